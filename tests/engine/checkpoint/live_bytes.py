"""Bytes of tensors that live at once while something runs, counted: files that are mapped are no memory."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SETS = (torch.ops.aten.set_.source_Storage, torch.ops.aten.set_.source_Storage_storage_offset)


class LiveBytes(TorchDispatchMode):
    """Counts what is made inside of it; `most` is the largest sum of what lived at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {each.untyped_storage().data_ptr() for each in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            is_of_file = func in SETS and is_mapped(storage.data_ptr())
            if storage.nbytes() and storage.data_ptr() not in before and not is_of_file:
                reference = StorageWeakRef(storage)
                self._made[reference.cdata] = (reference, storage.nbytes())
        self._made = {key: each for key, each in self._made.items() if not each[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._made.values()))
        return result


def living_bytes() -> int:
    """Bytes of the storages of all tensors that Python knows, mapped ones too."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), Tensor) and each.device.type == "cpu"]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def is_mapped(address: int) -> bool:
    """True where a file stands behind an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, _, _, node, *path = line.split(maxsplit=5)
        start, stop = (int(end, 16) for end in span.split("-"))
        if start <= address < stop:
            return node != "0" and bool(path)
    return False


def _tensors(value: Any) -> Iterable[Tensor]:
    found = (each for each in tree_leaves(value) if isinstance(each, Tensor) and each.layout == torch.strided)
    return [each for each in found if not each.is_meta]  # which has no memory
