"""Display of a run: its figures whole in terminals of any width, and its communication with and without a meter."""

import contextlib
import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace
from typing import Any

import pytest

import ds_moe_ep
from ds_moe_ep.training.display import (
    StepReport,
    communication_hidden,
    gradient_norm,
    packed,
    schedules,
    why_little_is_hidden,
    write_trace,
)
from tests.examples.training_scripts import EXAMPLES

FIGURES = (
    "loss 3.000", "lr 0.0010", "grad norm 0.123", "123,456 tokens/s", "memory 71.23 GB", "expert load max/mean 1.50",
    "communication hidden 93 % (blocking: 0 %)",
)  # fmt: skip


def report(**changes: Any) -> StepReport:
    """A step's report; a hidden share is in it."""
    values = {"step": 1, "loss": 3.0, "learning_rate": 1e-3, "gradient_norm": 0.1234, "tokens_per_s": 123_456.4}
    return StepReport(**(values | {"memory_bytes": 71.234e9, "load": 1.5, "hidden": (92.6, 0.0)} | changes))


def shown_in_a_terminal(columns: int) -> str:
    """Display of two steps in a terminal of so many columns, as written to it."""
    script = (
        "from ds_moe_ep.training.display import Progress\nfrom tests.examples.test_display import report\n"
        "with Progress(1200, 10, shown=True) as progress:\n"
        "    progress.show(report(step=1))\n    progress.show(report(step=2))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "TERM": "xterm", "COLUMNS": ""}
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdin=theirs, stdout=theirs)
    os.close(theirs)
    written = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while part := os.read(ours, 65536):
            written += part
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


@pytest.mark.parametrize("columns", [132, 80, 40])
def test_every_figure_the_step_and_the_remaining_time_stay_whole_in_a_terminal(columns: int) -> None:
    picture = shown_in_a_terminal(columns).rsplit("\x1b[2K", 1)[-1]  # what was drawn last
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", picture).replace("\r", "").strip("\n").split("\n")
    assert max(map(len, lines)) <= columns
    assert re.search(r"^step .* +2/1200 \S*\d+:\d\d", lines[0])
    words = " ".join(" ".join(lines[1:]).replace("|", " ").split())
    assert [figure for figure in FIGURES if " ".join(figure.split()) not in words] == []
    assert len(lines) <= 1 + {132: 2, 80: 2, 40: 7}[columns]


def test_without_a_terminal_a_step_is_one_line_with_every_figure() -> None:
    assert str(report()) == " | ".join(FIGURES)
    assert packed(["ab", "cd", "ef"], 7).split("\n") == ["ab | cd", "ef"]


def test_a_gradient_norm_that_deepspeed_does_not_tell_is_not_shown_and_an_overflow_is_infinite() -> None:
    norms = [gradient_norm(SimpleNamespace(get_global_grad_norm=lambda norm=norm: norm)) for norm in (None, 2, -1.0)]
    assert norms == [None, 2.0, math.inf]
    assert "grad norm n/a" in str(report(gradient_norm=None))


class Meter:
    """A meter that has measured, or not yet."""

    def __init__(self, hidden: float | None, control: float | None) -> None:
        self.hidden_percent, self.control_percent = lambda: hidden, lambda: control

    def report(self) -> str:
        return "the table"

    def write_trace(self, path: str) -> None:
        if self.hidden_percent() is None:
            raise ds_moe_ep.EngineError("no step was measured in 3")


@pytest.mark.parametrize(
    ("hidden", "control", "shown"),
    [
        (92.6, 0.0, "communication hidden 93 % (blocking: 0 %)"),
        (92.6, None, "communication hidden 93 % (blocking: n/a)"),
        (None, 0.0, "communication hidden n/a"),
        (None, None, "communication hidden n/a"),
    ],
)
def test_the_hidden_share_is_shown_with_its_blocking_control(
    hidden: float | None, control: float | None, shown: str
) -> None:
    engine = SimpleNamespace(moe_ep_meter=Meter(hidden, control))
    assert str(report(hidden=communication_hidden(engine))).endswith(shown)


def test_an_engine_without_a_meter_shows_no_figure() -> None:
    assert communication_hidden(SimpleNamespace()) == (None, None)


def test_a_trace_says_where_it_is_and_a_run_that_was_too_short_says_so() -> None:
    traced = write_trace(SimpleNamespace(moe_ep_meter=Meter(50.0, 0.0)), "out.json")
    assert "the table" in traced and "trace in out.json" in traced
    assert write_trace(SimpleNamespace(moe_ep_meter=Meter(None, None)), "out.json") == "no step was measured in 3"


@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"])
def test_ranks_that_share_cores_are_told_why_little_is_hidden_and_where_to_see_it(name: str) -> None:
    note = why_little_is_hidden({name: "16"}, 2)
    assert (
        note and note.startswith("16 ranks share 2 cores") and "python -m ds_moe_ep demo" in note and "\n" not in note
    )
    assert why_little_is_hidden({name: "16"}, 16) is None and why_little_is_hidden({}, 1) is None


def test_layers_with_one_choice_are_told_in_one_line() -> None:
    serial = SimpleNamespace(choice=None, config=SimpleNamespace(schedule="serial"))
    chosen = SimpleNamespace(choice="peers, 0.70 of serial's", config=SimpleNamespace(schedule="auto"))
    engine = SimpleNamespace(moe_ep_layers={"a": chosen, "b": serial, "c": chosen, "d": chosen})
    assert schedules(engine) == ["a and 2 layers alike: peers, 0.70 of serial's", "b: schedule serial"]
