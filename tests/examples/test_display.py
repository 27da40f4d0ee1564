"""What a run shows of its communication, with and without a meter."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from display import StepReport, communication_hidden, write_trace

import ds_moe_ep


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
    assert str(StepReport(1, 3.0, 100.0, 1.5, *communication_hidden(engine))).endswith(shown)


def test_an_engine_without_a_meter_shows_no_figure() -> None:
    assert communication_hidden(SimpleNamespace()) == (None, None)


def test_a_trace_says_where_it_is_and_a_run_that_was_too_short_says_so() -> None:
    traced = write_trace(SimpleNamespace(moe_ep_meter=Meter(50.0, 0.0)), "out.json")
    assert "the table" in traced and "trace in out.json" in traced
    assert write_trace(SimpleNamespace(moe_ep_meter=Meter(None, None)), "out.json") == "no step was measured in 3"
