"""The command line of a training run: what it takes, and the one that continues the run."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed

import ds_moe_ep
from ds_moe_ep.config.options import make_parser
from ds_moe_ep.training.options import TRACE_EVERY, TrainOptions

OVERWRITTEN = ("--save", "--resume", "--steps", "--weights", "--local_rank")
PATHS = ("--data", "--deepspeed_config", "--trace", "--watch")
# DeepSpeed counts local ranks in the order of ranks and refuses to start where Open MPI does not.
MPI_MAPPING = ("--map-by", "slot:OVERSUBSCRIBE", "--bind-to", "none")
LAUNCHER_ENV = ("DS_ACCELERATOR", "OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS")


def parse_arguments(description: str | None, config: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of a run, whose ds_config is like `config`; `--deepspeed_config` is DeepSpeed's own option.

    Raises ConfigError for what no run can have.
    """
    parser = make_parser(TrainOptions, description=description)
    args: argparse.Namespace = deepspeed.add_config_arguments(parser).parse_args(arguments)
    if args.deepspeed_config is None:
        parser.error(f"--deepspeed_config is missing; give for example {config}")
    return args


def read_settings(args: argparse.Namespace) -> tuple[dict[str, Any], ds_moe_ep.Section]:
    """The ds_config of a run and its section "moe_ep"; --trace and --watch turn the meter on."""
    ds_config = ds_moe_ep.load_ds_config(args.deepspeed_config)
    if args.replicas is not None:
        ds_config["moe_ep"] = {**ds_config.get("moe_ep", {}), "replicas": args.replicas}
    section = ds_moe_ep.read_section(ds_config)
    if section.model is None:
        raise ds_moe_ep.ConfigError(
            f'{args.deepspeed_config}: moe_ep.model is missing; add for example "model": "small"'
        )
    if args.trace or args.watch:  # a trace needs a measured step before the end
        every = min(section.moe.meter_every or TRACE_EVERY, args.steps)
        ds_config["moe_ep"] = {**ds_config.get("moe_ep", {}), "meter_every": every}
    if args.watch:
        every = section.moe.report_every or 1
        ds_config["moe_ep"] = {**ds_config["moe_ep"], "watch": args.watch, "report_every": every}
    return ds_config, section


def last_line(args: argparse.Namespace, step: int, stopped_by: signal.Signals | None) -> str:
    """Last line of a run, on its checkpoint: where it lies, and the command that goes on from it."""
    why = (
        f"{stopped_by.name}: stopped after step {step} of {args.steps}"
        if stopped_by
        else f"step {step} of {args.steps}"
    )
    if not args.save:
        return f"{why}; nothing is saved: give --save DIR"
    num_steps = args.steps if stopped_by else 2 * args.steps
    return f"{why}, checkpoint in {args.save}; to resume: {resume_command(args.save, num_steps)}"


def resume_command(checkpoint: str, num_steps: int) -> str:
    """The exact command that goes on from `checkpoint` until step `num_steps` and saves to the same folder."""
    folder = str(Path(checkpoint).resolve())
    kept = without_options(sys.argv[1:])
    script = [str(Path(sys.argv[0]).resolve()), *kept]
    changed = ["--save", folder, "--resume", folder, "--steps", str(num_steps)]
    settings = settings_of(os.environ)
    if int(os.environ.get("CROSS_SIZE", 1)) > 1:  # ranks of other hosts get what .deepspeed_env in this folder says
        settings = ["env", f"--chdir={Path.cwd()}", *settings]
    return shlex.join([*settings, *launcher(os.environ), *script, *changed])


def settings_of(environment: Mapping[str, str], *others: str) -> list[str]:
    """NAME=VALUE of the variables that a resumed run needs again, of those that are set."""
    return [f"{name}={environment[name]}" for name in (*LAUNCHER_ENV, *others) if name in environment]


def without_options(arguments: Sequence[str]) -> list[str]:
    """`arguments` without the options that a resumed run sets anew and the launcher's own --local_rank.

    Paths become absolute, so that the command works from any folder.
    """
    kept: list[str] = []
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = f"{name}={absolute(value)}" if equals and name in PATHS else argument
        elif name in PATHS:
            argument = absolute(argument)
        if name not in OVERWRITTEN:
            kept.append(argument)
    return kept


def absolute(path: str) -> str:
    """The path from the root, where there is such a file: a ds_config may also be named."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def launcher(environment: Mapping[str, str]) -> list[str]:
    """The start of the command: torchrun, mpirun or the deepspeed launcher, with this world's size.

    Of several nodes no rank knows the hostfile: there the word HOSTFILE stands for it.
    """
    size = int(environment["WORLD_SIZE"])
    beside_python = Path(sys.executable).parent
    if "TORCHELASTIC_RUN_ID" in environment:
        of_node = int(environment["LOCAL_WORLD_SIZE"])
        nodes = ["--nnodes", str(size // of_node)] if of_node < size else []
        return [str(beside_python / "torchrun"), *nodes, "--nproc_per_node", str(of_node)]
    if "OMPI_COMM_WORLD_SIZE" in environment:
        hosts: list[str] = []
        if int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]) < size:  # mpirun takes along what -x names alone
            named = [word for setting in settings_of(environment, "PYTHONPATH") for word in ("-x", setting)]
            hosts = ["--hostfile", "HOSTFILE", *named]
        as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
        return ["mpirun", *as_root, "-np", str(size), *hosts, *MPI_MAPPING, sys.executable]
    where = ["--hostfile", "HOSTFILE"] if int(environment.get("CROSS_SIZE", 1)) > 1 else ["--num_gpus", str(size)]
    return [str(beside_python / "deepspeed"), *where]
