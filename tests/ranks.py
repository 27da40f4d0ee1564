"""Real gloo ranks for tests: `run_ranks(4, function, *args)` gives the four results, or says which rank failed.

1. A fork server that has imported torch, deepspeed and this package once forks a process per rank.
2. The ranks meet at a store that the parent serves on 127.0.0.1, and form torch's default process group.
3. Each rank sends its pickled result, or its exception with the traceback, and waits for the parent's release, so
   that nobody leaves while another still reads from it. A rank that failed waits a moment only: its exit wakes
   the ranks that wait for it.
4. Whoever has not answered at the time limit is asked for its stack and killed. No rank outlives the call, nor
   the process that made it.

A `RankPool` (the fixture `pool`) has the ranks of one world run one function after the other.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from typing import Any

import psutil

from ds_moe_ep.bench.harness.processes import end_with_caller

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
# What ranks import, heavy things that DeepSpeed imports late included: each is loaded once, in the fork server.
PRELOAD = [
    "pytest", "tests.ranks", "torch", "torch.distributed", "torch._dynamo.repro.after_dynamo", "functorch.compile",
    "torch._inductor.compile_fx", "torch.onnx", "deepspeed", "deepspeed.moe.layer", "deepspeed.moe.utils",
    "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.stage_1_and_2", "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.zero.muon.muon_optimizer", "ds_moe_ep", "ds_moe_ep.moe.layer", "ds_moe_ep.engine.layer",
    "ds_moe_ep.engine.start", "ds_moe_ep.model.initialize", "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen3_moe.modeling_qwen3_moe", "peft", "tests.faults.train", "tests.moe.layer_runs",
    "tests.moe.faulty_transports", "tests.engine.hooks.hooked_layers", "tests.engine.hooks.autoep_models",
    "tests.parallel.training_runs", "tests.process_state", "tests.preloaded",
]  # fmt: skip
SERVER_ENV = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
LINGER_S = 1.0  # how long a failed rank stays connected: others may fail for a reason of their own
GRACE_S = 25.0  # how long the others may take to answer after the first failure, on a busy machine too
LOOK_S = 0.5  # between two looks at those that have not answered
STACK_S = 3.0  # how long a rank may take to write its stack
POOLED_LIMIT_S = 300.0  # of the process groups of ranks that run many functions: each call has a limit of its own
COUNTED_IN = "DS_MOE_EP_WORLDS"  # names a file that gets a line for each world that is started
SECONDARY = ("Connection reset", "Connection closed", "Broken pipe", "Connection refused", "Read timeout")


@dataclass(frozen=True)
class RankFailure:
    """Why one rank gave no result."""

    type_name: str
    message: str
    traceback: str

    @property
    def is_secondary(self) -> bool:
        """True where it only tells that another rank has gone."""
        return any(text in self.message for text in SECONDARY) or self.type_name in ("Unanswered", "PeerError")


class RankError(Exception):
    """Some ranks failed; `failures` maps each to its reason, the cause before its consequences."""

    def __init__(self, failures: Mapping[int, RankFailure], world_size: int) -> None:
        self.failures = dict(sorted(failures.items(), key=lambda item: item[1].is_secondary))
        lines = [f"{len(failures)} of {world_size} ranks failed"]
        lines += [f"rank {rank}: {f.type_name}: {f.message}" for rank, f in self.failures.items()]
        lines += [next(iter(self.failures.values())).traceback]
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Orders:
    """Orders of one rank."""

    rank: int
    world_size: int
    port: int
    timeout_s: float
    env: dict[str, str]
    process_group: bool
    is_pooled: bool
    stack_path: str


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    process_group: bool = True,
) -> list[Any]:
    """The results of `function(*args)` on `world_size` gloo ranks, in rank order.

    `function` is a module-level function; it asks torch.distributed for its rank. Results travel by pickle.
    `process_group=False` leaves torch.distributed unstarted, with the launcher's environment variables set.
    Raises RankError when a rank raises, dies, or has not answered after `timeout_s`.
    """
    world = World(world_size, timeout_s, env, process_group)
    try:
        return world.run(function, *args, timeout_s=timeout_s)
    finally:
        world.close()


class World:
    """Ranks that wait for functions to run, one after the other, until one of them fails."""

    def __init__(
        self,
        world_size: int,
        limit_s: float,
        env: Mapping[str, str] | None = None,
        process_group: bool = True,
        is_pooled: bool = False,
    ) -> None:
        import torch.distributed as dist

        self._folder = tempfile.TemporaryDirectory()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[Any] = []
        self._pipes: list[Any] = []
        context, given = _fork_server(), (limit_s, dict(env or {}), process_group, is_pooled)
        note_start(world_size)
        try:
            for rank in range(world_size):
                here, there = context.Pipe()
                orders = Orders(rank, world_size, self._store.port, *given, self._stack_path(rank))
                process = context.Process(target=_rank_main, args=(orders, there), daemon=True)
                process.start()
                there.close()
                self._processes.append(process)
                self._pipes.append(here)
        except BaseException:
            self.close()
            raise

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float) -> list[Any]:
        """The results of all ranks, in their order. After a RankError no more runs: close the world."""
        payload = pickle.dumps((function, args))
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # a rank that is gone: it gives no answer
                pipe.send_bytes(payload)
        answers = _collect(self._pipes, self._processes, self._folder.name, time.monotonic() + timeout_s)
        failures = {rank: answer for rank, answer in answers.items() if isinstance(answer, RankFailure)}
        for rank, process in enumerate(self._processes):
            if rank not in answers:
                failures[rank] = _unanswered(process, self._stack_path(rank), timeout_s)
        if failures:
            raise RankError(failures, len(self._processes))
        return [pickle.loads(answers[rank]) for rank in range(len(self._processes))]

    def close(self) -> None:
        """Lets every rank go, and kills those that do not."""
        _release(self._pipes, self._processes)
        self._folder.cleanup()

    def _stack_path(self, rank: int) -> str:
        return f"{self._folder.name}/{rank}"


class RankPool:
    """One world per number of ranks for many calls, each of which finds its ranks as they were when they started.

    A fork, a meeting and a first engine cost more than most calls. Ranks that fail are replaced by new ones before the
    next call. A function may change names of the package's modules, but puts back what it changes in others.
    """

    def __init__(self) -> None:
        self._worlds: dict[int, World] = {}

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0) -> list[Any]:
        """As `run_ranks`, on ranks that may have run other functions."""
        world = self._worlds.pop(world_size, None) or World(world_size, POOLED_LIMIT_S, is_pooled=True)
        try:
            results = world.run(function, *args, timeout_s=timeout_s)
        except BaseException:
            world.close()
            raise
        self._worlds[world_size] = world
        return results

    def close(self) -> None:
        """Ends all ranks."""
        for world in self._worlds.values():
            world.close()
        self._worlds.clear()


def note_start(world_size: int) -> None:
    """Appends the test and the number of its ranks to the file that `COUNTED_IN` names, if it names one."""
    if path := os.environ.get(COUNTED_IN):
        with open(path, "a") as file:
            file.write(f"{world_size} {os.environ.get('PYTEST_CURRENT_TEST')}\n")


def signal_itself(number: signal.Signals) -> None:
    """Sends this process a signal that takes effect before the call returns.

    os.kill may leave it to another thread, and the calling one goes on for a moment before it is stopped.
    """
    signal.pthread_kill(threading.get_ident(), number)


def is_stopped(pid: int | None) -> bool:
    """True for a process that a signal has stopped."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _collect(pipes: list[Any], processes: list[Any], folder: str, deadline: float) -> dict[int, bytes | RankFailure]:
    """Each rank's answer; after a failure the others get a moment, not the whole limit, and again after the next.

    Ranks that are stopped get none: nobody is left who would let them go on.
    """
    answers: dict[int, bytes | RankFailure] = {}
    limit = deadline
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        left_s = max(0.0, deadline - time.monotonic())
        ready = multiprocessing.connection.wait(list(waiting), left_s if deadline == limit else min(left_s, LOOK_S))
        if not ready:
            if time.monotonic() >= deadline or all(is_stopped(processes[rank].pid) for rank in waiting.values()):
                break
            continue
        for pipe in ready:
            rank = waiting[pipe]
            try:
                answers[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                processes[rank].join(60)  # a busy machine may need seconds for the end of one that was killed
                answers[rank] = RankFailure(
                    "Died", f"exit code {processes[rank].exitcode}, no answer", _stack(f"{folder}/{rank}")
                )
            if isinstance(answers[rank], RankFailure):
                deadline = min(limit, time.monotonic() + GRACE_S)
    return answers


def _unanswered(process: Any, stack_path: str, timeout_s: float) -> RankFailure:
    """The failure of a rank that hangs, with the stack that it is asked for."""
    try:
        os.kill(process.pid, signal.SIGUSR1)
    except ProcessLookupError:
        return RankFailure("Unanswered", "gone without an answer", "")
    until = time.monotonic() + STACK_S
    while not (told := _stack(stack_path)).endswith("\n") and time.monotonic() < until and not is_stopped(process.pid):
        time.sleep(0.05)
    return RankFailure(
        "Unanswered", f"no answer within the limit ({timeout_s:g} s, or the moment after a failure)", told
    )


def _stack(path: str) -> str:
    """The stack that a rank wrote when it was asked, or when a signal like SIGSEGV ended it."""
    file = pathlib.Path(path)
    return file.read_text() if file.exists() else "(no stack: it had not started)"


def _release(pipes: list[Any], processes: list[Any]) -> None:
    """Lets every rank go, and kills those that do not."""
    for pipe in pipes:
        pipe.close()  # a rank that answered waits for this
    deadline = time.monotonic() + 1.0
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join(10)


def _fork_server() -> Any:
    """The multiprocessing context whose fork server has the heavy modules loaded, with one thread per rank."""
    context = multiprocessing.get_context("forkserver")
    changed = SERVER_ENV | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.getenv("PYTHONPATH")])])}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)  # the server reads its environment once, when it starts
    try:
        context.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _rank_main(orders: Orders, pipe: Any) -> None:
    """A rank's life: join, then run, answer and wait for the next function, until the release."""
    end_with_caller()
    stack_file = open(orders.stack_path, "w")  # noqa: SIM115 (faulthandler keeps it open)
    faulthandler.register(signal.SIGUSR1, file=stack_file)
    faulthandler.enable(file=stack_file)
    code = 0
    try:
        from tests.process_state import ProcessState

        _join(orders)
        start = ProcessState() if orders.is_pooled else None
        while payload := _next_payload(pipe):
            if start is not None:
                start.begin()
            answer = _run(payload)
            pipe.send_bytes(pickle.dumps(answer))
            if start is not None:
                start.restore()
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        failure = RankFailure(type(error).__name__, str(error), f"--- rank {orders.rank}\n{text}")
        pipe.send_bytes(pickle.dumps(failure))
        pipe.poll(LINGER_S)  # the parent never writes again: this ends when it closes its side
        code = 1
    print(end="", flush=True)
    os._exit(code)


def _join(orders: Orders) -> None:
    """Joins the other ranks: the launcher's environment, one thread, and the default process group."""
    import torch
    import torch.distributed as dist

    rank, size = str(orders.rank), str(orders.world_size)
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(orders.port), **orders.env}
    torch.set_num_threads(1)
    _keep_shm_op_out()
    if orders.process_group:
        store = dist.TCPStore("127.0.0.1", orders.port, orders.world_size, is_master=False)
        limit = timedelta(seconds=orders.timeout_s)
        dist.init_process_group("gloo", store=store, rank=orders.rank, world_size=orders.world_size, timeout=limit)


def _next_payload(pipe: Any) -> bytes:
    """The next function with its arguments, or nothing once the parent has closed its side."""
    try:
        payload: bytes = pipe.recv_bytes()
    except (EOFError, ConnectionResetError):
        return b""
    return payload


def _run(payload: bytes) -> bytes:
    function, args = pickle.loads(payload)
    return pickle.dumps(function(*args))


def _keep_shm_op_out() -> None:
    """DeepSpeed would compile its shared-memory op for a minute at the first start on a CPU."""
    ops = sys.modules.get("deepspeed.ops")
    if ops is not None:
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
