"""Whatever goes wrong with copies of experts is told by name, on every rank and soon; the rest is seen in results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.errors import MoEError
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.replicas import copies, gradients
from ds_moe_ep.moe.replicas.gradients import GradientSums, LentPass, Returning
from ds_moe_ep.moe.replicas.told import present
from ds_moe_ep.schedule.placement import Placement
from tests.load_clock import Stopwatch, Took, without_load
from tests.moe.layer_cases import LayerCase, case_data, errors
from tests.moe.layer_runs import Links, build_layer, forward_backward
from tests.moe.replica_cases import Windows, connected, hosted_case, pin, replicas_of
from tests.ranks import RankPool

ODD, HOME = 2, 3  # the host where something goes wrong, the home of the expert that has most copies
LIMIT_S = 8.0  # a rank of a busy machine may come seconds late
GUESTS = ((7,), (7,), (1,), (0,))  # on each rank
CASE = hosted_case("faults", timeout_s=LIMIT_S)


def layer_in_a_window(case: LayerCase, windows: Windows) -> ExpertParallel:
    layer = connected(case, Links())
    pin(layer, *GUESTS)
    layer.dispatcher.follow(windows)
    return layer


def told(run: Callable[[], object]) -> tuple[str, Took]:
    """The error of a call in words, and its seconds."""
    watch = Stopwatch()
    try:
        run()
    except MoEError as error:
        return f"{type(error).__name__}: {error}", watch.read()
    return "", watch.read()


def is_odd() -> bool:
    return dist.get_rank() == ODD


# What a fault puts something else in the place of.
PATCHED = (
    (copies, "torch"), (copies.Copies, "start"), (gradients, "torch"), (gradients, "Returning"),
    (gradients.Loan, "collect"), (GradientSums, "add"), (Placement, "home"),
)  # fmt: skip


def put_back(run: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, after which all is in its place again: the ranks run others."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in PATCHED:
            patch.setattr(owner, name, vars(owner)[name])
        return run(*args)


def stale_weights() -> tuple[str, Took]:
    layer = layer_in_a_window(CASE, Windows())
    forward_backward(layer, CASE, case_data(CASE))
    if is_odd():
        guest = replicas_of(layer).copies.held[0]
        assert guest is not None
        present(guest)[0].mul_(1.5)
    return told(lambda: forward_backward(layer, CASE, case_data(CASE)))


def missed_window() -> tuple[str, Took]:
    windows = Windows()
    layer = layer_in_a_window(CASE, windows)
    forward_backward(layer, CASE, case_data(CASE))
    windows.number += not is_odd()
    return told(lambda: forward_backward(layer, CASE, case_data(CASE)))


def other_placement() -> tuple[str, Took]:
    layer = layer_in_a_window(CASE, Windows())
    if is_odd():
        pin(layer, (7,), (6,), (1,), (0,))
    return told(lambda: forward_backward(layer, CASE, case_data(CASE)))


def copies_alone() -> tuple[str, Took]:
    """One rank begins a window with copies, where the others go on without."""
    layer = layer_in_a_window(CASE, windows := Windows())
    pin(layer, *[(None,)] * 4)
    forward_backward(layer, CASE, case_data(CASE))
    windows.number += 1
    if is_odd():
        pin(layer, *GUESTS)

    def go_on() -> None:
        replicas_of(layer).begin_early()
        forward_backward(layer, CASE, case_data(CASE))

    return told(go_on)


def no_memory() -> tuple[str, Took]:
    layer = layer_in_a_window(CASE, Windows())
    if is_odd():
        copies.torch = _FullMemory()  # type: ignore[attr-defined]
    return told(lambda: forward_backward(layer, CASE, case_data(CASE)))


def no_memory_for_sums() -> tuple[str, Took]:
    layer = layer_in_a_window(CASE, Windows())
    if dist.get_rank() == HOME:
        gradients.torch = _FullMemory()  # type: ignore[attr-defined]
    return told(lambda: forward_backward(layer, CASE, case_data(CASE)))


class _FullMemory:
    """torch, with no room for another tensor."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty_like(self, *args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("out of memory: 0 bytes free")


def sums_that_went_wrong(fault: str) -> tuple[str, Took]:
    """Two micro-batches in a window, and a host that does something else with the first one's gradients."""
    windows = Windows()
    layer = layer_in_a_window(CASE, windows)
    if is_odd():
        plant(fault)

    def both() -> None:
        windows.last = False
        forward_backward(layer, CASE, case_data(CASE))
        windows.last = True
        forward_backward(layer, CASE, case_data(CASE))

    return told(both)


def plant(fault: str) -> None:
    add, home = GradientSums.add, Placement.home
    calls = []

    def faulty(sums: GradientSums, lent: LentPass, grads: Mapping[int, Sequence[Tensor | None]]) -> None:
        calls.append(lent)
        for _ in range({"twice": 2, "forgotten": 0}[fault] if len(calls) == 1 else 1):
            add(sums, lent, grads)

    class Elsewhere(Returning):
        def __init__(self, sums: GradientSums, *rest: Any) -> None:
            Placement.home = lambda placement, expert: (home(placement, expert) + 1) % 4  # type: ignore[method-assign]
            super().__init__(sums, *rest)

    if fault == "elsewhere":
        gradients.Returning = Elsewhere  # type: ignore[misc]
    else:
        GradientSums.add = faulty  # type: ignore[method-assign]


def unsent_sums() -> tuple[str, Took]:
    windows = Windows(last=False)
    layer = layer_in_a_window(CASE, windows)
    forward_backward(layer, CASE, case_data(CASE))
    return told(lambda: replicas_of(layer).refuse_unsent("layers.1"))


@dataclass(frozen=True)
class Fault:
    run: Callable[..., tuple[str, Took]]
    words: str  # in the error of each rank, or of the first that raises
    args: tuple[str, ...] = ()
    is_everywhere: bool = True  # the same error on every rank; else the others name the one that raised


FAULTS = {
    "weights in a slot that are not the home's": Fault(
        stale_weights, "the copy of expert 1 on rank 2 has other weights"
    ),
    "a step that one rank did not hear of": Fault(missed_window, "window=1"),
    "a placement that differs": Fault(other_placement, "rank 2 came to another placement"),
    "copies on one rank alone": Fault(copies_alone, "rank 2 in the placement pass"),
    "no memory for a copy": Fault(no_memory, "no memory for a copy of expert 1", is_everywhere=False),
    "no memory for sums that come home": Fault(
        no_memory_for_sums, "no memory for the gradient sums of copies of expert 7", is_everywhere=False
    ),
    "a gradient added twice": Fault(sums_that_went_wrong, "of 3 passes", ("twice",), is_everywhere=False),
    "a gradient forgotten": Fault(sums_that_went_wrong, "of 1 passes", ("forgotten",), is_everywhere=False),
    "a gradient sent to another home": Fault(
        sums_that_went_wrong, "rank 2 sends rank 0 other gradients of copies than that rank expects", ("elsewhere",)
    ),
    "gradients that never went home": Fault(unsent_sums, "did not go home before the optimizer's step"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_told_by_name_in_bounded_time(pool: RankPool, name: str) -> None:
    fault = FAULTS[name]
    found = pool.run(4, put_back, fault.run, *fault.args, timeout_s=40)
    texts = [text for text, _ in found]
    if fault.is_everywhere:
        assert all(fault.words in text for text in texts), texts
    else:
        assert any(fault.words in text for text in texts), texts
    assert without_load(took for _, took in found) <= 2 * LIMIT_S + 6


def damaged(how: str, grouped: str) -> tuple[Any, Any]:
    """A result with copies that something is wrong with, past all checks, and one without copies."""
    layer = connected(replace(CASE, config=replace(CASE.config, grouped_products=grouped)), Links())
    pin(layer, *GUESTS)
    if how == "weights" and is_odd():
        start = copies.Copies.start.__func__  # type: ignore[attr-defined]
        copies.Copies.start = classmethod(_Perturbing(start))  # type: ignore[assignment, method-assign]
    elif how != "weights" and dist.get_rank() == HOME:
        collect, factor = gradients.Loan.collect, {"twice": 2.0, "never": 0.0}[how]
        gradients.Loan.collect = lambda loan: [  # type: ignore[method-assign]
            None if grad is None else grad * factor for grad in collect(loan)
        ]
    mine = forward_backward(layer, CASE, case_data(CASE))
    plain = replace(CASE, config=replace(CASE.config, replicas=0))
    return mine, forward_backward(connected(plain, Links()), plain, case_data(plain))


class _Perturbing:
    """Copies whose weights are others once they came."""

    def __init__(self, start: Callable[..., copies.Copies]) -> None:
        self._start = start

    def __call__(self, *args: Any) -> copies.Copies:
        made = self._start(*args)
        made.transfer.wait()
        guest = made.held[0]
        assert guest is not None
        present(guest)[0].view(-1)[1] += 0.5
        return made


@pytest.mark.parametrize(
    ("how", "kind", "grouped"),
    [("weights", "y[", "off"), ("twice", "d expert", "on"), ("never", "d expert", "off"), ("weights", "y[", "on")],
)
def test_wrong_weights_and_gradients_are_seen_in_the_results(pool: RankPool, how: str, kind: str, grouped: str) -> None:
    """The control of the parity tests: what the checks did not see, they would."""
    found = pool.run(4, put_back, damaged, how, grouped, timeout_s=60)
    off = errors([mine for mine, _ in found], [plain for _, plain in found])
    assert max(value for name, value in off.items() if name.startswith(kind)) > 1e-3


def refused(kind: str) -> str:
    links = Links()
    case = hosted_case("unknown", expert=kind)
    return told(lambda: build_layer(case, case_data(case)).connect(links.of(case)))[0]


def test_experts_of_unknown_mathematics_are_refused_by_name(pool: RankPool) -> None:
    assert all("moe_ep.replicas=1: the experts of" in text for text in pool.run(4, refused, "module"))
    assert pool.run(4, refused, "gelu") == [""] * 4
