"""Lanes of pytest-xdist (`-n 3`): tests that wait beside tests that compute, so that the cores idle little.

A file's tests stay together, in their order, on one worker: they share its fixtures and its fork server. So do those of
the files of a set in `tests.together`. The files stand in one queue, those that wait (for time limits, paced links, the
end of processes) in front, those that compute at the back. The first worker takes from the front, any other from the
back, until the queue is empty: nobody has to guess how long either lane takes.
"""

from __future__ import annotations

import pytest
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from tests.together import is_in, unit_of

# Files and folders, the longest first. A file that is in neither stands between the two.
WAITING = """
    tests/faults/test_launched_faults.py tests/faults/test_forked_faults.py tests/moe/test_tuner.py tests/health
    tests/doctor tests/engine/test_out_of_step.py tests/bench/test_demo.py tests/testbed tests/test_ranks.py
    tests/comm/test_agreement.py tests/comm/test_peer_faults.py tests/bench/test_blocked.py tests/live
    tests/moe/test_replica_faults.py
""".split()
COMPUTING = """
    tests/parallel tests/kernels tests/engine/test_training.py tests/moe/test_schedules.py tests/moe/test_parity.py
    tests/examples/test_ready_configs.py tests/engine/layouts tests/verification tests/engine/test_compile.py
    tests/engine/test_native_parity.py tests/bench/test_systems.py tests/gpu tests/engine/checkpoint tests/engine/hooks
    tests/examples tests/engine tests/moe tests/simulate tests/report tests/test_wheel.py
""".split()


class Lanes(LoadScopeScheduling):
    """Gives out whole files, from both ends of the queue."""

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        if node is not self.nodes[0]:
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)


def put_in_order(items: list[pytest.Item]) -> None:
    """Orders a worker's tests as the queue is: every worker has to collect the same."""
    items.sort(key=lambda item: place_in_queue(unit_of(item.nodeid)))  # tests of a file keep their order


def place_in_queue(unit: str) -> int:
    for places, sign in ((WAITING, -1), (COMPUTING, 1)):
        for index, place in enumerate(places):
            if is_in(unit, place):
                return sign * (len(places) - index)
    return 0
