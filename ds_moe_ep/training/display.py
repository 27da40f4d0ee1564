"""Display of a run: a few live lines in a terminal, plain lines elsewhere, on one rank."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

import ds_moe_ep
from ds_moe_ep.records.quantity import counted, gigabytes, number

SEPARATOR, UNKNOWN = " | ", "n/a"
RANKS_OF_HOST = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")  # torchrun, deepspeed, mpirun
Hidden = tuple[float | None, float | None]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """The figures of one optimizer step, over all ranks."""

    step: int
    loss: float  # cross-entropy, nats per token
    learning_rate: float
    gradient_norm: float | None  # of all parameters, before clipping; None where DeepSpeed does not tell
    tokens_per_s: float
    memory_bytes: float  # of the fullest rank, at its fullest moment: of the device, or resident on a CPU
    load: float  # rows of the fullest expert over the mean, in the layer where that is largest
    hidden: Hidden = (None, None)  # percent of communication behind compute, and of the blocking control

    def figures(self) -> Iterator[str]:
        """Each figure with its name."""
        yield f"loss {number(self.loss, 3)}"
        yield f"lr {number(self.learning_rate)}"
        yield f"grad norm {UNKNOWN if self.gradient_norm is None else number(self.gradient_norm)}"
        yield f"{number(self.tokens_per_s, 0)} tokens/s"
        yield f"memory {gigabytes(self.memory_bytes, 2)}"
        yield f"expert load max/mean {number(self.load, 2)}"
        hidden, blocking = (UNKNOWN if share is None else f"{number(share, 0)} %" for share in self.hidden)
        yield f"communication hidden {hidden}" + ("" if self.hidden[0] is None else f" (blocking: {blocking})")

    def __str__(self) -> str:
        return SEPARATOR.join(self.figures())


def packed(words: Iterable[str], width: int) -> str:
    """The words in lines of at most `width` columns, where no word is longer."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + len(SEPARATOR) + len(word) <= width:
            lines[-1] += SEPARATOR + word
        else:
            lines.append(word)
    return "\n".join(lines)


def communication_hidden(engine: Any) -> Hidden:
    """The hidden share of the experts' traffic and that of the blocking control, in percent; None without a meter."""
    meter = getattr(engine, "moe_ep_meter", None)
    return (None, None) if meter is None else (meter.hidden_percent(), meter.control_percent())


def why_little_is_hidden(environment: Mapping[str, str], num_cores: int) -> str | None:
    """A line for a run on CPU whose launcher put more ranks on this host than it has cores; else None."""
    num_ranks = next((int(environment[name]) for name in RANKS_OF_HOST if name in environment), 1)
    if num_ranks <= num_cores:
        return None
    return (
        f"{num_ranks} ranks share {counted(num_cores, 'core')} here, where moving rows takes the time of computing: "
        "overlap can hide next to nothing; with emulated devices it can, see python -m ds_moe_ep demo"
    )


def gradient_norm(engine: Any) -> float | None:
    """The norm of the last step's gradients, inf after an overflow; None where DeepSpeed does not tell."""
    norm = engine.get_global_grad_norm()
    if norm is None:
        return None
    return float(norm) if float(norm) >= 0 else math.inf  # ZeRO marks an overflow by -1


def schedules(engine: Any) -> list[str]:
    """A line per choice of a schedule: the first layer that has it, and how many layers alike have it too."""
    names: dict[str, list[str]] = {}
    for name, layer in engine.moe_ep_layers.items():
        names.setdefault(str(layer.choice or f"schedule {layer.config.schedule}"), []).append(name)
    alike = {chosen: f" and {counted(len(others), 'layer')} alike" for chosen, (_, *others) in names.items() if others}
    return [f"{first}{alike.get(chosen, '')}: {chosen}" for chosen, (first, *_) in names.items()]


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
        self.live: Live | None = None
        self.figures: tuple[str, ...] = ("starting",)
        console = Console()
        # mpirun gives every process a terminal of its own, whatever its own output is.
        if shown and console.is_terminal and "OMPI_COMM_WORLD_SIZE" not in os.environ:
            columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = RichProgress("step", *columns, console=console, expand=True, auto_refresh=False)
            self.task = self.bar.add_task("", total=num_steps)
            self.console = console
            self.live = Live(get_renderable=self._picture, console=console, refresh_per_second=4)

    def _picture(self) -> Group:
        """The bar, and the figures under it in as many lines as the terminal's width asks for."""
        return Group(self.bar.get_renderable(), Text(packed(self.figures, self.console.width), overflow="fold"))

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
            self.figures = tuple(report.figures())
            self.bar.update(self.task, completed=report.step)
        elif self.shown and (report.step % self.every == 0 or report.step in (1, self.num_steps)):
            print(f"step {report.step}/{self.num_steps} | {report}", flush=True)
