"""The cost of a late rank for the others is found under the right label, however the call is made; nothing else is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from ds_moe_ep.bench.meters.blocked import METHODS, Blocked, Label, blocked, break_down
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import PARTS
from tests.ranks import RankPool

LATE_S = 0.2
LEAST_S = 0.1  # of LATE_S: on a busy machine the rank in time may itself come late out of the barrier before
MOST_TRIES = 6  # each with twice the lateness, since a busy machine may keep the rank in time for longer than that


def by_name(function: str, size: int, group: ProcessGroup | None) -> str:
    return f"{function} of {size}"


def row() -> Tensor:
    return torch.ones(4)


def to_and_fro(module: Any) -> None:
    """Rank 1 sends, rank 0 receives."""
    if dist.get_rank() == 1:
        module.send(row(), 0)
    else:
        module.recv(row(), 1)


def later(work: Any) -> None:
    """Waits for a handle after some work of one's own."""
    time.sleep(0.01)
    work.wait()


def both_ways() -> None:
    peer = 1 - dist.get_rank()
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, row(), peer), dist.P2POp(dist.irecv, row(), peer)]):
        work.wait()


class ReduceBackward(torch.autograd.Function):
    """The identity, whose gradient is summed over the ranks, as a row-split layer's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dist.all_reduce(dy)
        return dy


def backward() -> None:
    ReduceBackward.apply(row().requires_grad_()).sum().backward()


def in_a_thread(run: Callable[[], object]) -> Callable[[], None]:
    def start_and_join() -> None:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    return start_and_join


def calls() -> Mapping[str, tuple[Callable[[], object], str]]:
    """Calls that wait for the other rank, and the label that their time must have."""
    import deepspeed.comm as ds

    pair, rows = torch.empty(8), [row(), row()]
    return {
        "all_reduce": (lambda: dist.all_reduce(row()), "all_reduce of 2"),
        "DeepSpeed's all_reduce": (lambda: ds.all_reduce(row()), "all_reduce of 2"),
        "DeepSpeed's all_gather, bound when its backend started": (
            lambda: ds.all_gather_into_tensor(pair, row()),
            "all_gather_into_tensor of 2",
        ),
        "DeepSpeed's reduce_scatter, bound too": (
            lambda: ds.reduce_scatter_tensor(row(), pair),
            "reduce_scatter_tensor of 2",
        ),
        "DeepSpeed's all_to_all_single": (lambda: ds.all_to_all_single(row(), row()), "all_to_all_single of 2"),
        "DeepSpeed's send and recv": (lambda: to_and_fro(ds), "recv of 2"),
        "all_gather": (lambda: dist.all_gather(rows, row()), "all_gather of 2"),
        "objects": (lambda: dist.all_gather_object([None, None], "text"), "all_gather of 2"),
        "broadcast": (lambda: dist.broadcast(row(), src=1), "broadcast of 2"),
        "barrier": (lambda: dist.barrier(), "barrier of 2"),
        "messages both ways at once": (both_ways, "send of 2"),  # waited for first
        "a handle waited for later": (lambda: later(dist.all_reduce(row(), async_op=True)), "all_reduce of 2"),
        "DeepSpeed's handle": (lambda: later(ds.all_reduce(row(), async_op=True)), "all_reduce of 2"),
        "a backward pass": (backward, "all_reduce of 2"),
        "a backward pass in autograd's thread": (in_a_thread(backward), "all_reduce of 2"),
    }


@dataclass(frozen=True)
class Waited:
    """Blocked seconds by label, and all seconds, of a call for which rank 1 comes late; the same on both ranks."""

    in_time: Mapping[str, float]
    took_s: float
    late: Mapping[str, float]

    def is_found_under(self, label: str) -> bool:
        """True where the rank in time was blocked under the label, nothing counts twice, and the late one was not."""
        total_s = sum(self.in_time.values())
        return LEAST_S < self.in_time.get(label, 0.0) <= self.took_s >= total_s > sum(self.late.values())


def seconds_of(run: Callable[[], object], label: Label = by_name, late_s: float = LATE_S) -> Waited:
    dist.barrier()
    with blocked(label) as meter:
        if dist.get_rank() == 1:
            time.sleep(late_s)
        start_s = time.perf_counter()
        run()
        took_s = time.perf_counter() - start_s
    both: list[Any] = [None, None]
    dist.all_gather_object(both, (meter.seconds, took_s))
    (in_time, took_s), (late, _) = both
    return Waited(in_time, took_s, late)


def tried(measure: Callable[[float], Any], is_as_expected: Callable[[Any], bool]) -> Any:
    """What is measured with longer and longer lateness until it is as expected on both ranks; else the last of it."""
    for number in range(MOST_TRIES):
        found = measure(LATE_S * 2**number)
        both: list[Any] = [None, None]
        dist.all_gather_object(both, is_as_expected(found))
        if all(both):
            break
    return found


def waiting_job() -> dict[str, Waited]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    return {name: waited_for(*call) for name, call in calls().items()}


def waited_for(run: Callable[[], object], label: str) -> Waited:
    found: Waited = tried(lambda late_s: seconds_of(run, late_s=late_s), lambda each: each.is_found_under(label))
    return found


def mislabelled_job() -> bool:
    """True where the calls' time is found under another call's label, however late the rank is."""
    run, _ = calls()["all_reduce"]
    return bool(seconds_of(run, late_s=2 * LATE_S).is_found_under("barrier of 2"))


def test_a_late_rank_is_found_under_the_label_of_the_call_that_waits_for_it(pool: RankPool) -> None:
    import deepspeed  # noqa: F401 (the table of calls needs its names)

    found, _ = pool.run(2, waiting_job, timeout_s=240)
    for name, (_, label) in calls().items():
        assert found[name].is_found_under(label), (name, found[name])
    assert pool.run(2, mislabelled_job) == [False, False]


def unseen(late_s: float) -> dict[str, float]:
    """A handle from before the block, for which rank 1 comes late."""
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(late_s)
    work = dist.all_reduce(row(), async_op=True)
    assert work is not None
    with blocked(lambda function, size, group: f"{function} {size} {group}") as meter:
        work.wait()
    return meter.seconds


def controls_job() -> tuple[Mapping[str, float], ...]:
    def compute() -> None:
        time.sleep(0.05)
        torch.ones(64, 64) @ torch.ones(64, 64)

    quiet = seconds_of(compute).in_time
    lane = seconds_of(in_a_thread(lambda: dist.all_reduce(row()))).in_time
    left_out = seconds_of(lambda: dist.all_reduce(row()), lambda *_: None).in_time
    has_waited = tried(unseen, lambda seconds: dist.get_rank() == 1 or seconds.get("wait 0 None", 0.0) > LEAST_S)
    return quiet, lane, left_out, has_waited


def test_compute_and_the_lanes_threads_and_what_is_left_out_count_for_nothing(pool: RankPool) -> None:
    (quiet, lane, left_out, has_waited), _ = pool.run(2, controls_job)
    assert quiet == lane == left_out == {}
    assert has_waited["wait 0 None"] > LEAST_S


@dataclass(frozen=True)
class Split:
    """A block's own time, what was blocked in it, and all of it."""

    own_s: float
    blocked_s: float
    took_s: float

    @property
    def is_whole(self) -> bool:
        """True where the parts sum to the whole, up to what the calls that measure it take."""
        is_sum = abs(self.own_s + self.blocked_s - self.took_s) < 0.02
        return is_sum and self.own_s >= 0.05 and self.blocked_s > LEAST_S - 0.05


def own_time(late_s: float) -> Split:
    dist.barrier()
    with blocked(by_name) as meter:
        if dist.get_rank() == 1:
            time.sleep(late_s)
        start_s = time.perf_counter()
        with meter.own_time() as own:
            time.sleep(0.05)
            dist.all_reduce(row())
        took_s = time.perf_counter() - start_s
    return Split(own.seconds, meter.total_s, took_s)


def own_time_job() -> Split:
    split: Split = tried(own_time, lambda found: dist.get_rank() == 1 or found.is_whole)
    return split


def test_the_own_time_of_a_block_leaves_out_what_was_blocked_in_it(pool: RankPool) -> None:
    split, _ = pool.run(2, own_time_job)
    assert split.is_whole, split


def test_every_method_is_put_back_as_it_was_even_after_an_error() -> None:
    owned = [name for names in METHODS.values() for name in names if name in vars(ProcessGroup)]
    before = [vars(ProcessGroup)[name] for name in owned], vars(Work)["wait"]
    with pytest.raises(ZeroDivisionError), blocked(by_name):
        assert vars(Work)["wait"] is not before[1]
        assert all(vars(ProcessGroup)[name] is not found for name, found in zip(owned, before[0], strict=True))
        1 / 0  # noqa: B018
    assert ([vars(ProcessGroup)[name] for name in owned], vars(Work)["wait"]) == before


def test_every_method_of_this_torch_that_moves_data_is_known() -> None:
    """A release that adds one would go unseen. Torch's own methods end in the names below or move nothing."""
    moves = ("reduce", "gather", "scatter", "all_to_all", "alltoall", "broadcast", "send", "recv", "barrier")
    known = {name for names in METHODS.values() for name in names}
    found = {name for name in vars(ProcessGroup) if any(word in name for word in moves)}
    assert found - known == set()


def test_the_parts_of_a_step_sum_to_it_and_the_remainder_is_what_is_not_known() -> None:
    told = {"tensor_traffic": 0.2, "gradients": 0.1, "own": 0.05}
    known = break_down(2.0, told, optimizer_s=0.15, exposed_s=0.3, compute_s=1.0)
    assert known.parts == pytest.approx(
        {
            "compute": 1.0,
            "experts_traffic": 0.3,
            "tensor_traffic": 0.2,
            "pipeline": 0.0,
            "gradients": 0.25,
            "rest": 0.25,
        }
    )
    assert known.excess_s == 0 and sum(known.parts.values()) == pytest.approx(2)
    unknown = break_down(2.0, told, optimizer_s=0.15, exposed_s=0.3)
    assert unknown.parts["compute"] == pytest.approx(1.2) and unknown.parts["rest"] == pytest.approx(0.05)
    assert list(unknown.parts) == list(PARTS)


def test_parts_that_exceed_the_step_are_scaled_to_fit_and_it_is_said() -> None:
    found = break_down(1.0, {"pipeline": 0.5}, compute_s=1.5)
    assert found.excess_s == pytest.approx(1)
    assert found.parts["compute"] == pytest.approx(0.75) and found.parts["pipeline"] == pytest.approx(0.25)
    assert found.parts["rest"] == 0


@pytest.mark.parametrize(("step_s", "blocked_s"), [(0.0, {}), (1.0, {"pipeline": -0.1})])
def test_a_step_without_time_and_negative_seconds_are_refused(step_s: float, blocked_s: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="no part is negative"):
        break_down(step_s, blocked_s)


def test_a_meter_that_saw_nothing_has_no_seconds() -> None:
    assert Blocked(by_name).total_s == 0
