"""AutoEP's experts from files into their stacks: the same as by DeepSpeed's way, without a second copy in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_moe_ep.engine.checkpoint.loading.stacked import PlacedExpert, StackedExperts
from tests.engine.checkpoint.live_bytes import LiveBytes
from tests.engine.checkpoint.test_memory import beside_own
from tests.engine.hooks.autoep_models import EXPERT_WIDTH, HIDDEN_SIZE, AutoEPJob, autoep_layers, make_engine
from tests.engine.hugging_face.tiny_models import ds_config, logits_of, make_model, train_one_step
from tests.ranks import run_ranks

FAMILIES = ("mixtral", "gpt_oss")  # AutoEP's stacks, and the package's layers of files with stacks
WIDE = {"intermediate_size": 2048}
ONE_WIDE = 4 * (3 * 32 * 2048 + 2 * 2048 + 32)  # bytes of an expert's matrices, and of gpt-oss's biases
WEIGHTS_OF_ONE = 3 * HIDDEN_SIZE * EXPERT_WIDTH * 4
ONE_EXPERT = 4 * WEIGHTS_OF_ONE  # weights, master weights and two moments, in fp32


def test_places_of_one_stack_that_are_stacked_again_are_that_stack() -> None:
    whole = torch.randn(3, 4, 5)

    def place(local: int, of: torch.Tensor = whole) -> PlacedExpert:
        placed = of[local].as_subclass(PlacedExpert)
        placed.whole = of
        return placed

    assert torch.stack([place(0), place(1), place(2)], dim=0) is whole
    assert torch.stack([place(0), place(1)]) is not whole, "a place is missing"
    assert torch.equal(torch.stack([place(1), whole[0]]), whole[[1, 0]]), "one is of elsewhere"
    assert place(0).dim() == 2 and torch.equal(place(2), whole[2])


def loaded(folder: Path) -> list[tuple[Any, ...]]:
    """Of each stage, without the callback and with it: whether the stacks became the saved ones, and bytes beside."""
    import ds_moe_ep
    from ds_moe_ep.engine.extensions.engine_extensions import EngineExtensions

    found = []
    for stage in (0, 1):
        job = AutoEPJob(ep_size=2, world_size=2, stage=stage)
        engine = make_engine(job)
        ds_moe_ep.attach_overlap(engine)
        train_one(engine)
        engine.save_checkpoint(str(folder / str(stage)))
        saved = _stacks(engine)
        for is_ours in (False, True):
            other = make_engine(AutoEPJob(ep_size=2, world_size=2, stage=stage, seed=7))
            ds_moe_ep.attach_overlap(other)
            extensions = EngineExtensions.of(other)
            if not is_ours:
                extensions.uninstall([each for each in extensions.callbacks if type(each) is StackedExperts])
            train_one(other)  # its moments are there before the load
            differ = not all(map(torch.equal, _stacks(other), saved))
            num_bytes = beside_own(other, folder / str(stage))
            found.append((stage, is_ours, differ, all(map(torch.equal, _stacks(other), saved)), num_bytes))
    return found


def train_one(engine: Any) -> None:
    ids = torch.arange(24).view(1, 24)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()


def _stacks(engine: Any) -> list[torch.Tensor]:
    layers = autoep_layers(engine).values()
    return [stack.detach().clone() for layer in layers for stack in layer.experts.parameters()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_autoeps_experts_load_bit_for_bit_with_at_most_one_in_memory_beside_a_ranks_own(tmp_path: Path) -> None:
    """The control: by DeepSpeed's way a rank's experts of both layers are."""
    for by_case in run_ranks(2, loaded, tmp_path, timeout_s=200):
        for stage, is_ours, differed, is_same, num_bytes in by_case:
            assert differed and is_same, (stage, is_ours)
            assert (num_bytes <= ONE_EXPERT) == is_ours, (stage, is_ours, num_bytes)
            assert is_ours or num_bytes >= 8 * WEIGHTS_OF_ONE


def exported(folder: Path) -> list[tuple[str, int, int]]:
    """Of each family the bytes beside a rank's own at most while it leaves, and while what has left comes back."""
    import ds_moe_ep

    ds_moe_ep.init_distributed(dist_backend="gloo", verbose=False)
    found = []
    for family in FAMILIES:
        if dist.get_rank() == 0:
            make_model(family, **WIDE).save_pretrained(folder / f"source_{family}")
        dist.barrier()
        if family == "mixtral":
            autoep = {"autoep_size": 2, "preset_model": family}
            engine = train_one_step(make_model(family, **WIDE), ds_config(1, autoep))
        else:
            engine = train_one_step(ds_moe_ep.from_pretrained(folder / f"source_{family}", 2), ds_config(1))
        before = logits_of(engine)
        with LiveBytes() as leaving:
            ds_moe_ep.save_pretrained(engine, folder / family)
        with LiveBytes() as coming:
            again = ds_moe_ep.from_pretrained(folder / family)
        own = sum(each.nbytes for each in (*again.parameters(), *again.buffers()))
        assert (logits_of(again) - before).abs().max() <= 2e-6 * before.abs().max(), family
        found.append((family, leaving.most, coming.most - own))
    return found


@pytest.mark.slow
def test_folders_are_written_and_read_with_at_most_one_expert_in_memory_beside_a_ranks_own(tmp_path: Path) -> None:
    """The control: all experts of a rank, or of a block, would be several of them."""
    for by_family in run_ranks(2, exported, tmp_path, timeout_s=200):
        for family, *beside in by_family:
            assert max(beside) <= ONE_WIDE + 4096, (family, beside)  # a gate's row or two stand beside it
