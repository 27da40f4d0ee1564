"""Routing that a folder's configuration decides: no section changes it, and what routes otherwise never leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch.distributed as dist

import ds_moe_ep
from ds_moe_ep.engine.hugging_face.blocks import blocks_of
from ds_moe_ep.engine.hugging_face.families import FAMILIES
from ds_moe_ep.engine.hugging_face.routing import check_routing
from ds_moe_ep.errors import ConfigError, ExportError, MoEError
from tests.engine.hugging_face.tiny_models import distance, ds_config, load, logits_of, make_model, train_one_step
from tests.ranks import RankPool


def told_by(attempt: Callable[..., object], *args: Any, **options: Any) -> str:
    """The error of a call; "" where there is none."""
    try:
        attempt(*args, **options)
    except MoEError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def contradicted(folder: Path) -> list[str]:
    """Errors of engines of both doors whose section routes otherwise than the folder; the last section does not."""
    if dist.get_rank() == 0:
        make_model("mixtral").save_pretrained(folder / "source")
    dist.barrier()
    told = []
    for start in (ds_moe_ep.initialize, deepspeed.initialize):
        for section in ({"top_k": 1}, {"score": "sigmoid"}, {"route_scale": 2.0}, {"top_k": 2, "schedule": "peers"}):
            model = ds_moe_ep.from_pretrained(folder / "source", 2)
            config = ds_config(1) | {"moe_ep": section}
            told.append(told_by(start, model=model, config=config, model_parameters=list(model.parameters())))
    return told


def kept_bias(folder: Path) -> list[tuple[str, float]]:
    """Of sections for a router that chooses with a bias: the error, or how far logits are from those of the folder."""
    source = make_model("deepseek_v3")
    if dist.get_rank() == 0:
        source.save_pretrained(folder / "biased")
    dist.barrier()
    found = []
    for section in ({"balance": "aux_loss"}, {"balance": "bias_and_aux_loss"}, {"bias_step": 0.1, "balance": "bias"}):
        model = ds_moe_ep.from_pretrained(folder / "biased", 2)
        config = ds_config(1) | {"moe_ep": section}
        error = told_by(ds_moe_ep.initialize, model=model, config=config, model_parameters=list(model.parameters()))
        found.append((error, -1.0 if error else distance(logits_of(model), logits_of(source))))
    return found


def moved_bias(folder: Path) -> list[tuple[str, str, float]]:
    """Of a bias that stands still, and one that moves: errors of both writers; the distance of the export's logits."""
    found = []
    for step in (0.0, 0.5):
        model = ds_moe_ep.from_pretrained(folder / "source", 2, balance="bias", bias_step=step)
        engine = train_one_step(model, ds_config(1))
        handle = ds_moe_ep.attach_overlap(engine)
        logits, out = logits_of(engine), folder / f"step_{step}"
        of_folder = told_by(ds_moe_ep.save_pretrained, engine, out)
        of_file = told_by(engine.save_16bit_model, str(folder), f"{step}.bin")
        handle.remove()
        found.append((of_folder, of_file, distance(logits_of(load(out)), logits) if out.exists() else -1.0))
    return found


def all_three(folder: Path) -> tuple[list[str], list[tuple[str, float]], list[tuple[str, str, float]]]:
    return contradicted(folder), kept_bias(folder), moved_bias(folder)


def test_what_routes_otherwise_than_the_folder_neither_trains_nor_leaves(pool: RankPool, tmp_path: Path) -> None:
    for told, kept, biased in pool.run(2, all_three, tmp_path, timeout_s=150):
        assert "balance='aux_loss': the router of the model's folder chooses with a bias; write 'bias'" in kept[0][0]
        assert all(error == "" and 0 <= far <= 2e-6 for error, far in kept[1:]), kept
        for top_k, score, scale, same in (told[:4], told[4:]):
            assert "top_k=1: config.json of the model's folder decides it (2)" in top_k
            assert "score='sigmoid'" in score and "('softmax')" in score
            assert "route_scale=2.0" in scale and top_k.startswith("ConfigError")
            assert same == "", "the control: a section that says the same"
        still, moved = biased
        assert still[:2] == ("", "") and 0 <= still[2] <= 2e-6, "the control: a bias of zeros changes nothing"
        for error in moved[:2]:
            assert error.startswith("ExportError") and "has moved a routing bias" in error
    assert not (tmp_path / "step_0.5").exists() and not (tmp_path / "0.5.bin").exists()


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_every_knob_on_which_logits_depend_is_held_at_an_export(family: str, tmp_path: Path) -> None:
    make_model(family).save_pretrained(tmp_path)
    model: Any = ds_moe_ep.from_pretrained(tmp_path)
    (block, *_) = blocks_of(model, FAMILIES[family])
    check_routing(model.config, block)
    own = block.layer.config
    others: dict[str, Any] = {
        "score": "softmax" if own.score == "sigmoid" else "sigmoid", "renormalize": not own.renormalizes,
        "route_scale": 7.0, "eval_capacity_factor": 1.0, "force_even": True, "n_group": 4,
    }  # fmt: skip
    for name, value in others.items():
        block.layer.decided = {}
        block.layer.configure(ds_moe_ep.MoEConfig(**{**vars(own), name: value}))
        with pytest.raises(ExportError, match=f"moe_ep.{name}={value!r}, and a folder of {family} is read with"):
            check_routing(model.config, block)
    block.layer.configure(ds_moe_ep.MoEConfig(**{**vars(own), "noise": "jitter", "capacity_factor": 1.0}))
    check_routing(model.config, block)  # of training alone


def test_shards_are_sized_in_numbers(tmp_path: Path) -> None:
    from ds_moe_ep.engine.hugging_face.export import cut

    with pytest.raises(ConfigError, match="max_shard_bytes='5GB': a shard holds one byte or more"):
        cut([], "5GB")  # type: ignore[arg-type]


def written_by_one_rank(folder: Path) -> Any:
    """Logits of an engine whose ranks hold all experts each, behind a model file of its own."""
    model = ds_moe_ep.from_pretrained(folder / "whole", 1)
    engine = train_one_step(model, ds_config(1))
    handle = ds_moe_ep.attach_overlap(engine)
    engine.save_16bit_model(str(folder), "whole.bin")
    handle.remove()
    return logits_of(engine)


def test_a_file_of_ranks_with_all_experts_has_the_familys_names_too(pool: RankPool, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    make_model("mixtral").save_pretrained(tmp_path / "whole")
    before = logits_of(load(tmp_path / "whole"))
    found = pool.run(2, written_by_one_rank, tmp_path, timeout_s=100)
    state = {name: each.clone() for name, each in torch.load(tmp_path / "whole.bin").items()}
    save_file(state, tmp_path / "whole/model.safetensors", {"format": "pt"})
    for logits in found:
        assert distance(logits_of(load(tmp_path / "whole")), logits) <= 2e-6
        assert distance(before, logits) > 1e-3, "the control: the engine was trained"
