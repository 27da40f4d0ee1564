"""Checkpoint folders for the tests of conversions: ds_configs for them, and a reader of its own."""

from __future__ import annotations

import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine.checkpoint.convert.prepare import prepare
from ds_moe_ep.model.initialize import init_weights
from ds_moe_ep.model.transformer import build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from tests.parallel.training_runs import Run

TAG = "global_step7"


def target_config(run: Run, *, pipeline: bool) -> dict[str, Any]:
    """A ds_config for the run's model, laid out as a pipeline or by experts."""
    layout = {"layout": {"tp_size": run.tp_size, "pp_size": run.pp_size}} if pipeline else {"ep_size": run.ep_size}
    section = {"num_experts": run.num_experts, "top_k": run.top_k, "model": vars(run.model_config), **layout}
    return {"train_batch_size": 16, "moe_ep": section}


def staged_config(run: Run, *, pipeline: bool) -> dict[str, Any]:
    """That ds_config with the run's stage of ZeRO."""
    return target_config(run, pipeline=pipeline) | {"zero_optimization": {"stage": run.stage}}


def weights_in(folder: pathlib.Path, run: Run) -> dict[str, Tensor]:
    """Every weight of a checkpoint of expert parallelism, by its name on one device; read by file names alone."""
    tag = (folder / "latest").read_text()
    main = torch.load(folder / tag / "mp_rank_00_model_states.pt", weights_only=False)
    weights, found = dict(main["module"]), defaultdict(set)
    for path in (folder / tag).glob("layer_*_expert_*"):
        layer, expert = map(int, re.findall(r"\d+", path.name)[:2])
        found[layer].add(expert)
        for key, weight in torch.load(path, weights_only=True).items():
            assert f"layers.{layer}." in key
            assert f"deepspeed_experts.{expert}." in key
            weights[key] = weight
    assert dict(found) == {layer: set(range(run.num_experts)) for layer in range(run.model_config.num_layers)}
    assert main["num_experts"] == [run.num_experts] * run.model_config.num_layers
    return {key.replace("deepspeed_moe.", ""): weight for key, weight in weights.items()}


def write_experts(folder: pathlib.Path, run: Run, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Writes first weights as the engine writes them with experts over ranks, and returns them by name."""
    net = build_transformer(run.model_config, run.moe_config(), ExpertParallel)
    init_weights(net, seed=3)
    whole = net.to(dtype).state_dict()
    keys = {name: name.replace("feed_forward.", "feed_forward.deepspeed_moe.") for name in whole}
    dense = {keys[name]: weight for name, weight in whole.items() if "deepspeed_experts" not in name}
    (folder / TAG).mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    state = {"global_steps": 7, "global_samples": 112, "skipped_steps": 0, "lr_scheduler": None, "dp_world_size": 4}
    main = {"module": dense, "num_experts": [run.num_experts] * run.model_config.num_layers, **state}
    torch.save(main, folder / TAG / "mp_rank_00_model_states.pt")
    for layer in range(run.model_config.num_layers):
        for expert in range(run.num_experts):
            prefix = f"layers.{layer}.feed_forward.experts.deepspeed_experts.{expert}."
            weights = {keys[name]: weight.clone() for name, weight in whole.items() if name.startswith(prefix)}
            torch.save(weights, folder / TAG / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
    return whole


def converted(tmp_path: pathlib.Path, run: Run, dtype: torch.dtype = torch.float32) -> pathlib.Path:
    """A pipeline's checkpoint that came from one of experts in `tmp_path / "experts"`."""
    write_experts(tmp_path / "experts", run, dtype)
    prepare(tmp_path / "experts", tmp_path / "pipeline", target_config(run, pipeline=True)).write()
    return tmp_path / "pipeline"


def write_config(path: pathlib.Path, run: Run, *, pipeline: bool) -> str:
    """The path of a file with `target_config`."""
    path.write_text(json.dumps(target_config(run, pipeline=pipeline)), encoding="utf-8")
    return str(path)


def same(one: Any, other: Any) -> bool:
    """True for equal values of one structure, tensors bit for bit."""
    if any(isinstance(one, kind) != isinstance(other, kind) for kind in (dict, list, tuple, Tensor)):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other) or (vars(one) == vars(other) if hasattr(one, "__dict__") else False)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a structure that have more than one value."""
    if isinstance(value, Tensor) and value.numel() > 1:
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from tensors(part)
