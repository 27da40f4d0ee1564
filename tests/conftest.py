"""One thread for the parent too: torch's thread pool and busy ranks on the same cores slow each other by a hundred."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests.together import unit_of

if TYPE_CHECKING:
    from tests.ranks import RankPool

POOL = pytest.StashKey["RankPool"]()

os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until all tests are imported: collections would look again and again at objects that all stay

with suppress(ModuleNotFoundError):  # the tests marked gpu need pytest alone
    from hypothesis import settings

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


@pytest.fixture(scope="session")
def pool(request: pytest.FixtureRequest) -> RankPool:
    """Ranks that tests of a file share, and those of a set in `tests.together`: one world per number of ranks."""
    from tests.ranks import RankPool

    request.config.stash[POOL] = shared = RankPool()
    return shared


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends the ranks behind the last test that shares them."""
    if POOL in item.config.stash and (nextitem is None or unit_of(nextitem.nodeid) != unit_of(item.nodeid)):
        item.config.stash[POOL].close()
