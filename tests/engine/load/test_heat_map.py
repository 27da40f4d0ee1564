"""The picture of the load, and that TensorBoard gets it."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.load.monitor import CELL, COLD, DEAD, EVEN, HOT, PICTURE, heat_map, load_events
from tests.live.sample_runs import layer, report

HAS_TENSORBOARD = importlib.util.find_spec("tensorboard") is not None


def colors(picture: torch.Tensor) -> list[list[tuple[int, ...]]]:
    """The colour in the middle of each cell."""
    return [[tuple(color) for color in row] for row in picture[CELL // 2 :: CELL, CELL // 2 :: CELL].tolist()]


def test_a_cell_has_the_colour_of_its_load() -> None:
    layers = (layer("first", (20, 20, 20, 20)), layer("second", (0, 640, 10, 30)), layer("third", (7, 7)))
    picture = heat_map(layers)
    assert picture.shape == (3 * CELL, 4 * CELL, 3) and picture.dtype == torch.uint8
    first, second, third = colors(picture)
    assert first == [EVEN] * 4
    place = math.log2(4 * 640 / 680) / 2  # on a scale that ends at four times the mean
    warm = [even + place * (hot - even) for even, hot in zip(EVEN, HOT, strict=True)]
    assert second[0] == DEAD and second[1] == pytest.approx(warm, abs=1)
    assert second[2:] == [COLD, COLD], "what is beyond the scale has the colour of its end"
    assert third == [EVEN, EVEN, (255, 255, 255), (255, 255, 255)], "a layer of fewer experts"


def test_more_experts_than_anybody_can_read_get_no_curves_of_their_own() -> None:
    few = {name for name, _, _ in load_events(report(), 0)}
    many = {name for name, _, _ in load_events(report(layers=(layer("moe", (1,) * 2000),)), 0)}
    assert any("expert_load/rows/expert_003" in name for name in few)
    assert not any("/expert_0" in name for name in many) and "Train/moe_ep/moe/load_max_over_mean" in many


@pytest.mark.skipif(not HAS_TENSORBOARD, reason="tensorboard is not installed: nothing can be written to it")
def test_tensorboard_gets_the_picture(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(log_dir=str(tmp_path))
    engine = SimpleNamespace(monitor=SimpleNamespace(tb_monitor=SimpleNamespace(summary_writer=writer)))
    seams.write_picture(engine, PICTURE, heat_map(report().layers), 64)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (image,) = events.Images(PICTURE)
    assert (image.step, image.width, image.height) == (64, 4 * CELL, 2 * CELL)


def test_an_engine_without_tensorboard_draws_nothing() -> None:
    seams.write_picture(SimpleNamespace(monitor=SimpleNamespace(tb_monitor=None)), PICTURE, torch.zeros(1, 1, 3), 0)
