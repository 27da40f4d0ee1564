"""A device that runs nothing and remembers everything: CUDA's streams, events and allocator as bookkeeping.

`RecordingDevice` stands in for `torch.cuda` under the real CudaLanes. Every stream carries a vector clock, every event
hands one on. Every torch op is logged as reads and writes of bytes at its stream's clock; two accesses of the same
bytes, one of them a write, must be ordered by events. A storage that a stream uses without having allocated it must
have been given to that stream by record_stream, or the allocator could hand its memory out again too early.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ds_moe_ep.comm.transport import Message

Clock = dict[str, int]


@dataclass
class Stream:
    """A stream and what it has seen of every stream, itself included."""

    name: str
    clock: Clock = field(default_factory=dict)

    def tick(self) -> Clock:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return dict(self.clock)

    def see(self, clock: Clock) -> None:
        for name, time in clock.items():
            self.clock[name] = max(self.clock.get(name, 0), time)

    def wait_event(self, event: Event) -> None:
        self.see(event.clock)

    def __hash__(self) -> int:
        return hash(self.name)


class Event:
    def __init__(self) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream) -> None:
        self.clock = stream.tick()


@dataclass(frozen=True)
class Access:
    """One op's use of bytes [start, stop) of a storage."""

    op: str
    stream: str
    time: int
    start: int
    stop: int
    is_write: bool

    def is_before(self, clock: Clock) -> bool:
        return clock.get(self.stream, 0) >= self.time


class RecordingDevice(TorchDispatchMode):
    """What `torch.cuda` offers to CudaLanes, and the log of every op under it. `faults` are what it found."""

    Event = Event

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self._streams = [Stream("compute")]
        self._num_streams = 0
        self._accesses: dict[int, list[Access]] = {}
        self._home: dict[int, str] = {}
        self._shared: set[tuple[int, str]] = set()
        self._alive: list[Any] = []  # a freed address must not come back as another tensor

    def Stream(self, device: object = None) -> Stream:
        self._num_streams += 1
        return Stream(f"lane {self._num_streams}")

    def current_stream(self) -> Stream:
        return self._streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._streams.append(stream)
        yield
        self._streams.pop()

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        self._shared.add((tensor.untyped_storage()._cdata, stream.name))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        clock = self.current_stream().tick()
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for argument, value in _with_arguments(func, args, kwargs):
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value):
                self._access(func.name(), tensor, is_write, clock)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if tensor.untyped_storage()._cdata not in before:
                self._home[tensor.untyped_storage()._cdata] = self.current_stream().name
                self._access(func.name(), tensor, True, clock)
        return result

    def _access(self, op: str, tensor: Tensor, is_write: bool, clock: Clock) -> None:
        if tensor.numel() == 0 or op.startswith(VIEWS):
            return
        storage, here = tensor.untyped_storage()._cdata, self.current_stream().name
        self._alive.append(tensor.untyped_storage())
        start = tensor.storage_offset()
        stop = start + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        home = self._home.setdefault(storage, "compute")
        if here != home and not here.startswith("wire") and (storage, here) not in self._shared:
            self.faults.append(f"{op} on {here}: memory of {home} without record_stream")
        log = self._accesses.setdefault(storage, [])
        for other in log:
            overlaps = other.start < stop and start < other.stop and (is_write or other.is_write)
            if overlaps and not other.is_before(clock):
                self.faults.append(f"{op} on {here} is not ordered behind {other.op} on {other.stream}")
        log.append(Access(op, here, clock[here], start, stop, is_write))


VIEWS = tuple(
    f"aten::{name}"
    for name in (
        "view slice t detach alias select _unsafe_view unsqueeze transpose expand as_strided empty new_empty"
    ).split()
)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _with_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for index, argument in enumerate(func._schema.arguments):
        if index < len(args):
            yield argument, args[index]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


class RecordingWork:
    """A transfer on the communicator's own stream; waiting orders the current stream behind it, as NCCL's does."""

    def __init__(self, device: RecordingDevice, wire: Stream) -> None:
        self._device, self._clock = device, dict(wire.clock)

    def wait(self) -> None:
        self._device.current_stream().see(self._clock)


class RecordingTransport:
    """A group of `size` ranks of which this is rank 0: transfers read and write their rows on a stream of their own."""

    rank = 0

    def __init__(self, device: RecordingDevice, size: int) -> None:
        self.size = size
        self._device = device
        self._wires = {lane: Stream(f"wire {lane}") for lane in ("dispatch", "combine")}

    def exchange_counts(self, counts_PC: Tensor) -> Tensor:
        return counts_PC.clone()

    def sum(self, values: Tensor) -> Tensor:
        return values.clone()

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message]) -> RecordingWork:
        wire = self._wires[lane]
        wire.see(self._device.current_stream().tick())
        with self._device.stream(wire):
            for message in sends:
                message.rows.sum()
            for message in receives:
                message.rows.fill_(0.5)
        return RecordingWork(self._device, wire)
