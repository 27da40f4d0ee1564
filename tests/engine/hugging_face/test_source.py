"""Descriptions of a source in its export: keys of config.json that transformers itself drops, and generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ds_moe_ep
from ds_moe_ep.engine.hugging_face.export import describe
from ds_moe_ep.errors import EngineError
from tests.engine.hugging_face.described import GENERATION, as_on_the_hub, differences
from tests.engine.hugging_face.tiny_models import FAMILIES, make_model


def described(model: Any, folder: Path) -> Path:
    folder.mkdir()
    describe(model, folder)
    return folder


def test_an_export_says_all_that_its_source_says(tmp_path: Path) -> None:
    from transformers import AutoConfig

    for family in FAMILIES:
        source, out = tmp_path / family, tmp_path / f"{family}_out"
        make_model(family).save_pretrained(source)
        values = as_on_the_hub(source, family)
        model = ds_moe_ep.from_pretrained(source)
        assert model.config.output_router_logits is False, "its loss would read blocks that are gone"
        described(model, out)
        assert differences(values, out).keys() <= {"transformers_version", "auto_map"}, family
        assert json.loads((out / "generation_config.json").read_text()).items() >= GENERATION.items(), family
        read, expected = (AutoConfig.from_pretrained(each).to_dict() for each in (out, source))
        for name in ("_name_or_path", "auto_map"):
            read.pop(name, None), expected.pop(name, None)
        assert read == expected, family
        model.config.save_pretrained(tmp_path / f"{family}_plain")  # the control: transformers alone
        assert {"rope_theta", "torch_dtype"} <= differences(values, tmp_path / f"{family}_plain").keys(), family


def test_older_keys_leave_an_export_where_they_would_speak_against_the_model(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "source")
    values = as_on_the_hub(tmp_path / "source", "mixtral")
    model = ds_moe_ep.from_pretrained(tmp_path / "source", dtype="bfloat16")
    out = described(model, tmp_path / "typed")
    assert differences(values, out)["torch_dtype"] == ("float32", "bfloat16"), "of what was written"
    assert "rope_theta" not in differences(values, out)
    model.config.rope_parameters["rope_theta"] = 5.0
    out = described(model, tmp_path / "changed")
    assert differences(values, out)["rope_theta"] == (20000.0, None)
    assert json.loads((out / "config.json").read_text())["rope_parameters"]["rope_theta"] == 5.0


def test_a_model_of_transformers_own_loading_has_its_sources_keys_as_long_as_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    make_model("olmoe").save_pretrained(tmp_path / "source")
    values = as_on_the_hub(tmp_path / "source", "olmoe")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    model.config.output_router_logits = False  # by its user
    assert differences(values, described(model, tmp_path / "out")).keys() == {
        "transformers_version", "output_router_logits"
    }  # fmt: skip
    (tmp_path / "source/config.json").write_text("{")
    assert "rope_theta" in differences(values, described(model, tmp_path / "gone"))
    monkeypatch.chdir(tmp_path / "out")
    assert "rope_theta" not in json.loads(
        (described(make_model("olmoe"), tmp_path / "new") / "config.json").read_text()
    )


def test_generation_settings_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    make_model("olmoe").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(EngineError, match=r"generation_config.json: cannot be read .*; mend or remove it"):
        ds_moe_ep.from_pretrained(tmp_path)
