"""Facts that the doctor judges by: plain values, so that a test can describe any machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DeviceKind = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TorchFacts:
    """The installed torch; `error` says why it cannot be imported."""

    version: str = ""
    error: str = ""
    cuda: str = ""  # the CUDA release that it was built for; empty for a CPU build
    nccl: str = ""
    devices: tuple[Gpu, ...] = ()
    apart: tuple[tuple[int, int], ...] = ()  # pairs of devices without peer access


@dataclass(frozen=True, kw_only=True)
class DeepSpeedFacts:
    """The installed DeepSpeed; errors are empty where an import works."""

    version: str = ""
    error: str = ""
    tested: tuple[str, ...] = ()
    seams: str = ""  # what of its private names is gone
    autoep: str = ""  # why its AutoEP layer cannot be imported


@dataclass(frozen=True, kw_only=True)
class TritonFacts:
    """The installed Triton; an empty version means none."""

    version: str = ""
    error: str = ""
    interpreted: bool = False
    compiled: bool = False  # a kernel was compiled, ran on a device and was right
    reason: str = ""  # why none was


@dataclass(frozen=True, kw_only=True)
class ApexFacts:
    """The package under the name apex; an empty place means none is installed."""

    place: str = ""
    version: str = ""
    has_normalization: bool = False  # NVIDIA's has this part, other projects of the name do not
    offers: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class BuildLock:
    """The lock of one build of a torch extension; torch keeps its file open for as long as it builds."""

    age_s: float
    holder: str = ""  # the process that has the file open
    all_seen: bool = True  # False where its owner is another user, whose processes cannot be looked into


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """This machine."""

    name: str = ""
    cores: int = 1
    free_bytes: int = 0
    shm_bytes: int | None = None  # size of /dev/shm; None where there is none
    shm_left: Mapping[str, int] = field(default_factory=dict)  # DeepSpeed's files in it, and their bytes
    open_files: int = 0
    locks: Mapping[str, BuildLock] = field(default_factory=dict)  # of torch extension builds, by path
    addresses: tuple[str, ...] = ()  # what its own name resolves to
    own_address: bool = True  # a socket can be bound to the first of them
    localhost: bool = True  # `localhost` resolves to this machine
    interfaces: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()  # InfiniBand
    num_gpu_files: int = 0  # /dev/nvidia0 and so on, whatever torch sees
    compiler: str = ""
    launcher: str = ""  # what `deepspeed` starts
    launcher_beside: str = ""  # the one that lies beside this Python


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that was gathered."""

    python: tuple[int, int, int] = (3, 11, 0)
    versions: Mapping[str, str | None] = field(default_factory=dict)
    torch: TorchFacts = field(default_factory=TorchFacts)
    deepspeed: DeepSpeedFacts = field(default_factory=DeepSpeedFacts)
    triton: TritonFacts = field(default_factory=TritonFacts)
    apex: ApexFacts = field(default_factory=ApexFacts)
    host: HostFacts = field(default_factory=HostFacts)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def device(self) -> DeviceKind:
        """The kind of device that DeepSpeed would train on here."""
        asked = self.environment.get("DS_ACCELERATOR")
        return "cuda" if self.torch.devices and asked in (None, "", "cuda") else "cpu"
