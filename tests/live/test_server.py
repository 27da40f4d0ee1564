"""The server and its answers, over a real connection; the command's words and exit codes."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep.cli.main import main
from ds_moe_ep.errors import EngineError
from ds_moe_ep.live.folder import RunFolder
from ds_moe_ep.live.server import LiveServer
from ds_moe_ep.live.snapshot import MAX_COLUMNS, MAX_POINTS, snapshot, state_of, thin
from tests.live.sample_runs import NAMES, START_S, report, write_run

RUN = "20261128-120000-0a0a"


@contextmanager
def serving(folder: Path, host: str = "127.0.0.1") -> Iterator[LiveServer]:
    with LiveServer(RunFolder(folder), host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: LiveServer, path: str, **headers: str) -> tuple[int, Any]:
    """Status and text, or object, of an answer."""
    request = urllib.request.Request(server.url + path, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=100)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        text = answer.read().decode()
        return answer.status, json.loads(text) if "json" in answer.headers["Content-Type"] else text


def test_the_page_is_one_file_that_names_no_other_address(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        status, text = ask(server, "")
    assert status == 200 and text.startswith("<!doctype html>")
    urls = {word for word in text.replace('"', " ").replace("'", " ").split() if "://" in word}
    assert urls == {"http://www.w3.org/2000/svg"}, "the name of SVG, which nobody fetches"


def test_a_snapshot_has_the_curves_and_all_that_follows_from_the_last_counts(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    with serving(tmp_path) as server:
        status, found = ask(server, "snapshot.json")
    assert status == 200 and (found["state"], found["run"], found["num_reports"]) == ("ended", RUN, 3)
    assert found["series"]["step"] == [10, 20, 30] and found["series"]["hidden_percent"] == [92.5] * 3
    last, (first, second) = found["last"], found["last"]["layers"]
    assert (last["step"], last["loss"], last["control_percent"]) == (30, 2.48, 0.5)
    assert first["share_E"] == [0.5, 0.125, 0, 0.375] and first["dead_experts"] == [2] and first["max_over_mean"] == 2
    assert first["rows_per_pass_E"] == [20, 5, 0, 15] and second["rows_E"] == [22, 20, 20, 20]
    assert last["rank_rows_R"] == [25 + 21, 15 + 20] and last["rank_max_over_mean"] == pytest.approx(46 / 40.5)
    assert last["slowest"] == {"rank": 1, "expert_ms": 12.0, "over_mean": 1.2, "step": 10}


def test_a_page_that_is_open_sees_what_is_written_meanwhile(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        assert ask(server, "snapshot.json")[1]["state"] == "waiting"
        log = write_run(tmp_path, 1, ends=False)
        assert ask(server, "snapshot.json")[1]["num_reports"] == 1
        log.write(report(1))
        assert ask(server, f"report.json?run={RUN}&index=1")[1]["layers"][1]["rows_E"] == [21, 20, 20, 20]
        _, over = ask(server, f"layer.json?run={RUN}&layer={NAMES[1]}")
        assert [(column["step"], column["rows_E"][0]) for column in over["columns"]] == [(10, 10.0), (20, 10.5)]


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    with serving(tmp_path) as server:
        for path, words in {
            "snapshot.json?run=other": f"run=other: no such run in .*{RUN}",
            f"report.json?run={RUN}&index=9": "report=9: the run has 1",
            f"report.json?run={RUN}&index=-1": "report=-1",
            f"layer.json?run={RUN}&layer=none": f"layer=none: the run has {NAMES[0]}, {NAMES[1]}",
            "../../etc/passwd": "nothing is here",
        }.items():
            status, found = ask(server, path)
            assert status == 404, path
            with pytest.raises(ValueError, match=words):
                raise ValueError(found["error"])


def test_pages_of_other_sites_read_nothing_from_a_local_server(tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    with serving(tmp_path) as server:
        assert ask(server, "snapshot.json", Host="elsewhere.example")[0] == 403
        assert ask(server, "snapshot.json", Host="localhost:9999")[0] == 200, "through a tunnel"
    with serving(tmp_path, host="0.0.0.0") as server:
        assert ask(server, "snapshot.json", Host="elsewhere.example")[0] == 200, "served to others on purpose"


def test_a_port_that_is_taken_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with serving(tmp_path) as server, pytest.raises(EngineError, match=r"cannot be served .*--port 0"):
        LiveServer(RunFolder(tmp_path), "127.0.0.1", server.server_address[1])


def test_a_run_is_live_then_silent_unless_it_has_ended(tmp_path: Path) -> None:
    write_run(tmp_path, 3, ends=False)  # a report every 5 s, the last one at 15
    folder = RunFolder(tmp_path)
    folder.refresh()
    run = folder.runs[RUN]
    assert [state_of(run, START_S + after) for after in (16, 44, 46)] == ["live", "live", "silent"]
    run.is_ended = True
    assert state_of(run, START_S + 999) == "ended"


def test_long_runs_are_thinned_and_keep_both_ends(tmp_path: Path) -> None:
    assert thin(5, 10) == [0, 1, 2, 3, 4]
    for number, most in ((5000, MAX_POINTS), (MAX_COLUMNS + 1, MAX_COLUMNS)):
        indices = thin(number, most)
        assert len(set(indices)) == most and indices == sorted(indices)
        assert (indices[0], indices[-1]) == (0, number - 1)
    write_run(tmp_path, MAX_POINTS + 7)
    folder = RunFolder(tmp_path)
    folder.refresh()
    found = snapshot(folder)
    assert len(found["series"]["loss"]) == MAX_POINTS and found["num_reports"] == MAX_POINTS + 7
    assert found["series"]["step"][-1] == found["last"]["step"] == 10 * (MAX_POINTS + 7)


def test_the_command_prints_a_snapshot_or_says_what_it_waits_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(tmp_path), "--json"]) == 2
    assert "nothing is written yet; it waits for the first report of a run" in capsys.readouterr().out
    assert main(["watch", str(tmp_path / "none")]) == 2
    assert "there is no such folder; name the folder" in capsys.readouterr().err
    write_run(tmp_path, 2)
    assert main(["watch", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["run"], printed["last"]["step"]) == (RUN, 20)
