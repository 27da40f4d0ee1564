"""The training script under the real `deepspeed` launcher, in a terminal of 80 columns: Ctrl-C, and bad input."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading

import pytest

from ds_moe_ep.bench.harness.processes import free_port
from tests.examples.training_scripts import EXAMPLES, EXPERT_PARALLEL
from tests.ranks import REPOSITORY, SERVER_ENV

COLUMNS = 80
NUM_RANKS = 2


class Terminal:
    """A terminal in which a command runs; what it shows is kept."""

    def __init__(self, *words: str) -> None:
        self.shown = ""
        self._changed = threading.Condition()
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        environment = os.environ | SERVER_ENV | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}
        pipes = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = subprocess.Popen(words, env=environment, start_new_session=True, **pipes)
        os.close(theirs)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # nobody writes any more
            while part := os.read(self._ours, 65536):
                with self._changed:
                    self.shown += part.decode(errors="replace")
                    self._changed.notify()

    def wait_for(self, words: str, timeout_s: float) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: words in self.shown, timeout_s), self.shown[-3000:]

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to all that runs in the terminal."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, timeout_s: float) -> int:
        """The exit code; nothing of the command is left."""
        try:
            return self.process.wait(timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def launch(folder: pathlib.Path, *words: str) -> Terminal:
    """A run of train_ep16.py in `folder`."""
    (folder / "ds.json").write_text(json.dumps(EXPERT_PARALLEL))
    launcher = [str(pathlib.Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port())]
    script = [str(EXAMPLES / "train_ep16.py"), "--deepspeed_config", str(folder / "ds.json")]
    return Terminal(*launcher, "--num_gpus", str(NUM_RANKS), *script, *words)


@pytest.mark.slow  # two starts of a launcher: a minute where cores are shared
@pytest.mark.timeout(600)
def test_ctrl_c_saves_the_step_with_one_line_and_bad_input_is_told_once_with_exit_code_2(
    tmp_path: pathlib.Path,
) -> None:
    (tmp_path / "text").write_text("some words, and more of them; " * 500)
    save = ["--data", str(tmp_path / "text"), "--steps", "100000", "--save", str(tmp_path / "ck")]
    run = launch(tmp_path, *save)
    run.wait_for("communication hidden", 300)
    run.interrupt()
    run.wait_for("to resume: ", 60)
    run.end(60)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", run.shown)
    own = plain.split("Traceback")[0]  # the launcher's own, which dies of the signal
    assert "examples/" not in plain.partition("Traceback")[2].replace(str(EXAMPLES / "train_ep16.py"), "")
    found = re.findall(r"SIGINT: stopped after step (\d+) of 100000, checkpoint in .*; to resume: ", plain)
    assert len(found) == 1 and (tmp_path / "ck" / "latest").read_text() == f"global_step{found[0]}"
    for figure in ("loss ", "lr ", "grad norm ", " tokens/s", "memory ", "expert load max/mean ", "/100000"):
        assert figure in own

    run = launch(tmp_path, "--data", str(tmp_path / "none"))
    assert run.end(300) == 2
    assert run.shown.count(f"ConfigError: data={tmp_path / 'none'}: no such file or folder") == 1
    assert "Traceback" not in run.shown
