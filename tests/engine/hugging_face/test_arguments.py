"""Arguments that programs pass to transformers' from_pretrained: a meaning here, or a refusal by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ds_moe_ep
from ds_moe_ep.engine.hugging_face.arguments import HOLD_ANYWAY, REFUSED
from ds_moe_ep.errors import ConfigError
from tests.engine.hugging_face.tiny_models import distance, logits_of, make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of bf16 weights, which config.json says."""
    folder = tmp_path_factory.mktemp("olmoe")
    make_model("olmoe").bfloat16().save_pretrained(folder)
    yield folder


def test_a_type_of_weights_is_named_as_in_transformers(folder: Path) -> None:
    for asked, expected in (
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"dtype": torch.float32, "torch_dtype": "float32"}, torch.float32),
    ):
        model = ds_moe_ep.from_pretrained(folder, **asked)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}, asked


def test_without_a_type_in_the_configuration_that_of_the_files_counts(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    values = json.loads((folder / "config.json").read_text())
    del values["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    weights = load_file(folder / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float32):
        save_file({name: each.to(dtype) for name, each in weights.items()}, tmp_path / "model.safetensors")
        expected = AutoModelForCausalLM.from_pretrained(tmp_path).dtype
        assert ds_moe_ep.from_pretrained(tmp_path).dtype == dtype == expected
    save_file({name: each.to(torch.float8_e4m3fn) for name, each in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"the files' first weights=torch.float8_e4m3fn: .*pass dtype="):
        ds_moe_ep.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"dtype": "bfloat"}, r"from_pretrained\(dtype='bfloat'\): .* did you mean 'bfloat16'\?"),
        ({"dtype": "nonsense!"}, "known types: auto, bfloat16, float16, float32, float64"),
        ({"dtype": torch.int8}, r"dtype=torch.int8\): .* choose one of torch.float32, .*or 'auto'"),
        ({"torch_dtype": 16}, r"from_pretrained\(torch_dtype=16\)"),
        ({"dtype": {"": "float16"}}, "is no type of weights that train here"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "two names of one argument; give one"),
        ({"schedul": "peers"}, r"from_pretrained\(schedul='peers'\): .* did you mean 'schedule'\?"),
        ({"attn_implementaton": "eager"}, "did you mean 'attn_implementation'"),
        (
            {"use_cache": True},
            r"use_cache=True\): belongs to config.json, where it is False; .* pass config=AutoConfig",
        ),
        ({"config": "here"}, r"config='here'\): no configuration of transformers"),
        ({"device_map": "auto"}, r"device_map='auto'\): ranks share the experts by ep_size, .* leave it out"),
        ({"revision": "v2"}, r"revision='v2'\): .*huggingface_hub.snapshot_download\("),
        ({"token": "hf_x"}, "nothing is downloaded"),
        ({"load_in_4bit": True}, "no layer here trains weights of fewer bits"),
        ({"state_dict": {"w" * 300: 1}}, r"state_dict=\{'w{75}\.\.\.\): weights come from the folder's safetensors"),
        ({"output_loading_info": True}, "a tensor too few or too many is an error here; leave it out"),
    ],
)
def test_arguments_without_a_meaning_here_are_refused_by_name(folder: Path, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ds_moe_ep.from_pretrained(folder, **asked)


def test_arguments_that_ask_for_nothing_change_nothing(folder: Path) -> None:
    """Programs pass all of transformers' own defaults on."""
    passed: dict[str, Any] = {**dict.fromkeys(REFUSED), **dict.fromkeys(HOLD_ANYWAY, True)}
    passed |= {"revision": "main", "output_loading_info": False, "attn_implementation": None, "config": None}
    expected = logits_of(ds_moe_ep.from_pretrained(folder))
    assert torch.equal(logits_of(ds_moe_ep.from_pretrained(folder, **passed)), expected)
    assert not torch.equal(logits_of(ds_moe_ep.from_pretrained(folder, dtype=torch.float32)), expected)  # the control


def test_a_configuration_and_an_attention_of_the_callers_are_used(folder: Path) -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    config.output_router_logits = True
    plain = ds_moe_ep.from_pretrained(folder, dtype="float32")
    turned = ds_moe_ep.from_pretrained(folder, dtype="float32", config=config)
    assert distance(logits_of(turned), logits_of(plain)) > 1e-3
    assert config.output_router_logits, "the caller's stays as it is"
    eager = ds_moe_ep.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    assert eager.config._attn_implementation == "eager" != plain.config._attn_implementation
    assert distance(logits_of(eager), logits_of(plain)) <= 2e-6
