"""One thread for the parent too: torch's thread pool and busy ranks on the same cores slow each other by a hundred."""

import gc
import os
from typing import Any

import pytest
from hypothesis import settings

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


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, *gc.get_threshold()[1:])  # little of what tests make is garbage in cycles
    gc.enable()
