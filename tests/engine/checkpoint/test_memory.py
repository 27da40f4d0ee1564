"""A load has at most one expert's states in memory beside what the rank keeps, under its own ep_size and another.

Tensors are counted, not measured: what lived before, with what was made at most at one time, less what lives after.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.checkpoint.live_bytes import LiveBytes, living_bytes
from tests.ranks import RankPool

HIDDEN, WIDTH, NUM_EXPERTS = 16, 1024, 8
# An expert's weights, master weights and two moments, in fp32.
ONE_EXPERT = 4 * 4 * 2 * HIDDEN * WIDTH
Case = tuple[int, int]  # the stage of ZeRO, and the ep_size that loads what two ranks saved


class Experts(nn.Module):
    """Two MoE layers whose experts are nearly all of the model."""

    def __init__(self, ep_size: int) -> None:
        from ds_moe_ep import MoE

        super().__init__()
        knobs: dict[str, Any] = {"num_experts": NUM_EXPERTS, "ep_size": ep_size, "k": 2, "drop_tokens": False}
        narrow, wide = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.layers = nn.ModuleList(MoE(HIDDEN, nn.Sequential(wide, nn.GELU(), narrow), **knobs) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x.square().mean()


def make(stage: int, ep_size: int) -> Any:
    import ds_moe_ep

    ds_moe_ep.init_distributed(dist_backend="gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 10**9,
    }
    return ds_moe_ep.initialize(model=Experts(ep_size), config=config)[0]


def beside_own(engine: Any, folder: Path) -> int:
    """Bytes beside the rank's own at most while it loads."""
    before = living_bytes()
    with LiveBytes() as live:
        engine.load_checkpoint(str(folder))
    return before + live.most - living_bytes()


def each_beside_own(cases: Sequence[Case], folder: Path) -> list[tuple[int, int]]:
    """Of each case, bytes of a load and of one that reads files whole."""
    for stage in {stage for stage, _ in cases}:
        engine = make(stage, 2)
        engine.backward(engine(torch.ones(4, HIDDEN)))
        engine.step()
        engine.save_checkpoint(str(folder / str(stage)))
    found, load = [], torch.load
    for stage, ep_size in cases:
        engine = make(stage, ep_size)
        mapped = beside_own(engine, folder / str(stage))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch, "load", lambda *args, **options: load(*args, **{**options, "mmap": False}))
            found.append((mapped, beside_own(engine, folder / str(stage))))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("cases", [((1, 1), (1, 2)), pytest.param(((0, 1), (0, 2), (2, 1)), marks=pytest.mark.slow)])
def test_a_load_has_at_most_one_experts_states_beside_a_ranks_own(
    pool: RankPool, cases: Sequence[Case], tmp_path: Path
) -> None:
    """The control: files that are read whole are seen to lie in memory all at once."""
    for by_case in pool.run(2, each_beside_own, cases, tmp_path, timeout_s=120):
        for case, (mapped, whole) in zip(cases, by_case, strict=True):
            assert mapped <= ONE_EXPERT, (case, mapped)
            assert whole > 4 * ONE_EXPERT, (case, whole)
