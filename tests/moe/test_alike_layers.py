"""Layers alike share a measurement of their schedule: which do, and what happens when rows or the link change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ds_moe_ep.bench.candidates.emulated import EmulatedExperts
from ds_moe_ep.comm.callbacks import TransferCallback
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.moe import tuner
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.tuning.alike import AlikeLayers
from tests.moe.faulty_transports import Counting
from tests.moe.test_tuner import each, make_layer, tokens
from tests.ranks import RankPool


def quick_layer(**knobs: Any) -> ExpertParallel:
    """A layer whose experts take next to no time, and that measures one schedule beside serial.

    Nobody asks here which is chosen.
    """
    tuner.MOST = 1
    layer = make_layer(0.0, **knobs)
    layer.experts = EmulatedExperts(1, 1.0)
    return layer


def made_alike(layers: Sequence[ExpertParallel], share: bool = True) -> None:
    if share:
        AlikeLayers({layer.dispatcher: layer for layer in layers})


def counted(layer: ExpertParallel) -> list[str]:
    """The layer's transfers from now on."""
    layer.connect(transport := Counting(layer.dispatcher.connection.transport), Torus(2, 2))
    return transport.started


def first_passes(num_others: int, share: bool, odd_rank: int | None, callback: bool = False) -> list[tuple[str, bool]]:
    """Of each layer behind the first: whether its first pass has measured, and whose choice it has.

    The second is like the first, but on the odd rank; the third has another top_k, the fourth one more parameter, the
    fifth other experts.
    """
    second = quick_layer()
    second.gate.wg.requires_grad_(dist.get_rank() != odd_rank)
    kept = quick_layer()
    kept.register_parameter("more", torch.nn.Parameter(torch.ones(1)))
    others = [quick_layer(top_k=2), kept, make_layer(0.0, emulated=False)]
    layers = [quick_layer(), second, *others][: 1 + num_others]
    transfers = [counted(layer) for layer in layers]
    if callback:
        for layer in layers:
            layer.dispatcher.add_callback(TransferCallback())
    made_alike(layers, share)
    found = []
    for layer in layers:
        layer(tokens())
    for layer, started in zip(layers[1:], transfers[1:], strict=True):
        measured = "measured" if len(started) > 20 else "took over"
        found.append((measured, layer.dispatcher.choice is layers[0].dispatcher.choice))
    return found


ALONE, TAKEN = ("measured", False), ("took over", True)
CASES = {
    "alike": ((4, True, None), [TAKEN, ALONE, ALONE, ALONE]),
    "one rank holds another form": ((1, True, 2), [ALONE]),
    "callbacks": ((1, True, None, True), [ALONE]),
    "not shared": ((1, False, None), [ALONE]),
}


@pytest.fixture(scope="module")
def by_case(pool: RankPool) -> dict[str, list[list[tuple[str, bool]]]]:
    """What each rank found, by case."""
    by_rank = pool.run(4, each, first_passes, [words for words, _ in CASES.values()], timeout_s=120)
    return {name: [found[index] for found in by_rank] for index, name in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES)
def test_only_layers_alike_on_every_rank_take_over_what_the_first_has_measured(
    case: str, by_case: dict[str, list[list[tuple[str, bool]]]]
) -> None:
    assert by_case[case] == [CASES[case][1]] * 4


def choices_of_passes(change: str, share: bool = True) -> tuple[list[tuple[int, ...]], list[bool]]:
    """Numbers of the choices of two layers alike behind each of five passes, and which of them go their own way.

    "rows": rank 3's expert gets all rows of the second layer from pass 2 on; "other rows": from the first pass on.
    "link": rank 1 sees another link under the first layer in pass 3.
    """
    tuner.MIN_PASSES, tuner.SMOOTHING = 2, 1.0
    layers = [quick_layer(retune_drift=0.5) for _ in range(2)]
    made_alike(layers, share)
    known: list[Any] = []
    found = []
    for index in range(5):
        with torch.no_grad():
            layers[1].gate.wg.weight[3] += 100.0 * ((change, index) in (("rows", 2), ("other rows", 0)))
        sees = (change, index, dist.get_rank()) == ("link", 3, 1)
        layers[0].dispatcher.retuning.link.is_beyond_bound = lambda sees=sees: sees  # type: ignore[method-assign]
        for layer in layers:
            layer(tokens().abs())
        for choice in (layer.dispatcher.choice for layer in layers):
            known += [] if any(choice is other for other in known) else [choice]
        numbers = [next(i for i, each in enumerate(known) if each is layer.dispatcher.choice) for layer in layers]
        found.append(tuple(numbers))
    return found, [layer.dispatcher.retuning.is_apart for layer in layers]


CHANGES = {
    ("rows", True): ([(0, 0)] * 3 + [(0, 1)] * 2, [False, True]),
    ("other rows", True): ([(0, 0)] * 2 + [(0, 1)] * 3, [False, True]),
    ("link", True): ([(0, 0)] * 3 + [(1, 1)] * 2, [False, False]),
    ("link", False): ([(0, 1)] * 3 + [(2, 1)] * 2, [False, False]),
}


def test_a_changed_link_is_measured_once_and_changed_rows_by_their_own_layer_alone(pool: RankPool) -> None:
    """The last case is the control: layers that share nothing."""
    by_rank = pool.run(4, each, choices_of_passes, list(CHANGES), timeout_s=120)
    assert by_rank == [list(CHANGES.values())] * 4
