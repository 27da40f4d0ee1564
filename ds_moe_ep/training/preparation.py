"""Needs of a run before its engine starts: read and checked on every rank, and refused once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_moe_ep import ConfigError, Section
from ds_moe_ep.config.command_line import writable_file, writable_folder
from ds_moe_ep.config.training import Training, read_training
from ds_moe_ep.engine.seams import gather
from ds_moe_ep.model.text import Corpus, fingerprint, last_start, load_corpus
from ds_moe_ep.training.checkpoints import check_resume, check_room, checkpoint_bytes
from ds_moe_ep.training.command import parse_arguments, read_settings
from ds_moe_ep.training.world import agreed, set_up_process

RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
NOT_LAUNCHED = (
    "RANK: no launcher has set it; start by one, such as `deepspeed --num_gpus 16 examples/train_ep16.py ...`"
)


@dataclass(frozen=True)
class TrainingJob:
    """One training run, as every rank knows it."""

    args: argparse.Namespace
    ds_config: dict[str, Any]
    section: Section
    training: Training
    corpus: Corpus


def prepare(
    description: str | None, config: str, arguments: Sequence[str] | None, *, is_pipeline: bool = False
) -> TrainingJob:
    """The run that the command line names, in a world that has met. Collective.

    Raises ConfigError, the same on every rank, for what cannot work on one of them. A ds_config is like `config`.
    """
    args: argparse.Namespace | ConfigError
    try:
        args = parse_arguments(description, config, arguments)
    except ConfigError as error:
        args = error
    if not is_launched(os.environ):
        raise args if isinstance(args, ConfigError) else ConfigError(NOT_LAUNCHED)
    set_up_process()
    job = agreed(lambda: read_job(args, is_pipeline))
    if len(set(gather(fingerprint(job.corpus.train.numpy().tobytes(), len(job.corpus.validation))))) > 1:
        raise ConfigError("--data: the ranks read different text; give files that are the same on every host")
    if job.args.save:
        check_room(job.args.save, checkpoint_bytes(job.section, job.training))
    return job


def read_job(args: argparse.Namespace | ConfigError, is_pipeline: bool) -> TrainingJob:
    """This rank's view of the run. Local. Raises ConfigError for what cannot work here."""
    if isinstance(args, ConfigError):
        raise args
    if args.save_every and not args.save:
        raise ConfigError(f"--save-every={args.save_every}: without --save there is nowhere to save; name a folder")
    if args.resume and args.weights:
        raise ConfigError(f"--weights={args.weights}: --resume brings its own weights; leave one of the two out")
    if args.trace and is_pipeline:
        raise ConfigError("--trace: records the experts' traffic of a plain engine alone; leave it out")
    if args.watch and is_pipeline:
        raise ConfigError("--watch: shows how ranks share experts in a plain engine alone; leave it out")
    for name in ("resume", "weights"):
        if getattr(args, name):
            check_resume(getattr(args, name), f"--{name}")
    ds_config, section = read_settings(args)
    assert section.model is not None
    check_script(section, is_pipeline)
    training = read_training(ds_config, section.moe.ep_size, dist.get_world_size(), section.layout)
    corpus = load_corpus(args.data)
    for text in (corpus.train, corpus.validation):
        last_start(text, (1, section.model.sequence_length))
    if args.save:
        writable_folder(Path(args.save), "--save")
    if args.trace and dist.get_rank() == 0:
        writable_file(args.trace, "--trace")
    return TrainingJob(args, ds_config, section, training, corpus)


def check_script(section: Section, is_pipeline: bool) -> None:
    """Raises ConfigError for a ds_config of the other script, part of which this one would not heed."""
    layout, ep_size = section.layout, section.moe.ep_size
    if layout.size > 1 and not is_pipeline:
        raise ConfigError(
            f"moe_ep.layout={layout.tp_size}x{layout.pp_size}: this script cuts no model by tensors and stages; "
            "run examples/train_tp8_pp2.py, or leave the layout out"
        )
    if ep_size > 1 and layout.size == 1 and is_pipeline:
        raise ConfigError(
            f"moe_ep.ep_size={ep_size}: this script cuts a model, and the section has no layout; run "
            "examples/train_ep16.py, or give a layout"
        )


def is_launched(environment: Mapping[str, str]) -> bool:
    """True where a launcher has told this process its rank."""
    return any(name in environment for name in RANK_VARIABLES)
