"""Everything that the recognised mathematics of modules rests on, and whether it still stands.

A trace tells what a module computed when it was traced. That stays true as long as nothing changes that the trace ran
through: the modules, their classes, attributes, parameters and hooks, and the functions and constants that their code
reads. Whoever changes one of them (a hook, an adapter, another activation, a forward of its own) must be noticed.
"""

from __future__ import annotations

import dis
import operator
import types
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_module

CONSTANTS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl")  # what a call of any module runs through
_FUNCTIONALS = ("linear", "gelu", "silu")  # what the known leaves call; profilers and quantizers put others there
# Where DeepSpeed's flops profiler keeps the handles of the hooks that it hangs on every module.
_PROFILER_HANDLES = (
    "__pre_hook_handle__",
    "__post_hook_handle__",
    "__flops_handle__",
    "__start_time_hook_handle__",
    "__end_time_hook_handle__",
)
_PURE = ("builtins", "math", "_operator")
_EFFECTS = {"print", "input", "open", "exec", "eval", "getattr", "setattr", "delattr", "vars", "globals", "locals"}
_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_STORES = {"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR"}
_MISSING = object()


def has_hooks(module: nn.Module) -> bool:
    """True where calling the module would call hooks of its own."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def has_foreign_hooks(module: nn.Module) -> bool:
    """True where it has other hooks than a profiler's, which count and change nothing."""
    if not has_hooks(module):
        return False
    profilers = {handle.id for name, handle in vars(module).items() if name in _PROFILER_HANDLES}
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(set(each) - profilers for each in hooks)


def has_global_hooks() -> bool:
    """True where calling any module would call somebody's hooks."""
    return bool(torch_module._has_any_global_hook())


class Snapshot:
    """The state of modules, at a cost of microseconds per module to compare.

    `is_complete` is False where that cannot tell whether a trace still holds: the modules' code has effects of its own,
    or reads something whose changes cannot be seen (an object that may change inside, chance, the mode of torch).
    """

    def __init__(self, roots: Sequence[nn.Module]) -> None:
        self._roots = tuple(roots)
        self._modules = tuple({id(m): m for root in roots for m in root.modules()}.values())
        self._states = [_state(module) for module in self._modules]
        self._names = _Names(self._modules)
        for owner, names in ((nn.Module, _CALLS), (F, _FUNCTIONALS)):
            for name in names:
                self._names.add_attribute(owner, name)
        for module in self._modules:
            self._names.add_method(module, "forward")
        self.is_complete = not self._names.unknowable

    def holds(self, roots: Sequence[nn.Module]) -> bool:
        """True for the same modules in the same state."""
        return (
            len(roots) == len(self._roots)
            and all(map(operator.is_, roots, self._roots))
            and all(map(_is_as_before, self._states, self._modules))
            and self._names.hold()
        )


def _state(module: nn.Module) -> tuple[Any, ...]:
    """Objects whose identity changes with the module: its class, attributes, children, parameters, buffers, hooks."""
    own = module.__dict__
    children, parameters, buffers = own["_modules"], own["_parameters"], own["_buffers"]
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    fixed = type(module), not hooks
    return *fixed, *own.values(), *children.values(), *parameters.values(), *buffers.values()


def _is_as_before(before: tuple[Any, ...], module: nn.Module) -> bool:
    now = _state(module)
    return len(before) == len(now) and all(map(operator.is_, before, now))


class _Names:
    """The names that the modules' code reads outside of its arguments, each with the object that it stood for."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.unknowable = False
        self._own = [vars(module) for module in modules]
        self._attributes: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._globals: dict[tuple[int, str], tuple[dict[str, Any], str, Any]] = {}
        self._seen: set[tuple[int, int]] = set()

    def hold(self) -> bool:
        """True where each name still stands for the same object."""
        # Lists: each pass asks, and a generator costs as much again.
        attributes = [getattr(owner, name, _MISSING) is value for owner, name, value in self._attributes.values()]
        named = [names.get(name, _MISSING) is value for names, name, value in self._globals.values()]
        return all(attributes) and all(named)

    def add_attribute(self, owner: Any, name: str) -> Any:
        """Remembers an attribute of a class, a file of code, a function or a cell; returns it."""
        value = getattr(owner, name, _MISSING)
        self._attributes[id(owner), name] = (owner, name, value)
        return value

    def add_method(self, module: nn.Module, name: str) -> None:
        """Remembers the functions of a name in the module's class and those it inherits from, and what they read."""
        for cls in type(module).__mro__:
            if cls is nn.Module:
                break
            value = vars(cls).get(name, _MISSING)
            if value is _MISSING:
                continue
            if not isinstance(value, classmethod | staticmethod):  # whose access makes a new object each time
                self.add_attribute(cls, name)
            if isinstance(value, property):
                value = value.fget
            self._add_value(getattr(value, "__func__", value), module)

    def _add_value(self, value: Any, module: nn.Module) -> None:
        """Functions are read in their turn; constants cannot change; anything else may, unseen."""
        if isinstance(value, types.FunctionType):
            self._add_function(value, module)
        elif isinstance(value, tuple):
            for each in value:
                self._add_value(each, module)
        elif isinstance(value, types.BuiltinFunctionType):
            self.unknowable |= not _is_pure(value)
        elif not isinstance(value, (*CONSTANTS, type, types.ModuleType)):
            self.unknowable |= not _is_torch(value)

    def _add_function(self, function: types.FunctionType, module: nn.Module) -> None:
        if _is_torch(function) or (id(function), id(module)) in self._seen:
            return
        self._seen.add((id(function), id(module)))
        for name in ("__code__", "__defaults__", "__kwdefaults__"):
            self.add_attribute(function, name)
        for cell in function.__closure__ or ():
            self._add_value(self.add_attribute(cell, "cell_contents"), module)
        for code in _codes(function.__code__):
            self._add_code(code, function.__globals__, module)

    def _add_code(self, code: types.CodeType, names: dict[str, Any], module: nn.Module) -> None:
        read: dict[bool, set[str]] = {True: set(), False: set()}  # by whether a name is global
        for each in dis.get_instructions(code):
            self.unknowable |= each.opname in _STORES
            if each.opname == "LOAD_GLOBAL" or each.opname in _ATTRIBUTES:
                read[each.opname == "LOAD_GLOBAL"].add(each.argval)
        self.unknowable |= bool(read[True] & _EFFECTS)
        for name in read[True] & set(names):
            self._globals[id(names), name] = (names, name, names[name])
            self._add_value(names[name], module)
            if isinstance(names[name], types.ModuleType):
                self._add_members(names[name], read[False], module)
        for name in read[False]:
            owned = [own[name] for own in self._own if name in own]
            for value in owned:
                self._add_value(value, module)
            is_mode = name.startswith("is_") and not owned and not hasattr(type(module), name)
            self.unknowable |= is_mode  # torch.is_grad_enabled and its like
            self.add_method(module, name)

    def _add_members(self, library: types.ModuleType, read: set[str], module: nn.Module) -> None:
        for name in read:
            if name not in vars(library) or (id(library), name) in self._attributes:
                continue
            value = self.add_attribute(library, name)
            self._add_value(value, module)
            if isinstance(value, types.ModuleType):
                self._add_members(value, read, module)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_torch(value: Any) -> bool:
    """True where a function or an object is of torch's own code: it does what its name says."""
    return str(getattr(value, "__module__", None) or "").split(".")[0] == "torch"


def _is_pure(function: types.BuiltinFunctionType) -> bool:
    """True where a function of C code is torch's, or gives the same for the same arguments."""
    owner = function.__self__
    if isinstance(owner, types.ModuleType):
        return owner.__name__ in _PURE or owner.__name__.split(".")[0] == "torch"
    return owner is None or _is_torch(owner)
