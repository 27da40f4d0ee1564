"""The ds_configs of 16 ranks as they ship, each under the real `deepspeed` launcher: the loss curve of one device.

The reference is the model on one device under torch alone, in fp32, with the same first weights, sequences, optimizer
and schedule of learning rates. A step's balance losses are of each rank's tokens in a layout, as the ds_configs have
it, and of a micro-batch there: that moves the losses by LIMIT at most, and the script prints three decimals.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import pytest
import torch

from ds_moe_ep.config.section import load_ds_config, read_section
from ds_moe_ep.model.initialize import init_weights
from ds_moe_ep.model.text import load_corpus, micro_batches
from ds_moe_ep.model.transformer import build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from tests.examples.training_scripts import launched

NUM_STEPS = 5
LIMIT = 0.004
SCRIPTS = {
    "ep16_cpu": "train_ep16",
    "tp8_pp2_cpu": "train_tp8_pp2",
    "pp2_ep8_cpu": "train_tp8_pp2",
    "tp2_ep8_cpu": "train_tp8_pp2",
    "tp2_pp2_ep4_cpu": "train_tp8_pp2",
}


def losses_of(name: str, text: Path) -> list[float]:
    """The losses that a training script prints for each step, under the launcher on 16 processes."""
    words = ["--deepspeed_config", name, "--data", str(text), "--steps", str(NUM_STEPS), "--eval-batches", "1"]
    printed = launched(f"{SCRIPTS[name]}.py", *words, "--report-every", "1", num_ranks=16, limit_s=1150)
    found = re.findall(rf"step (\d+)/{NUM_STEPS} \| loss ([\d.]+)", printed)
    assert [int(step) for step, _ in found] == list(range(1, NUM_STEPS + 1)), printed[-4000:]
    return [float(loss) for _, loss in found]


@functools.cache
def on_one_device(text: Path, *, experts_learn: bool = True) -> list[float]:
    """The losses of the steps in one process, with 4 micro-batches of 16 sequences as the stages have them."""
    from deepspeed.runtime.lr_schedules import WarmupLR

    ds_config = load_ds_config("pp2_ep8_cpu")
    section = read_section({**ds_config, "moe_ep": {**ds_config["moe_ep"], "ep_size": 1, "layout": {}}})
    assert section.model is not None
    model = build_transformer(section.model, section.moe, ExpertParallel)
    init_weights(model, seed=0)
    params = {key: value for key, value in ds_config["optimizer"]["params"].items() if key != "torch_adam"}
    optimizer = torch.optim.AdamW(model.parameters(), **params)
    warm_up = WarmupLR(optimizer, **ds_config["scheduler"]["params"])
    corpus, size = load_corpus([str(text)]), (16, section.model.sequence_length)
    losses = []
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        sums = torch.zeros(())
        for batch in micro_batches(corpus.train, size, seed=0, step=step, rank=0, num_ranks=1, accumulation=4):
            output = model(*batch)
            (output.loss / 4).backward()
            sums += output.cross_entropy / 4
        torch.nn.utils.clip_grad_norm_(model.parameters(), ds_config["gradient_clipping"])
        if not experts_learn:
            for name, parameter in model.named_parameters():
                parameter.grad = None if "experts" in name else parameter.grad
        optimizer.step()
        warm_up.step()
        losses.append(float(sums))
    return losses


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text that no rank waits for, of the standard library."""
    sources = [Path(os.__file__).with_name(f"{name}.py") for name in ("argparse", "inspect", "typing", "tarfile")]
    file = tmp_path_factory.mktemp("text") / "sources.txt"
    file.write_text("".join(path.read_text() for path in sources))
    return file


@pytest.mark.slow  # 16 processes that import deepspeed: minutes where cores are shared
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_shipped_ds_config_of_16_ranks_gives_the_loss_curve_of_one_device_under_the_launcher(
    name: str, text: Path
) -> None:
    expected, found = on_one_device(text), losses_of(name, text)
    off = max(abs(mine - its) for mine, its in zip(found, expected, strict=True))
    print(f"{name}: {found}, one device: {[round(loss, 4) for loss in expected]}, off by {off:.4f}")
    assert off <= LIMIT
    assert expected[-1] < expected[0] - 0.3, "it learns"
    frozen = on_one_device(text, experts_learn=False)
    assert max(abs(mine - its) for mine, its in zip(found, frozen, strict=True)) > 5 * LIMIT, "the control"
