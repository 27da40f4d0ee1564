"""Files of safetensors with a CRC-32 of each tensor in their metadata: a bit that changes on a disk is seen when read.

A file is written tensor by tensor, so that no other is in memory: room is left for its header, which tells the
checksums and is written last. Other programs take no notice of them, and files without them are read as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ds_moe_ep.engine.state.tensor_bytes import bytes_of, crc32_of
from ds_moe_ep.errors import EngineError

KEY = "crc32"
LARGEST = 2**32 - 1
Made = tuple["TensorForm", Callable[[], Tensor]]  # a tensor to be written: its form, and what makes it
_NAME_OF_TYPE = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class TensorForm:
    """Type and shape of a tensor in a file; of a stack the first dimension counts places, which come one by one."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    is_stack: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> TensorForm:
        """That of a tensor."""
        return cls.of_shape(tensor.dtype, tensor.shape)

    @classmethod
    def of_shape(cls, dtype: torch.dtype, shape: Sequence[int]) -> TensorForm:
        """That of a tensor of this type and shape; what has more than two dimensions is a stack."""
        return cls(dtype, tuple(shape), len(shape) > 2)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def num_sums(self) -> int:
        """Checksums of it: one, or one per place of a stack."""
        return self.shape[0] if self.is_stack else 1


class CheckedFile:
    """A file of safetensors that is open for writing: `write` takes its tensors, each once, in any order. Local.

    Raises EngineError for types that such files do not hold.
    """

    def __init__(self, file: BinaryIO, forms: Mapping[str, TensorForm]) -> None:
        self._file, self._forms = file, forms
        self._sums = {name: [LARGEST] * form.num_sums for name, form in forms.items()}
        self._start: dict[str, int] = {}
        size = 0  # the widest types first, so that each tensor lies at a multiple of its own
        for name in sorted(forms, key=lambda each: -forms[each].dtype.itemsize):
            self._start[name] = size
            size += forms[name].num_bytes
        self._header_bytes = -(-len(self._header()) // 8) * 8
        self._file.truncate(8 + self._header_bytes + size)

    def write(self, name: str, tensor: Tensor, index: int | None = None) -> None:
        """Writes a tensor, or one place of a stack."""
        form = self._forms[name]
        is_whole = form.is_stack and index is None
        places: Iterable[tuple[int, Tensor]] = enumerate(tensor) if is_whole else [(index or 0, tensor)]
        for at, there in places:
            place = there.detach().to("cpu").contiguous()  # once, and of this place alone
            content = bytes_of(place)
            self._file.seek(8 + self._header_bytes + self._start[name] + at * len(content))
            self._file.write(content)
            self._sums[name][at] = crc32_of(place)

    def finish(self) -> None:
        """Writes the header: every tensor has come."""
        header = self._header()
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little"))
        self._file.write(header.ljust(self._header_bytes))

    def _header(self) -> bytes:
        found: dict[str, Any] = {"__metadata__": {"format": "pt", KEY: json.dumps(self._sums)}}
        for name, start in self._start.items():
            form = self._forms[name]
            offsets = [start, start + form.num_bytes]
            found[name] = {"dtype": _type_name(name, form), "shape": list(form.shape), "data_offsets": offsets}
        return json.dumps(found, separators=(",", ":")).encode()


def write_made(tensors: Mapping[str, Made], path: Path) -> None:
    """Writes tensors of these forms with their checksums, each made when its turn comes.

    Of those that are elsewhere, or not in one run, one at a time is copied.
    """
    with path.open("wb") as opened:
        file = CheckedFile(opened, {name: form for name, (form, _) in tensors.items()})
        for name, (_, make) in tensors.items():
            file.write(name, make())
        file.finish()


def checksums_in(file: Any, path: Path) -> Mapping[str, list[int]]:
    """Checksums by tensor of an open file; none where it has none. Raises EngineError for what is no list of them."""
    text = (file.metadata() or {}).get(KEY)
    try:
        found = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise EngineError(f"{path}: its checksums are damaged ({error}); take another copy of it") from error
    if not isinstance(found, Mapping) or not all(isinstance(sums, list) for sums in found.values()):
        raise EngineError(f"{path}: its checksums are damaged; take another copy of it")
    return found


def form_in(file: Any, path: Path, name: str) -> TensorForm:
    """Type and shape of a tensor of an open file. Raises EngineError for a type that is not known here."""
    found = file.get_slice(name)
    dtype = next((dtype for dtype, known in _NAME_OF_TYPE.items() if known == found.get_dtype()), None)
    if dtype is None:
        raise EngineError(f"{path}: {name} is of type {found.get_dtype()}, which is not known; convert it to another")
    return TensorForm.of_shape(dtype, found.get_shape())


def read_checked(file: Any, path: Path, name: str, sums: Mapping[str, list[int]], index: int | None) -> Tensor:
    """A tensor of an open file, or one place of its first dimension, of which no more is read where places have sums.

    Raises EngineError where it does not have its checksum.
    """
    expected = sums.get(name)
    has_places = expected is not None and len(expected) > 1
    is_place = index is not None and (expected is None or has_places)
    tensor: Tensor = file.get_slice(name)[index] if is_place else file.get_tensor(name)
    if expected is not None:
        if is_place and index is not None:
            expected = expected[index : index + 1]
        found = [crc32_of(place) for place in tensor] if has_places and not is_place else [crc32_of(tensor)]
        if found != expected:
            raise EngineError(
                f"{path}: {name} is damaged, its checksum does not fit; take another copy, and check the disk"
            )
    return tensor if is_place or index is None else tensor[index]


def _type_name(name: str, form: TensorForm) -> str:
    if form.dtype not in _NAME_OF_TYPE:
        raise EngineError(
            f"{name}: is {form.dtype}, which files of safetensors do not hold; convert it to another type"
        )
    return _NAME_OF_TYPE[form.dtype]


def same(tensor: Tensor) -> Tensor:
    """A tensor that is there, where others are read when their turn comes."""
    return tensor
