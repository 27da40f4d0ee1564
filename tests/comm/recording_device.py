"""A device that runs nothing and remembers everything: CUDA's streams, events and allocator as bookkeeping.

`RecordingDevice` stands in for `torch.cuda` under the real CudaLanes. Every stream carries a vector clock, every event
hands one on. Every torch op is logged as reads and writes of bytes at its stream's clock; two accesses of the same
bytes, one of them a write, must be ordered by events, and what is read must have been written. A storage that another
stream than its own uses must not be freed before its own stream has seen the end of that use, or the allocator could
hand its memory out again too early, unless record_stream told it. The host may wait outside of a schedule alone, for
the whole device never, and each of its waits is counted: copies from and to pageable memory are among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ds_moe_ep.comm.transport import Answer, Loopback, Message
from ds_moe_ep.schedule.spans import NO_TAGS, Tags, union, without

Clock = dict[str, int]

HOST_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2"}
HOST_METHODS = ("tolist", "cpu", "numpy", "new_tensor")  # of a tensor; on the CPU they dispatch no op
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
UNWRITTEN = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}


@dataclass
class Stream:
    """A stream and what it has seen of every stream, itself included."""

    name: str
    device: RecordingDevice
    clock: Clock = field(default_factory=dict)

    def tick(self) -> Clock:
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return dict(self.clock)

    def see(self, clock: Clock) -> None:
        for name, time in clock.items():
            self.clock[name] = max(self.clock.get(name, 0), time)

    def wait_event(self, event: Event) -> None:
        self.device.num_stream_waits += 1
        self.see(event.clock)

    def synchronize(self) -> None:
        self.device.host_waits(f"synchronize of stream {self.name}")

    def __hash__(self) -> int:
        return hash(self.name)


class Event:
    def __init__(self, device: RecordingDevice) -> None:
        self.device = device
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.device.num_events += 1
        self.clock = (self.device.running if stream is None else stream).tick()

    def synchronize(self) -> None:
        self.device.host_waits("synchronize of an event")


@dataclass(frozen=True)
class Moment:
    """A point of a stream, and what the stream had seen by then."""

    stream: str
    clock: Clock

    def is_beside(self, other: Moment) -> bool:
        """True where neither is ordered behind the other."""
        return not self._has_seen(other) and not other._has_seen(self)

    def _has_seen(self, other: Moment) -> bool:
        return self.clock.get(other.stream, 0) >= other.clock[other.stream]


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
    """Stand-in for what CudaLanes use of `torch.cuda`, and the log of every op under it; `faults` are what it found."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self.products: list[Moment] = []
        self.transfers: list[Moment] = []
        self.num_waits = 0  # for transfers
        self.launched: list[str] = []
        self.host_waited: list[str] = []
        self.forward_waits = 0
        self.pinned: list[Tensor] = []  # memory of the host: reading it asks no device
        self.num_events = self.num_stream_waits = self.num_given = 0
        self.asked_of: list[object] = []  # devices whose current stream was asked for
        self._is_in_schedule = False
        self._streams = [Stream("compute", self)]
        self._by_name = {"compute": self._streams[0]}
        self._written: dict[int, list[tuple[float, float]]] = {}  # of storages that were born unwritten
        self._accesses: dict[int, list[Access]] = {}
        self._home: dict[int, str] = {}
        self._shared: set[tuple[int, str]] = set()
        self._lives: dict[int, StorageWeakRef] = {}  # by address, which comes back to nobody while the reference lives
        self._lent: dict[int, list[Access]] = {}  # uses by other streams than a storage's own, while it lives

    def Stream(self, device: object = None, priority: int = 0) -> Stream:
        stream = Stream(f"lane {len(self._by_name)}", self)
        self._by_name[stream.name] = stream
        return stream

    def Event(self) -> Event:
        return Event(self)

    def synchronize(self, device: object = None) -> None:
        self.faults.append("synchronize of the whole device")

    def current_stream(self, device: object = None) -> Stream:
        self.asked_of.append(device)
        return self._streams[-1]

    @property
    def running(self) -> Stream:
        """The stream on which ops run now."""
        return self._streams[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._streams.append(stream)
        yield
        self._streams.pop()

    @contextmanager
    def schedule(self) -> Iterator[None]:
        """Inside, the host may not wait."""
        self._is_in_schedule = True
        yield
        self._is_in_schedule = False

    def host_waits(self, what: str) -> None:
        self.host_waited.append(what)
        if self._is_in_schedule:
            self.faults.append(f"{what} makes the host wait inside the schedule")

    def empty_pinned(self, like: Tensor) -> Tensor:
        """Memory of the host that copies reach without a wait."""
        self.pinned.append(torch.empty_like(like))
        return self.pinned[-1]

    def is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor.untyped_storage()._cdata == pinned.untyped_storage()._cdata for pinned in self.pinned)

    def record_stream(self, tensor: Tensor, stream: Stream) -> None:
        self.num_given += 1
        self._shared.add((tensor.untyped_storage()._cdata, stream.name))

    def check_freed(self) -> None:
        """Finds memory that was freed while its own stream had not seen the end of another one's use."""
        for storage in [storage for storage in self._lent if self._lives[storage].expired()]:
            home = self._home[storage]
            for use in self._lent.pop(storage):
                if not use.is_before(self._by_name[home].clock) and (storage, use.stream) not in self._shared:
                    self.faults.append(f"memory of {home} is freed while {use.op} on {use.stream} may use it")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.check_freed()
        name, clock = func.name().split(".")[0], self.running.tick()
        self.launched.append(name)
        if name in PRODUCTS:
            self.products.append(Moment(self.running.name, clock))
        if name in HOST_WAITS:
            self.host_waits(name)
        is_view = name == "aten::_unsafe_view" or any(_is_alias(result) for result in func._schema.returns)
        before = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for argument, value in [] if is_view or name in UNWRITTEN else _with_arguments(func, args, kwargs):
            is_write = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in _tensors(value):
                self._access(name, tensor, is_write, clock)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()._cdata
            if storage not in before:
                self._home[storage] = self.running.name
                self._lives[storage] = StorageWeakRef(tensor.untyped_storage())
                if name in UNWRITTEN:
                    self._written[storage] = []
                else:
                    self._access(name, tensor, True, clock)
        return result

    def _access(self, op: str, tensor: Tensor, is_write: bool, clock: Clock) -> None:
        if tensor.numel() == 0:
            return
        storage, here = tensor.untyped_storage()._cdata, self.running.name
        self._lives.setdefault(storage, StorageWeakRef(tensor.untyped_storage()))
        start = tensor.storage_offset()
        stop = start + 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        home = self._home.setdefault(storage, "compute")
        if is_write and storage in self._written:
            self._written[storage] = union([*self._written[storage], (start, stop)])
        elif storage in self._written and without([(start, stop)], self._written[storage]):
            self.faults.append(f"{op} on {here} reads what nothing has written")
        log = self._accesses.setdefault(storage, [])
        for other in log:
            overlaps = other.start < stop and start < other.stop and (is_write or other.is_write)
            if overlaps and not other.is_before(clock):
                self.faults.append(f"{op} on {here} is not ordered behind {other.op} on {other.stream}")
        log.append(Access(op, here, clock[here], start, stop, is_write))
        if here != home and not here.startswith("wire"):  # what a communicator uses, it keeps
            self._lent.setdefault(storage, []).append(log[-1])


def _is_alias(result: Any) -> bool:
    return result.alias_info is not None and not result.alias_info.is_write


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
        self._is_waited_for = False

    def wait(self) -> None:
        if self._is_waited_for:
            self._device.faults.append("a transfer is waited for twice")
        self._is_waited_for = True
        self._device.num_waits += 1
        self._device.running.see(self._clock)


class RecordingTransport(Loopback):
    """A group of `size` ranks of which this is rank 0: transfers read and write their rows on a stream of their own."""

    rank = 0

    def __init__(self, device: RecordingDevice, size: int) -> None:
        self.size, self.ranks = size, range(size)
        self._device = device
        self._wires = {lane: Stream(f"wire {lane}", device) for lane in ("dispatch", "combine")}

    def exchange_counts(self, counts_PC: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        return counts_PC.clone()

    def consult(self, told_C: Tensor, num_answered: int, answer: Answer, tags: Tags = NO_TAGS) -> Callable[[], Tensor]:
        return lambda: answer(told_C.repeat(self.size, 1))[0]

    def sum(self, values: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        return values.clone()

    def start(
        self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS
    ) -> RecordingWork:
        own = ([m for m in messages if m.peer == self.rank] for messages in (sends, receives))
        for sent, received in zip(*own, strict=True):
            received.rows.copy_(sent.rows)  # on the lane, where the transports over groups keep their own rows, too
        sends, receives = ([m for m in messages if m.peer != self.rank] for messages in (sends, receives))
        wire = self._wires[lane]
        wire.see(self._device.running.tick())
        self._device.transfers.append(Moment(wire.name, wire.tick()))
        with self._device.stream(wire):
            for message in sends:
                message.rows.sum()
            for message in receives:
                message.rows.fill_(0.5)
        return RecordingWork(self._device, wire)
