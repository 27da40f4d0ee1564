"""Memory breakdown of one DeepSpeed engine on this rank, though other engines live in the same process.

    memory_breakdown(engine, step, device) -> bytes by part, of records.names.KINDS

1. What stays is counted from the engine's own tensors, each storage once: weights behind the module's parameters, what
   the optimizer holds beside them (states, fp32 masters), and whatever else the engine's objects reach.
2. The peak of one step is measured above the memory before it, so another engine's tensors cannot be part of it: on
   CUDA by the allocator, on a CPU by the kernel (see memory.py; the process must have called return_freed_memory).
3. While the step runs, a hook behind each parameter's gradient and one before the optimizer's step look at the peak and
   the gradients until then. Where the peak has risen, what it holds above gradients and buckets is activations. What
   it rises by after the last gradient is buffers: flattened copies, the optimizer's temporaries.

Each part is given at its own fullest moment. They are not all full at once, so their sum is at least the peak of the
step and what stays. Measure a step that is not the first: optimizers make their states in that one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ds_moe_ep.bench.meters.memory import CudaMeter, HostMeter
from ds_moe_ep.engine import step_seams as seams

Storages = dict[int, int]  # bytes by address


def memory_breakdown(engine: Any, step: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Bytes of each of records.names.KINDS while the engine runs `step` once, each at its fullest.

    `step` is a whole training step of this engine, or a forward pass. Local, if the step is. Raises EngineError on a
    CPU whose system is not Linux.
    """
    gc.collect()
    watch = _Watch(engine, device)
    with watch.hooks():
        step()
    watch.end()
    weights, optimizer = weight_storages(engine), optimizer_storages(engine)
    stays = reachable(engine, device)
    others = {*weights, *optimizer, *gradient_storages(engine)}
    return {
        "weights": sum(weights.values()),
        "gradients": watch.gradients,
        "optimizer": sum(optimizer.values()),
        "activations": watch.activations,
        "buffers": sum(size for at, size in stays.items() if at not in others) + watch.buffers,
    }


@dataclass
class _Watch:
    """Largest gradients, activations and passing buffers that the hooks of one step see."""

    engine: Any
    device: torch.device

    def __post_init__(self) -> None:
        self.gradients = self.activations = self.buffers = 0
        self._parameters: list[nn.Parameter] = [p for p in self.engine.module.parameters() if p.requires_grad]
        self._meter = CudaMeter(self.device) if self.device.type == "cuda" else HostMeter()
        self._gradients_before = self._now = sum(gradient_storages(self.engine).values())
        self._has_looked = False
        self._peak = self._touched = 0
        self._before = self._meter.used()
        self._meter.reset()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Looks behind every gradient and before the optimizer's step while the block runs."""
        handles = [p.register_post_accumulate_grad_hook(lambda _: self._look()) for p in self._parameters]
        optimizer = seams.torch_optimizer(self.engine)
        if optimizer is not None:
            handles.append(optimizer.register_step_pre_hook(lambda *_: self._look_at_gradients()))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self) -> None:
        """One look behind a gradient: a rise of the peak is put down to activations."""
        self._look_at_gradients()
        buckets = self._bucket_bytes()
        self.buffers = max(self.buffers, buckets)
        self.activations = max(self.activations, self._rise() - self._new_gradients() - buckets)
        self._has_looked = True

    def end(self) -> None:
        """The last look: a rise since the last gradient is buffers, and without gradients activations."""
        rise = self._rise() - self._new_gradients()
        if self._has_looked:
            self.buffers = max(self.buffers, rise)
        else:
            self.activations = max(self.activations, rise)

    def _look_at_gradients(self) -> None:
        self._now = sum(gradient_storages(self.engine).values())
        self.gradients = max(self.gradients, self._now)

    def _new_gradients(self) -> int:
        return self._now - self._gradients_before

    def _rise(self) -> int:
        """The peak above the memory before where it is higher than at the last look, else 0."""
        before, self._peak = self._peak, max(self._peak, self._meter.peak() - self._before)
        return self._peak if self._peak > before else 0

    def _bucket_bytes(self) -> int:
        """Bytes of ZeRO's buckets; on a CPU those that gradients have touched, since the rest has no pages."""
        size = sum(bucket_storages(self.engine).values())
        if self.device.type == "cuda":
            return size
        self._touched = max(self._touched, seams.filled_bucket_bytes(self.engine))
        return min(self._touched, size)


def weight_storages(engine: Any) -> Storages:
    """The storages behind the module's parameters; ZeRO's flat ones with their padding."""
    return storages(engine.module.parameters())


def optimizer_storages(engine: Any) -> Storages:
    """States of the optimizer, and the parameters it updates where they are not the module's own (fp32 masters)."""
    optimizer = seams.torch_optimizer(engine)
    if optimizer is None:
        return {}
    weights = weight_storages(engine)
    held = storages(tensors_in([group["params"] for group in optimizer.param_groups]))
    held |= storages(tensors_in(list(optimizer.state.values())))
    return {at: size for at, size in held.items() if at not in weights}


def gradient_storages(engine: Any) -> Storages:
    """The gradients that there are at this moment, outside DeepSpeed's buckets."""
    optimizer = seams.torch_optimizer(engine)
    parameters = list(engine.module.parameters())
    if optimizer is not None:
        parameters += tensors_in([group["params"] for group in optimizer.param_groups])
    found = [gradient for p in parameters for gradient in (p.grad, *seams.gradients_beside(p)) if gradient is not None]
    found += tensors_in(seams.held_gradients(engine))
    buckets = bucket_storages(engine)
    return {at: size for at, size in storages(found).items() if at not in buckets}


def bucket_storages(engine: Any) -> Storages:
    """ZeRO's buckets at this moment; gradients in them are views."""
    return storages(tensors_in(seams.bucket_buffers(engine)))


def reachable(engine: Any, device: torch.device) -> Storages:
    """Every storage on the device that the engine's objects hold, without the batches that it was given."""
    held = tensors_in([value for name, value in vars(engine).items() if name not in seams.BATCHES])
    return storages(tensor for tensor in held if tensor.device.type == device.type)


def storages(tensors: Iterable[Tensor]) -> Storages:
    """Bytes of the storages behind the tensors by address: what they share counts once."""
    behind = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
    return {storage.data_ptr(): storage.nbytes() for storage in behind if storage.nbytes()}


def tensors_in(root: object) -> list[Tensor]:
    """The tensors in containers and in objects' attributes, at any depth; not those that only functions hold."""
    found: list[Tensor] = []
    seen: dict[int, object] = {}  # the objects themselves, since a freed one's id is given out again
    waiting = [root]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, type | ModuleType | Dataset | DataLoader):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            found.append(value)
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        elif isinstance(value, nn.Module) or (hasattr(value, "__dict__") and not callable(value)):
            waiting += vars(value).values()
    return found
