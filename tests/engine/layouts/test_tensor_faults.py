"""A rank that dies beside tensor ranks or sequence ranks, or in a stage: all others end in time, and name it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.explain_errors import is_collective
from tests.engine.hooks.test_folded_autoep import FoldedJob
from tests.engine.hooks.test_folded_autoep import train as train_folded
from tests.engine.layouts.layout_runs import LAYOUT_RANKS, LayoutJob
from tests.engine.layouts.layout_runs import run_job as run_layout
from tests.engine.layouts.tensor_models import WORLD, TensorJob
from tests.engine.layouts.test_sequence_parallel import SequenceJob, run_job
from tests.engine.layouts.test_tensor_checkpoints import make_engine, step
from tests.ranks import RankError, run_ranks

LIMIT_S = 60.0
WAITS_S = 5.0  # of a survivor for the others, below the moment that `run_ranks` gives them
IN_TIME_S = 40.0  # from the death to the last survivor's error; `timeout_s` is 10 s
CULPRIT = 3  # and of stages, in the second one, 5
KNOBS: dict[str, Any] = {"timeout_s": 10.0, "watch": None}


@contextmanager
def noting(folder: str) -> Iterator[None]:
    """A scope of a survivor, whose error leaves a file.

    It ends when all have one: a process that leaves before it has told of its error would be taken for the cause.
    """
    try:
        yield
    except BaseException:
        Path(folder, f"ended {dist.get_rank()}").touch()
        until = time.monotonic() + WAITS_S
        while len(list(Path(folder).glob("ended *"))) < dist.get_world_size() - 1 and time.monotonic() < until:
            time.sleep(0.05)
        raise


def die(folder: str) -> None:
    Path(folder, "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(LIMIT_S)


def check_all_end_and_name_the_culprit(
    folder: Path, train: Callable[..., None], *words: Any, world: int = WORLD, culprit: int = CULPRIT
) -> None:
    with pytest.raises(RankError) as error:
        run_ranks(world, train, *words, str(folder), timeout_s=LIMIT_S)
    failures = error.value.failures
    assert sorted(failures) == list(range(world))
    for rank in set(range(world)) - {culprit}:
        assert f"rank {culprit}" in failures[rank].message, (rank, failures[rank].message)
    seconds = max(path.stat().st_mtime for path in folder.glob("ended *")) - (folder / "died").stat().st_mtime
    print(f"{train.__name__} {words}: {seconds:.1f} s")
    assert seconds < IN_TIME_S


def die_in_a_gather(call: int, culprit: int, folder: str) -> None:
    """Lets the culprit die in its `call`-th gather of tokens over a tensor group from now on."""
    from ds_moe_ep.moe.tensor_parallel import early, exchange

    begin, calls = exchange.begin_rows, []

    def dies(group: Any, counts: Sequence[int], own: Tensor) -> Callable[[], Tensor]:
        calls.append(1)
        if len(calls) == call and dist.get_rank() == culprit:
            die(folder)
        return begin(group, counts, own)

    exchange.begin_rows = early.begin_rows = dies


def train_until_killed(job: TensorJob, call: int, folder: str) -> None:
    """Steps on this rank; the culprit dies in the second one."""
    engine = make_engine(job)
    first, second = job.batches()
    step(engine, first)
    die_in_a_gather(call, CULPRIT, folder)
    with noting(folder):
        step(engine, second)


# A forward pass gathers twice in each of two layers, beside its last combine and behind it; then come gradients of
# tokens, beside both combines, and of weights.
CALLS = {"beside a combine": 1, "behind a pass": 2, "backward, beside a combine": 5, "backward, behind it": 7}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ep_size"), [("ours", 2), ("ours", 4), ("hooked", 4)])
@pytest.mark.parametrize("call", CALLS)
def test_a_rank_that_dies_in_a_gather_of_tensor_ranks_ends_the_others(
    kind: str, ep_size: int, call: str, tmp_path: Path
) -> None:
    job = TensorJob(kind=kind, ep_size=ep_size, tokens=16, knobs=KNOBS if kind == "ours" else {})
    check_all_end_and_name_the_culprit(tmp_path, train_until_killed, job, CALLS[call])


def train_stages_until_killed(job: LayoutJob, call: int, folder: str) -> None:
    die_in_a_gather(call, 5, folder)
    with noting(folder):
        run_layout(job)


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 4], ids=["forward", "later"])
def test_a_rank_that_dies_in_a_gather_of_tensor_ranks_of_a_stage_ends_those_of_both(call: int, tmp_path: Path) -> None:
    job = LayoutJob(tp_size=2, pp_size=2, ep_size=2, top_k=2, accumulation=2, tokens=8, clipping=0.0, knobs=KNOBS)
    check_all_end_and_name_the_culprit(tmp_path, train_stages_until_killed, job, call, world=LAYOUT_RANKS, culprit=5)


def die_at(place: str, call: int, culprit: int, folder: str) -> None:
    """Lets the culprit die as it enters a place of a pipeline for the `call`-th time from now on."""
    from deepspeed.runtime.pipe import schedule
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from ds_moe_ep.moe.dispatcher import Dispatcher

    calls: list[int] = []

    def dying(work: Callable[..., Any]) -> Callable[..., Any]:
        def dies(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == call and dist.get_rank() == culprit:
                die(folder)
            return work(*args, **kwargs)

        return dies

    if place == "between micro-batches":
        steps = PipelineEngine._INSTRUCTION_MAP
        steps[schedule.LoadMicroBatch] = dying(steps[schedule.LoadMicroBatch])
    else:
        name = {"forward": "__call__", "backward": "_begin_backward"}[place]
        setattr(Dispatcher, name, dying(getattr(Dispatcher, name)))


def train_plain_stages_until_killed(job: LayoutJob, place: str, call: int, culprit: int, folder: str) -> None:
    die_at(place, call, culprit, folder)
    with noting(folder):
        run_layout(job)


PLACES = {"forward": 3, "backward": 3, "between micro-batches": 4}  # each step has two micro-batches


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [1, 5], ids=["first stage", "last stage"])
@pytest.mark.parametrize("place", PLACES)
def test_a_rank_of_a_stage_that_dies_ends_those_of_all_stages(place: str, culprit: int, tmp_path: Path) -> None:
    job = LayoutJob(pp_size=2, ep_size=4, top_k=2, accumulation=2, tokens=8, clipping=0.0, knobs=KNOBS)
    words = job, place, PLACES[place], culprit
    check_all_end_and_name_the_culprit(
        tmp_path, train_plain_stages_until_killed, *words, world=LAYOUT_RANKS, culprit=culprit
    )


def train_folded_until_killed(job: FoldedJob, call: int, folder: str) -> None:
    die_in_a_gather(call, CULPRIT, folder)
    with noting(folder):
        train_folded(job)


@pytest.mark.slow
def test_a_rank_that_dies_in_a_gather_of_autoeps_folded_layers_ends_the_others(tmp_path: Path) -> None:
    check_all_end_and_name_the_culprit(tmp_path, train_folded_until_killed, FoldedJob(ep_size=2), 3)


def train_sequences_until_killed(job: SequenceJob, folder: str) -> None:
    """Steps on this rank; the culprit dies in the forward pass of the second one."""
    from ds_moe_ep.moe.dispatcher import Dispatcher

    call, calls = Dispatcher.__call__, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and dist.get_rank() == CULPRIT:  # each step has two layers
            die(folder)
        return call(*args, **kwargs)

    Dispatcher.__call__ = dies  # type: ignore[method-assign]
    with noting(folder):
        run_job(job)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ep_size"), [("ours", 2), ("ours", 4), ("hooked", 4)])
def test_a_rank_that_dies_beside_sequence_ranks_ends_the_others(kind: str, ep_size: int, tmp_path: Path) -> None:
    job = SequenceJob(kind=kind, ep_size=ep_size, top_k=2, knobs=KNOBS if kind == "ours" else {"timeout_s": 10.0})
    check_all_end_and_name_the_culprit(tmp_path, train_sequences_until_killed, job)


def test_a_collective_that_is_waited_for_later_is_known_by_its_communicators_words() -> None:
    """Its wait has no frame of torch.distributed; the control is an error of the program's own."""
    assert is_collective(RuntimeError("[pair.cc:537] Read error [127.0.0.1]:3977: Connection reset by peer"))
    assert not is_collective(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
