"""Model and routing workload of the soak: a classifier of two MoE layers, on points whose common direction turns."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.engine.start import initialize
from ds_moe_ep.model.text import fingerprint
from ds_moe_ep.moe.experts import GeluMLP, SwiGLU
from tests.soak.plan import DRIFT_STEPS, SoakPlan

Batch = tuple[Tensor, Tensor]  # points [T, D], and their classes [T]

COMMON, OWN = 0.8, 0.6  # of a point's length: the step's direction, and noise
OWN_IN_BURST = 0.02
TURNS = (1.0, 1.7, 2.3, 3.1)  # of the direction in its four planes, while the first turns once


class RoutingWorkload:
    """Draws the batches of a run: the busiest expert changes, and in bursts one gets every row."""

    def __init__(self, plan: SoakPlan) -> None:
        self._plan = plan
        generator = torch.Generator().manual_seed(fingerprint(plan.seed, "weather"))
        square_DD = torch.randn(plan.hidden_size, plan.hidden_size, generator=generator)
        self._axes_2PD = torch.linalg.qr(square_DD).Q[: 2 * len(TURNS)].view(2, len(TURNS), -1)
        self._classes_DC = torch.randn(plan.hidden_size, plan.num_classes, generator=generator)

    def batch(self, step: int, rank: int) -> Batch:
        """The points of a rank in a step, and their classes; the same for equal (seed, step, rank)."""
        plan = self._plan
        size = (plan.tokens_of(step, rank), plan.hidden_size)
        own = torch.Generator().manual_seed(fingerprint(plan.seed, "points", step, rank))
        noise_TD = torch.randn(size, generator=own)
        length = math.sqrt(plan.hidden_size)
        if plan.is_burst(step):
            x_TD = length * self._burst_D(step) + OWN_IN_BURST * noise_TD
        else:
            x_TD = COMMON * length * self._direction_D(step) + OWN * noise_TD
        return x_TD, (x_TD @ self._classes_DC).argmax(1)

    def _direction_D(self, step: int) -> Tensor:
        """A unit vector that turns in several planes at once, at rates that do not meet."""
        angle_P = torch.tensor(TURNS) * (2 * math.pi * step / DRIFT_STEPS)
        cos_PD, sin_PD = angle_P.cos()[:, None] * self._axes_2PD[0], angle_P.sin()[:, None] * self._axes_2PD[1]
        direction_D: Tensor = (cos_PD + sin_PD).sum(0) / math.sqrt(len(TURNS))
        return direction_D

    def _burst_D(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(fingerprint(self._plan.seed, "burst", step))
        return F.normalize(torch.randn(self._plan.hidden_size, generator=generator), dim=0)


@dataclass(frozen=True)
class Output:
    """The loss to train on, and how many tokens of this rank chose each expert of the first layer."""

    loss: Tensor
    counts_E: Tensor


class SoakModel(nn.Module):
    """Two residual MoE layers and a head."""

    def __init__(self, plan: SoakPlan) -> None:
        super().__init__()
        width, inner = plan.hidden_size, plan.expert_width
        self.num_tokens = plan.num_tokens
        first = MoE(width, GeluMLP(width, inner), config=plan.moe(0))
        second = MoE(width, SwiGLU(width, inner), config=plan.moe(1), shared=GeluMLP(width, inner))
        self.layers = nn.ModuleList([first, second])
        self.head = nn.Linear(width, plan.num_classes)

    def forward(self, x_TD: Tensor, classes_T: Tensor) -> Output:
        """Loss and counts of a batch. Its mean is over a constant: a batch without tokens has the loss 0."""
        l_aux_sum, counts = x_TD.new_zeros(()), []
        for layer in self.layers:
            y_TD, l_aux, counts_E = layer(x_TD)
            x_TD, l_aux_sum = x_TD + y_TD, l_aux_sum + l_aux
            counts.append(counts_E)
        loss = F.cross_entropy(self.head(x_TD), classes_T, reduction="sum") / self.num_tokens
        return Output(loss + l_aux_sum, counts[0])


MakeModel = Callable[[SoakPlan], nn.Module]


def build_engine(plan: SoakPlan, make_model: MakeModel = SoakModel) -> Any:
    """DeepSpeed's engine around the model, whose first values follow from the seed. Collective."""
    model = make_model(plan)
    for name, parameter in model.named_parameters():
        place = dist.get_rank() if ".experts." in name else "all ranks"
        generator = torch.Generator().manual_seed(fingerprint(plan.seed, name, place))
        with torch.no_grad():
            parameter.normal_(0.0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)
    with redirect_stdout(StringIO()):  # DeepSpeed prints each group that it makes
        engine, *_ = initialize(model=model, config=plan.ds_config())
    return engine
