"""Refusals of a conversion before it writes anything: damaged checkpoints, other models, folders that exist."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ds_moe_ep.engine.checkpoint.convert.prepare import prepare
from ds_moe_ep.errors import MoEError
from tests.engine.checkpoint.checkpoints import TAG, converted, target_config, write_experts
from tests.parallel.training_runs import Run

RUN = Run(top_k=2, model={"num_layers": 2, "shared_expert_width": 8})
Folder = pathlib.Path


def change(path: Folder, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edits what a file holds."""
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


class Crafted:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, target: Folder) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def main_file(folder: Folder) -> Folder:
    return folder / TAG / "mp_rank_00_model_states.pt"


def expert_file(folder: Folder) -> Folder:
    return folder / TAG / "layer_1_expert_2_mp_rank_00_model_states.pt"


def add_bias(state: dict[str, Any]) -> None:
    state["module"]["layers.0.feed_forward.deepspeed_moe.gate.balance.steps_E"] = torch.zeros(4)


def cut_off(path: Folder) -> None:
    path.write_bytes(path.read_bytes()[:-200])


Damage = Callable[[Folder], Any]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a file is missing": (
        lambda folder: expert_file(folder).unlink(),
        r"1 files are missing, layer_1_expert_2_mp_rank_00_model_states\.pt first; complete the folder",
    ),
    "the main file is missing": (lambda folder: main_file(folder).unlink(), r"files are missing, mp_rank_00_"),
    "a file is left over": (
        lambda folder: shutil.copy(expert_file(folder), folder / TAG / "layer_2_expert_0_mp_rank_00_model_states.pt"),
        r"1 files are left over, layer_2_expert_0_",
    ),
    "a file is cut off": (lambda folder: cut_off(expert_file(folder)), r"layer_1_expert_2_.*is cut off.*save"),
    "a file is no checkpoint": (
        lambda folder: shutil.make_archive(str(expert_file(folder)), "zip", folder, "latest")
        and expert_file(folder).with_name(expert_file(folder).name + ".zip").replace(expert_file(folder)),
        r"layer_1_expert_2_.*cannot be read",
    ),
    "a file holds no weights": (
        lambda folder: torch.save([1, 2], expert_file(folder)),
        r"layer_1_expert_2_.*holds a list and no weights",
    ),
    "a weight is missing": (
        lambda folder: change(main_file(folder), lambda state: state["module"].pop("head.weight")),
        r"mp_rank_00_model_states\.pt: lacks 1 weights, head\.weight first: another model",
    ),
    "a weight is left over": (
        lambda folder: change(main_file(folder), add_bias),
        r"has left over 1 weights, layers\.0\..*steps_E first: another model, or another moe_ep\.balance, was saved",
    ),
    "a weight is no tensor": (
        lambda folder: change(main_file(folder), lambda state: state["module"].update({"head.weight": "lost"})),
        r"head\.weight is str, and the model",
    ),
    "files of both layouts": (
        lambda folder: torch.save({}, folder / TAG / "layer_00-model_00-model_states.pt"),
        r"holds files of two layouts; name a folder that engine\.save_checkpoint wrote",
    ),
    "files of no layout": (
        lambda folder: [path.unlink() for path in (folder / TAG).glob("layer_*")],
        r"holds files of no known layout",
    ),
    "no file latest": (
        lambda folder: (folder / "latest").unlink(),
        rf"latest: cannot be read.*choose a tag of {TAG}, or name the folder",
    ),
    "latest names another tag": (
        lambda folder: (folder / "latest").write_text("step9"),
        rf"step9: no such folder; choose a tag of {TAG}",
    ),
    "latest is empty": (
        lambda folder: (folder / "latest").write_text(""),
        rf"latest: names no tag; choose a tag of {TAG}, or name",
    ),
    "latest names what a kill has left": (
        lambda folder: (
            shutil.copytree(folder / TAG, folder / "step9.saving"),
            (folder / "latest").write_text("step9.saving"),
        ),
        rf"step9\.saving: was not saved to the end; choose a tag of {TAG}, or name",
    ),
    "no such folder": (shutil.rmtree, r"latest: cannot be read.*; name the folder that was given to"),
}  # fmt: skip


def assert_refused(tmp_path: Folder, source: Folder, config: dict[str, Any], message: str) -> None:
    """A conversion is refused with this message, and writes nothing."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MoEError, match=message) as error:
        prepare(source, tmp_path / "target", config)
    assert ";" in str(error.value), "a way out follows the rule"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_and_nothing_is_written(tmp_path: Folder, damage: str) -> None:
    write_experts(tmp_path / "experts", RUN)
    harm, message = DAMAGES[damage]
    harm(tmp_path / "experts")
    assert_refused(tmp_path, tmp_path / "experts", target_config(RUN, pipeline=True), message)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"model": {"expert_width": 64}}, r"fc1\.weight is \(32, 32\), and the model of the ds_config has \(64, 32\)"),
        ({"model": {"hidden_size": 64}}, r"embedding\.weight is \(32, 32\), .* has \(32, 64\)"),
        ({"model": {"expert": "swiglu"}}, r"lacks 6 weights, .*shared\.down\.weight first"),
        ({"model": {"num_layers": 4}}, r"8 files are missing, layer_2_expert_0_"),
        ({"num_experts": 8}, r"8 files are missing, layer_0_expert_4_"),
        ({"num_experts": 2}, r"4 files are left over, layer_0_expert_2_"),
    ],
)
@pytest.mark.parametrize("pipeline", [True, False])
def test_another_model_than_the_saved_one_is_refused(
    tmp_path: Folder, knobs: dict[str, Any], message: str, pipeline: bool
) -> None:
    write_experts(tmp_path / "experts", RUN)
    model = RUN.model | knobs.get("model", {})
    other = Run(top_k=2, ep_size=2, model=model, num_experts=knobs.get("num_experts", 4))
    assert_refused(tmp_path, tmp_path / "experts", target_config(other, pipeline=pipeline), message)


def to_half(state: dict[str, Any]) -> None:
    state["layer.attention.qkv.weight"] = state["layer.attention.qkv.weight"].half()


def test_a_crafted_pickle_does_nothing(tmp_path: Folder) -> None:
    write_experts(tmp_path / "experts", RUN)
    made = tmp_path / "made"
    change(main_file(tmp_path / "experts"), lambda state: state.update({"client_note": Crafted(made)}))
    message = r"mp_rank_00_model_states\.pt: holds posix\.mkdir, and making it could run code of the file's"
    assert_refused(tmp_path, tmp_path / "experts", target_config(RUN, pipeline=True), message)
    assert not made.exists()
    torch.load(main_file(tmp_path / "experts"), weights_only=False)
    assert made.exists(), "the control: it would have"


PIPELINE_DAMAGES: dict[str, tuple[Damage, str]] = {
    "shares of two types": (
        lambda folder: change(folder / TAG / "layer_02-model_01-model_states.pt", to_half),
        r"layer_02-model_01-.*qkv\.weight is torch\.float16, another rank's share torch\.float32",
    ),
    "a rank is missing": (
        lambda folder: (folder / TAG / "layer_02-model_01-model_states.pt").unlink(),
        r"1 files are missing, layer_02-model_01-",
    ),
    "shares of three ranks": (
        lambda folder: [
            shutil.copy(path, str(path).replace("model_01-", "model_02-"))
            for path in (folder / TAG).glob("layer_*model_01-*")
        ],
        r"was saved by tp_size=3, which the model of the ds_config cannot have .*num_heads=4",
    ),
}


@pytest.mark.parametrize("damage", PIPELINE_DAMAGES)
def test_a_damaged_checkpoint_of_a_pipeline_is_refused(tmp_path: Folder, damage: str) -> None:
    folder = converted(tmp_path, RUN)
    harm, message = PIPELINE_DAMAGES[damage]
    harm(folder)
    assert_refused(tmp_path, folder, target_config(RUN, pipeline=False), message)


@pytest.mark.parametrize(("name", "message"), [("target", "target: exists"), ("target.part", r"target\.part: exists")])
def test_what_is_there_already_is_not_overwritten(tmp_path: Folder, name: str, message: str) -> None:
    write_experts(tmp_path / "experts", RUN)
    (tmp_path / name).mkdir()
    assert_refused(tmp_path, tmp_path / "experts", target_config(RUN, pipeline=True), message)


def test_a_ds_config_without_a_model_and_one_that_cannot_be_cut_are_refused(tmp_path: Folder) -> None:
    write_experts(tmp_path / "experts", RUN)
    config = target_config(RUN, pipeline=True)
    without = {"moe_ep": {"num_experts": 4, "layout": {"tp_size": 2}}}
    assert_refused(tmp_path, tmp_path / "experts", without, r"moe_ep\.model=null: a conversion needs the model")
    config["moe_ep"]["layout"] = {"tp_size": 8}
    assert_refused(tmp_path, tmp_path / "experts", config, r"tp_size=8 does not divide moe_ep\.model\.num_heads=4")
