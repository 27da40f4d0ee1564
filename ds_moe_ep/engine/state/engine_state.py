"""The whole state of an engine in host memory, and the way back to it, bit for bit.

1. Attributes of the engine, its optimizers and its scheduler, and all containers in them, are kept as they are.
2. Tensors are kept by their memory: views of one flat buffer, as ZeRO has them, are copied once.
3. Random states of the process: Python, numpy, torch, and torch's on the accelerator.

Communicators, threads, files, and what measures an engine are no part of it.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ds_moe_ep.engine import step_seams
from ds_moe_ep.engine.extensions.engine_extensions import EngineExtensions
from ds_moe_ep.engine.extensions.reports import MeterReport
from ds_moe_ep.engine.load.report import LoadReport
from ds_moe_ep.engine.shadow.shadow import Shadow

# Objects that hold a part of the training state, by the modules of their classes.
STATEFUL = ("deepspeed.runtime.", "deepspeed.ops.", "deepspeed.utils.tensor_fragment", "torch.optim", "torch.amp")
REPORTS = (LoadReport, MeterReport, Shadow)  # callbacks that count steps, or tell people of them


class EngineState:
    """A copy of the state of an engine between two steps. Local; it takes as much host memory as the state has."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._random = _random_state(engine.device)
        self._attributes: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any] | deque[Any], list[Any]]] = []
        self._sets: list[tuple[set[Any], set[Any]]] = []
        self._data: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []  # a parameter, its values and its gradient
        self._memory: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._seen: set[int] = set()
        self._keep_attributes(vars(engine))
        for module in engine.module.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                self._walk(tensor)
        for root in (engine.optimizer, step_seams.torch_optimizer(engine), engine.lr_scheduler):
            self._walk(root)
        self._walk(getattr(engine, step_seams.GRAD_SCALER, None))

    @property
    def num_bytes(self) -> int:
        """Bytes of the copy."""
        return sum(copy.numel() for _, copy in self._memory.values())

    @torch.no_grad()
    def put_back(self) -> None:
        """Makes the engine what it was. Local; between passes."""
        for attributes, before in self._attributes:
            attributes.clear()
            attributes.update(before)
        for items, kept in self._lists:
            items.clear()
            items.extend(kept)
        for values, members in self._sets:
            values.clear()
            values.update(members)
        for parameter, data, gradient in self._data:
            parameter.data = data
            parameter.grad = gradient
        for storage, copy in self._memory.values():
            torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(copy)
        _set_random_state(self._random)

    def _keep_attributes(self, attributes: dict[Any, Any]) -> None:
        self._seen.add(id(attributes))
        self._attributes.append((attributes, dict(attributes)))

    def _walk(self, value: Any) -> None:
        """Keeps a value and all that it holds."""
        if value is None or isinstance(value, (int, float, str, bool)) or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._keep_tensor(value)
            return
        self._seen.add(id(value))
        if isinstance(value, dict):
            self._keep_attributes(value)
            for each in (*value.keys(), *value.values()):
                self._walk(each)
        elif isinstance(value, (list, deque)):
            self._lists.append((value, list(value)))
            for each in value:
                self._walk(each)
        elif isinstance(value, set):
            self._sets.append((value, set(value)))
        elif isinstance(value, tuple):
            for each in value:
                self._walk(each)
        elif self._is_stateful(value):
            self._walk(vars(value))

    def _is_stateful(self, value: Any) -> bool:
        if value is self._engine or isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
            return False
        is_root = value is self._engine.lr_scheduler or isinstance(value, torch.optim.Optimizer)
        name = type(value).__module__
        return is_root or (name.startswith(STATEFUL) and not name.endswith("config"))

    def _keep_tensor(self, tensor: Tensor) -> None:
        self._seen.add(id(tensor))
        if isinstance(tensor, nn.Parameter) or tensor.is_leaf:
            self._data.append((tensor, tensor.data, tensor.grad))  # type: ignore[arg-type]
            self._walk(tensor.grad)
            self._walk(vars(tensor))
        storage = tensor.untyped_storage()
        if not tensor.is_meta and storage.nbytes() and storage.data_ptr() not in self._memory:
            raw = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
            self._memory[storage.data_ptr()] = (storage, raw.detach().to("cpu", copy=True))


def _random_state(device: torch.device) -> dict[str, Any]:
    """Random states of the process."""
    own = None if device.type == "cpu" else getattr(torch, device.type).get_rng_state(device)
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": (device, own),
    }


def _set_random_state(kept: dict[str, Any]) -> None:
    random.setstate(kept["python"])
    numpy.random.set_state(kept["numpy"])
    torch.set_rng_state(kept["torch"])
    device, own = kept["device"]
    if own is not None:
        getattr(torch, device.type).set_rng_state(own, device)


@contextmanager
def untold(engine: Any) -> Iterator[None]:
    """A scope whose steps no report, no log and no monitor hears of."""
    extensions, monitor = EngineExtensions.of(engine), engine.monitor
    callbacks, is_enabled = extensions.callbacks, getattr(monitor, "enabled", False)
    with ExitStack() as scopes:
        for callback in callbacks:
            if isinstance(callback, LoadReport):
                scopes.enter_context(callback.paused())
        extensions.callbacks = tuple(callback for callback in callbacks if not isinstance(callback, REPORTS))
        if is_enabled:
            monitor.enabled = False
        try:
            yield
        finally:
            extensions.callbacks = callbacks
            if is_enabled:
                monitor.enabled = True
