"""Files of safetensors with a CRC-32 of each tensor in their metadata: a bit that changes on a disk is seen when read.

Other programs take no notice of them, and files without them are read as they are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.errors import EngineError

KEY = "crc32"


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes contiguous tensors of the host with their checksums."""
    from safetensors.torch import save_file

    sums = {name: checksums(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, {"format": "pt", KEY: json.dumps(sums)})


def checksums(tensor: Tensor) -> list[int]:
    """CRC-32 of a tensor's bytes: one, or one per place of a stack's first dimension, which are read one by one."""
    return [_crc32(place) for place in tensor] if tensor.dim() > 2 else [_crc32(tensor)]


def checksums_in(file: Any, path: Path) -> Mapping[str, list[int]]:
    """Checksums by tensor of an open file; none where it has none. Raises EngineError for what is no list of them."""
    text = (file.metadata() or {}).get(KEY)
    try:
        found = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise EngineError(f"{path}: its checksums are damaged ({error}); take another copy of it") from error
    if not isinstance(found, Mapping):
        raise EngineError(f"{path}: its checksums are damaged; take another copy of it")
    return found


def check_tensor(path: Path, name: str, tensor: Tensor, sums: Mapping[str, list[int]], index: int | None) -> None:
    """Raises EngineError where a tensor, or one place of its first dimension, does not have its checksum."""
    if name not in sums:
        return
    expected = sums[name] if index is None else sums[name][index : index + 1]
    found = checksums(tensor) if index is None else [_crc32(tensor)]
    if found != expected:
        raise EngineError(
            f"{path}: {name} is damaged, its checksum does not fit; take another copy, and check the disk"
        )


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
