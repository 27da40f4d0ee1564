"""An emulated device: experts that wait as long as their rows would take, and leave the processor to others.

Many ranks on few cores cannot compute at once, so real experts there say little about a machine with a device per rank.
These say what a schedule hides if each rank had one. Everything else is real: routing, rows, messages, links. The
output of an expert is its input, in both directions; it has no parameters, or some that only travel, where copies of
experts do. Every figure made with them says `emulated`.
Attention has an emulation as well, for whole models: it keeps its parameters, since their gradients travel.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.kernels.rotary import Rotation
from ds_moe_ep.model.attention import CausalAttention
from ds_moe_ep.moe.experts import Experts
from ds_moe_ep.moe.layout import Grouping
from ds_moe_ep.moe.match_expert import Form
from ds_moe_ep.moe.split_experts import ExpertPass, Span, Weights


class EmulatedDevice:
    """One rank's device: it works one row at a time, and counts the seconds that it was busy."""

    def __init__(self) -> None:
        self.busy_s = 0.0

    def work(self, rows: int, row_us: float) -> None:
        """Waits for as long as the device would work."""
        if rows and row_us:
            time.sleep(1e-6 * rows * row_us)
            self.busy_s += 1e-6 * rows * row_us

    def __deepcopy__(self, memo: dict[int, Any]) -> EmulatedDevice:
        return self  # copies of a module run on the same device


class EmulatedExpert(nn.Module):
    """One expert for layers that differentiate it by autograd: a row waits once forward, twice backward."""

    def __init__(self, row_us: float, device: EmulatedDevice | None = None) -> None:
        super().__init__()
        self.row_us, self.device = row_us, device or EmulatedDevice()

    def forward(self, rows_ND: Tensor) -> Tensor:
        y_ND: Tensor = _Wait.apply(rows_ND, self.row_us, self.device)  # type: ignore[no-untyped-call]
        return y_ND


class EmulatedAttention(CausalAttention):
    """Attention that adds nothing and takes its time; gradients of its parameters are zeros."""

    token_us: float
    device: EmulatedDevice

    @classmethod
    def take_over(cls, attention: CausalAttention, token_us: float, device: EmulatedDevice) -> None:
        """Makes an emulation of `attention`, in place: its parameters and hooks stay."""
        attention.__class__ = cls
        assert isinstance(attention, cls)
        attention.token_us, attention.device = token_us, device

    def forward(self, x_BSD: Tensor, rotation: Rotation) -> Tensor:
        y_BSD: Tensor = _Wait.apply(x_BSD, self.token_us, self.device, *self.parameters())  # type: ignore[no-untyped-call]
        return y_BSD * 0


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, row_us: float, device: EmulatedDevice, *parameters: Tensor) -> Tensor:
        ctx.row_us, ctx.device = row_us, device
        ctx.save_for_backward(*parameters)
        device.work(num_rows(rows_ND), row_us)
        return rows_ND.clone()

    @staticmethod
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        ctx.device.work(2 * num_rows(dy_ND), ctx.row_us)
        return dy_ND, None, None, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class EmulatedExperts(Experts):
    """The same in place of a layer's own experts: input gradients and weight gradients each wait once per row."""

    def __init__(
        self, num_local_experts: int, row_us: float, device: EmulatedDevice | None = None, num_weights: int = 0
    ) -> None:
        device = device or EmulatedDevice()
        super().__init__(EmulatedExpert(row_us, device), num_local_experts)
        self.row_us, self.device = row_us, device
        num_travelling = num_local_experts if num_weights else 0
        self.travelling = nn.ParameterList(nn.Parameter(torch.zeros(num_weights)) for _ in range(num_travelling))

    def known(self) -> tuple[Form, Sequence[Weights]] | None:
        """A form whose pass waits, and the parameters that travel; None without any."""
        if not len(self.travelling):
            return None
        return Form("gelu", {}, own_pass=self._pass), [{"up.weight": weight} for weight in self.travelling]

    def _pass(self, weights: Sequence[Weights]) -> ExpertPass:
        return EmulatedPass(self.row_us, self.device, weights, len(self.travelling))

    def start(self, spans: Sequence[Span], keep_graph: bool, groupings: Sequence[Grouping] = ()) -> ExpertPass:
        return EmulatedPass(self.row_us, self.device)


class EmulatedPass:
    """One pass through emulated experts, the first `num_own` of which are the rank's own.

    Gradients of copies are zeros, which travel. Own experts have none, as where no copies are: no host would add them.
    """

    def __init__(
        self, row_us: float, device: EmulatedDevice, weights: Sequence[Weights] = (), num_own: int = 0
    ) -> None:
        self.saved: list[Tensor] = []
        self._sizes = [[weight.shape for weight in named.values() if weight is not None] for named in weights]
        self.may_overwrite = False
        self.use_triton: bool | None = None
        self._row_us, self._device, self._num_own = row_us, device, num_own

    def compute(self, expert: int, rows: slice, x_nD: Tensor, y_nD: Tensor) -> None:
        self._device.work(len(x_nD), self._row_us)
        y_nD.copy_(x_nD)

    def input_grads(self, expert: int, rows: slice, dy_nD: Tensor, dx_nD: Tensor) -> None:
        self._device.work(len(dy_nD), self._row_us)
        dx_nD.copy_(dy_nD)

    def add_weight_grads(self, expert: int, rows: slice, x_nD: Tensor, dy_nD: Tensor) -> None:
        self._device.work(len(dy_nD), self._row_us)

    def release_weights(self) -> None:
        """Nothing: there are no weights."""

    def restore_weights(self, weights: Sequence[Tensor]) -> None:
        """Nothing."""

    def weight_grads(self, expert: int) -> list[Tensor | None]:
        sizes = self._sizes[expert] if self._sizes else []
        return [None if expert < self._num_own else torch.zeros(size) for size in sizes]


def num_rows(rows: Tensor) -> int:
    """Rows of a tensor [..., D]."""
    return rows.numel() // max(rows.shape[-1], 1)
