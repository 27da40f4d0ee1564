"""Work that the fork server of `tests.ranks` does once, so that no rank does it: tables that torch makes at first use.

And what all ranks have: a short measurement where a layer's schedule is "auto", since few tests ask what it chooses.
Those take `full_measurement()`. What is imported stays as long as a rank does: no garbage collection looks at it, which
would take half a second each time and copy every page that ranks share. Of what ranks make themselves little is garbage
in cycles: they look for it after 20,000 objects, not after 700.

A fork copies an entry for each page, and the end of a rank drops them: 30 ms for 350 MB in pages of 4 KB, 9 ms where
most of them are joined to pages of 2 MB.
"""

import ctypes
import gc
import re
from pathlib import Path

import torch
from torch.overrides import get_overridable_functions, get_testing_overrides

from ds_moe_ep.moe import tuner
from ds_moe_ep.schedule import benchmark

get_testing_overrides()
get_overridable_functions()
torch.fx.symbolic_trace(torch.nn.Linear(1, 1))
torch.manual_seed(0)  # torch draws a seed for each process: ranks that set none would draw others in each run

gc.collect()
gc.freeze()
gc.set_threshold(20_000, *gc.get_threshold()[1:])

FULL = (tuner.PROBES, tuner.WIRE_PROBES, tuner.MOST), (benchmark.LEAST_ROUNDS, benchmark.MOST_ROUNDS)
(tuner.PROBES, tuner.WIRE_PROBES, tuner.MOST), (benchmark.LEAST_ROUNDS, benchmark.MOST_ROUNDS) = (1, 1, 3), (1, 1)


def full_measurement() -> None:
    """Lets layers of this rank measure as long as a user's do."""
    (tuner.PROBES, tuner.WIRE_PROBES, tuner.MOST), (benchmark.LEAST_ROUNDS, benchmark.MOST_ROUNDS) = FULL


LARGE_PAGE = 2 << 20
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # Linux 6.1; an older kernel refuses, and pages stay as they are
OWN_MEMORY = re.compile(r"^(\w+)-(\w+) rw-p 00000000 00:00 0 +(?:\[heap\])?$", re.MULTILINE)  # in /proc/self/maps


def join_pages() -> None:
    """Joins the small pages of this process's own memory to large ones, as far as the kernel can."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for begin, end in OWN_MEMORY.findall(Path("/proc/self/maps").read_text()):
        first = -(-int(begin, 16) // LARGE_PAGE) * LARGE_PAGE
        size = int(end, 16) // LARGE_PAGE * LARGE_PAGE - first
        if size > 0:
            madvise(first, size, MADV_HUGEPAGE)
            madvise(first, size, MADV_COLLAPSE)


join_pages()
