"""What a run shows: a live line in a terminal, plain lines elsewhere, on one rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

import ds_moe_ep


@dataclass(frozen=True)
class StepReport:
    """The figures of one optimizer step, over all ranks."""

    step: int
    loss: float  # cross-entropy, nats a token
    tokens_per_s: float
    load: float  # rows of the fullest expert over the mean, in the layer where that is largest
    hidden_percent: float | None  # communication that ran behind compute; None where it is not measured
    blocking_percent: float | None  # the same of the blocking control: what the meter is off by

    def __str__(self) -> str:
        hidden, blocking = percent(self.hidden_percent), percent(self.blocking_percent)
        measured = "n/a" if self.hidden_percent is None else f"{hidden} (blocking: {blocking})"
        return (
            f"loss {self.loss:.3f} | {self.tokens_per_s:,.0f} tokens/s | "
            f"expert load max/mean {self.load:.2f} | communication hidden {measured}"
        )


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.0f} %"


def communication_hidden(engine: Any) -> tuple[float | None, float | None]:
    """The hidden share of the experts' traffic and that of the blocking control, in percent; None without a meter."""
    meter = getattr(engine, "moe_ep_meter", None)
    return (None, None) if meter is None else (meter.hidden_percent(), meter.control_percent())


def schedules(engine: Any) -> list[str]:
    """A line a layer: the schedule that was chosen for it."""
    layers = engine.moe_ep_layers.items()
    return [f"{name}: {layer.choice or 'schedule ' + layer.config.schedule}" for name, layer in layers]


def write_trace(engine: Any, path: str) -> str:
    """Writes the trace of the last measured step, and says what it shows. Collective."""
    try:
        engine.moe_ep_meter.write_trace(path)
    except ds_moe_ep.EngineError as error:  # too few steps
        return str(error)
    return f"{engine.moe_ep_meter.report()}\ntrace in {path}; open it in https://ui.perfetto.dev"


class Progress:
    """Shows steps up to `num_steps`: each of them in a terminal, else the first, every `every`-th and the last.

    With `shown` false it shows nothing, so that all ranks run the same code.
    """

    def __init__(self, num_steps: int, every: int, *, shown: bool) -> None:
        self.num_steps = num_steps
        self.every = every
        self.shown = shown
        self.live: RichProgress | None = None
        # mpirun gives every process a terminal of its own, whatever its own output is.
        if shown and Console().is_terminal and "OMPI_COMM_WORLD_SIZE" not in os.environ:
            columns = ("step", BarColumn(bar_width=20), MofNCompleteColumn(), "{task.description}")
            self.live = RichProgress(*columns, TextColumn("|"), TimeRemainingColumn())
            self.live.add_task("starting", total=num_steps)

    def __enter__(self) -> Progress:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self, report: StepReport) -> None:
        """Shows one step."""
        if self.live is not None:
            self.live.update(self.live.task_ids[0], completed=report.step, description=str(report))
        elif self.shown and (report.step % self.every == 0 or report.step in (1, self.num_steps)):
            print(f"step {report.step}/{self.num_steps} | {report}", flush=True)
