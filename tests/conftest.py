"""One thread for the parent too: torch's thread pool and busy ranks on the same cores slow each other by a hundred."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.ranks import RankPool

os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until all tests are imported: collections would look again and again at objects that all stay

# A deadline measures the machine's load, not the code. Examples are drawn anew each time.
settings.register_profile("without deadlines", deadline=None, max_examples=50)
settings.load_profile("without deadlines")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The lanes under `-n 3`. Environments of other releases run tests without xdist."""
    from tests.lanes import Lanes

    config.option.loadscopereorder = False
    return Lanes(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        from tests.lanes import put_in_order

        put_in_order(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """The same numbers in each run, whichever tests ran before: torch draws a seed for each process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, *gc.get_threshold()[1:])  # little of what tests make is garbage in cycles
    gc.enable()


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Ranks that all tests of a file share, one world per number of ranks."""
    from tests.ranks import RankPool

    shared = RankPool()
    yield shared
    shared.close()
