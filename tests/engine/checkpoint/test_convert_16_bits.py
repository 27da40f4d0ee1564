"""Master weights, moments and the loss scale of 16-bit runs, carried between layouts: bit for bit, there and back.

Under ZeRO, and without it, where DeepSpeed's wrappers keep master weights beside torch's states. Controls: states of
another expert, and a run that has loaded weights alone, are seen.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_moe_ep.engine.checkpoint.convert.layout_parameters import expert_parameters
from ds_moe_ep.engine.checkpoint.convert.prepare import prepare
from ds_moe_ep.errors import ConfigError, EngineError
from tests.engine.checkpoint.checkpoints import TAG, same, staged_config, write_experts
from tests.engine.checkpoint.test_convert import (
    MODEL,
    RUN,
    assert_same_states,
    each_loaded_by,
    loaded_by,
    saved_by,
    with_experts,
    with_pipeline,
)
from tests.parallel.training_runs import Run
from tests.ranks import RankPool

Folder = pathlib.Path
DEEP = replace(RUN, model={**MODEL, "num_layers": 4})
LAYOUTS = ((2, 2), (4, 1), (1, 4), (2, 1), (1, 2))  # tensor ranks, stages


def carry(source: Folder, target: Folder, run: Run, *, pipeline: bool, **options: Any) -> Folder:
    """Converts a checkpoint to the run's layout and stage; returns where it is."""
    prepare(source, target, staged_config(run, pipeline=pipeline), **options).write()
    return target


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("precision", "stage"), [("bf16", 2), ("fp16", 1), ("bf16", 0), ("fp16", 0)])
def test_states_of_16_bits_go_to_every_layout_and_back_bit_for_bit(
    pool: RankPool, precision: str, stage: int, tmp_path: Folder
) -> None:
    run = replace(DEEP, **{precision: True}, stage=stage)
    trained = saved_by(pool, with_experts, run, tmp_path / "trained")
    pipelines = [replace(run, stage=1, tp_size=tp_size, pp_size=pp_size) for tp_size, pp_size in LAYOUTS]
    folders = [
        carry(tmp_path / "trained", tmp_path / f"{each.tp_size}x{each.pp_size}", each, pipeline=True)
        for each in pipelines
    ]
    for loaded in each_loaded_by(pool, with_pipeline, pipelines, folders):
        assert_same_states(loaded, trained)
    back = replace(run, ep_size=2, stage=stage or 1)
    carry(folders[0], tmp_path / "back", back, pipeline=False)
    assert_same_states(loaded_by(pool, with_experts, back, tmp_path / "back"), trained)
    carry(tmp_path / "trained", tmp_path / "weights", pipelines[0], pipeline=True, weights_only=True)
    alone = loaded_by(pool, with_pipeline, pipelines[0], tmp_path / "weights")
    with pytest.raises(AssertionError):
        assert_same_states(alone, trained)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_states_of_a_trained_pipeline_in_fp16_become_those_of_experts(pool: RankPool, tmp_path: Folder) -> None:
    run = replace(RUN, fp16=True)
    trained = saved_by(pool, with_pipeline, run, tmp_path / "trained")
    for stage, ep_size in ((1, 4), (2, 2)):
        target = replace(run, stage=stage, ep_size=ep_size)
        carry(tmp_path / "trained", tmp_path / f"{stage}", target, pipeline=False)
        assert_same_states(loaded_by(pool, with_experts, target, tmp_path / f"{stage}"), trained)


def error_of_load(run: Run, folder: str) -> str:
    """The error of a pipeline that loads a checkpoint with its states."""
    try:
        with_pipeline(run, folder, True)
    except Exception as error:
        return type(error).__name__
    return ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pipeline_in_bf16_without_zero_does_not_load_its_own_states_and_convert_carries_them(
    pool: RankPool,
    tmp_path: Folder,
) -> None:
    """DeepSpeed looks for all ranks' states where it has written one rank's."""
    run = replace(RUN, bf16=True, stage=0)
    trained = saved_by(pool, with_pipeline, run, tmp_path / "trained")
    assert set(pool.run(4, error_of_load, run, str(tmp_path / "trained"))) == {"KeyError"}
    for stage in (1, 2):
        target = replace(run, stage=stage, ep_size=2)
        carry(tmp_path / "trained", tmp_path / f"{stage}", target, pipeline=False)
        assert_same_states(loaded_by(pool, with_experts, target, tmp_path / f"{stage}"), trained)
    with pytest.raises(ConfigError, match="stage=0: the source has optimizer states with master weights"):
        carry(tmp_path / "trained", tmp_path / "none", replace(run, tp_size=4, pp_size=1), pipeline=True)


def write_wrapped(folder: Folder, run: Run, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """Writes a checkpoint of experts in 16 bits without ZeRO as DeepSpeed's wrapper writes it; the states by name."""
    write_experts(folder, run, dtype)
    generator, known = torch.Generator().manual_seed(11), dict[str, dict[str, Tensor]]()
    for rank in range(run.ep_size):
        listed = expert_parameters(run.model_config, run.moe_config(), run.ep_size, rank)
        states: dict[int, Any] = {}
        masters: list[list[Tensor]] = [[], []]
        for place, each in enumerate(listed):
            if each.name not in known:
                kinds = ("exp_avg", "exp_avg_sq", "master")
                known[each.name] = {kind: torch.randn(each.shape, generator=generator) for kind in kinds}
            values = known[each.name]
            states[place] = {"step": torch.tensor(7.0), **{kind: values[kind] for kind in ("exp_avg", "exp_avg_sq")}}
            masters[each.is_of_expert].append(values["master"])
        groups = []
        for name, first, group in (("dense", 0, masters[0]), ("experts", len(masters[0]), masters[1])):
            places = list(range(first, first + len(group)))
            groups.append({"lr": 0.03, "betas": (0.9, 0.999), "name": name, "moe": name == "experts", "params": places})
        scale = {"cur_scale": 32.0, "cur_iter": 9, "last_overflow_iter": 4, "scale_factor": 2.0, "scale_window": 50}
        scale = {"dynamic_loss_scale": True, **scale} if dtype == torch.float16 else {"dynamic_loss_scale": False}
        optimizer = {**scale, "optimizer_state_dict": {"state": states, "param_groups": groups}, "fp32_groups": masters}
        torch.save({"optimizer": optimizer}, folder / TAG / f"expp_rank_{rank}_mp_rank_00_optim_states.pt")
    return known


def states_in(folder: Folder) -> Sequence[dict[str, Any]]:
    """The states in the files of a pipeline's first stage and tensor rank."""
    paths = sorted((folder / TAG).glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
    return [torch.load(path, weights_only=False)["optimizer_state_dict"] for path in paths]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_beside_master_weights_become_those_of_zero_for_a_pipeline(dtype: torch.dtype, tmp_path: Folder) -> None:
    """By hand: each vector is the master weights, or moments, of the stage's parameters, one behind the other."""
    run = Run(top_k=2, ep_size=2, tp_size=1, pp_size=1, stage=1, model={"num_layers": 1})
    known = write_wrapped(tmp_path / "experts", run, dtype)
    carry(tmp_path / "experts", tmp_path / "pipeline", run, pipeline=True)
    ranks = states_in(tmp_path / "pipeline")
    assert len(ranks) == 4  # as many as saved
    assert all(states["base_optimizer_state"]["state"][0]["step"] == 7 for states in ranks)
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        vectors = [
            states["single_partition_of_fp32_groups"][0]
            if kind == "master"
            else states["base_optimizer_state"]["state"][0][kind]
            for states in ranks
        ]
        expected = torch.cat([values[kind].flatten() for values in _in_order(known, run)])
        found = torch.cat(vectors)[: expected.numel()]
        assert torch.equal(found, expected), kind
        swapped = torch.cat([values[kind].flatten() for values in _in_order(_with_two_experts_swapped(known), run)])
        assert not torch.equal(found, swapped), "the control"
    scaler = ranks[0]["loss_scaler"]
    assert scaler.cur_scale == (32.0 if dtype == torch.float16 else 1.0)
    assert dtype != torch.float16 or (scaler.cur_iter, scaler.last_overflow_iter, scaler.scale_window) == (9, 4, 50)
    carry(tmp_path / "pipeline", tmp_path / "back", replace(run, ep_size=4), pipeline=False)
    carry(tmp_path / "back", tmp_path / "again", run, pipeline=True, world_size=4)
    assert all(same(one, other) for one, other in zip(ranks, states_in(tmp_path / "again"), strict=True))


def test_states_and_the_loss_scale_come_through_tp8_pp2_bit_for_bit(tmp_path: Folder) -> None:
    model = {"num_layers": 2, "num_heads": 8, "expert": "swiglu", "shared_expert_width": 16}
    run = Run(top_k=2, ep_size=4, tp_size=1, pp_size=1, stage=1, model=model)
    write_wrapped(tmp_path / "experts", run, torch.float16)
    direct = carry(tmp_path / "experts", tmp_path / "direct", run, pipeline=True, world_size=4)
    cut = carry(tmp_path / "experts", tmp_path / "cut", replace(run, tp_size=8, pp_size=2), pipeline=True)
    assert len(list((cut / TAG).glob("zero_pp_rank_0_mp_rank_*_optim_states.pt"))) == 16
    back = carry(cut, tmp_path / "back", replace(run, ep_size=2), pipeline=False, world_size=8)
    through = carry(back, tmp_path / "through", run, pipeline=True, world_size=4)
    pairs = list(zip(states_in(direct), states_in(through), strict=True))
    assert all(same(one, other) for one, other in pairs)
    assert not same(pairs[0][0], pairs[1][0]), "the control: another rank's cut"


def _in_order(known: dict[str, dict[str, Tensor]], run: Run) -> list[dict[str, Tensor]]:
    """The parameters' states in the order of the model on one device."""
    from ds_moe_ep.model.transformer import build_transformer
    from ds_moe_ep.moe.layer import ExpertParallel

    return [
        known[name]
        for name, _ in build_transformer(run.model_config, run.moe_config(), ExpertParallel).named_parameters()
    ]


def _with_two_experts_swapped(known: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    def other(name: str) -> str:
        one, two = ".deepspeed_experts.1.", ".deepspeed_experts.3."
        return name.replace(one, two) if one in name else name.replace(two, one)

    return {name: known[other(name)] for name in known}


def test_targets_that_load_no_such_states_are_refused_by_name(tmp_path: Folder) -> None:
    run = Run(top_k=2, ep_size=2, tp_size=1, pp_size=1, stage=0, model={"num_layers": 1})
    write_wrapped(tmp_path / "experts", run, torch.float16)
    config = staged_config(run, pipeline=True)
    without = {key: value for key, value in config.items() if key != "zero_optimization"}
    for each in (config, without):
        with pytest.raises(
            ConfigError, match=r"stage=0: the source has .* with master weights, which load with stage 1"
        ):
            prepare(tmp_path / "experts", tmp_path / "target", each)
    prepare(tmp_path / "experts", tmp_path / "target", config, weights_only=True)
    other = staged_config(replace(run, ep_size=4), pipeline=False)
    with pytest.raises(EngineError, match=r"holds no optimizer states of torch's form; take --weights-only"):
        prepare(tmp_path / "experts", tmp_path / "target", other)
    prepare(tmp_path / "experts", tmp_path / "target", other, weights_only=True)
    path = tmp_path / "experts" / TAG / "expp_rank_1_mp_rank_00_optim_states.pt"
    saved = torch.load(path, weights_only=False)
    saved["optimizer"]["fp32_groups"][1][0] = torch.zeros(3)
    torch.save(saved, path)
    with pytest.raises(EngineError, match=r"its optimizer has a master weight of \(3,\), which the model .* does not"):
        prepare(tmp_path / "experts", tmp_path / "target", staged_config(replace(run, stage=1), pipeline=True))
