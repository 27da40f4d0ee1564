"""A NaN or an infinity on one rank: all ranks skip the step together, and one line names the rank.

Expert gradients are reduced over another group than dense ones, and still every rank has to decide alike. fp16 is
refused on the CPU; the tests tell DeepSpeed that it is there: its loss scaling and its optimizers run all the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.small_model import Job, SmallModel, batches, make_model, named_weights
from tests.ranks import RankPool

BAD_RANK = 1
PLACES = {1: "expert", 2: "activation", 3: "loss"}  # of the bad number in a step
EXPERT = "layers.1.deepspeed_moe.experts.deepspeed_experts.0.fc1.weight"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
Step = tuple[bool, bool, bool, float]  # applied, weights changed, weights finite, loss scale


class Spoiler(nn.Module):
    """The model with a number that is not finite, in some steps of one rank at one place each."""

    def __init__(self, model: SmallModel, value: float, places: Mapping[int, str]) -> None:
        super().__init__()
        self.model, self.value, self.places, self.step = model, value, places, 0
        model.get_parameter(EXPERT).register_hook(partial(self.spoil, "expert"))
        model.enter.register_forward_hook(self.spoil_output)

    def spoil(self, place: str, tensor: Tensor) -> Tensor | None:
        is_time = self.places.get(self.step) == place and dist.get_rank() == BAD_RANK
        return torch.full_like(tensor, self.value) if is_time else None

    def spoil_output(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        output.register_hook(partial(self.spoil, "activation"))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        loss = self.model(x, target)
        bad = self.spoil("loss", loss)
        return loss if bad is None else loss * bad


@dataclass(frozen=True)
class Case:
    """A training in some precision, with a number that is not finite."""

    precision: str
    stage: int
    ep_size: int
    value: float

    @property
    def job(self) -> Job:
        return Job(steps=5, stage=self.stage, ep_size=self.ep_size)


CASES = [  # those in fp16 last: DeepSpeed is told that it is there, and knows it from then on
    Case("bf16", 0, 2, math.nan),
    Case("bf16", 1, 4, math.inf),
    Case("bf16", 2, 2, math.nan),
    Case("fp32", 1, 4, math.nan),
    Case("fp16", 0, 4, math.inf),
    Case("fp16", 1, 2, math.nan),
    Case("fp16", 2, 4, -math.inf),
]


def train_with_bad_numbers() -> list[tuple[list[Step], list[str]]]:
    """Of each case: what was done in its steps, and said."""
    return [train_with_a_bad_number(case.job, case.precision, case.value) for case in CASES]


def train_with_a_bad_number(job: Job, precision: str, value: float) -> tuple[list[Step], list[str]]:
    """Five steps, three of them with a bad number on one rank: what this rank did, and what its log says of skips."""
    lines: list[str] = []
    logging.getLogger("DeepSpeed").addFilter(lambda record: lines.append(record.getMessage()) is None)
    engine = make_scaled_engine(job, precision, value, PLACES)
    rank, dtype = dist.get_rank(), DTYPES[precision]
    steps: list[Step] = []
    before = named_weights(engine.module.model, job)
    for number, ((x, target),) in enumerate(batches(job)):
        engine.module.step = number
        engine.backward(engine(x[rank].to(dtype), target[rank].to(dtype)))
        engine.step()
        after = named_weights(engine.module.model, job)
        changed = any(not torch.equal(before[name], weight) for name, weight in after.items())
        finite = all(bool(weight.isfinite().all()) for weight in after.values())
        steps.append((bool(engine.was_step_applied()), changed, finite, float(engine.optimizer.loss_scale)))
        before = after
    return steps, [line for line in lines if "was skipped" in line]


def make_scaled_engine(job: Job, precision: str, value: float, places: Mapping[int, str]) -> Any:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    import ds_moe_ep

    deepspeed.init_distributed("gloo")
    config = dict(job.ds_config)
    if precision == "fp16":
        get_accelerator().is_fp16_supported = lambda: True
        config["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}
    elif precision == "bf16":
        config["bf16"] = {"enabled": True}
    model = Spoiler(make_model(job), value, places)
    return ds_moe_ep.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]


@pytest.fixture(scope="module")
def by_rank(pool: RankPool) -> list[list[tuple[list[Step], list[str]]]]:
    return pool.run(4, train_with_bad_numbers, timeout_s=200)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.precision}-{case.stage}-{case.ep_size}-{case.value}")
def test_every_rank_skips_the_step_and_the_rank_is_named(
    case: Case, by_rank: list[list[tuple[list[Step], list[str]]]]
) -> None:
    """The steps around it are taken, on finite weights; with loss scaling the scale is halved on every rank."""
    results = [of_rank[CASES.index(case)] for of_rank in by_rank]
    scales = [256.0, 128.0, 64.0, 32.0, 32.0] if case.precision == "fp16" else [1.0] * 5
    expected = [(i not in PLACES, i not in PLACES, True, scale) for i, scale in enumerate(scales)]
    assert [steps for steps, _ in results] == [expected] * 4
    for (step, place), line in zip(PLACES.items(), results[0][1], strict=True):
        assert f"step {step} was skipped: {SAYS[place]}" in line
    assert all(lines == [] for _, lines in results[1:])


SAYS = {
    "expert": f"gradients are not finite on ranks 1 (1 of them, next to the loss model.{EXPERT})",
    "activation": "gradients are not finite on ranks 1 (2 of them, next to the loss model.enter.bias)",
    "loss": "the loss is not finite on ranks 1; gradients are not finite on ranks 0 (",
}
