"""AutoEP's layers (Hugging Face Mixtral, Qwen3-MoE) with the hooks train as without them.

fp32, 2 Adam steps: 2e-6 of a tensor's largest weight and 1e-6 of the loss, the bounds at which AutoEP itself equals the
blocks of Hugging Face.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_moe_ep.engine.checkpoint.convert.prepare import prepare
from ds_moe_ep.engine.state.optimizer_view import own_gradient, own_master, own_partition
from ds_moe_ep.errors import ConfigError, EngineError
from tests.engine.hooks import autoep_models
from tests.engine.hooks.autoep_models import AutoEPJob, autoep_layers, make_engine, named_weights, train_steps
from tests.engine.hooks.hooked_layers import KNOBS, hooked, rank, same_state, state_of
from tests.engine.small_model import distance, merged
from tests.ranks import RankPool

WEIGHTS, LOSS = 2e-6, 1e-6
ROUNDED_WEIGHTS, ROUNDED_LOSS = 1e-2, 5e-3  # in bf16
HALF_WEIGHTS, HALF_LOSS = 1.5e-3, 1e-4  # in fp16, with three bits more
Outcome = tuple[list[float], dict[str, Tensor]]


def jobs() -> list[AutoEPJob]:
    """Both presets; ZeRO 0 to 3; EP = world and below it; accumulation, recomputation, balance loss."""
    return [
        AutoEPJob(steps=2, **knobs)
        for knobs in (
            {"stage": 0},
            {"stage": 1, "ep_size": 2, "preset": "qwen3_moe", "accumulation": 2},
            {"stage": 2, "checkpointing": "reentrant", "grouped_mm": False},
            {"stage": 3, "ep_size": 2, "router_logits": True},
            {"stage": 3, "preset": "qwen3_moe", "checkpointing": "non-reentrant"},
            {
                "stage": 0,
                "preset": "qwen3_moe",
                "top_k": 1,
                "checkpointing": "non-reentrant",
                "activation": "swiglu_oai",
            },
            {"stage": 1, "ep_size": 2, "score_apply": "pre"},
        )
    ]


def train_both(table: Sequence[AutoEPJob]) -> list[tuple[Outcome, Outcome]]:
    """Each job through the hooks, with one of KNOBS in turn, and without them, on this rank."""
    results = []
    for index, job in enumerate(table):
        engine = make_engine(job)
        with hooked(engine, **KNOBS[index % len(KNOBS)]) as handle:
            assert list(handle.layers) == list(autoep_layers(engine))
            assert all(layer.known_experts() is not None for layer in handle.layers.values())
            losses = train_steps(engine, job)
            weights = named_weights(engine, job)
        results.append(((losses, weights), autoep_models.run_job(job)))
    return results


MORE = (0, 4)  # jobs whose settings others have too


@pytest.mark.parametrize("is_rest", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_through_the_hooks_is_the_training_without_them(pool: RankPool, is_rest: bool) -> None:
    table = [job for index, job in enumerate(jobs()) if (index in MORE) == is_rest]
    by_rank = pool.run(4, train_both, table, timeout_s=280)
    for index, job in enumerate(table):
        mine, plain = ([results[index][side] for results in by_rank] for side in (0, 1))
        assert mine[0][0] == pytest.approx(plain[0][0], rel=LOSS), job
        assert distance(merged([w for _, w in mine]), merged([w for _, w in plain])) <= WEIGHTS, job


def rounded(**precision: Any) -> list[AutoEPJob]:
    """One of each stage; all experts are chosen, since a choice that rounding turns over would be another training."""
    return [AutoEPJob(steps=2, top_k=8, stage=stage, ep_size=2 + stage % 2 * 2, **precision) for stage in range(4)]


ROUNDED, HALVES = rounded(bf16=True), rounded(fp16=True)


@pytest.mark.slow
@pytest.mark.parametrize("table", [ROUNDED, HALVES], ids=["bf16", "fp16"])
def test_in_16_bits_training_through_the_hooks_is_that_without_them_up_to_a_few_roundings(
    table: Sequence[AutoEPJob], pool: RankPool
) -> None:
    by_rank = pool.run(4, train_both, table, timeout_s=280)
    for index, job in enumerate(table):
        weights, loss = (HALF_WEIGHTS, HALF_LOSS) if job.fp16 else (ROUNDED_WEIGHTS, ROUNDED_LOSS)
        mine, plain = ([results[index][side] for results in by_rank] for side in (0, 1))
        assert mine[0][0] == pytest.approx(plain[0][0], rel=loss), job
        assert distance(merged([w for _, w in mine]), merged([w for _, w in plain])) <= weights, job


def test_clamped_experts_are_not_those_of_the_family(pool: RankPool) -> None:
    """The control for the activation of gpt-oss."""
    clamped, plain = (AutoEPJob(world_size=2, ep_size=2, activation=kind, steps=1) for kind in ("swiglu_oai", ""))
    for (mine, _), (_, theirs) in pool.run(2, train_both, [clamped, plain]):
        assert abs(mine[0][0] - theirs[0][0]) > 100 * LOSS * theirs[0][0]


def test_weights_on_the_rows_are_not_weights_on_the_results(pool: RankPool) -> None:
    """The control for score_apply="pre": experts are not linear."""
    pre, post = (AutoEPJob(world_size=2, ep_size=2, score_apply=kind, steps=1) for kind in ("pre", "post"))
    for (mine, _), (_, plain) in pool.run(2, train_both, [pre, post]):
        assert abs(mine[0][0] - plain[0][0]) > 100 * LOSS * plain[0][0]


def train_perturbed(job: AutoEPJob) -> tuple[list[float], list[float]]:
    """Losses with another expert on the last rank, and without."""
    engine = make_engine(job)
    with torch.no_grad():
        if rank() == 3:
            next(iter(autoep_layers(engine).values())).experts.w2.mul_(1.1)
    with hooked(engine, **KNOBS[0]):
        return train_steps(engine, job), autoep_models.run_job(job)[0]


def test_a_perturbed_remote_expert_is_seen_through_the_hooks(pool: RankPool) -> None:
    for mine, plain in pool.run(4, train_perturbed, AutoEPJob(steps=1)):
        assert abs(mine[0] - plain[0]) > 100 * LOSS * plain[0]


def removed(job: AutoEPJob) -> tuple[list[str], bool, bool]:
    """Keys of the model's state that differ after the hooks are gone; whether weights and loss are the same bits."""
    engine = make_engine(job)
    ids = autoep_models.batches(job)[0][0][rank()]
    with torch.no_grad():
        loss = engine(input_ids=ids, labels=ids).loss
        weights, before = named_weights(engine, job), state_of(engine.module)
        with hooked(engine, **KNOBS[0]):
            with pytest.raises(ConfigError, match=r"input\.shape=\(2, 3, 60\)"):
                next(iter(autoep_layers(engine).values()))(torch.zeros(2, 3, 60))
            engine.module.eval()
            assert torch.allclose(engine(input_ids=ids, labels=ids).loss, loss, rtol=LOSS)
            engine.module.train()
        after = state_of(engine.module)
        again = engine(input_ids=ids, labels=ids).loss
    same = [torch.equal(w, weights[name]) for name, w in named_weights(engine, job).items()]
    changed = same_state(*({k: v for k, v in s.items() if not isinstance(v, Tensor)} for s in (after, before)))
    return changed, all(same) and reads_frozen(engine), torch.equal(again, loss)


def reads_frozen(engine: Any) -> bool:
    """True where a parameter that nobody trains reads as no gradient, and as itself in the optimizer's place."""
    parameter = next(iter(autoep_layers(engine).values())).experts.w1
    parameter.requires_grad_(False)
    gradient, master = own_gradient(parameter), own_master(engine, parameter)
    parameter.requires_grad_(True)
    partition = own_partition(parameter)
    weight = (parameter if partition is None else partition).detach().flatten()
    return torch.equal(master.values, weight) and torch.equal(gradient.values, torch.zeros_like(weight))


def each_removed(table: Sequence[AutoEPJob]) -> list[tuple[list[str], bool, bool]]:
    return [removed(job) for job in table]


def test_removed_hooks_leave_nothing_behind(pool: RankPool) -> None:
    table = [AutoEPJob(world_size=2, ep_size=2), AutoEPJob(world_size=2, ep_size=2, stage=3)]
    assert pool.run(2, each_removed, table) == [[([], True, True)] * 2] * 2


def resumed(folder: str, stage: int, saves_hooked: bool) -> Outcome:
    """A step, a checkpoint, and three more in a fresh engine; the hooks are there before it or after it, not both."""
    job = AutoEPJob(stage=stage, ep_size=2, world_size=2)
    first = make_engine(job)
    with hooked(first, **KNOBS[0]) if saves_hooked else nullcontext():
        train_steps(first, replace(job, steps=1))
        first.save_checkpoint(folder)
    second = make_engine(replace(job, seed=9))
    with nullcontext() if saves_hooked else hooked(second, **KNOBS[0]):
        second.load_checkpoint(folder)
        losses = train_steps(second, job)
        return losses, named_weights(second, job)


def test_checkpoints_go_from_hooked_to_plain_engines_and_back(pool: RankPool, tmp_path: pathlib.Path) -> None:
    for stage in (0, 2):
        there, back = (
            pool.run(2, resumed, str(tmp_path / f"{stage}{saves_hooked}"), stage, saves_hooked)
            for saves_hooked in (True, False)
        )
        assert there[0][0] == pytest.approx(back[0][0], rel=LOSS)
        assert distance(merged([w for _, w in there]), merged([w for _, w in back])) <= WEIGHTS
    # DeepSpeed's script ends with an error about an expert's file; the one in its place tells the way
    assert "ds_moe_ep.cli.main" in (tmp_path / "2True" / "zero_to_fp32.py").read_text()
    with pytest.raises(EngineError, match=r"is of AutoEP's layers; .*save_pretrained\(engine, folder\)"):
        prepare(tmp_path / "2True", tmp_path / "weights", None, to="fp32")


def refused(changes: dict[str, Any]) -> str:
    """The error of attaching to a layer with these attributes."""
    import ds_moe_ep

    engine = make_engine(AutoEPJob(ep_size=2, world_size=2))
    for layer in list(autoep_layers(engine).values())[1:]:
        for name, value in changes.items():
            setattr(layer, name, value)
    try:
        ds_moe_ep.attach_overlap(engine)
    except ds_moe_ep.EngineError as error:
        return str(error)
    return ""


def test_layers_that_move_their_own_rows_are_refused_by_name(pool: RankPool) -> None:
    for error in pool.run(2, refused, {"comm_backend": "deepep"}):
        assert "model.layers.1.mlp" in error
        assert "model.layers.0" not in error
        assert "DeepEP" in error or "deepep" in error


def states_by_expert(engine: Any, job: AutoEPJob) -> dict[str, Tensor]:
    """Master weights and moments, an expert's under its global index. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    optimizer, found = engine.optimizer, {}
    for index, parameters in enumerate(optimizer.bit16_groups if job.stage else ()):
        cut = optimizer.single_partition_of_fp32_groups[index]
        lazy_init_hp_params_optimizer_state(parameters, cut, optimizer.optimizer.state)
    for name, parameter in engine.module.named_parameters():
        state = {} if job.stage else optimizer.state[parameter]
        for kind in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(parameter, kind) if job.stage else state[kind]
            by_expert = autoep_models.by_expert(name, value.detach().clone(), job)
            found |= {f"{known} {kind}": each for known, each in by_expert.items()}
        master = safe_get_full_fp32_param(parameter) if job.stage else parameter
        found |= autoep_models.by_expert(name, master.detach().clone(), job)
    return found


def states_under_another_size(stages: Sequence[int], folder: str) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Of each stage: the states where ep_size 2 saved, and those that a hooked engine of ep_size 4 loaded."""
    jobs = [AutoEPJob(stage=stage, ep_size=2, steps=1) for stage in stages]
    saved = []
    for job in jobs:  # all before the larger groups exist: DeepSpeed names files without ZeRO by the largest
        engine = make_engine(job)
        train_steps(engine, job)
        engine.save_checkpoint(f"{folder}/{job.stage}")
        saved.append(states_by_expert(engine, job))
    loaded = []
    for job in (replace(job, ep_size=4, seed=8) for job in jobs):
        engine = make_engine(job)
        with hooked(engine, **KNOBS[0]):
            engine.load_checkpoint(f"{folder}/{job.stage}")
            loaded.append(states_by_expert(engine, job))
    return list(zip(saved, loaded, strict=True))


@pytest.mark.parametrize("stages", [(0, 2), pytest.param((0, 1, 2), marks=pytest.mark.slow)])
def test_optimizer_states_load_under_another_ep_size_bit_for_bit(
    pool: RankPool, stages: Sequence[int], tmp_path: pathlib.Path
) -> None:
    by_rank = pool.run(4, states_under_another_size, stages, str(tmp_path), timeout_s=150)
    for pairs in zip(*by_rank, strict=True):
        saved, loaded = (merged([pair[side] for pair in pairs]) for side in (0, 1))
        assert distance(loaded, saved) == 0.0
        one, other = (f"model.layers.1.mlp.experts.{expert}.w2 exp_avg" for expert in (0, 5))
        assert not torch.equal(saved[one], saved[other]), "the control: moments of two experts differ"
