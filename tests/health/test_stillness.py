"""The calls of one thread, read by another."""

import gc
import signal
import subprocess
import sys
import threading
import traceback

import pytest

from ds_moe_ep.health.stillness import stack_of

# Threads of C that call Python for a moment, as those that free a tensor do, while the main thread's calls are read.
STORM = """
import ctypes, faulthandler, os, sys, tempfile, threading, time
from ds_moe_ep.health.stillness import stack_of

library, called = ctypes.CDLL(None), []
call = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(lambda _: called.append(0))

def start_threads():
    while True:
        thread = ctypes.c_ulong()
        library.pthread_create(ctypes.byref(thread), None, call, None)
        library.pthread_join(thread, None)

for _ in range(3):
    threading.Thread(target=start_threads, daemon=True).start()
dump = tempfile.TemporaryFile()
end_s = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end_s:
    if sys.argv[1] == "dump":
        faulthandler.dump_traceback(dump, all_threads=True)
        dump.seek(0)
        dump.truncate()
    else:
        assert stack_of(threading.main_thread().ident)[-1].function == "<module>"
print(len(called), flush=True)
os._exit(0)
"""


def waits(is_there: threading.Event, may_end: threading.Event, told: list[traceback.StackSummary]) -> None:
    told.append(traceback.extract_stack())
    is_there.set()
    may_end.wait()


def test_the_calls_of_a_thread_are_those_it_tells_itself_the_innermost_first() -> None:
    is_there, may_end, told = threading.Event(), threading.Event(), list[traceback.StackSummary]()
    thread = threading.Thread(target=waits, args=(is_there, may_end, told))
    thread.start()
    is_there.wait()
    frames, nobody = stack_of(thread.ident or 0), stack_of(1)
    may_end.set()
    thread.join()
    names = [frame.function for frame in frames]
    expected = [(each.filename, each.name) for each in reversed(told[0])]
    assert [(frame.file, frame.function) for frame in frames[names.index("waits") :]] == expected
    assert frames[0].is_in(("/threading.py",)) and not frames[names.index("waits")].is_in(("/threading.py",))
    assert nobody == []


def run_storm(way: str, seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", STORM, way, str(seconds)], capture_output=True, text=True, timeout=240)


def test_reading_calls_outlives_threads_of_c_that_come_and_go() -> None:
    storm = run_storm("walk", 2)
    assert storm.returncode == 0, storm.stderr
    assert int(storm.stdout) > 10


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the interpreter's fault is Python 3.11's")
def test_a_dump_of_all_threads_does_not() -> None:
    assert run_storm("dump", 30).returncode == -signal.SIGSEGV


@pytest.mark.parametrize("is_on", [True, False])
def test_the_collector_is_left_as_it_was(is_on: bool) -> None:
    was_on = gc.isenabled()
    try:
        (gc.enable if is_on else gc.disable)()
        stack_of(threading.get_ident())
        stack_of(1)
        assert gc.isenabled() is is_on
    finally:
        (gc.enable if was_on else gc.disable)()
