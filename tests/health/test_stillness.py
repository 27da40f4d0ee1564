"""The calls of one thread, read by another."""

import tempfile
import threading
import traceback

from ds_moe_ep.health.stillness import stack_of


def waits(is_there: threading.Event, may_end: threading.Event, told: list[traceback.StackSummary]) -> None:
    told.append(traceback.extract_stack())
    is_there.set()
    may_end.wait()


def test_the_calls_of_a_thread_are_those_it_tells_itself_the_innermost_first() -> None:
    is_there, may_end, told = threading.Event(), threading.Event(), list[traceback.StackSummary]()
    thread = threading.Thread(target=waits, args=(is_there, may_end, told))
    thread.start()
    is_there.wait()
    with tempfile.TemporaryFile() as dump:
        for _ in range(2):  # the second dump takes the place of the first
            frames = stack_of(thread.ident or 0, dump)
        nobody = stack_of(1, dump)
    may_end.set()
    thread.join()
    names = [frame.function for frame in frames]
    expected = [(each.filename, each.name) for each in reversed(told[0])]
    assert [(frame.file, frame.function) for frame in frames[names.index("waits") :]] == expected
    assert frames[0].is_in(("/threading.py",)) and not frames[names.index("waits")].is_in(("/threading.py",))
    assert nobody == []
