"""LoRA adapters on experts through a checkpoint: loaded whole at another ep_size, and merged at export as peft merges.

2e-6 of the largest logit is the order of sums over two experts; a step of Adam blows a rounding up to 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ds_moe_ep
from ds_moe_ep.model.initialize import renumbered
from tests.engine.checkpoint.live_bytes import LiveBytes
from tests.engine.hugging_face.tiny_models import (
    NUM_EXPERTS,
    distance,
    ds_config,
    load,
    logits_of,
    make_model,
    token_ids,
)
from tests.ranks import RankPool

LOGITS, WEIGHTS = 2e-6, 2e-5
WIDTH, HIDDEN = 48, 32
AT_ONCE = 4 * (4 * WIDTH * HIDDEN)  # one expert's matrix: as it was, the adapters' part twice, and what is written
ADAPTED = 2 * 2 * (4 * WIDTH * HIDDEN)  # up and down, of one expert in two layers
FIRST, OTHER = 2, 4  # ep_sizes


@dataclass(frozen=True)
class Resumed:
    """Trained weights by their names over all ranks, and logits, of the run that went on and of what was loaded."""

    saved: tuple[dict[str, Tensor], Tensor]
    loaded: tuple[dict[str, Tensor], Tensor]
    went_on: dict[str, Tensor]
    resumed: dict[str, Tensor]
    without_moments: dict[str, Tensor]
    trained: Tensor  # logits of the resumed run
    most_bytes: int  # that lived at one time in the export


def adapted(source: Path, ep_size: int) -> Any:
    """The model of a folder with adapters on experts and attention, and a head that is trained whole."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=4, target_modules=["down", "up", "q_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    return get_peft_model(ds_moe_ep.from_pretrained(source, ep_size), lora)


def make_engine(source: Path, ep_size: int, stage: int, seed: int) -> Any:
    torch.manual_seed(100 * seed + dist.get_rank())
    model = adapted(source, ep_size)
    engine: Any = ds_moe_ep.initialize(model=model, config=ds_config(stage), model_parameters=list(model.parameters()))[
        0
    ]
    return engine


def step(engine: Any, number: int) -> dict[str, Tensor]:
    """One step of training, and the weights behind it."""
    engine.train()
    ids = token_ids(10 * number + dist.get_rank())
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    return trained_weights(engine)


def trained_weights(engine: Any) -> dict[str, Tensor]:
    layer = next(each for each in engine.module.modules() if isinstance(each, ds_moe_ep.MoE))
    num_local = layer.num_local_experts
    first = dist.get_rank() % layer.ep_size * num_local
    named = engine.module.named_parameters()
    return {
        renumbered(name, lambda local: first + local): parameter.detach().clone()
        for name, parameter in named
        if parameter.requires_grad
    }


def saved_and_loaded(folder: Path, stage: int) -> Resumed:
    ds_moe_ep.init_distributed(dist_backend="gloo", verbose=False)
    source, checkpoint = folder / "source", str(folder / "checkpoint")
    if dist.get_rank() == 0:
        make_model("mixtral").save_pretrained(source)
    dist.barrier()
    first = make_engine(source, FIRST, stage, seed=1)
    weights = step(first, 1)
    saved = weights, logits_of(first)
    first.save_checkpoint(checkpoint)
    went_on = step(first, 2)
    other = make_engine(source, OTHER, stage, seed=2)
    other.load_checkpoint(checkpoint)
    loaded = trained_weights(other), logits_of(other)
    resumed = step(other, 2)
    trained = logits_of(other)
    other.save_16bit_model(str(folder), "whole.bin")
    with LiveBytes() as live:
        ds_moe_ep.save_pretrained(other, folder / "merged")
    control = make_engine(source, OTHER, stage, seed=3)
    control.load_checkpoint(checkpoint, load_optimizer_states=False)
    return Resumed(saved, loaded, went_on, resumed, step(control, 2), trained, live.most)


def over_ranks(by_rank: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of all ranks; those that several have must be equal."""
    whole: dict[str, Tensor] = {}
    for theirs in by_rank:
        for name, weight in theirs.items():
            assert torch.equal(whole.setdefault(name, weight), weight), name
    return whole


def furthest(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert mine.keys() == theirs.keys()
    return max(float((mine[name] - weight).abs().max()) for name, weight in theirs.items())


def check(pool: RankPool, folder: Path, stage: int) -> None:
    by_rank: list[Resumed] = pool.run(4, saved_and_loaded, folder, stage, timeout_s=200)
    saved, loaded = (over_ranks([getattr(each, name)[0] for each in by_rank]) for name in ("saved", "loaded"))
    assert sum("lora_" in name and "deepspeed_experts" in name for name in saved) == 2 * NUM_EXPERTS * 2 * 2
    assert furthest(loaded, saved) == 0, "whole, bit for bit"
    for each in by_rank:
        assert distance(each.loaded[1], each.saved[1]) <= LOGITS, "frozen experts too"
    went_on, resumed, without = (
        over_ranks([getattr(each, name) for each in by_rank]) for name in ("went_on", "resumed", "without_moments")
    )
    assert furthest(resumed, went_on) < WEIGHTS
    assert furthest(without, went_on) > 100 * WEIGHTS, "the control: moments that are not loaded are seen"
    most_bytes = max(each.most_bytes for each in by_rank)
    assert most_bytes <= AT_ONCE < NUM_EXPERTS // OTHER * ADAPTED, ("a matrix at a time, not a rank's", most_bytes)
    merged, reference = load(folder / "merged"), adapted(folder / "source", 1)
    with_adapters = {name: value.clone() for name, value in reference.state_dict().items()}
    reference.load_state_dict(torch.load(folder / "whole.bin"))
    for each in by_rank:
        assert distance(each.trained, logits_of(merged)) <= LOGITS
    assert distance(logits_of(reference.merge_and_unload()), logits_of(merged)) <= LOGITS, "as peft merges"
    other = adapted(folder / "source", 1)
    other.load_state_dict(with_adapters)
    assert distance(logits_of(other.merge_and_unload()), logits_of(merged)) > 1e-2, "the control: other adapters"


@pytest.mark.parametrize("stage", [2, pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow)])
def test_adapters_load_whole_at_another_ep_size_and_leave_merged(pool: RankPool, tmp_path: Path, stage: int) -> None:
    check(pool, tmp_path, stage)
