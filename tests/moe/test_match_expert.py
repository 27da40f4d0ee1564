"""Which experts run as split products, and which go through autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe_ep.moe.experts import GeluMLP, SwiGLU
from ds_moe_ep.moe.match_expert import ExpertForms, match_expert


class MegatronLike(nn.Module):
    """A user's class with its own names and the functional GELU."""

    def __init__(self, approximate: str = "tanh") -> None:
        super().__init__()
        self.dense_4h_to_h = nn.Linear(16, 8)
        self.dense_h_to_4h = nn.Linear(8, 16, bias=False)
        self.approximate = approximate

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(hidden), approximate=self.approximate))


class Swapped(SwiGLU):
    """The same mathematics with the product's sides swapped."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * F.silu(self.gate(x)))


class TwoOutputs(GeluMLP):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


class Residual(GeluMLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Unused(GeluMLP):
    def __init__(self) -> None:
        super().__init__(8, 16)
        self.scale = nn.Parameter(torch.ones(1))


class Branching(GeluMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class WithoutItsBias(GeluMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(F.linear(x, self.fc1.weight, None)))


class OfAnothersWeight(GeluMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(F.linear(x, self.fc2.weight, self.fc1.bias)))


class OneLinearTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.gelu(self.fc(x)))


def tied() -> nn.Module:
    module = GeluMLP(8, 8)
    module.fc2.weight = module.fc1.weight
    return module


def hooked() -> nn.Module:
    module = GeluMLP(8, 16)
    module.fc1.register_forward_hook(lambda *_: None)
    return module


def test_gelu_and_swiglu_are_recognised_by_what_they_compute() -> None:
    for module, up, approximate in (
        (GeluMLP(8, 16, bias=True), "fc1", "none"),
        (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), "0", "none"),
        (MegatronLike(), "dense_h_to_4h", "tanh"),
    ):
        form = match_expert(module)
        assert form is not None and form.kind == "gelu"
        assert (form.linears["up"], form.approximate) == (up, approximate)
    for module in (SwiGLU(8, 16), Swapped(8, 16, bias=True)):
        form = match_expert(module)
        assert form is not None and form.kind == "swiglu" and form.linears["gate"] == "gate"


def test_experts_are_recognised_behind_an_engine_of_zero_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves a product of its own in the place of F.linear, for the whole process."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    modules = [GeluMLP(8, 16, bias=True), SwiGLU(8, 16)]
    expected, forms = [match_expert(module) for module in modules], [ExpertForms() for _ in modules]
    assert [known.common([module]) for known, module in zip(forms, modules, strict=True)] == expected
    monkeypatch.setattr(F, "linear", zero3_linear_wrap)
    assert [match_expert(module) for module in modules] == expected and None not in expected
    assert [known.common([module]) for known, module in zip(forms, modules, strict=True)] == expected
    assert all("forward" not in vars(part) for module in modules for part in module.modules())
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: zero3_linear_wrap(x, weight, bias))
    assert [match_expert(module) for module in modules] == [None, None], "the control: another's product"


@pytest.mark.parametrize(
    "module",
    [
        TwoOutputs(8, 16),
        Residual(8, 16),
        Unused(),
        Branching(8, 16),
        WithoutItsBias(8, 16, bias=True),
        OfAnothersWeight(8, 8, bias=True),
        hooked(),
        OneLinearTwice(),
        tied(),
        nn.Linear(8, 8),
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)),
        nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8)),
        nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.LayerNorm(8)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_anything_beside_them_goes_through_autograd(module: nn.Module) -> None:
    parameters = [id(parameter) for parameter in module.parameters()]
    assert match_expert(module) is None
    assert [id(parameter) for parameter in module.parameters()] == parameters, "symbols stood there meanwhile"
