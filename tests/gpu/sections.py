"""Sections of the one-GPU check: equality, host syncs, speed, memory. Each yields findings; none needs DeepSpeed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.comm.recorder import make_recorder
from ds_moe_ep.moe.experts import GeluMLP, SwiGLU
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.schedule.spans import Overlap, Tags, accounts
from tests.gpu.layers import Sizes, Times, alternate, dense, gradients, make_layer, relative_error
from tests.gpu.mirror import Fault, Links

JITTER_CYCLES = 200_000  # about 0.1 ms: longer than a near copy
SCHEDULES: dict[str, dict[str, Any]] = {
    "serial": {"schedule": "serial"},
    "peers": {"schedule": "peers"},
    "peers, depth 1": {"schedule": "peers", "depth": 1},
    "peers, 2 cuts": {"schedule": "peers", "row_cuts": 2},
    "chunks": {"schedule": "chunks"},
}


@dataclass(frozen=True)
class Finding:
    """One line of the check: a name of dotted parts, a value or samples, a unit; whether it holds (None: a figure)."""

    name: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    n: int = 1
    holds: bool | None = None
    note: str = ""


def check(of: Sizes) -> Iterator[Finding]:
    """The layer equals the dense expert, outputs and all gradients, with delayed copies and poisoned buffers.

    Behind it the controls: rows of one peer lost, and on CUDA a transfer that nobody waits for, must not pass.
    """
    with poisoned_buffers():
        for kind in (GeluMLP, SwiGLU):
            for name, knobs in SCHEDULES.items():
                for top_k in (1, 2):
                    for jitter in (0, JITTER_CYCLES) if of.is_cuda else (0,):
                        worst = worst_error(of, kind, knobs, top_k, jitter, 3 if jitter else 1)
                        yield Finding(
                            f"check.{kind.__name__}.{name}.k{top_k}{'.delayed' if jitter else ''}",
                            worst, "relative error", holds=worst <= of.bound,
                        )  # fmt: skip
        faults: tuple[Fault, ...] = ("lost rows", "no wait") if of.is_cuda else ("lost rows",)
        for fault in faults:
            worst = worst_error(of, GeluMLP, SCHEDULES["peers"], 1, 10 * JITTER_CYCLES, 1, fault)
            yield Finding(f"check.control.{fault}", worst, "relative error", holds=worst > of.bound, note="must differ")


def worst_error(
    of: Sizes, kind: type[nn.Module], knobs: dict[str, Any], top_k: int, jitter: int, trials: int, fault: Fault = ""
) -> float:
    """The largest relative error of outputs and gradients over some draws of the tokens."""
    layer = make_layer(of, kind=kind, top_k=top_k, jitter_cycles=jitter if of.is_cuda else 0, fault=fault, **knobs)
    worst = 0.0
    for _ in range(trials):
        x_TD, dy_TD = of.tokens()
        found = gradients(layer, partial(_outputs, layer), x_TD, dy_TD)
        expected = gradients(layer, partial(dense, layer), x_TD, dy_TD)
        errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
        worst = max(worst, *errors)
    if of.is_cuda:
        torch.cuda.synchronize()  # a planted fault leaves copies on their way to memory that others get
    return worst


def _outputs(layer: ExpertParallel, x_TD: Tensor) -> Tensor:
    y_TD: Tensor = layer(x_TD)[0]
    return y_TD


@contextmanager
def poisoned_buffers() -> Iterator[None]:
    """A scope in which memory that nobody wrote holds not-a-number: reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def sync(of: Sizes) -> Iterator[Finding]:
    """Host syncs of a forward and of a backward pass, and the lines that make them. Needs CUDA."""
    if not of.is_cuda:
        return
    layer = make_layer(of, "peers")
    x_TD, dy_TD = of.tokens()
    layer(x_TD.requires_grad_())[0].backward(dy_TD)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            y_TD = layer(x_TD)[0]
            num_forward = len(_syncs(seen))
            y_TD.backward(dy_TD)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = _syncs(seen)
    lines = sorted({f"{Path(each.filename).name}:{each.lineno}" for each in syncs})
    yield Finding("sync.forward", num_forward, "syncs", holds=num_forward <= 1, note=", ".join(lines))
    yield Finding("sync.backward", len(syncs) - num_forward, "syncs", holds=len(syncs) == num_forward)


def _syncs(seen: Sequence[warnings.WarningMessage]) -> list[warnings.WarningMessage]:
    """The warnings of torch's debug mode, among those of others."""
    return [each for each in seen if "called a synchronizing" in str(each.message)]


def speed(of: Sizes, rounds: int) -> Iterator[Finding]:
    """Forward and backward of each schedule beside the dense expert alone, its blocked control, and what it hides."""
    links: Sequence[Links] = ("none", "pcie") if of.is_cuda else ("none",)
    for link in links:
        for name, knobs in SCHEDULES.items():
            yield from _speed_of(of, rounds, link, name, make_layer(of, links=link, **knobs))


def _speed_of(of: Sizes, rounds: int, link: Links, name: str, layer: ExpertParallel) -> Iterator[Finding]:
    x_TD, dy_TD = of.tokens()
    expert = layer.experts.deepspeed_experts[0]
    blocked = make_blocked(layer)

    def bound() -> None:
        tokens_TD = x_TD.detach().requires_grad_()
        torch.autograd.grad(expert(tokens_TD), [tokens_TD, *expert.parameters()], dy_TD)

    def forward() -> None:
        layer(x_TD.detach().requires_grad_())

    def both() -> None:
        gradients(layer, partial(_outputs, layer), x_TD, dy_TD)

    if of.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    dense_times, forward_times, both_times, blocked_times = alternate([bound, forward, both, blocked(both)], rounds)
    at = f"speed.{link}.{name}"
    yield from _timed(f"{at}.dense", dense_times)
    yield from _timed(f"{at}.forward", forward_times)
    yield from _timed(f"{at}.step", both_times)
    yield from _timed(f"{at}.blocked", blocked_times)
    yield Finding(f"{at}.of_dense", dense_times.median_ms / both_times.median_ms, "ratio")
    hidden = overlap_of(layer, both, of)
    yield Finding(f"{at}.traffic", hidden.total_us / 1e3, "ms")
    yield Finding(f"{at}.hidden", hidden.hidden_percent or 0.0, "percent", note="of the traffic, by events")
    saved_ms = blocked_times.median_ms - both_times.median_ms
    yield Finding(f"{at}.saved", saved_ms, "ms", note="blocked less overlapped")
    peak_bytes = torch.cuda.max_memory_allocated() if of.is_cuda else 0
    yield Finding(f"{at}.peak", peak_bytes / 1e9, "GB", note="" if of.is_cuda else "not measured on a CPU")


def _timed(name: str, times: Times) -> Iterator[Finding]:
    low, *_, high = sorted(times.device_ms)
    yield Finding(name, times.median_ms, "ms", low, high, len(times.device_ms))
    low, *_, high = sorted(times.host_ms)
    yield Finding(f"{name}.host", times.host_median_ms, "ms", low, high, len(times.host_ms))


def make_blocked(layer: ExpertParallel) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Turns work into the same work under the control schedule: the same pieces, nothing hidden."""

    def of(work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            layer.dispatcher.record(layer.dispatcher.recorder, is_blocking=True)
            try:
                work()
            finally:
                layer.dispatcher.record(layer.dispatcher.recorder)

        return run

    return of


def overlap_of(layer: ExpertParallel, work: Callable[[], None], of: Sizes) -> Overlap:
    """The traffic of one run of the work, and how much of it lay beside compute."""
    recorder = make_recorder(of.device, 0)
    before = layer.dispatcher.recorder
    layer.dispatcher.record(recorder)
    try:
        work()
    finally:
        layer.dispatcher.record(before)
    return accounts(recorder.spans())[Tags()]


def memory(of: Sizes) -> Iterator[Finding]:
    """Peak memory of some passes of one layer, its tokens and parameters included. Needs CUDA."""
    if not of.is_cuda:
        return
    for name, knobs in SCHEDULES.items():
        layer = make_layer(of, **knobs)
        x_TD, dy_TD = of.tokens()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(4):
            gradients(layer, partial(_outputs, layer), x_TD, dy_TD)
        yield Finding(f"memory.{name}.allocated", torch.cuda.max_memory_allocated() / 1e9, "GB")
        yield Finding(f"memory.{name}.reserved", torch.cuda.max_memory_reserved() / 1e9, "GB")
        del layer
