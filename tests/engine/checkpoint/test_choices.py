"""Choices of the schedule 'auto' travel in checkpoints: a resumed run repeats them instead of measuring again."""

from __future__ import annotations

import pathlib
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

import ds_moe_ep
from ds_moe_ep.errors import ConfigError, EngineError
from tests.engine.small_model import Job, batches, make_engine, train_steps
from tests.ranks import RankPool

AUTO = Job(steps=2, ep_size=4, top_k=2, schedule="auto")


def choices_of(engine: Any) -> dict[str, Any]:
    return {name: layer.choice and layer.choice.to_dict() for name, layer in engine.moe_ep_layers.items()}


def refuse_loads(engine: Any, folder: str) -> None:
    """Asserts that what loads nothing, or would load by DeepSpeed's rules, is refused."""
    with pytest.raises(EngineError, match=r"none: nothing was loaded, the folder names no tag"):
        ds_moe_ep.load_checkpoint(engine, f"{folder}/none")
    layers = vars(engine).pop("moe_ep_layers")  # as a plain engine, which has none
    with pytest.raises(EngineError, match=r"engine=DeepSpeedEngine: .* call attach_overlap\(engine\) first"):
        ds_moe_ep.load_checkpoint(engine, folder)
    engine.moe_ep_layers = layers


def save_and_resume(folder: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Choices before training, after it, after loading into a new engine, and after going on there."""
    engine = make_engine(AUTO)
    before = choices_of(engine)
    train_steps(engine, AUTO, batches(AUTO))
    after = choices_of(engine)
    engine.save_checkpoint(folder, client_state={"note": "kept"})
    resumed = make_engine(replace(AUTO, seed=9))
    refuse_loads(resumed, folder)
    path, state = ds_moe_ep.load_checkpoint(resumed, folder)
    assert path.is_relative_to(folder)
    assert state["note"] == "kept" and "moe_ep_schedules" not in state
    loaded = choices_of(resumed)
    train_steps(resumed, AUTO, batches(AUTO))
    return before, after, loaded, choices_of(resumed)


def test_a_resumed_run_takes_the_choices_of_its_checkpoint(pool: RankPool, tmp_path: pathlib.Path) -> None:
    results = pool.run(4, save_and_resume, str(tmp_path), timeout_s=90)
    assert all(result == results[0] for result in results)
    before, after, loaded, later = results[0]
    assert before == {"layers.0": None, "layers.1": None}
    assert all(choice is not None for choice in after.values())
    assert loaded == after == later


def save_and_load_in_groups(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Choices of this rank, of which each expert group has its own, when saved and when a new engine has loaded."""
    job = replace(AUTO, ep_size=2, stage=1)
    engine = make_engine(job)
    train_steps(engine, job, batches(job)[:1])
    for layer in engine.moe_ep_layers.values():
        layer.dispatcher.take_choice(replace(layer.choice, serial_ms=float(dist.get_rank() // 2)))
    engine.save_checkpoint(folder)
    resumed = make_engine(replace(job, seed=9))
    resumed.load_checkpoint(folder)
    return choices_of(engine), choices_of(resumed)


def test_each_expert_group_takes_its_own_choices_again(pool: RankPool, tmp_path: pathlib.Path) -> None:
    results = pool.run(4, save_and_load_in_groups, str(tmp_path), timeout_s=90)
    assert all(loaded == saved for saved, loaded in results)
    assert results[0][0] == results[1][0] != results[2][0], "the control: the groups' choices differ"


def test_choices_for_another_torus_or_schedule_or_an_unknown_layer_are_left_and_broken_ones_refused() -> None:
    from ds_moe_ep import GeluMLP, MoE, MoEConfig
    from ds_moe_ep.engine.checkpoint.choices import take_choices

    layers = {"a": MoE(8, GeluMLP(8, 16), config=MoEConfig(num_experts=4))}
    choice = {"knobs": {"schedule": "serial"}, "time_to_serial": 1.0, "predicted_to_serial": 1.0, "serial_ms": 1.0}
    choice["raced"] = {}
    take_choices(layers, {"a": {"torus": [1, 2], "choice": choice}, "b": {"torus": [1, 1], "choice": choice}}, "ckpt")
    assert layers["a"].choice is None
    take_choices(layers, {"a": {"torus": [1, 1], "choice": choice}}, "ckpt")
    assert layers["a"].choice is not None
    apart = {"a": MoE(8, GeluMLP(8, 16), config=MoEConfig(num_experts=4, ep_size=2))}
    take_choices(apart, {"a": {"torus": [1, 2], "choice": choice}}, "ckpt")
    assert apart["a"].choice is None, "a layer without a group stands alone"
    take_choices(apart, {"a": {"torus": [1, 1], "choice": choice}}, "ckpt")
    assert apart["a"].choice is not None
    fixed = {"a": MoE(8, GeluMLP(8, 16), config=MoEConfig(num_experts=4, schedule="serial"))}
    take_choices(fixed, {"a": {"torus": [1, 1], "choice": choice}}, "ckpt")
    assert fixed["a"].choice is None
    with pytest.raises(ConfigError, match="expected a torus"):
        take_choices(layers, {"a": {}}, "ckpt")
    with pytest.raises(ConfigError, match=r"ckpt: moe_ep_schedules\.a"):
        take_choices(layers, {"a": {"torus": [1, 1], "choice": {}}}, "ckpt")
