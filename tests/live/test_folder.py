"""Logs and their reader: bounded size, runs that are killed or started again, and files that grow, move or go."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.live.folder import RunFolder
from ds_moe_ep.live.run_log import NAME, RunLog, new_run
from tests.live.sample_runs import START_S, head, report, write_run


def read(path: Path) -> RunFolder:
    folder = RunFolder(path)
    folder.refresh()
    return folder


def test_what_is_written_is_read_again_number_by_number(tmp_path: Path) -> None:
    log = RunLog(tmp_path, head())
    odd = report(0, loss=math.inf, tokens_per_s=None, expert_ms_R=())
    for each in (odd, report(1)):
        log.write(each)
    (run,) = read(tmp_path).runs.values()
    assert run.head == head() and not run.is_ended
    assert [entry.read() for entry in run.entries] == [odd, report(1)]
    assert [entry.figures["loss"] for entry in run.entries] == [math.inf, report(1).loss]
    for line in log.path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # a browser reads no NaN and no Infinity
    log.end()
    log.end()
    assert log.path.read_text().count('"kind":"end"') == 1 and next(iter(read(tmp_path).runs.values())).is_ended


def test_a_log_stays_below_its_bound_and_each_file_can_be_read_alone(tmp_path: Path) -> None:
    log = RunLog(tmp_path, head(), max_file_bytes=5000, max_files=3)
    for index in range(100):
        log.write(report(index))
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 and all(file.stat().st_size <= 5000 for file in files)
    (run,) = read(tmp_path).runs.values()
    steps = [entry.figures["step"] for entry in run.entries]
    assert steps == [10 * (index + 1) for index in range(100 - len(steps), 100)], "the last ones, none missing"
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(files[-1], alone)
    assert next(iter(read(alone).runs.values())).entries[-1].read() == report(99)


def test_a_line_longer_than_a_file_is_written_all_the_same(tmp_path: Path) -> None:
    log = RunLog(tmp_path, head(), max_file_bytes=10, max_files=2)
    log.write(report(0))
    log.write(report(1))
    (run,) = read(tmp_path).runs.values()
    assert run.entries[-1].read() == report(1) and len(list(tmp_path.iterdir())) == 2


def test_half_a_line_is_left_out_until_it_is_whole(tmp_path: Path) -> None:
    path = write_run(tmp_path, 2, ends=False).path
    text = path.read_bytes()
    path.write_bytes(text[:-40])
    folder = read(tmp_path)
    (run,) = folder.runs.values()
    assert len(run.entries) == 1 and folder.num_skipped == 0
    path.write_bytes(text)
    folder.refresh()
    assert [entry.read() for entry in run.entries] == [report(0), report(1)]


def test_lines_that_are_none_of_a_log_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write_run(tmp_path, 1, ends=False).path
    with path.open("a") as file:
        file.write('{"kind":"report","st\x00 cut\n[1]\n{"kind":"report","step":1}\n\n{"kind":"later"}\n')
    other = head("20261128-130000-0b0b").line() | {"schema": 2}
    (tmp_path / "20261128-130000-0b0b.00000.jsonl").write_text(json.dumps(other) + "\n")
    (tmp_path / "mine.jsonl").write_text("not looked at\n")
    folder = read(tmp_path)
    assert list(folder.runs) == ["20261128-120000-0a0a"] and folder.num_skipped == 5
    assert len(folder.runs["20261128-120000-0a0a"].entries) == 1


def test_a_run_that_starts_again_is_another_run_and_touches_nothing_of_the_first(tmp_path: Path) -> None:
    first = write_run(tmp_path, 2, ends=False).path
    before = first.read_bytes()
    folder = read(tmp_path)
    write_run(tmp_path, 1, run="20261128-120100-0c0c")
    folder.refresh()
    assert [len(run.entries) for run in folder.runs.values()] == [2, 1] and first.read_bytes() == before
    assert NAME.fullmatch(f"{new_run(START_S)}.00000.jsonl") and new_run(START_S) != new_run(START_S)


def test_the_reader_follows_files_that_grow_shrink_and_go(tmp_path: Path) -> None:
    log = write_run(tmp_path, 1, ends=False)
    folder = read(tmp_path)
    (run,) = folder.runs.values()
    log.write(report(1))
    folder.refresh()
    folder.refresh()
    assert [entry.figures["step"] for entry in run.entries] == [10, 20]
    kept = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(kept[:2]))
    folder.refresh()
    assert [entry.figures["step"] for entry in run.entries] == [10]
    entry = run.entries[0]
    log.path.unlink()
    folder.refresh()
    assert run.entries == [] and entry.read() is None


def test_a_folder_that_is_not_there_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"watch=.*/none: there is no such folder; name the folder .*--watch"):
        RunFolder(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"watch=.*/file: is a file; name the folder"):
        RunFolder(tmp_path / "file")
