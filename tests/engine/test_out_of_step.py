"""Ranks of an engine in different passes: an error on every rank that says who is where, and no process that dies."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.comm.disturbed import caught
from tests.engine.small_model import Job, batches, make_engine
from tests.load_clock import Stopwatch, without_load
from tests.ranks import RankError, RankPool

LIMIT_S = 5.0
KINDS = ("ours", "native")  # the package's layer, and DeepSpeed's, hooked, with a dropless gate


def engine_of(kind: str, stage: int = 0) -> Any:
    import ds_moe_ep

    job = Job(layer=kind, world_size=2, ep_size=2, num_experts=4, schedule="serial", stage=stage)
    engine = make_engine(job)
    if kind == "native":
        ds_moe_ep.attach_overlap(engine, {"schedule": "serial", "timeout_s": LIMIT_S})
    return engine


def loss_of(engine: Any) -> torch.Tensor:
    x, target = batches(Job(world_size=2, ep_size=2))[0][0]
    return engine(x[dist.get_rank()], target[dist.get_rank()])


def step(engine: Any) -> None:
    engine.backward(loss_of(engine))
    engine.step()


def skips_a_bad_loss(engine: Any, is_odd: bool) -> None:
    loss = loss_of(engine)
    if not is_odd:
        engine.backward(loss)
        engine.step()
    step(engine)


def skips_the_last_layer(engine: Any, is_odd: bool) -> None:
    if is_odd:
        engine.module.layers[1].forward = lambda x: (x, x.new_zeros(()), None)
    step(engine)


def evaluates(engine: Any, is_odd: bool) -> None:
    engine.train(not is_odd)
    with torch.set_grad_enabled(not is_odd):
        loss_of(engine)


CASES: list[tuple[Callable[[Any, bool], None], str, str]] = [  # where rank 0 is, and rank 1, which is odd
    (skips_a_bad_loss, "the backward pass of call 1 of ", "the training pass of call 2 of "),
    (skips_the_last_layer, "the training pass of call 1 of ", "the backward pass of call 1 of "),
    (evaluates, "the training pass of call 1 of ", "the evaluation pass of call 1 of "),
]


def run_cases(kind: str, odd: int, stage: int) -> list[str]:
    """Each case's error on this rank, and that of a pass while rank 1 waits in a barrier of the program's own."""
    errors, is_odd = [], dist.get_rank() == odd
    for case, _, _ in CASES:
        engine = engine_of(kind, stage)
        step(engine)
        errors.append(caught(case, engine, is_odd))
    engine = engine_of(kind, stage)
    errors.append("" if is_odd else caught(loss_of, engine))
    dist.barrier()
    return errors


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_in_different_passes_all_say_who_is_where(pool: RankPool, kind: str) -> None:
    for stage in (0, 2) if kind == "ours" else (0,):
        by_rank = pool.run(2, with_a_limit, kind, 1, stage, timeout_s=60)
        for (_, first, second), *errors in zip(CASES, *by_rank, strict=False):
            for error in errors:
                assert error.startswith("EngineError: layers.") and "ranks are in different passes" in error, error
                assert f"rank 0 in {first}" in error and f"rank 1 in {second}" in error, error
        late = by_rank[0][-1]
        assert late.startswith("PeerError: layers.0") and f"did not answer rank 0 within {LIMIT_S:g} s" in late, late
        assert "rank 1 is in barrier, called from run_cases (test_out_of_step.py:" in late, late


def test_ranks_in_the_same_passes_say_nothing(pool: RankPool) -> None:
    """The control of the test above."""
    assert pool.run(2, with_a_limit, "native", -1, 0, timeout_s=60) == [[""] * (len(CASES) + 1)] * 2


def with_a_limit(kind: str, odd: int, stage: int) -> list[str]:
    """`run_cases` where the package's own layers have the limit, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "moe_config", property(limited(Job.moe_config.fget)))  # type: ignore[attr-defined]
        return run_cases(kind, odd, stage)


def limited(config_of: Callable[[Job], Any]) -> Callable[[Job], Any]:
    from dataclasses import replace

    return lambda job: replace(config_of(job), timeout_s=LIMIT_S)


def save_alone(folder: str) -> None:
    """Rank 0 saves while rank 1 trains on."""
    engine = engine_of("native")
    step(engine)
    watch = Stopwatch()
    try:
        if dist.get_rank() == 0:
            engine.save_checkpoint(folder)
        step(engine)
    finally:
        Path(folder, f"{dist.get_rank()}.s").write_text(json.dumps(watch.read()))


def test_a_rank_that_saves_alone_and_the_one_that_trains_on_both_end_with_who_is_where(
    pool: RankPool, tmp_path: Path
) -> None:
    with pytest.raises(RankError) as failed:
        pool.run(2, save_alone, str(tmp_path), timeout_s=60)
    saves, trains = (failed.value.failures[rank] for rank in range(2))
    assert trains.type_name == "PeerError" and "rank 0 is in all_gather_object, called from gather" in trains.message
    assert saves.type_name == "EngineError" and "not saved, a rank ended or stalled meanwhile" in saves.message
    assert "first error: rank 1: PeerError: layers.0" in saves.message
    took = [json.loads((tmp_path / f"{rank}.s").read_text()) for rank in range(2)]
    assert without_load(took) < LIMIT_S + 12
