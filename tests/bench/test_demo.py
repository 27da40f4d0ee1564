"""The demo: what it measures and prints, its trace, the ends of ranks, and what it refuses."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from ds_moe_ep.bench.demo import command, links
from ds_moe_ep.bench.demo.death import Death, Saying, show_death
from ds_moe_ep.bench.demo.links import Paced, Uplink
from ds_moe_ep.bench.demo.options import LONGEST_S, link_rate
from ds_moe_ep.bench.demo.plan import CANDIDATES, NUM_RANKS, PHASES, STEP_BYTES, DemoPlan
from ds_moe_ep.bench.demo.results import SPEEDUP, TRAFFIC_RATIO, MeasuredStep, Results
from ds_moe_ep.bench.demo.show import show
from ds_moe_ep.bench.harness.processes import late_interrupt
from ds_moe_ep.cli.main import main
from ds_moe_ep.comm.transport import Loopback, Message
from ds_moe_ep.schedule.spans import Span, Tags
from tests import ranks
from tests.planted_clock import PlantedClock

TINY = ["--rounds", "1", "--compute-ms", "100", "--link", "300mbit"]


@pytest.fixture
def tests_own_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forked from the server that tests use, which has torch; the environment is put back."""
    ranks._fork_server()
    for name, value in command.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, object], Path]]:
    """Output of the command as JSON, started as a user starts it, and the trace that it writes."""
    trace = tmp_path_factory.mktemp("demo") / "demo.json"
    words = [sys.executable, "-m", "ds_moe_ep", "demo", *TINY, "--json", "--trace", str(trace)]
    for _ in range(4):  # a busy machine may hold its one round up, in which little is hidden then
        done = subprocess.run(words, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        found = json.loads(done.stdout)
        if all(hides(found, phase) for phase in PHASES):
            break
    yield found, trace


def hides(found: dict[str, Any], phase: str) -> bool:
    """True where the overlapped schedule hides more of a phase than the serial one by a good deal."""
    serial, overlapped = (found["sides"][side][phase]["hidden_percent"]["median"] for side in CANDIDATES)
    return bool(overlapped > serial + 20)


def test_overlapped_hides_more_than_serial_does_in_both_passes(figures: tuple[dict, Path]) -> None:
    found, _ = figures
    assert found["emulated"] is True and found["link_bytes_per_s"] == 37.5e6 and found["rounds"] == 1
    assert set(found["sides"]) == set(CANDIDATES)
    for phase in PHASES:
        serial, overlapped = (found["sides"][side][phase] for side in ("serial", "overlapped"))
        assert serial["hidden_percent"]["median"] < 5, "the control hides nothing"
        assert hides(found, phase)
        computes = 100 * {"forward": 1, "backward": 2, "step": 3}[phase]
        assert all(side["ms"]["median"] >= computes and side["ms"]["n"] == 1 for side in (serial, overlapped))
    paced_ms, serial_ms = 1e3 * STEP_BYTES / 37.5e6, found["sides"]["serial"]["step"]["ms"]["median"]
    assert serial_ms >= 300 + 0.9 * paced_ms, "no transfer is faster than the link"
    assert found["traffic_over_compute"]["median"] > 0.9 * paced_ms / 300 / 2, "the node's ranks share it"


def test_the_trace_holds_both_schedules_of_all_ranks_and_says_that_they_are_emulated(
    figures: tuple[dict, Path],
) -> None:
    events = [event for event in json.loads(figures[1].read_text())["traceEvents"] if event["ph"] == "X"]
    assert {event["pid"] for event in events} == set(range(NUM_RANKS))
    assert {event["args"]["layer"] for event in events} == {"emulated serial", "emulated overlapped"}
    assert {event["args"]["phase"] for event in events} == {"forward", "backward"}
    assert {event["name"].split()[0] for event in events} == {"dispatch", "compute", "combine", "weights"}
    assert not list(figures[1].parent.glob("*.part"))


def results() -> Results:
    """Two rounds by hand: a pass of 100 ms of compute between, or beside, two transfers of 40 ms."""

    def step(name: str, starts_ms: tuple[float, float, float], stretch: float) -> MeasuredStep:
        spans, dispatch_ms, compute_ms, combine_ms = [], *starts_ms
        for number, phase in enumerate(("forward", "backward")):
            for lane, start_ms, took_ms in (
                ("dispatch", dispatch_ms, 40), ("compute", compute_ms, 100), ("combine", combine_ms, 40)
            ):  # fmt: skip
                start_us = 1e3 * (200 * number + start_ms)
                tags = Tags(f"emulated {name}", phase, "all peers")
                spans += [Span(lane, rank, lane, start_us, start_us + 1e3 * took_ms, tags) for rank in range(NUM_RANKS)]
        seconds = {"forward": stretch * 0.2, "backward": stretch * 0.2, "step": stretch * 0.4}
        return MeasuredStep(name, seconds, tuple(spans))  # what a rank tells of it is its finding

    plan = DemoPlan(12.5e6, 200 / 3, 2, 0, "")
    serial, overlapped = step("serial", (0, 40, 140), 1.0), step("overlapped", (10, 0, 50), 0.5)
    slow = replace(overlapped, seconds={phase: 2 * s for phase, s in overlapped.seconds.items()})
    return Results(plan, [measured.finding() for measured in (serial, overlapped, slow, serial)])


def test_figures_are_medians_over_rounds_and_sums_over_ranks() -> None:
    found = results()
    assert [found[f"{side}.step.hidden"].value for side in CANDIDATES] == pytest.approx([0, 100])
    assert found["serial.step.time"].value == 400 and found["overlapped.step.time"].value == pytest.approx(300)
    assert found[SPEEDUP].value == pytest.approx(1.5) and found[SPEEDUP].n == 2
    assert found[TRAFFIC_RATIO].value == pytest.approx(160 / 200)
    assert list(found.shown()) == ["serial", "overlapped"]


def test_the_round_that_is_shown_is_the_one_nearest_to_the_median() -> None:
    steps = [MeasuredStep(name, dict.fromkeys(PHASES, s), (_span(name, s),)) for s in ROUNDS_S for name in CANDIDATES]
    shown = Results(DemoPlan(12.5e6, 200 / 3, 3, 0, ""), [step.finding() for step in steps]).shown()
    assert {name: spans[0].stop_us for name, spans in shown.items()} == dict.fromkeys(CANDIDATES, 1e6 * MIDDLE_S)


ROUNDS_S, MIDDLE_S = (0.5, 0.2, 0.3), 0.3


def _span(name: str, seconds: float) -> Span:
    return Span("compute", 0, "compute", 0.0, 1e6 * seconds, Tags(f"emulated {name}", "forward", "all peers"))


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_every_line_says_emulated_and_is_whole_in_terminals_of_any_width(width: int, encoding: str) -> None:
    raw = io.BytesIO()
    written = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    show(results(), Console(file=written, width=width))
    lines = raw.getvalue().decode(encoding).splitlines()
    assert all(line.startswith("emulated ") and len(line) <= width for line in lines)
    busy, exposed = "█░" if encoding == "utf-8" else "#-"
    bars = {lane: [line.split()[2] for line in lines if line.split()[1] == lane] for lane in ("dispatch", "compute")}
    assert [exposed in bar for bar in bars["dispatch"]] == [True, False], "serial, overlapped"
    assert [busy in bar for bar in bars["dispatch"]] == [False, True]
    assert all(busy in bar and exposed not in bar for bar in bars["compute"])
    assert len(bars["compute"][0]) == min(width, 100) - 18, "the longest step fills the width"
    text = " ".join(line.removeprefix("emulated ") for line in lines)
    assert "serial: step 400 ms, hidden 0 %" in text and "overlapped is 1.50" in text


@pytest.mark.parametrize("victim", [2, 0])
def test_every_survivor_names_the_rank_that_was_killed(
    tests_own_server: None, capsys: pytest.CaptureFixture[str], victim: int
) -> None:
    assert main(["demo", "--compute-ms", "30", "--link", "1gbit", "--kill", str(victim), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["killed"] == victim and found["named_by_all"] is True
    assert {said["rank"] for said in found["survivors"]} == set(range(NUM_RANKS)) - {victim}
    assert all(said["names_it"] and said["after_s"] < 20 for said in found["survivors"])


def test_without_a_death_nobody_is_named(tests_own_server: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *TINY]) == 0
    printed = capfd.readouterr()
    assert "PeerError" not in printed.out + printed.err and "is gone" not in printed.out + printed.err
    assert all(line.startswith("emulated ") and len(line) <= 80 for line in printed.out.splitlines())


def test_a_death_is_named_only_by_who_says_that_this_process_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    told = "dispatch: ranks 2, 3 did not answer rank 0; rank 2 (pid 77 on host) is gone, last seen in work"
    others = [Saying(rank, 0.1, told) for rank in (1, 3)]
    assert Death(2, 77, (Saying(0, 0.1, told), *others)).is_named_by_all
    for text in (told.replace("pid 77", "pid 78"), told.replace("rank 2 (", "rank 3 ("), told.partition(";")[0]):
        death = Death(2, 77, (Saying(0, 0.1, text), *others))
        assert not death.is_named_by_all
        show_death(death, Console(width=40))
        assert "rank 0 does not name it" in capsys.readouterr().out
    silent = Death(2, 77, tuple(others))
    assert not silent.is_named_by_all
    show_death(silent, Console(width=40))
    assert "rank 0 says nothing" in capsys.readouterr().out


@pytest.fixture
def heeded_interrupts() -> Iterator[None]:
    """Ctrl-C as Python takes it by default: tests that run in the background of a shell are started without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_interrupts")
def test_ctrl_c_while_ranks_are_forked_ends_the_demo_once_they_are() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), late_interrupt():
        signal.raise_signal(signal.SIGINT)
        steps.append("started")
    assert steps == ["started"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with late_interrupt():
        pass


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> PlantedClock:
    """The clock of links."""
    clock = PlantedClock(time.monotonic())
    monkeypatch.setattr(links, "time", clock)
    return clock


def test_ranks_of_a_node_share_its_uplink(tmp_path: Path, clock: PlantedClock) -> None:
    first, second = (Uplink(tmp_path / "node0", 1e6) for _ in range(2))
    ends_s = [link.passes_at(100_000) - clock.now_s for link in (first, second, first)]
    assert ends_s == pytest.approx([0.1, 0.2, 0.3])
    assert Uplink(tmp_path / "node1", 1e6).passes_at(100_000) - clock.now_s == pytest.approx(0.1)
    clock.sleep(0.5)
    assert first.passes_at(100_000) - clock.now_s == pytest.approx(0.1), "it has been free since"


class Recording(Loopback):
    """Tells when a transfer starts."""

    def __init__(self, clock: PlantedClock) -> None:
        self.clock, self.started_s = clock, list[float]()

    def start(self, *args: object, **kwargs: object) -> object:
        self.started_s.append(self.clock.now_s)
        return None


def test_far_messages_wait_for_the_link_and_near_ones_do_not(tmp_path: Path, clock: PlantedClock) -> None:
    inner, begin_s = Recording(clock), clock.now_s
    transport = Paced(inner, Uplink(tmp_path / "node0", 1e6), frozenset({2}))
    rows = torch.zeros(100, 250)  # 100 kB
    transport.start("dispatch", [Message(1, rows, 0, 100)], [Message(2, rows, 0, 100)])
    transport.start("dispatch", [Message(2, rows, 0, 100)], [])
    assert [moment - begin_s for moment in inner.started_s] == pytest.approx([0.0, 0.1])
    assert clock.slept_s == pytest.approx([0.1]), "it sleeps, and does not spin"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--link", "none"], "--link=none: the demo's link has a rate"),
        (["--link", "fast"], "--link=fast: write a rate like"),
        (["--link", "0"], "--link=0: give a number"),
        (["--link=-5mbit"], "--link=-5: give a number"),
        (["--link", "1kbit"], "--link=1kbit: the traffic of one step would take"),
        (["--link", "nan"], "--link=nan"),
        (["--kill", "4"], "--kill=4: give a whole number from 0 to 3"),
        (["--kill", "-1"], "--kill=-1: give a whole number from 0 to 3"),
        (["--rounds", "0"], "--rounds=0: give a whole number"),
        (["--compute-ms", "0"], "--compute-ms=0: give a number"),
        (["--trace", "missing/demo.json"], "there is no folder missing"),
        (["--kil", "2"], "--kil: unknown option"),
        (["--kill", "2", "--trace", "demo.json"], "--trace"),
    ],
)
def test_what_cannot_be_is_refused_before_a_rank_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_rate_is_given_in_bits_or_in_bytes() -> None:
    assert link_rate("400mbit") == 50e6 and link_rate("2gbit") == 250e6 and link_rate("50e6") == 50e6
    least = STEP_BYTES / LONGEST_S
    assert link_rate(f"{least}") == least
