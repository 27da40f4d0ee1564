"""The names of DeepSpeed that the package leans on, in the installed release: a test fails when one moves."""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe import layer as native
from deepspeed.moe.sharded_moe import MOELayer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import groups

from ds_moe_ep.engine import arguments, seams, step_seams
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.experts import GeluMLP


def test_the_installed_release_is_a_tested_one() -> None:
    assert deepspeed.__version__ in seams.TESTED


def test_every_group_function_is_there_with_the_arguments_that_are_passed() -> None:
    seams.check_release.cache_clear()
    seams.check_release()
    create = inspect.signature(groups._create_expert_and_data_parallel).parameters
    assert "use_data_before_expert_parallel_" in create
    used = set(re.findall(r"groups\.(\w+)", Path(seams.__file__).read_text()))
    assert used <= set(seams.GROUP_NAMES), "seams.py uses a name that it does not check"


def test_a_missing_name_is_an_error_that_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(groups, "_get_expert_parallel_group_ranks")
    seams.check_release.cache_clear()
    with pytest.raises(EngineError, match=r"_get_expert_parallel_group_ranks.*install a tested release"):
        seams.check_release()


def test_the_constructor_takes_deepspeeds_arguments_with_its_defaults() -> None:
    theirs = inspect.signature(native.MoE.__init__).parameters
    ours = inspect.signature(MoE.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert {name: p.default for name, p in theirs.items()} == {name: ours[name].default for name in theirs}
    routing = set(theirs) - {"self", "hidden_size", "expert", "use_residual"}
    assert {name: theirs[name].default for name in routing} == arguments.DEFAULTS


def test_the_engine_reads_what_the_layer_offers() -> None:
    engine = inspect.getsource(DeepSpeedEngine)
    for name in ("set_deepspeed_parallelism", "num_experts", "num_local_experts", "expert_group_name"):
        assert f".{name}" in engine or f"'{name}'" in engine
    assert "isinstance(module, MoE)" in engine
    assert ".deepspeed_moe.experts.deepspeed_experts." in engine
    layer = MoE(8, GeluMLP(8, 16), num_experts=4)
    assert isinstance(layer, native.MoE) and isinstance(layer.deepspeed_moe, MOELayer)
    assert (layer.num_experts, layer.num_local_experts, layer.expert_group_name) == (4, 4, "ep_size_1")


def test_no_key_but_the_experts_holds_the_word_that_the_engine_splits_by() -> None:
    from ds_moe_ep.config.knobs import MoEConfig

    layer = MoE(
        8, GeluMLP(8, 16), use_residual=True, config=MoEConfig(num_experts=4, balance="bias"), shared=GeluMLP(8, 16)
    )
    experts = ".experts.deepspeed_experts."
    assert all(experts in f".{key}" or "expert" not in key for key in layer.state_dict())


def test_keys_shapes_and_order_of_parameters_are_those_of_the_native_layer() -> None:
    knobs = {"num_experts": 3, "ep_size": 1, "k": 1, "use_residual": True}
    ours, theirs = MoE(8, GeluMLP(8, 16, bias=True), **knobs), native.MoE(8, GeluMLP(8, 16, bias=True), **knobs)
    described = [
        [(name, tuple(p.shape), getattr(p, "allreduce", True), getattr(p, "group_name", None))
         for name, p in layer.named_parameters()]
        for layer in (ours, theirs)
    ]  # fmt: skip
    assert described[0] == described[1]
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_what_the_hooks_use_of_the_native_layer_is_there_and_a_missing_name_is_told() -> None:
    layer = native.MoE(8, GeluMLP(8, 16), num_experts=2, ep_size=1)
    assert seams.missing_of(layer.deepspeed_moe, seams.MOE_LAYER_NAMES) == ""
    assert seams.missing_of(layer.deepspeed_moe.gate, seams.GATE_NAMES) == ""
    del layer.deepspeed_moe.gate.drop_tokens
    assert "has no drop_tokens" in seams.missing_of(layer.deepspeed_moe.gate, seams.GATE_NAMES)


def test_the_shared_memory_build_stays_away_on_a_cpu() -> None:
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


class SteppedEngine:
    """Parts of an engine that `reporting_model_step` reads; torch's own scaler skips steps and tells nobody."""

    def __init__(self, scaler: torch.amp.GradScaler | None, is_applied: bool = True) -> None:
        self.torch_autocast_z0_gradscaler, self._is_applied = scaler, is_applied
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)

    def _take_model_step(self, lr_kwargs: None = None) -> None:
        if self.torch_autocast_z0_gradscaler is not None:
            self.torch_autocast_z0_gradscaler.step(self.optimizer)
            self.torch_autocast_z0_gradscaler.update()

    def was_step_applied(self) -> bool:
        return self._is_applied


def test_a_step_that_torchs_loss_scaler_skips_counts_as_skipped() -> None:
    engine, told = SteppedEngine(torch.amp.GradScaler("cpu")), []
    take = step_seams.reporting_model_step(engine, engine._take_model_step, told.append)
    for factor in (1.0, float("inf"), 1.0):
        engine.torch_autocast_z0_gradscaler.scale(engine.weight.sum() * factor).backward()  # type: ignore[union-attr]
        take()
        engine.optimizer.zero_grad()
    assert told == [True, False, True] and engine.weight.tolist() == [-1.0, -1.0]


def test_a_step_that_the_engine_says_it_did_not_apply_counts_as_skipped() -> None:
    engine, told = SteppedEngine(None, is_applied=False), []
    take = step_seams.reporting_model_step(engine, engine._take_model_step, told.append)
    take()
    assert told == [False]


def test_deepspeeds_muon_compiles_at_its_first_call_and_not_in_ranks_that_never_use_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[str] = []

    def compile_(function: Any) -> Any:
        compiled.append(function.__name__)
        return function

    if importlib.util.find_spec(step_seams.MUON) is None:
        pytest.skip("this release has no Muon")
    monkeypatch.setattr(torch, "compile", compile_)

    def import_anew() -> None:
        for name in [name for name in sys.modules if name.startswith("deepspeed.runtime.zero.muon.")]:
            monkeypatch.delitem(sys.modules, name)

    import_anew()
    step_seams.import_muon_without_compiling()
    functions = sys.modules["deepspeed.runtime.zero.muon.original_muon"]
    assert step_seams.MUON in sys.modules and not compiled
    for _ in range(2):
        functions.zeropower_via_newtonschulz5(torch.eye(2), steps=1)
    assert compiled == ["zeropower_via_newtonschulz5"]
    import_anew()
    importlib.import_module(step_seams.MUON)
    assert len(compiled) > 1, "the control: as DeepSpeed imports it"
