"""A layer computes what `expert(x)` computes, whatever was done to the expert after the layer was made.

With one expert, top-1 and no capacity the layer's output is the expert's, times the gate's weight of 1. Each change is
compared with the expert called as a module: output, gradient of the input, gradient of every parameter.
"""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.layer import ExpertParallel

D, WIDTH = 8, 16
RELU_INSTEAD = False


class Expert(nn.Module):
    """A GELU expert whose code reads attributes, a method and a constant of this file."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(D, WIDTH), nn.GELU(), nn.Linear(WIDTH, D)
        self.drop: nn.Module | None = None
        self.twice = False

    def hidden(self, x: Tensor) -> Tensor:
        return self.fc1(x)

    def forward(self, x: Tensor) -> Tensor:
        if RELU_INSTEAD:
            return self.fc2(F.relu(self.hidden(x)))
        h = self.act(self.hidden(x))
        if self.drop is not None:
            h = self.drop(h)
        y: Tensor = self.fc2(h)
        return y + y if self.twice else y


class Gated(nn.Module):
    """A SwiGLU expert."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = (nn.Linear(a, b, bias=False) for a, b in ((D, WIDTH), (D, WIDTH), (WIDTH, D)))
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(self.act(self.w1(x)) * self.w3(x))
        return y


class Adapter(nn.Module):
    """A low-rank adapter around a Linear, as PEFT wraps it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.b(self.a(x))
        return y


class AdaptedLinear(nn.Linear):
    """The same as a subclass of Linear, whose parameters keep their names."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def set_to(name: str, make: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    def change(expert: nn.Module) -> None:
        setattr(expert.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], make(expert))

    return change


def subclassed(expert: nn.Module) -> None:
    class Sub(Expert):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    expert.__class__ = Sub


def called_otherwise(expert: nn.Module) -> None:
    class Sub(Expert):
        def __call__(self, x: Tensor) -> Tensor:
            return 3 * super().__call__(x)

    expert.__class__ = Sub


def normed(expert: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(expert.fc2)
    with torch.no_grad():
        expert.fc2.parametrizations.weight.original0.mul_(2)


def one_weight_for_two(expert: nn.Module) -> None:
    expert.fc1, expert.fc2 = nn.Linear(D, D), nn.Linear(D, D)
    expert.fc2.weight = expert.fc1.weight


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "nothing": lambda e: None,
    "another activation": set_to("act", lambda e: nn.ReLU()),
    "the activation's own knob": set_to("act.approximate", lambda e: "tanh"),
    "an activation that is a function": lambda e: (delattr(e, "act"), setattr(e, "act", torch.relu)),
    "a flag that forward reads": set_to("twice", lambda e: True),
    "a module where there was None": set_to("drop", lambda e: Doubled()),
    "another Linear": set_to("fc1", lambda e: nn.Linear(D, WIDTH, bias=False)),
    "a bias taken away": set_to("fc2.bias", lambda e: None),
    "an adapter around a Linear": set_to("fc1", lambda e: Adapter(e.fc1)),
    "an adapter that is a Linear": set_to("fc2", lambda e: AdaptedLinear(WIDTH, D)),
    "a forward of its own": set_to("forward", lambda e: lambda x: 2 * e.fc2(e.act(e.fc1(x)))),
    "a forward of a Linear's own": set_to("fc1.forward", lambda e: lambda x: 2 * F.linear(x, e.fc1.weight)),
    "a method of its own": set_to("hidden", lambda e: types.MethodType(lambda self, x: -self.fc1(x), e)),
    "another class": subclassed,
    "another call": called_otherwise,
    "a hook on the expert": lambda e: e.register_forward_hook(lambda m, i, o: 2 * o),
    "a hook in front of a Linear": lambda e: e.fc2.register_forward_pre_hook(lambda m, i: (2 * i[0],)),
    "a hook on gradients": lambda e: e.fc2.register_full_backward_hook(lambda m, i, o: (3 * i[0],)),
    "a hook before gradients": lambda e: e.act.register_full_backward_pre_hook(lambda m, g: (3 * g[0],)),
    "a parametrization": lambda e: parametrize.register_parametrization(e.fc1, "weight", Doubled()),
    "a norm of a weight": normed,
    "a pruned weight": lambda e: prune.l1_unstructured(e.fc1, "weight", 0.5),
    "one weight for two": one_weight_for_two,
    "another weight": set_to("fc1.weight", lambda e: nn.Parameter(torch.randn(WIDTH, D))),
    "a frozen weight": lambda e: e.fc1.weight.requires_grad_(False),
    "a compiled call": lambda e: e.compile(backend="eager"),
}


def layer_with(expert: nn.Module, **knobs: object) -> tuple[ExpertParallel, nn.Module]:
    config = MoEConfig(**{"num_experts": 1, "ep_size": 1, **knobs})
    layer = ExpertParallel(D, expert, config)
    layer(torch.randn(3, D))  # its experts have been read once
    return layer, layer.experts.deepspeed_experts[0]


def output_of(layer: ExpertParallel) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x)[0]


def off_by(layer: Callable[[Tensor], Tensor], expert: nn.Module) -> float:
    """The largest difference between two callables over one expert, in output and gradients; no gradient is zero."""
    results = []
    for call in (layer, expert):
        torch.manual_seed(1)
        expert.zero_grad()
        x = torch.randn(5, D, requires_grad=True)
        y = call(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in expert.named_parameters()}
        results.append({"y": y.detach(), "dx": x.grad, **grads})
    mine, right = results
    return max(float((mine[key] - right[key]).abs().max()) for key in mine)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_layer_computes_what_its_changed_expert_computes(name: str, training: bool) -> None:
    torch.manual_seed(0)
    layer, expert = layer_with(Expert())
    layer.train(training)
    before = copy.deepcopy(expert)
    CHANGES[name](expert)
    assert off_by(output_of(layer), expert) < 1e-5
    if name not in ("nothing", "another weight", "a frozen weight", "a bias taken away", "a compiled call"):
        x = torch.randn(5, D, requires_grad=True)
        values = [torch.autograd.grad(e(x).square().sum(), x)[0] for e in (before, expert)]
        assert not torch.allclose(*values), "the change changes nothing"


def test_a_changed_gated_expert_and_a_changed_shared_expert_are_noticed() -> None:
    layer, expert = layer_with(Gated())
    expert.act = nn.GELU()
    assert off_by(output_of(layer), expert) < 1e-5
    layer = ExpertParallel(D, Expert(), MoEConfig(num_experts=1), shared=Gated())
    layer(torch.randn(3, D))
    layer.shared.w1.register_forward_hook(lambda m, i, o: -o)
    routed = layer.experts.deepspeed_experts[0]
    assert off_by(lambda x: layer(x)[0] - routed(x), layer.shared) < 1e-5


def test_one_changed_expert_among_several_is_computed_as_it_is() -> None:
    torch.manual_seed(0)
    layer = ExpertParallel(D, Expert(), MoEConfig(num_experts=3, top_k=3, renormalize=False))
    layer(torch.randn(3, D))
    experts = layer.experts.deepspeed_experts
    experts[1].act = nn.Tanh()
    experts[2] = nn.Linear(D, D)
    x = torch.randn(5, D)
    weights = layer.gate.wg(x).softmax(1)
    right = sum(weights[:, i : i + 1] * expert(x) for i, expert in enumerate(experts))
    assert torch.allclose(layer(x)[0], right, atol=1e-6)


def test_experts_that_share_a_weight_get_the_sum_of_its_gradients() -> None:
    layer = ExpertParallel(D, Expert(), MoEConfig(num_experts=2, top_k=2, renormalize=False))
    one, other = layer.experts.deepspeed_experts
    other.fc1.weight = one.fc1.weight
    x = torch.randn(5, D)
    weights = layer.gate.wg(x).softmax(1).detach()
    right = torch.autograd.grad((weights[:, :1] * one(x) + weights[:, 1:] * other(x)).sum(), one.fc1.weight)[0]
    layer(x)[0].sum().backward()
    assert torch.allclose(one.fc1.weight.grad, right, atol=1e-5)


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def test_changed_code_is_noticed_and_so_is_its_way_back() -> None:
    layer, expert = layer_with(Expert())
    here = __import__(__name__, fromlist=["RELU_INSTEAD"])
    relu = F.relu
    for owner, name, value in (
        (Expert, "forward", lambda self, x: self.fc2(self.fc1(x).tanh())),
        (Expert, "hidden", lambda self, x: self.fc1(x) ** 2),
        (Expert.hidden, "__code__", (lambda self, x: -self.fc1(x)).__code__),
        (here, "RELU_INSTEAD", True),
        (nn.Linear, "forward", lambda self, x: relu(torch.nn.functional.linear(x, self.weight, self.bias))),
        (nn.GELU, "forward", lambda self, x: relu(x)),
        (F, "linear", lambda x, w, b=None: -torch._C._nn.linear(x, w, b)),
        (F, "gelu", lambda x, approximate="none": relu(x)),
    ):
        x = torch.randn(4, D)
        was = expert(x)
        with replaced(owner, name, value):
            assert off_by(output_of(layer), expert) < 1e-5, name
            assert not torch.allclose(expert(x), was), f"{name}: the change changes nothing"
        assert off_by(output_of(layer), expert) < 1e-5, name
        assert torch.allclose(layer(x)[0], was, atol=1e-6), name


def test_hooks_of_all_modules_are_called_while_they_hang_there() -> None:
    layer, expert = layer_with(Expert())
    seen: list[nn.Module] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, i, o: seen.append(module))
    try:
        assert off_by(output_of(layer), expert) < 1e-5
    finally:
        handle.remove()
    assert seen.count(expert.fc1) == 2  # in the layer, and as a module


class Stateful(Expert):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return super().forward(x)


class Chance(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.rand(()) < 2 else x


class Moody(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if torch.is_grad_enabled() else x


class Configured(Expert):
    def __init__(self) -> None:
        super().__init__()
        self.options = {"scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.options["scale"] == 1.0 else x


class ByMode(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x


def test_code_whose_trace_may_not_hold_is_called_as_a_module() -> None:
    for expert_class in (Stateful, Chance, Moody, Configured, ByMode):
        layer, expert = layer_with(expert_class())
        assert off_by(output_of(layer), expert) < 1e-5, expert_class.__name__
    layer, expert = layer_with(Stateful())
    x = torch.randn(4, D)
    layer(x)
    assert torch.equal(expert.seen.detach(), x)
    layer, expert = layer_with(Moody())
    with torch.no_grad():
        assert torch.equal(layer(x)[0], x)
    layer, expert = layer_with(Configured())
    expert.options["scale"] = 2.0
    assert torch.equal(layer(x)[0], x)
    layer, _ = layer_with(ByMode())
    assert not torch.equal(layer(x)[0], x) and torch.equal(layer.eval()(x)[0], x)


def test_an_unchanged_expert_is_read_once_for_each_mode_and_a_changed_one_again() -> None:
    layer, expert = layer_with(Expert())
    forms, reads = layer.experts._forms, []

    def common() -> object:
        form, (known, _) = forms.common([expert]), forms._known[expert.training]
        if not any(known is each for each in reads):
            reads.append(known)
        return form

    for mode in (True, False, True, False):
        layer.train(mode)
        assert common() is not None
    assert len(reads) == 2
    expert.act = nn.ReLU()
    assert common() is None and len(reads) == 3
    expert.act = nn.GELU()
    assert common() is not None and len(reads) == 4
    for copied in (copy.deepcopy(forms), pickle.loads(pickle.dumps(forms))):
        assert copied._known == {}


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    layer, expert = layer_with(Expert())
    outside = torch.ones(D, requires_grad=True)
    expert.register_forward_hook(lambda m, i, o: o * outside)
    with pytest.raises(EngineError, match=r"shape \(8,\) that needs a gradient and is no parameter"):
        layer(torch.randn(4, D))
    with torch.no_grad():
        layer(torch.randn(4, D))
    outside.requires_grad_(False)
    assert off_by(output_of(layer), expert) < 1e-5
