"""`"schedule": "auto"`: measured on the first pass, decided alike on all ranks, repeated when routing drifts.

Experts are emulated and the link is slow by a stated amount, so that what is best is known. Ranks of the torus stand on
two nodes of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor

from ds_moe_ep.bench.candidates.emulated import EmulatedExperts
from ds_moe_ep.comm.open import open_transport
from ds_moe_ep.comm.transport import InFront, Message, Transfer, Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe import tuner
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.tuner import Choice, Drift, LinkMeter
from ds_moe_ep.schedule import drift
from ds_moe_ep.schedule.spans import NO_TAGS, Tags
from tests.moe.faulty_transports import Counting, Slow
from tests.ranks import RankPool

D, TOKENS = 8, 200
MOST_TRIES = 6  # of a measurement, which another load on the machine's cores can disturb
ROW_US = 250.0  # of an emulated expert, forward: 50 ms per pass of even routing


def make_layer(link_row_us: float, emulated: bool = True, **knobs: Any) -> ExpertParallel:
    torch.manual_seed(0)
    config = MoEConfig(num_experts=4, ep_size=4, bit_equal=True, **knobs)
    layer = ExpertParallel(D, GeluMLP(D, 2 * D), config)
    if emulated:
        layer.experts = EmulatedExperts(1, ROW_US)
    transport = open_transport([list(range(4))], config)
    layer.connect(Slow(transport, 1e-6 * link_row_us) if link_row_us else transport, Torus(2, 2))
    return layer


def each(function: Callable[..., Any], words: Sequence[tuple[Any, ...]]) -> list[Any]:
    """On a rank: what the function gives for each of several arguments, one after the other."""
    return [function(*each_words) for each_words in words]


def tokens(rows: int = TOKENS) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(dist.get_rank()))


def choice_over(link_row_us: float) -> tuple[dict[str, Any], str]:
    from tests.preloaded import full_measurement

    full_measurement()
    layer = make_layer(link_row_us)
    layer(tokens())
    assert layer.dispatcher.choice is not None
    return layer.dispatcher.choice.to_dict(), layer.dispatcher.connection.forward.name


def test_a_slow_link_makes_every_rank_choose_the_same_overlapped_schedule(pool: RankPool) -> None:
    """Another load on the machine's cores can disturb a measurement: of several one has to be as it was predicted."""
    choices: list[dict[str, Any]] = []
    while len(choices) < MOST_TRIES and not any(is_as_predicted(choice) for choice in choices):
        results = pool.run(4, choice_over, 0.5 * ROW_US)
        assert all(result == results[0] for result in results)
        choice, in_force = results[0]
        assert in_force == choice["knobs"]["schedule"]
        choices.append(choice)
    assert any(is_as_predicted(choice) for choice in choices), choices


def is_as_predicted(choice: dict[str, Any]) -> bool:
    ratio = choice["time_to_serial"]
    is_overlapped = choice["knobs"]["schedule"] != "serial"
    return is_overlapped and ratio < 0.9 and choice["predicted_to_serial"] == pytest.approx(ratio, abs=0.15)


def test_without_a_link_worth_hiding_nothing_slower_than_serial_is_chosen(pool: RankPool) -> None:
    for choice, _ in pool.run(4, choice_over, 0.0):
        assert choice["time_to_serial"] <= 1
        assert choice["knobs"]["schedule"] == "serial" or choice["time_to_serial"] < 1


def results_and_gradients(schedule: str) -> list[Tensor]:
    layer = make_layer(20.0, emulated=False, schedule=schedule)
    x_TD = tokens().requires_grad_()
    y_TD, loss, _ = layer(x_TD)
    assert all(parameter.grad is None for parameter in layer.parameters()), "a measurement leaves no gradients"
    (y_TD.square().sum() + loss).backward()
    return [y_TD.detach(), x_TD.grad, *(p.grad for p in layer.parameters())]


def test_measuring_changes_no_result_and_leaves_no_gradient(pool: RankPool) -> None:
    for mine, expected in pool.run(4, each, results_and_gradients, [("auto",), ("serial",)]):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def transfers_of_passes() -> tuple[list[int], bool, list[set[str]]]:
    """Transfers of: evaluation, the first training pass, the second, one after a restored choice; whose they are."""
    layer = make_layer(0.0)
    layer.dispatcher.rename("layers.3")
    transport = Counting(layer.dispatcher.connection.transport)
    layer.connect(transport, Torus(2, 2))
    counts, layers = [], []

    def run(of: ExpertParallel) -> None:
        before = len(transport.started)
        transport.layers.clear()
        of(tokens())
        layers.append(set(transport.layers))
        counts.append(len(transport.started) - before)

    with torch.no_grad():
        run(layer.eval())
    assert layer.dispatcher.choice is None, "evaluation measures nothing"
    run(layer.train())
    run(layer)
    other = make_layer(0.0)
    other.connect(transport, Torus(2, 2))
    other.dispatcher.take_choice(layer.dispatcher.choice)
    run(other)
    return counts, layer.dispatcher.choice == other.dispatcher.choice, layers


def test_only_the_first_training_pass_without_a_choice_measures_under_the_name_of_its_layer(pool: RankPool) -> None:
    for (evaluation, first, second, restored), is_same, layers in pool.run(4, transfers_of_passes):
        assert is_same
        assert first > 10 * evaluation
        assert second == restored <= evaluation + 14, "eight chunks have 16 transfers, serial has 2"
        # A rank that ends while the layer measures is told with the layer; the last one was given no name.
        assert layers == [{"layers.3"}, {"layers.3"}, {"layers.3"}, {""}]


def choices_under_drift(watchers: tuple[int, ...]) -> list[int]:
    """The passes at which choices were made; routing turns to expert 3 in pass 2, and only some ranks may notice."""
    tuner.MIN_PASSES, tuner.SMOOTHING = 2, 1.0
    layer = make_layer(0.0, retune_drift=0.5)
    if dist.get_rank() not in watchers:
        layer.dispatcher.retuning.rows = Drift(0.0)
    passes, last = [], None
    for index in range(6):
        with torch.no_grad():
            layer.gate.wg.weight[3] += 100.0 * (index == 2)
        layer(tokens().abs())
        if layer.dispatcher.choice is not last:
            passes.append(index)
            last = layer.dispatcher.choice
    return passes


def test_drift_that_one_rank_sees_makes_all_ranks_measure_in_the_same_pass(pool: RankPool) -> None:
    """Seen in pass 2, told in the exchange of pass 3; nobody who watches, nobody who measures."""
    assert pool.run(4, each, choices_under_drift, [((3,),), ((),)]) == [[[0, 3], [0]]] * 4


UNEQUAL = [(41, 3, 0, 18), (0, 0, 0, 9), (0, 0, 0, 0)]


def choices_on_a_link(rows_us: tuple[float, ...], slow_rank: int | None = None) -> list[tuple[int, str]]:
    """The passes that made a choice, and its kind: a pass over each link of these times per row.

    Where `slow_rank` is given, no other rank looks at the link.
    """
    tuner.MIN_PASSES = 2
    drift.SAMPLE_EVERY, drift.WINDOW = 1, 4
    layer = make_layer(1.0, retune_drift=1.0)
    link = layer.dispatcher.connection.transport
    layer.dispatcher.retuning.link = LinkMeter(1.0 if slow_rank in (None, dist.get_rank()) else 0.0)
    found: list[tuple[int, str]] = []
    last = None
    for index, row_us in enumerate(rows_us):
        link._row_s = 1e-6 * row_us
        layer(tokens())
        if layer.dispatcher.choice is not last:
            last = layer.dispatcher.choice
            found.append((index, last.knobs["schedule"]))
    return found


FAST, SLOW = 0.2 * ROW_US, 2 * ROW_US  # so much that another load on the cores is neither


@pytest.mark.parametrize("slow_rank", [pytest.param(None, marks=pytest.mark.slow), 2])
def test_a_link_that_becomes_slow_makes_all_ranks_choose_again_in_the_same_pass(
    pool: RankPool, slow_rank: int | None
) -> None:
    """Four passes are the base, eight are seen to be slow, and the next one tells all ranks.

    There overlap saves the most. Another load on the machine's cores can disturb what is measured: of several one has
    to see it.
    """
    link = (FAST,) * 4 + (SLOW,) * 8 + (ROW_US,) * 2
    for _ in range(MOST_TRIES):
        results = pool.run(4, choices_on_a_link, link, slow_rank, timeout_s=120)
        assert all(result == results[0] for result in results)
        if [index for index, _ in results[0]] == [0, 12] and results[0][1][1] != "serial":
            return
    raise AssertionError(results[0])


def test_a_link_that_stays_as_it_is_makes_nobody_choose_again(pool: RankPool) -> None:
    """The control of the test above."""
    for _ in range(MOST_TRIES):  # another load may look like a slower link
        results = pool.run(4, choices_on_a_link, (FAST,) * 14, timeout_s=120)
        assert all(result == results[0] for result in results)
        if [index for index, _ in results[0]] == [0]:
            return
    raise AssertionError(results[0])


def pass_with_rows(rows: tuple[int, ...]) -> tuple[dict[str, Any], bool]:
    """The choice over unequal rows, and whether the pass after it gives finite results of the right shape."""
    layer = make_layer(2.0, emulated=False)
    x_TD = tokens(rows[dist.get_rank()]).requires_grad_()
    for _ in range(2):
        y_TD, loss, _ = layer(x_TD)
        (y_TD.sum() + loss).backward()
    return layer.dispatcher.choice.to_dict(), y_TD.shape == x_TD.shape and bool(x_TD.grad.isfinite().all())


def test_ranks_with_unequal_rows_or_none_agree(pool: RankPool) -> None:
    for results in zip(*pool.run(4, each, pass_with_rows, [(rows,) for rows in UNEQUAL]), strict=True):
        assert all(result == results[0] for result in results) and results[0][1]


class Restless(torch.nn.Module):
    """An expert that draws random numbers, keeps statistics, and has a hook on its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(D, D)
        self.norm = torch.nn.BatchNorm1d(D)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.norm(self.linear(x)))


def state_after_a_pass(schedule: str) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    layer = ExpertParallel(D, Restless(), MoEConfig(num_experts=4, ep_size=4, schedule=schedule))
    layer.connect(open_transport([list(range(4))], layer.config), Torus(2, 2))
    if schedule == "auto":
        layer.dispatcher.take_choice = lambda choice: None  # type: ignore[method-assign] (it measures, and stays serial)
    layer(tokens())
    return torch.get_rng_state(), [buffer.clone() for buffer in layer.buffers()]


def test_measuring_moves_neither_random_numbers_nor_statistics_of_experts(pool: RankPool) -> None:
    by_rank = pool.run(4, each, state_after_a_pass, [("auto",), ("serial",)])
    for (rng, buffers), (expected_rng, expected_buffers) in by_rank:
        assert torch.equal(rng, expected_rng)
        assert all(torch.equal(a, b) for a, b in zip(buffers, expected_buffers, strict=True))


def recomputed_gradients(schedule: str, reentrant: bool) -> list[Tensor]:
    layer = make_layer(2.0, emulated=False, schedule=schedule)
    x_TD = tokens().requires_grad_()
    y_TD = torch.utils.checkpoint.checkpoint(lambda x: layer(x)[0], x_TD, use_reentrant=reentrant)
    y_TD.square().sum().backward()
    return [x_TD.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def test_a_recomputed_layer_may_measure_in_its_first_pass(pool: RankPool) -> None:
    words = [(schedule, reentrant) for reentrant in (True, False) for schedule in ("auto", "serial")]
    for found in pool.run(4, each, recomputed_gradients, words):
        for mine, expected in zip(found[::2], found[1::2], strict=True):
            assert len(mine) == len(expected) > 2
            assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def hooks_of_a_pass() -> int:
    layer = make_layer(2.0, emulated=False)
    calls: list[int] = []
    for parameter in layer.experts.parameters():
        parameter.register_hook(lambda grad: calls.append(1))
    layer(tokens())
    return len(calls)


def test_a_measurement_fires_no_hook_of_a_parameter(pool: RankPool) -> None:
    assert pool.run(4, hooks_of_a_pass) == [0] * 4


def test_drift_is_smoothed_bounded_and_can_be_off() -> None:
    for bound, expected in ((0.5, True), (2.0, False), (0.0, False)):
        of_rows = Drift(bound)
        for rows in (100, *[200] * tuner.MIN_PASSES):
            of_rows.see(rows)
        assert of_rows.is_beyond_bound() == expected
    brief = Drift(0.5)
    for rows in (100, *[1000] * (tuner.MIN_PASSES - 2)):
        brief.see(rows)
    assert not brief.is_beyond_bound(), "a measurement is not repeated at once"
    brief.see(1000)
    brief.restart()
    for _ in range(tuner.MIN_PASSES):
        brief.see(1000)
    assert not brief.is_beyond_bound(), "the base of the next one is where the rows have settled"


def test_a_choice_survives_as_plain_values_and_others_are_refused() -> None:
    choice = Choice(
        knobs={"schedule": "peers", "row_cuts": 2},
        time_to_serial=0.7,
        predicted_to_serial=0.66,
        serial_ms=12.5,
        raced={"peers (row_cuts=1)": 0.8},
    )
    assert Choice.from_dict(choice.to_dict(), "ckpt") == choice
    assert str(choice) == (
        "peers (row_cuts=2), 0.70 of serial's 12.5 ms per pass (0.66 predicted; peers (row_cuts=1): 0.80)"
    )
    for broken in ({}, {**choice.to_dict(), "knobs": {"num_experts": 3}}, {**choice.to_dict(), "knobs": None}):
        with pytest.raises(ConfigError, match="ckpt"):
            Choice.from_dict(broken, "ckpt")


class InOrder(InFront):
    """Keeps the order of messages and of sums, in which ranks wait for each other."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self.text = ""

    def sum(self, values: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        self.text += "s"
        return super().sum(values, tags)

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        self.text += lane[0]
        return super().start(lane, sends, receives, tags)


def order_of_a_measurement() -> str:
    layer = make_layer(0.0, emulated=False)
    layer.connect(transport := InOrder(layer.dispatcher.connection.transport), Torus(2, 2))
    layer(tokens())
    return transport.text


def test_ranks_wait_for_each_other_around_each_probe_of_the_link(pool: RankPool) -> None:
    """Nothing, near rows, far rows, next to nothing; twice, of which the first warms up. Serial passes follow."""
    probes = "ss" + 3 * "sds"
    assert [text[: 1 + 2 * len(probes) + 4] for text in pool.run(4, order_of_a_measurement)] == [
        "s" + 2 * probes + "dcdc"
    ] * 4
