"""Workers of the lanes are forks of one process that has imported torch, DeepSpeed and the package once for all.

1. xdist starts a worker as `PYTHON -u -c CODE` with pipes as standard streams. For the lanes PYTHON is this file, run
   as a script: it hands its streams to the process that has imported, and ends when the worker does.
2. That process forks the worker, which runs what arrives on its standard input, as `python -c CODE` would.
3. Before it does so, the worker forks the server that forks the ranks of its tests (see tests/ranks.py).

Each process dies with its parent: nothing is left of a pytest that is killed.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

THIS_FILE = Path(__file__).resolve()
HAS_KNOWN_FORK_SERVER = sys.version_info < (3, 14)  # later ones ask their clients for a key


@contextmanager
def importing_process() -> Iterator[str]:
    """The command that stands for PYTHON, as long as the process lives that has imported."""
    from tests.ranks import REPOSITORY, server_environment

    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/workers")
        listener.listen()
        own = {name: os.environ.get(name) for name in server_environment()}
        code = f"from tests.lane_workers import serve; serve({listener.fileno()}, {own!r})"
        how = {"cwd": REPOSITORY, "env": os.environ | server_environment(), "stdin": subprocess.DEVNULL}
        with subprocess.Popen([sys.executable, "-c", code], pass_fds=[listener.fileno()], **how) as process:
            listener.close()
            try:
                yield f"{sys.executable} {THIS_FILE} {folder}/workers"
            finally:
                process.terminate()


def ask_for_a_worker(address: str) -> int:
    """Hands over the standard streams. The exit code of the worker, once it has ended."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        socket.send_fds(connection, [b"streams"], [0, 1, 2])
        for stream in (0, 1):  # the pipes are the worker's alone
            os.close(stream)
        told = connection.recv(16)
    return int(told or 1)


def serve(listener_fd: int, own_environment: dict[str, str | None]) -> None:
    """Imports, then forks a worker for each connection until the end of who started this process.

    `own_environment` has the variables that this process has of its own, as its starter has them.
    """
    from tests.ranks import PRELOAD

    _die_with_parent(signal.SIGTERM)
    gc.disable()  # workers turn it on again
    for name in PRELOAD[:-1]:
        __import__(name)
    gc.freeze()
    workers: dict[int, tuple[int, socket.socket]] = {}
    with socket.socket(fileno=listener_fd) as listener, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    _, streams, _, _ = socket.recv_fds(connection, 16, 3)
                    pid = os.fork()
                    if pid == 0:
                        for other in (listener, selector, connection, *(each for _, each in workers.values())):
                            other.close()
                        _be_a_worker(streams, own_environment)
                    for stream in streams:
                        os.close(stream)
                    selector.register(end := os.pidfd_open(pid), selectors.EVENT_READ)
                    workers[end] = pid, connection
                else:
                    selector.unregister(end := key.fd)
                    os.close(end)
                    pid, connection = workers.pop(end)
                    _, status = os.waitpid(pid, 0)
                    with connection:
                        connection.sendall(str(abs(os.waitstatus_to_exitcode(status))).encode())


def _be_a_worker(streams: list[int], environment: dict[str, str | None]) -> None:
    """What `python -u -c CODE` with these streams does with the code that is sent to it. Never returns."""
    code = 1
    try:
        _die_with_parent(signal.SIGKILL)
        if HAS_KNOWN_FORK_SERVER:
            _fork_the_fork_server(streams)
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        sys.argv = ["-c"]
        exec(eval(sys.stdin.readline()), sys.modules["__main__"].__dict__)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _fork_the_fork_server(streams: list[int]) -> None:
    """Starts this process's fork server as `forkserver.ensure_running` does, by a fork in place of a fresh process."""
    from multiprocessing import connection, forkserver

    from tests.ranks import PRELOAD

    server = forkserver._forkserver
    with socket.socket(socket.AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")
        listener.bind(address)
        listener.listen()
        alive_r, alive_w = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                for descriptor in (alive_w, *streams):
                    os.close(descriptor)
                _die_with_parent(signal.SIGKILL)
                forkserver.main(listener.detach(), alive_r, PRELOAD[-1:])
            finally:
                os._exit(0)
        os.close(alive_r)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, alive_w, pid


def _die_with_parent(number: signal.Signals) -> None:
    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(ask_for_a_worker(sys.argv[1]))
