"""Prints the processor time of layers, all threads: python -m tests.account.processor_time [ranks] [rounds] [experts]

The sides alternate in the same processes. Other work on the machine lengthens wall time at will, and processor time by
what it leaves in the caches: so each round gives a ratio, and the median of the ratios is printed beside the times.
The calling thread, which computes, stands apart from all threads, among which are the backend's.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch.distributed as dist

from ds_moe_ep.bench.candidates.cases import CASES
from ds_moe_ep.bench.candidates.layers import PLAIN, LayerSetup, build
from ds_moe_ep.bench.harness.method import rotation
from tests.account.rounds import mean_rounds

SIDES = (PLAIN, "serial")
WARM_UPS = 2


def rounds_of(ranks: int, rounds: int, experts: int, rank: int) -> Iterator[list[float]]:
    """This rank's milliseconds of each side, of all threads and then of the calling one, round by round."""
    from ds_moe_ep.bench.candidates import native  # imports deepspeed, which reads DS_ACCELERATOR

    native.start_ranks("gloo", 300.0)
    case = replace(CASES[0], num_experts=experts)
    setup = LayerSetup(case=case, rank=rank, num_ranks=ranks, aux_loss_weight=0.01)
    layers = {name: build(name, setup) for name in SIDES}
    gc.collect()
    gc.freeze()
    for index in range(WARM_UPS + rounds):
        of_all, of_caller = dict[str, float](), dict[str, float]()
        for name in rotation(SIDES, index):
            layers[name].prepare()
            dist.barrier()
            start_s = time.process_time(), time.thread_time()
            layers[name].run()
            of_all[name] = 1e3 * (time.process_time() - start_s[0])
            of_caller[name] = 1e3 * (time.thread_time() - start_s[1])
        if index >= WARM_UPS:
            yield [took[name] for took in (of_all, of_caller) for name in SIDES]


def main() -> None:
    """The times of both sides, and the second over the first; of all threads, and of the calling one."""
    ranks, rounds, experts = (int(given) for given in [*sys.argv[1:], *("16", "12", "16")[len(sys.argv) - 1 :]])
    by_side = list(zip(*mean_rounds(partial(rounds_of, ranks, rounds, experts), ranks), strict=True))
    for of, (plain, ours) in (("all threads", by_side[:2]), ("calling thread", by_side[2:])):
        ratios = [b / a for a, b in zip(plain, ours, strict=True)]
        for name, times in zip((*SIDES, "ratio"), (plain, ours, ratios), strict=True):
            low, median, high = statistics.quantiles(times, n=4, method="inclusive")
            print(f"{ranks} ranks, {of:14} {name:14} {median:8.3f} ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main()
