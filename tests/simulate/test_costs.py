"""Costs are what their formulas give by hand, and never beat the peak, the memory or the link."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.simulate.cluster.cluster import Device, Link
from ds_moe_ep.simulate.step.formulas import attention_us, matmul_us, memory_us

PERFECT = Device(memory_bytes=80e9, peak_bf16=1e9, memory_bandwidth=3e6)  # 1 PFLOP/s, 3 TB/s
REAL = Device(
    memory_bytes=80e9,
    peak_bf16=1e9,
    matmul_efficiency=0.8,
    half_rows=100.0,
    attention_efficiency=0.4,
    memory_bandwidth=3e6,
    memory_efficiency=0.75,
    launch_us=5.0,
)
SHARE = st.floats(0.01, 1.0)
AMOUNT = st.just(0.0) | st.floats(1, 1e15)  # of whole things
DEVICES = st.builds(
    Device,
    memory_bytes=st.just(80e9),
    peak_bf16=st.floats(1e3, 1e10),
    matmul_efficiency=SHARE,
    half_rows=st.floats(0, 1000),
    attention_efficiency=SHARE,
    memory_bandwidth=st.floats(1e3, 1e7),
    memory_efficiency=SHARE,
    launch_us=st.floats(0, 100),
)
LINKS = st.builds(Link, bandwidth=st.floats(1, 1e6), efficiency=SHARE, latency_us=st.floats(0, 1000))


def test_a_product_of_a_hundred_rows_on_a_device_that_wants_a_hundred_reaches_half_of_its_share() -> None:
    # 4 Gflop at 1e9 flop/us * 0.8 / 2, behind a launch.
    assert matmul_us(REAL, "bf16", 4e9, rows=100) == pytest.approx(5 + 4 / 0.4)


def test_a_product_of_very_many_rows_reaches_the_whole_share() -> None:
    assert matmul_us(REAL, "bf16", 4e9, rows=1e12) == pytest.approx(5 + 4 / 0.8)


def test_twice_the_rows_cost_less_than_twice_the_time() -> None:
    one, two = (matmul_us(REAL, "bf16", rows * 1e7, rows) for rows in (64, 128))
    assert one < two < 2 * one


def test_a_perfect_device_takes_flops_over_peak_and_bytes_over_bandwidth() -> None:
    assert matmul_us(PERFECT, "bf16", 7e9, rows=1) == 7.0
    assert attention_us(PERFECT, "bf16", 7e9) == 7.0
    assert memory_us(PERFECT, 6e6) == 2.0


def test_nothing_to_compute_launches_nothing() -> None:
    assert matmul_us(REAL, "bf16", 0.0, rows=0) == 0.0
    assert attention_us(REAL, "bf16", 0.0) == 0.0
    assert memory_us(REAL, 0.0, num_kernels=0) == 0.0


def test_attention_and_memory_by_hand() -> None:
    assert attention_us(REAL, "bf16", 2e9) == pytest.approx(5 + 2 / 0.4)
    assert memory_us(REAL, 9e6, num_kernels=3) == pytest.approx(3 * 5 + 9 / (3 * 0.75))


def test_a_precision_without_a_peak_is_refused_by_the_name_of_its_number() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.device\.peak_fp16: missing"):
        matmul_us(REAL, "fp16", 1.0, rows=1)


@given(device=DEVICES, flops=AMOUNT, rows=st.floats(1, 1e6))
def test_no_product_beats_the_peak(device: Device, flops: float, rows: float) -> None:
    limit_us = flops / device.peak("bf16")
    assert matmul_us(device, "bf16", flops, rows) >= limit_us * (1 - 1e-12)
    assert attention_us(device, "bf16", flops) >= limit_us * (1 - 1e-12)


@given(device=DEVICES, num_bytes=AMOUNT, num_kernels=st.integers(0, 50))
def test_no_kernel_beats_the_memory(device: Device, num_bytes: float, num_kernels: int) -> None:
    found_us = memory_us(device, num_bytes, num_kernels)
    assert found_us >= num_bytes / device.memory_bandwidth * (1 - 1e-12)
    assert found_us >= num_kernels * device.launch_us


@given(device=DEVICES, flops=st.floats(1, 1e15), rows=st.floats(1, 1e6), more=st.floats(1, 100))
def test_more_rows_never_make_a_product_slower_and_more_flops_never_faster(
    device: Device, flops: float, rows: float, more: float
) -> None:
    found_us = matmul_us(device, "bf16", flops, rows)
    assert matmul_us(device, "bf16", flops, rows * more) <= found_us * (1 + 1e-12)
    assert matmul_us(device, "bf16", flops * more, rows) >= found_us * (1 - 1e-12)
