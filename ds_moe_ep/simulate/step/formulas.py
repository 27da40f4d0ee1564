"""Times of each op on a cluster, in closed form; each function states its formula.

Times are in microseconds, amounts in flops and bytes. A formula that names no source is
arithmetic. Collectives are in all_reduce.py.
"""

from __future__ import annotations

from ds_moe_ep.simulate.cluster.cluster import Device


def matmul_us(device: Device, precision: str, flops: float, rows: float) -> float:
    """launch + flops / (peak * efficiency * rows / (rows + half_rows)).

    `rows` is the smaller side of the product, the rows of one expert mostly: few of them leave units idle and weights
    are read for little work. The curve is the simplest one that rises linearly and saturates; `half_rows` is fitted.
    """
    if flops <= 0 or rows <= 0:
        return 0.0
    reached = device.matmul_efficiency * rows / (rows + device.half_rows)
    return device.launch_us + flops / (device.peak(precision) * reached)


def attention_us(device: Device, precision: str, flops: float) -> float:
    """launch + flops / (peak * attention_efficiency): one fused kernel (FlashAttention, arXiv 2205.14135)."""
    return device.launch_us + flops / (device.peak(precision) * device.attention_efficiency) if flops > 0 else 0.0


def memory_us(device: Device, num_bytes: float, num_kernels: float = 1) -> float:
    """kernels * launch + bytes / (memory_bandwidth * memory_efficiency): norms, gathers, activations, optimizers."""
    return num_kernels * device.launch_us + num_bytes / (device.memory_bandwidth * device.memory_efficiency)


def product_us(device: Device, matmul_time_us: float, num_bytes: float) -> float:
    """A product's time, or that of the bytes which it moves for its results: whichever is longer."""
    return max(matmul_time_us, memory_us(device, num_bytes)) if num_bytes else matmul_time_us
