"""Units and notes of the probe's samples."""

from __future__ import annotations

from ds_moe_ep.bench.harness.collector import Metric

SPREAD = "median and quartiles of samples; on GPUs, and between ranks, a sample is the slowest rank's"
METRICS = {
    "matmul": ("GFLOP/s", f"the two products of an expert, 4*R*D*F operations; {SPREAD}"),
    "attention": (
        "GFLOP/s",
        f"causal attention of one sequence, forward and backward, 3.5 times 2*S*S*D operations; {SPREAD}",
    ),
    "memory": ("GB/s", f"an elementwise operation on fp32, bytes read and written; {SPREAD}"),
    "launch": ("us", f"the host issues a small kernel; {SPREAD}"),
    "sync": ("us", f"the host reads a number that a kernel has just made; {SPREAD}"),
    "near": ("us", f"ranks of one node send and receive at once; bytes one way; {SPREAD}"),
    "far": ("us", f"ranks of two nodes send and receive at once; bytes one way; {SPREAD}"),
    "host": ("us", f"core time of a message, both ends, of all threads; {SPREAD}"),
    "senders": ("ranks", "ranks of a node that send at once where all pairs do"),
    "cores": ("cores", "processor cores that the ranks share"),
    "byte": ("us/MB", f"core time of a message, both ends, of all threads; {SPREAD}"),
}


def metric(name: str, *, is_shaped: bool) -> Metric:
    """The Metric of a name's last part, where it has one of its own, or of its first."""
    _, kind, *rest = name.split(".")
    unit, note = METRICS[rest[-1] if rest and rest[-1] in METRICS else kind]
    return Metric(unit, note, is_emulated=is_shaped and kind in ("near", "far"))
