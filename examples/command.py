"""The command line that continues a run, written for the launcher that started it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

OVERWRITTEN = ("--save", "--resume", "--steps")
LAUNCHER_ENV = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS")


def resume_command(checkpoint: str, num_steps: int) -> str:
    """The exact command that goes on from `checkpoint` until step `num_steps` and saves to the same folder."""
    folder = str(Path(checkpoint).resolve())
    kept = without_options(sys.argv[1:])
    script = [str(Path(sys.argv[0]).resolve()), *kept]
    changed = ["--save", folder, "--resume", folder, "--steps", str(num_steps)]
    settings = [f"{name}={os.environ[name]}" for name in LAUNCHER_ENV if name in os.environ]
    return shlex.join([*settings, *launcher(os.environ), *script, *changed])


def without_options(arguments: Sequence[str]) -> list[str]:
    """`arguments` without the options that a resumed run sets anew and the launcher's own --local_rank."""
    kept: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name = argument.split("=", maxsplit=1)[0]
        if name in (*OVERWRITTEN, "--local_rank"):
            if "=" not in argument:
                next(remaining, None)
        else:
            kept.append(argument)
    return kept


def launcher(environment: Mapping[str, str]) -> list[str]:
    """The start of the command: torchrun, mpirun, or the deepspeed launcher, with this world's size."""
    size = environment["WORLD_SIZE"]
    local_size = environment.get("LOCAL_WORLD_SIZE", size)
    beside_python = Path(sys.executable).parent
    if "TORCHELASTIC_RUN_ID" in environment:
        nodes = [] if local_size == size else ["--nnodes", str(int(size) // int(local_size))]
        return [str(beside_python / "torchrun"), *nodes, "--nproc_per_node", local_size]
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return ["mpirun", "-np", size, sys.executable]
    return [str(beside_python / "deepspeed"), "--num_gpus", local_size]
