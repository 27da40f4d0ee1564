"""Examples that hook DeepSpeed's own MoE, one in the style of Megatron: the same losses with the hooks and without."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.examples.spoilt import losses_of, spoilt
from tests.examples.training_scripts import EXAMPLES
from tests.ranks import RankPool


def losses(is_hooked: bool, spoils: bool = False, num_steps: int = 3) -> list[float]:
    """This rank's losses; spoilt where one expert of the last rank is another one."""
    import deepspeed

    import ds_moe_ep
    from ds_moe_ep.model.text import load_corpus, training_batch

    sys.path.insert(0, str(EXAMPLES))
    example: Any = importlib.import_module("hook_megatron_moe")
    torch.manual_seed(0)
    ds_moe_ep.init_distributed(verbose=False)
    model = example.GPTModel(ep_size=dist.get_world_size())
    groups = deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer(
        [{"name": "all", "params": list(model.parameters())}]
    )
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=example.DS_CONFIG)
    if spoils and dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            next(model.layers[0].mlp.deepspeed_moe.experts.parameters()).mul_(2)
    text, size, found = load_corpus().train, (example.DS_CONFIG["train_micro_batch_size_per_gpu"], 64), []
    with ds_moe_ep.attach_overlap(engine, {"schedule": "peers", "node_size": 1}) if is_hooked else nullcontext():
        for step in range(num_steps):
            batch = training_batch(text, size, seed=0, step=step, first=dist.get_rank() * 4, num_sequences=8)
            loss = engine(*batch)
            engine.backward(loss)
            engine.step()
            found.append(float(loss))
    return found


def test_a_megatron_style_model_trains_to_the_same_losses_with_the_hooks_and_to_others_with_another_expert(
    pool: RankPool,
) -> None:
    """top-1 outputs are the same bits; a step of Adam moves by the last bits of its gradient: 2e-6 of the loss."""
    plain, hooked = (pool.run(2, losses, is_hooked) for is_hooked in (False, True))
    for mine, expected in zip(hooked, plain, strict=True):
        assert mine[0] == expected[0]
        assert mine == pytest.approx(expected, rel=2e-6)
    spoilt = pool.run(2, losses, True, True, 1)
    assert abs(hooked[0][0] - spoilt[0][0]) > 1e-5, "the control: an expert of the other rank"


def printed_by_the_plain_example() -> dict[str, str]:
    """Output of rank 0 without hooks, with them, and with hooks that bring results to the wrong tokens."""
    sys.path.insert(0, str(EXAMPLES))
    example: Any = importlib.import_module("hook_deepspeed_moe")
    printed = {}
    for name, words in (("plain", ["--no-overlap"]), ("hooked", []), ("spoilt", ["--steps", "20"])):
        with spoilt(name == "spoilt"), contextlib.redirect_stdout(io.StringIO()) as output:
            example.train(example.parse_arguments(["--steps", "40", *words]))
        printed[name] = output.getvalue()
    return printed


def test_a_plain_model_trains_to_the_same_losses_with_the_hooks(pool: RankPool) -> None:
    printed = pool.run(2, printed_by_the_plain_example)[0]
    plain, hooked, astray = (losses_of(printed[name]) for name in ("plain", "hooked", "spoilt"))
    assert len(plain) == 2 and plain[1] < plain[0] and len(astray) == 1
    assert hooked == pytest.approx(plain, abs=2e-4), "as they are printed, to four decimals"
    assert "layers.1: " in printed["hooked"] and "MoE" in printed["hooked"]
    assert abs(astray[0] - plain[0]) > 1e-2
