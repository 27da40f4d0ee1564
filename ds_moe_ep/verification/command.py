"""The command: runs a training script until its engine is verified. Exit code 0, or 1 where there is a problem.

In a launcher's job each rank runs it, and rank 0 prints. Outside of one it starts the ranks on this machine.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from ds_moe_ep.bench.harness.processes import die_with_parent, free_port, loopback_environment
from ds_moe_ep.comm.launcher import launched
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.verification.options import VerifyOptions
from ds_moe_ep.verification.verdicts import EngineReport, TrainingVerdict

LINE_WIDTH = 110
POLL_S = 0.1
GRACE_S = 60.0  # for the other ranks, when one has ended badly


class VerificationEnded(BaseException):
    """Ends the script, whose own handlers of errors let it pass."""

    def __init__(self, report: EngineReport) -> None:
        super().__init__("the engine is verified")
        self.report = report


def run(options: VerifyOptions) -> int:
    """Runs the command. Raises ConfigError for a script that is not there, EngineError where no engine stepped."""
    if not Path(options.script).is_file():
        raise ConfigError(f"verify.script={options.script}: no such file; give the training script")
    world = launched(os.environ)
    if world is None and options.ranks is None:
        raise ConfigError(
            "verify.ranks: no launcher started this process; give --ranks N to start ranks here, or run it in the "
            "job: deepspeed --module ds_moe_ep verify --script train.py"
        )
    if world is None and options.ranks == 1:  # a launcher's world of one is none
        os.environ.update(loopback_environment(0, 1, free_port()))
    is_rank = world is not None or options.ranks == 1
    report = run_rank(options) if is_rank else run_here(options, options.ranks or 1)
    try:
        if world is None or world.rank == 0:
            _show(report, options)
    finally:
        if world is not None and dist.is_initialized():
            dist.barrier()  # a launcher ends all ranks with the first one that found a problem
    return report.exit_code


def run_rank(options: VerifyOptions) -> EngineReport:
    """The report of this rank of a job, which all ranks have alike."""
    from ds_moe_ep.engine.state.doors import another_config, at_first_forward
    from ds_moe_ep.engine.views.layers import viewed_layers
    from ds_moe_ep.verification.verify import Verification, check_engine

    begun: list[Verification] = []
    before, sys.argv = sys.argv, [options.script, *options.arguments]
    folder = str(Path(options.script).resolve().parent)

    def begin(engine: Any) -> None:
        if begun or not viewed_layers(engine.module):
            return
        check_engine(engine)
        verification = Verification(engine, checkpoint=options.checkpoint, folder=options.folder, when_over=_end)
        begun.append(scopes.enter_context(verification))

    with ExitStack() as scopes:
        scopes.enter_context(redirect_stdout(sys.stderr))  # the script's own words
        scopes.enter_context(at_first_forward(begin))
        if options.config is not None:
            scopes.enter_context(another_config(options.config))
        sys.path.insert(0, folder)
        try:
            runpy.run_path(options.script, run_name="__main__")
        except VerificationEnded as ended:
            return ended.report
        finally:
            sys.argv = before
            sys.path.remove(folder)
    reached = "two steps" if begun else "an engine with MoE layers ran"
    raise EngineError(f"verify.script={options.script}: it ended before {reached}; let it train for two steps at least")


def _end(report: EngineReport) -> None:
    raise VerificationEnded(report)


def run_here(options: VerifyOptions, num_ranks: int) -> EngineReport:
    """The report of ranks that are started on this machine. Raises EngineError where one of them fails."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "verdicts.json"
        words = [sys.executable, "-m", "ds_moe_ep", "verify", *_words(options), "--out", str(out)]
        words += ["--", *options.arguments] if options.arguments else []
        ranks = [
            subprocess.Popen(
                words,
                env={**os.environ, **loopback_environment(rank, num_ranks, port)},
                stdout=subprocess.DEVNULL,  # the report, which is read from the file
                preexec_fn=die_with_parent,
            )
            for rank in range(num_ranks)
        ]
        codes = _wait(ranks, options.limit)
        if not out.is_file():
            raise EngineError(f"verify.script={options.script}: the ranks ended with codes {codes}; see their errors")
        told = json.loads(out.read_text(encoding="utf-8"))
    return EngineReport(tuple(TrainingVerdict(**verdict) for verdict in told["verdicts"]))


def _words(options: VerifyOptions) -> list[str]:
    """The command line of one rank."""
    words = ["--script", options.script]
    words += [] if options.config is None else ["--config", options.config]
    words += [] if options.folder is None else ["--folder", options.folder]
    return words + ([] if options.checkpoint else ["--no-checkpoint"])


def _wait(ranks: Sequence[subprocess.Popen[bytes]], limit_s: float) -> list[int | None]:
    """The exit codes of all ranks; those that take too long are killed, and have none."""
    end_s = time.monotonic() + limit_s
    has_failed = False
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < end_s:
        if not has_failed and any(rank.poll() not in (None, 0, 1) for rank in ranks):
            has_failed, end_s = True, min(end_s, time.monotonic() + GRACE_S)
        time.sleep(POLL_S)
    codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()
    return codes


def _show(report: EngineReport, options: VerifyOptions) -> None:
    text = json.dumps(report.to_dict(), indent=2)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(text)
    else:
        report.print(Console(width=None if sys.stdout.isatty() else LINE_WIDTH))
