"""The options of `plan`, `audit` and `calibrate`. Light to import: the command line reads them for each command."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ds_moe_ep.config.command_line import output_file, slots
from ds_moe_ep.config.options import option
from ds_moe_ep.config.shipped import shipped_clusters, shipped_ds_configs

SPECIFIED_CLUSTER = "h100_4x4"
CLUSTERS = f"these ship: {', '.join(shipped_clusters())}"


def micro_batch(text: str) -> int | str:
    """The value of --micro-batch: a number of sequences, or `largest`."""
    if text == "largest":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"={text}: give a number of sequences, or largest")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """A job, its cluster, and what to print and write; `given` is all of the command line, to be typed again."""

    config: str = option(
        help=f"the job: a ds_config that names its model; these ship: {', '.join(shipped_ds_configs())}",
        metavar="DS_CONFIG",
    )
    cluster: str = option(help=f"the cluster (JSON; {CLUSTERS})", metavar="FILE")
    compare: str | None = option(None, "another job on the same cluster, side by side", metavar="DS_CONFIG")
    micro_batch: int | Literal["largest"] | None = option(
        None,
        "sequences of a micro-batch of --config; with `largest` as many as fit, in the job of --compare too. The "
        "batch stays, accumulation adapts (default: as the files say)",
        type=micro_batch,
        metavar="N|largest",
    )
    load: str = option(
        "even",
        "how rows fall on experts: even, zipf:<exponent>, or a file of rows, of Records or of recorded routes",
        metavar="LOAD",
    )
    replicas: int | Literal["auto"] | None = option(
        None,
        "slots per rank for copies of hot experts in --config (default: as the file says)",
        type=slots,
        metavar="N|auto",
    )
    tensor_ranks: int = option(
        1,
        "ranks of a Megatron mpu that cut the dense part of --config, which no ds_config names",
        least=1,
        metavar="RANKS",
    )
    forward: bool = option(False, "forward passes alone instead of training")
    nodes: int | None = option(
        None, "as many nodes as this (default: as the cluster's file says)", least=1, metavar="N"
    )
    sweep: str | None = option(
        None,
        "scale out instead: ep=1..1024 (doubling), ep=1,4,16, or 'ep=16 dp=1..64' (copies of the experts). Prints "
        "the curve and how well the specification's four laws fit it; with --out also draws it",
        metavar="SIZES",
    )
    search: bool = option(False, "list the layouts of --config that fit the cluster instead, best first")
    traffic: tuple[float, ...] = option(
        (),
        "with --search: the best layout on links between nodes over which the experts' rows, where all ranks share the "
        "experts and nothing is hidden, take this many times the compute (as in `bench systems`)",
        above=0,
        metavar="RATIO",
    )
    verbose: bool = option(
        False, "print every table: memory, parts of a step, schedules, bounds, changes", one_of="form"
    )
    json: bool = option(False, "print JSON instead of lines", one_of="form")
    out: Path | None = option(
        None, "write Records for `report`, and spans or pictures beside them", type=output_file, metavar="FILE"
    )
    trace: Path | None = option(
        None, "write a Chrome trace of one micro-batch of --config", type=output_file, metavar="FILE"
    )
    given: tuple[str, ...] = ()

    @property
    def mode(self) -> Literal["training", "forward"]:
        """Passes that are simulated."""
        return "forward" if self.forward else "training"


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """The cluster, and the form in which the audit is told."""

    cluster: str = option(
        SPECIFIED_CLUSTER,
        f"the cluster (JSON; {CLUSTERS}; default: the specification's, {SPECIFIED_CLUSTER})",
        metavar="FILE",
    )
    markdown: bool = option(False, "print a Markdown table", one_of="form")
    json: bool = option(False, "print JSON, with the numbers behind each text", one_of="form")
    out: Path | None = option(None, "write every number as a Record", type=output_file, metavar="FILE")
    given: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Records, the cluster to begin with, and the runs that stay out of the fit."""

    records: tuple[str, ...] = option(help="files of Records, one line of JSON each", positional=True)
    cluster: str = option(help=f"the cluster to begin with (JSON; {CLUSTERS})", metavar="FILE")
    out: Path | None = option(
        None, "where to write the calibrated cluster (default: nowhere)", type=output_file, metavar="FILE"
    )
    hold_out: float = option(
        0.5, "share of the runs that stays out of the fit and tells its error", least=0, most=1, metavar="SHARE"
    )
    precision: Literal["bf16", "fp16", "fp32"] | None = option(
        None, "precision whose products tell the efficiency (default: the fastest one's)"
    )
