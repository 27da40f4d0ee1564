"""A rank that dies beside tensor ranks or sequence ranks: all others end, and name it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.explain_errors import is_collective
from tests.engine.layouts.tensor_models import TensorJob
from tests.engine.layouts.test_sequence_parallel import SequenceJob, run_job
from tests.engine.layouts.test_tensor_checkpoints import make_engine, step
from tests.ranks import RankError, run_ranks

LIMIT_S = 40.0
CULPRIT = 3


def die_if_culprit() -> None:
    if dist.get_rank() == CULPRIT:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(LIMIT_S)


def check_all_end_and_name_the_culprit(train: Callable[..., None], *words: Any) -> None:
    with pytest.raises(RankError) as error:
        run_ranks(4, train, *words, timeout_s=LIMIT_S)
    failures = error.value.failures
    assert sorted(failures) == [0, 1, 2, 3]
    for rank in (0, 1, 2):
        assert f"rank {CULPRIT}" in failures[rank].message, (rank, failures[rank].message)


def train_until_killed(job: TensorJob, call: int) -> None:
    """Steps on this rank; the culprit dies in its `call`-th gather over the tensor group of the second step."""
    from ds_moe_ep.moe.tensor_parallel import exchange

    engine = make_engine(job)
    first, second = job.batches()
    step(engine, first)
    begin, calls = exchange.Spans.begin, []

    def dies(spans: exchange.Spans, share: Tensor) -> Callable[[], Tensor]:
        calls.append(1)
        if len(calls) == call:
            die_if_culprit()
        return begin(spans, share)

    exchange.Spans.begin = dies  # type: ignore[method-assign]
    step(engine, second)


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("call", [1, 3], ids=["forward", "backward"])
def test_a_rank_that_dies_in_a_gather_of_tensor_ranks_ends_the_others(ep_size: int, call: int) -> None:
    job = TensorJob(ep_size=ep_size, top_k=2, knobs={"timeout_s": 10.0, "watch": None})
    check_all_end_and_name_the_culprit(train_until_killed, job, call)


def train_sequences_until_killed(job: SequenceJob) -> None:
    """Steps on this rank; the culprit dies in the forward pass of the second one."""
    from ds_moe_ep.moe.dispatcher import Dispatcher

    call, calls = Dispatcher.__call__, []

    def dies(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # each step has two layers
            die_if_culprit()
        return call(*args, **kwargs)

    Dispatcher.__call__ = dies  # type: ignore[method-assign]
    run_job(job)


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", [2, 4])
def test_a_rank_that_dies_beside_sequence_ranks_ends_the_others(ep_size: int) -> None:
    job = SequenceJob(ep_size=ep_size, top_k=2, knobs={"timeout_s": 10.0, "watch": None})
    check_all_end_and_name_the_culprit(train_sequences_until_killed, job)


def test_a_collective_that_is_waited_for_later_is_known_by_its_communicators_words() -> None:
    """Its wait has no frame of torch.distributed; the control is an error of the program's own."""
    assert is_collective(RuntimeError("[pair.cc:537] Read error [127.0.0.1]:3977: Connection reset by peer"))
    assert not is_collective(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
