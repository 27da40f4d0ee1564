"""The options of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.config.command_line import slots
from ds_moe_ep.config.options import option

TRACE_EVERY = 10  # steps between two measurements, where --trace has to turn the meter on


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """A run's text, length, checkpoints and reports; DeepSpeed adds --deepspeed_config, a file or a name that ships."""

    data: tuple[str, ...] = option((), "text files or folders (default: Python's library)", metavar="PATH")
    steps: int = option(80, "train until this optimizer step", least=1)
    save: str | None = option(None, "where to save a DeepSpeed checkpoint at the end, or after a signal", metavar="DIR")
    save_every: int | None = option(None, "save every N steps as well", least=1, metavar="N")
    resume: str | None = option(None, "a folder that --save wrote", metavar="DIR")
    weights: str | None = option(None, "a checkpoint to take weights from, such as `convert` writes", metavar="DIR")
    seed: int = option(0, "of the first weights and of the batches")
    eval_batches: int = option(4, "validation micro-batches of a rank", least=1)
    report_every: int = option(10, "steps between lines without a terminal", least=1)
    trace: Path | None = option(
        None,
        f"writes the last measured step as a Chrome trace; without meter_every, measures every {TRACE_EVERY} steps",
        metavar="FILE",
    )
    watch: str | None = option(
        None,
        "writes a report of each step there, for `python -m ds_moe_ep watch DIR`, and turns the meter on",
        metavar="DIR",
    )
    replicas: int | str | None = option(
        None,
        "slots per rank for copies of hot experts, a number or auto (default: as the ds_config says)",
        type=slots,
        metavar="N",
    )
    local_rank: int = option(-1, "set by the deepspeed launcher", flags=("--local_rank",))
