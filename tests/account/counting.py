"""A count of all that one pass asks of a device: every launch, every byte, every product, without a device.

Tensors are on the meta device: they have shapes and no numbers. Each op is a launch that reads its inputs and writes
its outputs once; views and empty tensors cost nothing; a gather reads what it gives. Triton kernels stand in as one
launch with the bytes that their own text says they move.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = frozenset(
    "view reshape t transpose slice select unsqueeze expand detach alias _unsafe_view as_strided squeeze permute split "
    "split_with_sizes unbind view_as lift_fresh promote_types".split()
)
UNWRITTEN = frozenset("empty empty_like new_empty empty_strided new_empty_strided".split())
PRODUCTS = frozenset("mm addmm addmm_ bmm _grouped_mm".split())
OVERWRITTEN = frozenset("copy_ fill_ zero_ uniform_ exponential_".split())  # ops that do not read what they write


@dataclass(frozen=True)
class Launch:
    """One launch: where in the layer, which op, bytes read and written; of a product (rows, inner, columns)."""

    where: str
    op: str
    read_bytes: int
    written_bytes: int
    product: tuple[int, int, int] | None = None

    @property
    def flops(self) -> int:
        rows, inner, columns = self.product or (0, 0, 0)
        return 2 * rows * inner * columns


@dataclass
class Account(TorchDispatchMode):
    """The launches under it, in order, and the largest number of bytes that were alive at once."""

    launches: list[Launch] = field(default_factory=list)
    peak_bytes: int = 0
    peak_at: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._where = ["elsewhere"]
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """A scope whose launches belong to this part of the layer."""
        self._where.append(where)
        yield
        self._where.pop()

    def wrap(self, function: Callable[..., Any], where: str) -> Callable[..., Any]:
        """The function inside of such a scope."""

        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.at(where):
                return function(*args, **kwargs)

        return inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split("::")[1].split(".")[0]
        result = func(*args, **kwargs)
        self._track(result)
        if name not in VIEWS | UNWRITTEN:
            self._launch(name, func, args, kwargs, result)
        return result

    def _launch(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        read = written = 0
        seen: set[int] = set()
        for index, argument in enumerate(func._schema.arguments):
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            for tensor in tensors(value):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written += num_bytes(tensor)
                    seen.add(id(tensor))
                    read += num_bytes(tensor) if argument.name == "self" and name not in OVERWRITTEN else 0
                elif tensor.device.type == "meta":
                    read += num_bytes(tensor)
        outputs = [tensor for tensor in tensors(result) if id(tensor) not in seen]
        written += sum(map(num_bytes, outputs))
        if name in ("index_select", "gather", "take"):
            read = written + num_bytes(list(tensors(args))[-1])
        if name == "index_copy_":
            read, written = 2 * [num_bytes(list(tensors(args))[-1])]
        if any(tensor.device.type == "meta" for tensor in (*tensors(args), *tensors(result))):
            self.launches.append(Launch(self._where[-1], name, read, written, _product(name, args)))

    def kernel(
        self,
        name: str,
        reads: Sequence[Tensor | None],
        writes: Sequence[Tensor | None],
        product: tuple[int, int, int] | None = None,
    ) -> None:
        """One launch of a kernel of our own."""
        read, written = (sum(num_bytes(tensor) for tensor in each if tensor is not None) for each in (reads, writes))
        self.launches.append(Launch(self._where[-1], name, read, written, product))

    def _track(self, result: Any) -> None:
        for tensor in tensors(result):
            storage = tensor.untyped_storage()
            known = self._alive.get(storage._cdata)
            if tensor.device.type == "meta" and (known is None or known[0].expired()):
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        alive = sum(size for _, size in self._alive.values())
        if alive > self.peak_bytes:
            self.peak_bytes, self.peak_at = alive, self._where[-1]


def _product(name: str, args: Sequence[Any]) -> tuple[int, int, int] | None:
    if name not in PRODUCTS:
        return None
    left, right = [tensor for tensor in tensors(args) if tensor.dim() > 1][-2:]
    return left.shape[:-1].numel(), left.shape[-1], right.shape[-1]


def tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors(value)


def num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def by_place(launches: Sequence[Launch]) -> dict[str, list[Launch]]:
    found: dict[str, list[Launch]] = defaultdict(list)
    for launch in launches:
        found[launch.where].append(launch)
    return dict(found)
