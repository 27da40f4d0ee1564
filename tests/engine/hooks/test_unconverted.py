"""Blocks of experts that AutoEP leaves as they are: the error names them, and what it says to set converts them."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hooks.unconverted import UnconvertedBlock, blocks_of, options_of, pattern_of, refuse_unconverted
from ds_moe_ep.errors import EngineError
from tests.ranks import RankPool

needs_autoep = pytest.mark.skipif(not seams.has("AutoEP"), reason="this release of DeepSpeed has no AutoEP")
# Families that no preset of AutoEP knows, and what names them to it; the last two it computes as they are.
FAMILIES: dict[str, dict[str, str]] = {
    "gpt_oss": {"moe_layer_pattern": r"model\.layers\.\d+\.mlp", "router_pattern": "router"},
    "llama4_text": {"moe_layer_pattern": r"model\.layers\.\d+\.feed_forward", "router_pattern": "router"},
    "phimoe": {"moe_layer_pattern": r"model\.layers\.\d+\.mlp", "router_pattern": "router"},
    "jamba": {"moe_layer_pattern": r"model\.layers\.\d+\.feed_forward", "router_pattern": "router"},
    "granitemoe": {"moe_layer_pattern": r"model\.layers\.\d+\.block_sparse_moe", "router_pattern": "router"},
}
IDS = torch.arange(24)[None] % 60


class Experts(nn.Module):
    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 32, 8))
        self.down_proj = nn.Parameter(torch.randn(num_experts, 8, 16))


class Block(nn.Module):
    """A block as Hugging Face's models have them; or its experts as a list."""

    def __init__(self, num_experts: int = 4, router: str = "gate", as_list: bool = False) -> None:
        super().__init__()
        self.add_module(router, nn.Linear(8, num_experts, bias=False))
        listed = nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 8) for name in "w1 w2 w3".split()}) for _ in "abcd")
        self.experts = listed if as_list else Experts(num_experts)


def test_blocks_are_found_by_their_structure_and_dense_modules_are_none() -> None:
    model = nn.Sequential(Block(), nn.Linear(8, 8), Block(router="wg", as_list=True), nn.Conv1d(4, 4, 3))
    found = [(block.name, block.experts, block.router, block.num_experts) for block in blocks_of(model)]
    assert found == [("0", "experts", "gate", 4), ("2", "experts", "wg", 4)]
    named = options_of(blocks_of(model)[1:], None)
    assert named == {
        "moe_layer_pattern": r"\d+", "router_pattern": "wg", "expert_w1": "w1", "expert_w2": "w2", "expert_w3": "w3"
    }  # fmt: skip


def test_a_pattern_matches_all_its_names_and_others_that_differ_in_numbers_alone() -> None:
    pattern = pattern_of(["model.layers.0.mlp", "model.layers.11.mlp", "mtp.mlp"])
    assert all(re.fullmatch(pattern, name) for name in ("model.layers.7.mlp", "mtp.mlp"))
    assert not any(re.fullmatch(pattern, name) for name in ("model.layers.7.mlp.experts", "modelxlayers.7.mlp"))


class Converted(Block):
    _is_autoep_layer = True


@needs_autoep
def test_a_model_of_which_a_part_is_left_is_refused_unless_the_section_says_so() -> None:
    model = nn.ModuleDict({"a": Converted(), "b": Block()})
    section = {"enabled": True, "autoep_size": 2}
    with pytest.raises(EngineError, match=r'converted 1 layers .* left b as they were.*"a\|b" for all.* or to "a" to'):
        refuse_unconverted(model, {"expert_parallel": section})
    refuse_unconverted(model, {"expert_parallel": {**section, "moe_layer_pattern": "a"}})
    refuse_unconverted(model, {"expert_parallel": {**section, "enabled": False}})
    refuse_unconverted(model, {})


@needs_autoep
def test_a_model_without_blocks_is_told_the_presets_and_the_patterns() -> None:
    with pytest.raises(EngineError, match=r"experts and a router as children.*moe_layer_pattern.*preset_model"):
        refuse_unconverted(nn.Linear(2, 2), {"expert_parallel": {"enabled": True}})


def test_a_release_without_autoep_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "has", lambda name: False)
    with pytest.raises(EngineError, match=r"has no AutoEP: pip install 'deepspeed>=0\.19\.8'"):
        refuse_unconverted(Block(), {"expert_parallel": {"enabled": True}})


@needs_autoep
def test_every_option_that_is_named_is_one_of_autoeps() -> None:
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig

    known = {field.name for field in dataclasses.fields(AutoEPConfig)}
    said = "moe_layer_pattern router_pattern expert_pattern expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr"
    assert known >= {*said.split(), "preset_model", "score_func", "route_norm", "score_apply"}


def tiny(family: str) -> nn.Module:
    """A tiny model of a family, the same on every rank."""
    import transformers

    base = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False}
    base |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "intermediate_size": 96, "pad_token_id": 0}
    own: dict[str, dict[str, Any]] = {
        "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        "llama4_text": {"head_dim": 16, "num_local_experts": 4, "interleave_moe_layer_step": 1},
        "phimoe": {"num_local_experts": 4},
        "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_expand": 1},
        "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    }
    config = transformers.AutoConfig.for_model(family, **base, **own[family])
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def start(model: nn.Module, section: dict[str, Any], door: str) -> Any:
    import deepspeed

    import ds_moe_ep

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
        "expert_parallel": {"enabled": True, "autoep_size": dist.get_world_size(), **section},
    }
    parameters = list(model.parameters())
    if door == "initialize":
        config["moe_ep"] = {"attach": True}
        return ds_moe_ep.initialize(model=model, config=config, model_parameters=parameters)[0]
    engine = deepspeed.initialize(model=model, config=config, model_parameters=parameters)[0]
    ds_moe_ep.attach_overlap(engine)
    return engine


def as_it_says(family: str) -> tuple[str, dict[str, Any]]:
    """The error of a family that no preset knows, at the door of its turn, and the section that it names."""
    door = "initialize" if len(family) % 2 else "attach_overlap"
    try:
        start(tiny(family), {}, door)
    except EngineError as error:
        said = re.search(r'with ("expert_parallel": \{.*?\}), or the family', str(error))
        return str(error), json.loads(f"{{{said[1]}}}")["expert_parallel"] if said else {}
    return "nothing was refused", {}


def follow_the_errors() -> tuple[dict[str, tuple[str, dict[str, Any]]], dict[str, float]]:
    """Errors of each family, and how far the converted and hooked models are from Hugging Face's own."""
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    seams.init_distributed(dist_backend="gloo", verbose=False)
    told = {family: as_it_says(family) for family in FAMILIES}
    off = {}
    for family, extra in (("granitemoe", {}), ("jamba", {"route_norm": False})):
        expected = logits(tiny(family))
        engine = start(tiny(family), {**told[family][1], **extra}, "initialize")
        assert len(engine.moe_ep_layers) == sum(seams.is_autoep_layer(module) for module in engine.module.modules()) > 0
        off[family] = float((logits(engine.module.eval()) - expected).abs().max() / expected.abs().max())
    return told, off


@needs_autoep
def test_the_error_names_the_family_to_autoep_and_what_it_says_converts_the_model(pool: RankPool) -> None:
    """Logits to 2e-6 of the largest: products in another order."""
    for told, off in pool.run(2, follow_the_errors, timeout_s=150):
        for family, options in FAMILIES.items():
            message, section = told[family]
            assert f"converted no layer of {type(tiny(family)).__name__} (model_type {family!r})" in message
            assert "preset_model (one of mixtral" in message
            assert {name: section.get(name) for name in options} == options, message
        assert "gate_up_proj_bias, which AutoEP leaves out" in told["gpt_oss"][0]
        assert max(off.values()) <= 2e-6


def test_the_first_name_of_a_configuration_that_can_be_top_k_is_said() -> None:
    from types import SimpleNamespace

    config = SimpleNamespace(moe_top_k=2, second_topk=4)
    block = UnconvertedBlock("layers.0", "experts", "gate", 4, frozenset())
    assert options_of([block], config)["top_k_attr"] == "moe_top_k"
