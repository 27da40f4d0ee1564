"""A fault planted in each kind of group: a sum or gather that is forgotten, other ranks, a loss that counts twice.

Expert, tensor and sequence groups and pipeline stages, on 8 ranks. Each is refused by name, or seen by the comparison
with one device that sound jobs pass; ranks whose weights part are seen by their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from tests.engine.layouts.layout_runs import (
    LAYOUT_RANKS,
    SEQUENCE_SIZE,
    LayoutJob,
    StageLayer,
    as_the_ranks_tell,
    merged,
    run_job,
)
from tests.engine.layouts.tensor_runs import Trained, planted, reference
from tests.moe.layer_cases import D
from tests.ranks import run_ranks

Plant = Callable[[], Any]  # a scope; called on each rank


@contextmanager
def results_stay_away() -> Iterator[None]:
    """Results of rows from other ranks come back as zeros."""
    from ds_moe_ep.moe import executor

    combine = executor._combine

    def forgets(piece: int, layout: Any, transport: Any, buffers: Any, tags: Any) -> Any:
        for peer, (start, stop) in layout.pieces[piece].received:
            buffers.wire_out_RD[start:stop] *= peer == transport.rank
        return combine(piece, layout, transport, buffers, tags)

    with patch.object(executor, "_combine", forgets):
        yield


@contextmanager
def experts_reduced_with_others() -> Iterator[None]:
    """Experts' gradients are summed over ranks that hold other experts."""
    from deepspeed.utils import groups

    with (
        patch.object(groups, "_get_expert_data_parallel_group_dict", groups._get_expert_parallel_group_dict),
        patch.object(groups, "_get_expert_data_parallel_group", groups._get_expert_parallel_group),
    ):
        yield


@contextmanager
def ranks_that_are_apart() -> Iterator[None]:
    """DeepSpeed's expert groups hold other ranks than the layer was told."""
    from ds_moe_ep.engine import seams

    make = seams.expert_group
    with patch.object(seams, "expert_group", lambda ep_size, is_interleaved: make(ep_size, not is_interleaved)):
        yield


@contextmanager
def balance_twice() -> Iterator[None]:
    from ds_moe_ep.moe import layer

    loss_of = layer.router_loss
    with patch.object(layer, "router_loss", lambda *words: 2 * loss_of(*words)):
        yield


@contextmanager
def sequences_not_summed() -> Iterator[None]:
    """Gradients are summed over the ranks that have the same place in their sequences."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as unit

    groups = [dist.new_group(list(range(place, LAYOUT_RANKS, SEQUENCE_SIZE))) for place in range(SEQUENCE_SIZE)]
    own = groups[dist.get_rank() % SEQUENCE_SIZE]
    with patch.object(unit, "get_sequence_data_parallel_group", lambda: own):
        yield


@contextmanager
def divided_by_the_world() -> Iterator[None]:
    from ds_moe_ep.engine.layouts.sequence import ExpertGradients

    with patch.object(ExpertGradients, "is_needed", lambda: False):
        yield


def losses_of_stages(factor: float) -> Any:
    """The balance losses of the stages before, times a factor."""
    return patch.object(StageLayer, "of_layers_before", staticmethod(lambda packed: factor * packed[:, D:].sum()))


@contextmanager
def groups_across_stages() -> Iterator[None]:
    from ds_moe_ep.engine import seams

    def across(ep_size: int, is_interleaved: bool) -> Any:
        first = dist.get_rank() % (LAYOUT_RANKS // 2)
        ranks = [first, first + LAYOUT_RANKS // 2]
        return dist.new_group(ranks, use_local_synchronization=True), ranks

    with patch.object(seams, "expert_group", across):
        yield


@dataclass(frozen=True)
class Case:
    """A fault, the job that it is planted in, and the error that names it where the package does."""

    plant: Plant
    job: LayoutJob
    error: str = ""


EXPERTS = LayoutJob(ep_size=4, top_k=2, clipping=3.0)
TENSORS = LayoutJob(ep_size=4, top_k=2, tp_size=2, clipping=3.0)
SEQUENCES = LayoutJob(ep_size=4, top_k=2, sp_size=2, clipping=3.0)
STAGES = LayoutJob(ep_size=2, top_k=2, pp_size=2, clipping=0.0, accumulation=2, tokens=8)
UNLIKE = "a collective of DeepSpeed's failed"  # there are more of the wrong ranks than of the right ones
PARTED = "the ranks of a tensor-parallel group have different tokens"
CASES: dict[str, dict[str, Case]] = {
    "expert groups": {
        "none": Case(nullcontext, EXPERTS),
        "results that are not brought home": Case(results_stay_away, EXPERTS),
        "gradients summed over ranks with other experts": Case(experts_reduced_with_others, EXPERTS),
        "a balance loss counted twice": Case(balance_twice, EXPERTS),
        "a group of other ranks": Case(ranks_that_are_apart, EXPERTS, "expert-parallel group holds ranks"),
    },
    "tensor groups": {
        "none": Case(nullcontext, TENSORS),
        "tokens counted twice": Case(lambda: planted("tokens counted twice"), TENSORS),
        "gradients that are not gathered": Case(lambda: planted("gradients that are not gathered"), TENSORS, PARTED),
        "results that are not gathered": Case(lambda: planted("results that are not gathered"), TENSORS, PARTED),
        "a group of the wrong ranks": Case(lambda: planted("a group of the wrong ranks"), TENSORS, UNLIKE),
    },
    "sequence groups": {
        "none": Case(nullcontext, SEQUENCES),
        "gradients that are not summed": Case(sequences_not_summed, SEQUENCES),
        "gradients summed over ranks with other experts": Case(experts_reduced_with_others, SEQUENCES),
        "experts divided by the world": Case(divided_by_the_world, SEQUENCES),
        "losses of parts counted as whole ones": Case(
            nullcontext, replace(SEQUENCES, fault="parts of losses as whole ones")
        ),
    },
    "stages": {
        "none": Case(nullcontext, STAGES),
        "losses that are forgotten": Case(lambda: losses_of_stages(0.0), STAGES),
        "losses counted twice": Case(lambda: losses_of_stages(2.0), STAGES),
        "gradients summed over ranks with other experts": Case(experts_reduced_with_others, STAGES),
        "a group across stages": Case(groups_across_stages, STAGES, "this one holds ranks"),
    },
}


def run_cases(kind: str) -> list[Trained | str]:
    """Each case on this rank: what it did, or the error that the package raised."""
    import ds_moe_ep
    from ds_moe_ep.engine.layouts.known_groups import forget_groups

    found: list[Trained | str] = []
    for case in CASES[kind].values():
        with case.plant():
            try:
                found.append(run_job(case.job))
            except ds_moe_ep.MoEError as error:
                found.append(str(error))
                forget_groups()
    return found


def is_seen(job: LayoutJob, results: Sequence[Trained | str], expected: Trained) -> bool:
    """True where ranks part, or are far from one device."""
    trained = [result for result in results if isinstance(result, Trained)]
    assert len(trained) == LAYOUT_RANKS, results
    try:
        return merged(job, trained).distance(expected) > 5 * job.bound
    except AssertionError as error:
        assert "differ" in str(error), error
        return True


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_each_fault_of_each_kind_of_group_is_refused_by_name_or_seen(kind: str) -> None:
    by_rank = run_ranks(LAYOUT_RANKS, run_cases, kind, timeout_s=300)
    for (name, case), results in zip(CASES[kind].items(), zip(*by_rank, strict=True), strict=True):
        if case.error:
            assert all(isinstance(result, str) for result in results), (name, results)
            assert any(case.error in str(result) for result in results), (name, results)  # others wait for these ranks
            continue
        expected: Trained = as_the_ranks_tell(case.job, reference(replace(case.job, fault="")))
        assert is_seen(case.job, results, expected) == (name != "none"), name
