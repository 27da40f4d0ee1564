"""The training scripts' `main` in the ranks of one world: runs that are stopped, resumed, and refused; or launched."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch.distributed as dist

from ds_moe_ep.bench.harness.processes import free_port
from tests.ranks import REPOSITORY, SERVER_ENV

EXAMPLES = REPOSITORY / "examples"
MODEL = {"name": "small", "num_layers": 2, "hidden_size": 32, "num_heads": 2, "expert_width": 32, "sequence_length": 16}
DS_CONFIG = {
    "train_batch_size": 8,
    "gradient_clipping": 1.0,
    "steps_per_print": 10**9,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": 0.001, "warmup_max_lr": 0.01, "warmup_num_steps": 10},
    },
}
EXPERT_PARALLEL = DS_CONFIG | {
    "train_micro_batch_size_per_gpu": 2,
    "moe_ep": {"num_experts": 4, "ep_size": 2, "noise": "jitter", "timeout_s": 20, "model": MODEL},
}
PIPELINE = DS_CONFIG | {
    "train_micro_batch_size_per_gpu": 2,
    "moe_ep": {"num_experts": 4, "layout": {"tp_size": 1, "pp_size": 2}, "noise": "jitter", "model": MODEL},
}


def launched(script: str, *words: str, num_ranks: int, limit_s: float) -> str:
    """Output of an example under the deepspeed launcher; nothing of it is left."""
    launcher = pathlib.Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_gpus", str(num_ranks), "--master_port", str(free_port()), str(EXAMPLES / script)]
    environment = os.environ | SERVER_ENV | {"PYTHONPATH": str(REPOSITORY)}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*command, *words], env=environment, cwd=REPOSITORY, start_new_session=True, **pipes)
    try:
        printed, _ = process.communicate(timeout=limit_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, printed[-4000:]
    return str(printed)


@dataclass(frozen=True)
class Outcome:
    """Outcome of one rank's call of `main`."""

    code: int | None
    printed: str
    error: str = ""

    def steps(self) -> dict[int, str]:
        """Loss, learning rate and gradient norm by step, as they were printed."""
        lines = [line.split(" | ") for line in self.printed.splitlines() if line.startswith("step ") and " | " in line]
        return {int(words[0].split()[1].split("/")[0]): " ".join(words[1:4]) for words in lines}


@dataclass(frozen=True)
class Case:
    """One call: words of the command line by rank, and the signal that a rank gets at a step."""

    words: Sequence[str]
    of_rank: tuple[tuple[int, tuple[str, ...]], ...] = ()
    signalled: tuple[int, int, int] | None = None  # number, rank, step


def run_cases(script: str, cases: dict[str, Case]) -> dict[str, Outcome]:
    """Outcomes of a script's `main` on this rank, one call after the other. Collective."""
    sys.path.insert(0, str(EXAMPLES))
    module: Any = importlib.import_module(script)
    return {name: run_case(module, case) for name, case in cases.items()}


def run_case(module: Any, case: Case) -> Outcome:
    words = [*case.words, *dict(case.of_rank).get(dist.get_rank(), ())]
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        signalled(module, case),
        mock.patch.object(sys, "argv", ["train.py", *words]),
    ):
        try:
            return Outcome(module.main(words), output.getvalue())
        except module.ds_moe_ep.MoEError as error:
            return Outcome(None, output.getvalue(), f"{type(error).__name__}: {error}")
        finally:
            dist.barrier()


@contextlib.contextmanager
def signalled(module: Any, case: Case) -> Iterator[None]:
    """Lets the case's rank get its signal while it draws the batches of a step; the world stays for the next case."""
    draw: Callable[..., Any] = module.micro_batches

    def draw_and_signal(*args: Any, step: int, **kwargs: Any) -> Any:
        if case.signalled and case.signalled[1:] == (dist.get_rank(), step):
            os.kill(os.getpid(), case.signalled[0])
            time.sleep(0.3)  # a thread hears of it
        return draw(*args, step=step, **kwargs)

    with mock.patch.object(module, "micro_batches", draw_and_signal), mock.patch.object(dist, "destroy_process_group"):
        yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def room_for(folder: str, sizes: Sequence[int]) -> list[str]:
    """Words of `check_room` on checkpoints of these sizes; empty where they fit. Collective."""
    from ds_moe_ep.training.checkpoints import check_room

    told = []
    for size in sizes:
        try:
            check_room(folder, size)
            told.append("")
        except ValueError as error:
            told.append(str(error))
    return told
