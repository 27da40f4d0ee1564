"""The options of the commands that are the command line's own, each command's as a dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ds_moe_ep.config.options import option
from ds_moe_ep.config.shipped import shipped_ds_configs

BENCHMARKS = {
    "systems": "EP16, TP8/PP2, other layouts, DeepSpeed's MoE and AutoEP, training",
    "scaling": "EP = 1, 2, 4, 8, 16, and the specification's scaling laws",
    "layer": "one layer against DeepSpeed's own and the matmuls alone",
    "overlap": "schedules of one layer on shaped links",
    "probe": "a device and its links, in two minutes, for calibrate",
}


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """A command that takes none."""


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """A ds_config, and the GPU that it should fit."""

    path: str = option(
        help=f"a ds_config (JSON) with a section moe_ep; these ship: {', '.join(shipped_ds_configs())}",
        positional=True,
        metavar="DS_CONFIG",
    )
    world_size: int | None = option(
        None, "ranks of the job (default: what the batch sizes imply, else ep_size)", least=1, metavar="RANKS"
    )
    tensor_ranks: int = option(
        1, "ranks of a Megatron mpu that cut the dense part, which no ds_config names", least=1, metavar="RANKS"
    )
    gpu_gb: float = option(80.0, "memory of one GPU in 1e9 bytes", above=0, metavar="GB")
    reserve_gb: float = option(4.0, "part of it left to CUDA's context, NCCL and fragmentation", least=0, metavar="GB")
    load: float = option(
        1.0,
        "rows of the fullest rank over the mean, for its activations (default: 1, even routing)",
        least=1,
        metavar="TIMES",
    )
    verbose: bool = option(
        False, "print every table: parameters, memory, traffic, arithmetic, the specification's figures", one_of="form"
    )
    json: bool = option(False, "print JSON instead of lines", one_of="form")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """A checkpoint, and the layout that it is carried to."""

    source: str = option(help="a folder that engine.save_checkpoint wrote", positional=True, metavar="FROM_DIR")
    target: str = option(help="the folder to make; it must not exist", positional=True, metavar="TO_DIR")
    config: str | None = option(
        None, "the ds_config that TO_DIR is for; not needed with --to fp32", metavar="DS_CONFIG"
    )
    to: Literal["checkpoint", "hugging_face", "fp32"] = option(
        "checkpoint", "the form of TO_DIR: a checkpoint, a Hugging Face folder, or the weights in fp32 (safetensors)"
    )
    tag: str | None = option(None, "which checkpoint of FROM_DIR (default: the one that its file `latest` names)")
    world_size: int | None = option(
        None, "data-parallel ranks that will load TO_DIR (default: as many as saved FROM_DIR)", least=1, metavar="RANKS"
    )
    weights_only: bool = option(False, "leave optimizer states behind")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """A benchmark, and the words that it reads itself."""

    benchmark: str = option(help=", ".join(BENCHMARKS), positional=True, choices=tuple(BENCHMARKS), metavar="BENCHMARK")
    options: tuple[str, ...] = option(help="the benchmark's own options", positional=True, rest=True, metavar="...")
