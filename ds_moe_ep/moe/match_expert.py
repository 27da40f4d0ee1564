"""Matches an expert module to the form of its mathematics: read from its traced graph, never guessed from its class.

What was read holds as long as nothing has changed that it was read from (`snapshot.py`): each pass asks `ExpertForms`,
which compares and reads again, so that a layer computes what `expert(x)` computes whenever an expert was changed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ds_moe_ep.kernels.activation import Clamp
from ds_moe_ep.moe.snapshot import Snapshot, has_global_hooks, has_hooks
from ds_moe_ep.moe.split_experts import ExpertPass, Weights

_PRODUCTS = (torch.mul, operator.mul)
_STATE = frozenset((*vars(nn.Module()), "in_features", "out_features"))
_LEAVES = (nn.Linear, nn.GELU, nn.SiLU)
_LINEAR = torch._C._nn.linear  # F.linear itself, whoever stands in its place
_ZERO3_LINEAR = ("deepspeed.runtime.zero.linear", "zero3_linear_wrap")
_calls_of = operator.attrgetter("__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")


@dataclass(frozen=True)
class Form:
    """A recognised kind of expert: which parameters play which part."""

    kind: Literal["gelu", "swiglu"]
    linears: dict[str, str]  # part ("up", "gate", "down") -> name of the Linear in the module
    approximate: str = "none"
    clamp: Clamp | None = None  # of a SwiGLU that has bounds
    own_pass: Callable[[Sequence[Weights]], ExpertPass] | None = None  # instead of the mathematics of the kind

    def weights_of(self, expert: nn.Module) -> Weights:
        """Weights and biases of an expert by part, in the order of the module's parameters."""
        part_of = {name: part for part, name in self.linears.items()}
        weights: Weights = {}
        for name, parameter in expert.named_parameters():
            linear, _, leaf = name.rpartition(".")
            weights[f"{part_of[linear]}.{leaf}"] = parameter
        return weights


Known = tuple[Form, Sequence[Weights]]


def match_expert(template: nn.Module) -> Form | None:
    """The form of a module's computation; None when it is no GELU MLP and no SwiGLU, clamped or not, of plain Linears.

    Reads the traced graph, so that a class of any name is found, and anything beside it (dropout, hooks, a second
    output, a buffer) sends the module through autograd instead.
    """
    if not _leaves_are_torch() or not all(is_plain(module) for module in template.modules()):
        return None
    try:
        graph = _graph_of(template)
    except Exception:  # tracing runs the user's forward on symbols, which may fail in any way
        return None
    steps = [node for node in graph.nodes if node.op != "get_attr"]
    output = steps[-1].args[0]
    form = _gelu_form(template, output) or _swiglu_form(template, output) or _clamped_form(template, output)
    if form is None or len(steps) != (12 if form.clamp else {"gelu": 5, "swiglu": 7}[form.kind]):
        return None
    names = {name for name, _ in template.named_parameters()}  # a tied weight stands here once
    if (
        len(set(form.linears.values())) < len(form.linears)
        or not {f"{n}.weight" for n in form.linears.values()} <= names
    ):
        return None
    owned = {f"{linear}.{leaf}" for linear in form.linears.values() for leaf in ("weight", "bias")}
    return form if names <= owned else None


class ExpertForms:
    """The form that modules have in common, read again when anything that it was read from has changed."""

    def __init__(self) -> None:
        self._known: dict[bool, tuple[Snapshot, Known | None]] = {}  # by mode: training or evaluation

    def common(self, modules: Sequence[nn.Module]) -> Form | None:
        """The form of all modules as they are now; None where they have none in common."""
        known = self.known(modules)
        return None if known is None else known[0]

    def known(self, modules: Sequence[nn.Module]) -> Known | None:
        """The form and each module's weights as they are now; None where they have no form in common."""
        if not modules or has_global_hooks():
            return None
        mode = modules[0].training
        known = self._known.get(mode)
        if known is None or not known[0].holds(modules):
            known = self._known[mode] = _read(modules)
        return known[1]

    def __deepcopy__(self, memo: object) -> ExpertForms:
        return ExpertForms()  # a copy of the modules is read by itself

    def __reduce__(self) -> tuple[type[ExpertForms], tuple[()]]:
        return ExpertForms, ()


def _read(modules: Sequence[nn.Module]) -> tuple[Snapshot, Known | None]:
    snapshot = Snapshot(modules)
    forms = [match_expert(module) if snapshot.is_complete else None for module in modules]
    form = forms[0] if all(form == forms[0] for form in forms) else None
    return snapshot, None if form is None else (form, [form.weights_of(module) for module in modules])


def _graph_of(template: nn.Module) -> torch.fx.Graph:
    """The functions that the module runs, its own modules' included, on symbols of its input and its parameters.

    The parameters' symbols stand in this module meanwhile. torch.fx.Tracer.trace changes nn.Module itself, for all
    threads, and Python looks through its hundreds of subclasses each time: milliseconds, and slower calls afterwards.
    """
    tracer = torch.fx.Tracer(autowrap_modules=())  # type: ignore[arg-type]
    tracer.root, tracer.graph, tracer.tensor_attrs = template, torch.fx.Graph(), {}
    forward, args = tracer.create_args_for_root(type(template).forward, is_module=True)
    owned = [(vars(module)["_parameters"], name) for name, module in template.named_modules()]
    before = [dict(parameters) for parameters, _ in owned]
    linears = [m for m in template.modules() if type(m) is nn.Linear] if F.linear is not _LINEAR else []
    try:
        for linear in linears:
            vars(linear)["forward"] = partial(_linear_forward, linear)
        for parameters, name in owned:
            for leaf in [leaf for leaf, parameter in parameters.items() if parameter is not None]:
                parameters[leaf] = tracer.create_proxy("get_attr", f"{name}.{leaf}", (), {})
        with _NoConstants():
            output = forward(*args)
    finally:
        for (parameters, _), own in zip(owned, before, strict=True):
            parameters.update(own)
        for linear in linears:
            vars(linear).pop("forward", None)
    tracer.create_node("output", "output", (tracer.create_arg(output),), {})
    return tracer.graph


def _linear_forward(linear: nn.Linear, x: Any) -> Any:
    """The product of nn.Linear itself: ZeRO 3's in its place cannot be traced."""
    return _LINEAR(x, linear.weight, linear.bias)


class _NoConstants(TorchFunctionMode):
    """Ends a trace in which torch computes something from no input: chance, or a tensor that may change later."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        values = (*args, *(kwargs or {}).values())
        if not any(isinstance(value, torch.fx.Proxy) for value in values):
            raise TypeError(f"{function} reads no input of the module")
        return function(*args, **(kwargs or {}))


def _leaves_are_torch() -> bool:
    """True where the modules that a form is made of compute what torch says: nobody has replaced their code."""
    own_code = all(cls.forward.__module__ == cls.__module__ for cls in _LEAVES)
    return own_code and F.gelu is torch._C._nn.gelu and (F.linear is _LINEAR or _is_of_zero3(F.linear))


def _is_of_zero3(function: Any) -> bool:
    """True for the product that DeepSpeed's ZeRO 3 leaves in the place of F.linear for the process.

    Of weights that are whole, as those of modules without its hooks are, it is the same.
    """
    return (getattr(function, "__module__", ""), getattr(function, "__qualname__", "")) == _ZERO3_LINEAR


def is_plain(module: nn.Module) -> bool:
    """True where calling the module runs its class's forward and nothing else, on parameters of torch's own type."""
    own = vars(module)
    return not (
        has_hooks(module)
        or any(map(operator.is_not, _calls_of(type(module)), _calls_of(nn.Module)))
        or own["_buffers"]
        or own.get("_compiled_call_impl") is not None
        # "forward", set on this module alone; what every module has is none of these, and is asked for in each pass.
        or any(callable(getattr(type(module), name, None)) for name in own.keys() - _STATE)
        or not {type(parameter) for parameter in own["_parameters"].values()} <= {nn.Parameter, type(None)}
    )


def is_plain_linear(module: nn.Module) -> bool:
    """True where calling the module is the product with its weight, and nothing else."""
    return type(module) is nn.Linear and vars(module)["_parameters"]["bias"] is None and is_plain(module)


def _gelu_form(template: nn.Module, output: Any) -> Form | None:
    down = _linear(template, output)
    gelu = _call(down.input, F.gelu) if down else None
    up = _linear(template, gelu.args[0]) if gelu and len(gelu.args) == 1 else None
    if not (down and up and up.input.op == "placeholder"):
        return None
    assert gelu is not None
    return Form("gelu", {"up": up.name, "down": down.name}, str(gelu.kwargs.get("approximate", "none")))


def _swiglu_form(template: nn.Module, output: Any) -> Form | None:
    down = _linear(template, output)
    product = _call(down.input, *_PRODUCTS) if down else None
    if down is None or product is None:
        return None
    for active, other in (product.args, product.args[::-1]):
        silu = _call(active, F.silu)
        gate, up = _linear(template, silu.args[0]) if silu else None, _linear(template, other)
        if gate and up and gate.input is up.input and gate.input.op == "placeholder":
            return Form("swiglu", {"gate": gate.name, "up": up.name, "down": down.name})
    return None


def _clamped_form(template: nn.Module, output: Any) -> Form | None:
    """down((up + 1) * (gate * sigmoid(gate * alpha))), each product either way round."""
    down = _linear(template, output)
    for shifted, glu in _factors(down.input) if down else ():
        for bounded, share in _factors(glu):
            alphas = [alpha for node, alpha in _factors(_sigmoid_of(share)) if node is bounded]
            gate, up = _bounded(template, bounded), _bounded(template, _less_one(shifted))
            if not (down and gate and up and alphas and isinstance(alphas[0], float)):
                continue
            limit = gate[1]["max"]
            if gate[1]["min"] is not None or limit is None or up[1] != {"min": -limit, "max": limit}:
                continue
            if gate[0].input is up[0].input and gate[0].input.op == "placeholder":
                linears = {"gate": gate[0].name, "up": up[0].name, "down": down.name}
                return Form("swiglu", linears, clamp=Clamp(alphas[0], float(limit)))
    return None


def _factors(node: Any) -> Sequence[tuple[Any, Any]]:
    """Both orders of a product's factors; none for any other node."""
    product = _call(node, *_PRODUCTS)
    return () if product is None else ((product.args[0], product.args[1]), (product.args[1], product.args[0]))


def _sigmoid_of(node: Any) -> Any:
    """The node whose sigmoid this one is; None for any other."""
    sigmoid = _call(node, torch.sigmoid, F.sigmoid) or _method(node, "sigmoid")
    return sigmoid.args[0] if sigmoid is not None and len(sigmoid.args) == 1 and not sigmoid.kwargs else None


def _less_one(node: Any) -> Any:
    """The node to which this one adds 1; None for any other."""
    added = _call(node, torch.add, operator.add)
    if added is None or added.kwargs or len(added.args) != 2:
        return None
    one, other = added.args if isinstance(added.args[0], int | float) else added.args[::-1]
    return other if one == 1 else None


def _bounded(template: nn.Module, node: Any) -> tuple[_Linear, dict[str, Any]] | None:
    """The Linear whose output is clamped here, and its bounds; None for any other node."""
    clamp = _call(node, torch.clamp) or _method(node, "clamp")
    linear = _linear(template, clamp.args[0]) if clamp is not None else None
    if clamp is None or linear is None:
        return None
    return linear, {"min": None, "max": None} | dict(zip(("min", "max"), clamp.args[1:], strict=False)) | clamp.kwargs


def _method(node: Any, name: str) -> torch.fx.Node | None:
    """The node if it calls this method of a tensor, else None."""
    return node if isinstance(node, torch.fx.Node) and node.op == "call_method" and node.target == name else None


def _call(node: Any, *functions: Callable[..., Any]) -> torch.fx.Node | None:
    """The node if it calls one of the functions, else None."""
    is_call = isinstance(node, torch.fx.Node) and node.op == "call_function" and node.target in functions
    return node if is_call else None


@dataclass(frozen=True)
class _Linear:
    """A Linear of the module in its graph: its name, and the node of its input."""

    name: str
    input: torch.fx.Node


def _linear(template: nn.Module, node: Any) -> _Linear | None:
    """The plain Linear of the module that a node computes, with its own weight and bias; else None."""
    call = _call(node, _LINEAR)
    if call is None or len(call.args) != 3:
        return None
    x, weight, bias = call.args
    name, _, leaf = str(getattr(weight, "target", "")).rpartition(".")
    linear = dict(template.named_modules()).get(name)
    if leaf != "weight" or type(linear) is not nn.Linear or not isinstance(x, torch.fx.Node):
        return None
    own = None if linear.bias is None else f"{name}.bias"
    return _Linear(name, x) if getattr(bias, "target", None) == own else None
