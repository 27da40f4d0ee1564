"""How a training process ends: signals, and errors of which it tells a line and no traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from ds_moe_ep.errors import ConfigError, MoEError, PeerError
from ds_moe_ep.training import ending

WAITING = (
    "import sys, threading, ending\n"
    "ending.ECHO_S = 200.0\n"
    "with ending.Stop() as stop:\n"
    "    print('ready', flush=True)\n"
    "    def tell():\n"
    "        for line in sys.stdin:\n"
    "            if line == 'later\\n': ending.ECHO_S = -1.0\n"
    "            print(stop.votes(), flush=True)\n"
    "    threading.Thread(target=tell, daemon=True).start()\n"
    "    threading.Event().wait()\n"
)


def test_the_first_signal_asks_an_echo_is_ignored_and_a_later_one_ends_at_once() -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", WAITING], cwd=Path(ending.__file__).parent, **pipes)
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # as the deepspeed launcher does

    def votes(line: str) -> list[str]:
        process.stdin.write(line)  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return sorted(process.stdout.readline().split("[")[1].rstrip("]\n").split(", "))  # type: ignore[union-attr]

    while "1.0" not in votes("votes\n"):  # a thread hears of the first signal
        time.sleep(0.02)
    time.sleep(0.3)  # and of the second, which is no second wish
    assert process.poll() is None
    assert votes("later\n") == ["0.0", "0.0", "1.0"]
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM and told == ""


def test_ranks_that_heard_different_signals_end_for_the_same_one_and_for_none_where_none_did() -> None:
    assert ending.Stop.decided([0.0, 0.0, 0.0]) is None
    assert ending.Stop.decided([1.0, 1.0, 0.0]) is signal.SIGINT
    assert ending.Stop.decided([0.0, 0.0, 1.0]) is signal.SIGUSR1


@pytest.mark.parametrize(
    ("error", "rank", "code", "told"),
    [
        (ConfigError("steps=0: give one"), "0", 2, "ConfigError: steps=0: give one\n"),
        (ConfigError("steps=0: give one"), "3", 2, ""),
        (PeerError("rank 1 is gone"), "3", 1, "PeerError: rank 1 is gone\n"),
    ],
)
def test_errors_of_the_package_end_with_a_line_and_what_all_ranks_were_given_is_told_once(
    error: MoEError,
    rank: str,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> NoReturn:
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(ending, "HEAD_START_S", 0.0)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as left:
        ending.run(fail)
    assert left.value.code == code and capsys.readouterr().err == told


def test_an_error_that_nobody_foresaw_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError("x")
    except KeyError as error:
        ending.tell(KeyError, error, error.__traceback__)
    assert "Traceback" in capsys.readouterr().err
