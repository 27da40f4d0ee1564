"""Two-level dispatch: one copy of a token per far node, spread there, gives what rows give.

"copies" moves rows another way and computes the same: equal bit for bit to one level under the same schedule. "sums"
adds a token's results of a node there, rounds once more and in another order: equal to the float64 reference as one
level is. In float64 the bound is 1e-12 of the largest value: one rounding is 1e-16, sums have some hundred terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from ds_moe_ep.comm.callbacks import TransferCallback
from ds_moe_ep.comm.transport import InFront, Message, Transfer, Transport
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe import tuner
from ds_moe_ep.moe.two_level import relay
from ds_moe_ep.schedule.spans import NO_TAGS, Tags
from tests.moe.faulty_transports import Delayed
from tests.moe.layer_cases import D, LayerCase, LayerResult, case_data, errors, reference_results
from tests.moe.layer_runs import Links, build_layer, config, run_case, torus_for
from tests.moe.test_schedules import differences
from tests.ranks import RankPool

EXACT = 1e-12
SHAPES: list[dict[str, object]] = [
    {"schedule": "serial"},
    {"schedule": "peers"},
    {"schedule": "serial", "transport": "collective"},
    {"schedule": "peers", "transport": "collective", "depth": 3, "weight_blocks": 4},
    {"schedule": "peers", "transport": "pairwise", "depth": 1},
    {"schedule": "peers", "depth": 0},
]


def case(name: str, rows: Sequence[int] = (17, 5, 0, 22), world: int = 4, **knobs: object) -> LayerCase:
    """A float64 case on nodes of two ranks with two experts per rank and k = 2, unless said otherwise."""
    of_case = {key: knobs.pop(key) for key in ("expert", "shared", "masked", "skew", "training") if key in knobs}
    known = {"num_experts": 2 * world, "ep_size": world, "node_size": 2, "two_level": "copies", "top_k": 2, **knobs}
    rows = (*rows[:world], *(9,) * (world - len(rows)))
    return LayerCase(name=name, config=config(**known), rows=rows, dtype=torch.float64, **of_case)  # type: ignore[arg-type]


def every_case(world: int = 4, **knobs: object) -> list[LayerCase]:
    """k = 2, 4 and all, one and several experts per rank, uneven and no tokens, capacity, masks, every form."""
    none = (0,) * world
    found = [
        case("several local experts", world=world, top_k=4, **knobs),
        case("masked tokens and a capacity", (11,) * world, world, masked=True, capacity_factor=1.0, **knobs),
        case("no tokens", none, world, **knobs),
        case("one local expert", world=world, num_experts=world, **knobs),
        case("every expert", (3, 1, 4, 2), world, top_k=2 * world, **knobs),
        case("most tokens to one expert", world=world, skew=3.0, expert="swiglu", **knobs),
        case("a capacity", (12,) * world, world, capacity_factor=0.75, top_k=4, **knobs),
        case("a capacity, no tokens", none, world, capacity_factor=1.0, **knobs),
        case("one token", (0, 1, *none[2:]), world, **knobs),
        case("masked tokens", world=world, masked=True, score="sigmoid", renormalize=False, **knobs),
        case("a shared expert", world=world, shared=True, expert="gelu_bias", **knobs),
        case("experts of unknown form", world=world, expert="module", **knobs),
        case("evaluation", world=world, training=False, **knobs),
    ]
    return [each.with_config(**SHAPES[index % len(SHAPES)]) for index, each in enumerate(found)]


def narrow(each: LayerCase, dtype: torch.dtype) -> LayerCase:
    return replace(each, dtype=dtype)


class FarBytes(InFront):
    """Counts the bytes that leave this rank's node, by lane."""

    def __init__(self, inner: Transport, node_size: int) -> None:
        super().__init__(inner)
        self._node_size = node_size
        self.by_lane: dict[str, int] = {}

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        far = [m for m in sends if m.peer // self._node_size != self.rank // self._node_size]
        key = f"{tags.phase} {lane}"
        self.by_lane[key] = self.by_lane.get(key, 0) + sum(m.num_bytes for m in far)
        return super().start(lane, sends, receives, tags)


Found = tuple[LayerResult, dict[str, int]]


def run_all(cases: Sequence[LayerCase], fault: str = "", delays: int = 0, links: Links | None = None) -> list[Found]:
    """Every case's result on this rank and its far bytes, with a planted fault or random delays."""
    links, found = links or Links(), []
    with FAULTS[fault]():
        for each in cases:
            counter = FarBytes(links.of(each), each.config.node_size)
            transport = Delayed(counter, 1, longest_s=0.005) if delays else counter
            found.append((run_case(each, transport), counter.by_lane))
    return found


def spread_to_the_wrong_rank() -> AbstractContextManager[object]:
    """A relay gives its node's first rank rows of the last one, and so on: as many, and others."""
    real = relay.gather_tokens
    return patch.object(relay, "gather_tokens", lambda copies, maps: real(copies, maps).flip(0))


def forget_a_sum() -> AbstractContextManager[object]:
    """A relay takes the first of a copy's rows for the sum of all."""
    real = relay.unpermute

    def first(rows: object, weights: torch.Tensor, maps: object, *rest: object) -> torch.Tensor:
        only = weights.clone()
        only[:, 1:] = 0
        return real(rows, only, maps, *rest)  # type: ignore[arg-type]

    return patch.object(relay, "unpermute", first)


def forget_gradients_of_weights() -> AbstractContextManager[object]:
    """The gradients of weights that a relay makes do not come home."""
    real = relay.unpacked

    def zeros(rows: torch.Tensor, width: int, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        found = real(rows, width, like)
        return [torch.zeros_like(each) for each in found] if len(like) == 1 and like[0].is_floating_point() else found

    return patch.object(relay, "unpacked", zeros)


FAULTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "": nullcontext,
    "wrong rank": spread_to_the_wrong_rank,
    "forgotten sum": forget_a_sum,
    "forgotten gradients": forget_gradients_of_weights,
}


def off(cases: Sequence[LayerCase], by_rank: Sequence[Sequence[Found]]) -> dict[str, tuple[str, float]]:
    """The cases that are not what the reference is, with the tensor that is worst."""
    found = {}
    for index, each in enumerate(cases):
        worst = errors([results[index][0] for results in by_rank], reference_results(each))
        name = max(worst, key=lambda key: worst[key])
        if worst[name] > EXACT:
            found[f"{each.name} {each.config.two_level}"] = (name, worst[name])
    return found


def unequal(cases: Sequence[LayerCase], found: Sequence[Found], others: Sequence[Found]) -> list[str]:
    """The cases of a rank whose results differ in a bit from the others'."""
    pairs = zip(cases, found, others, strict=True)
    differing = {each.name: differences(one[0], other[0]) for each, one, other in pairs}
    return [f"{name}: {tensors}" for name, tensors in differing.items() if tensors]


def compare(pool: RankPool, world: int, cases: Sequence[LayerCase]) -> None:
    """Copies and sums equal the reference; copies equal one level bit for bit, in float64 and in narrow types."""
    sums = [each.with_config(two_level="sums") for each in cases]
    dtypes = (torch.float32, torch.bfloat16)
    copies = [*cases, *(narrow(each, dtypes[index % 2]) for index, each in enumerate(cases))]
    rows = [each.with_config(two_level="off") for each in copies]
    by_rank = pool.run(world, run_all, [*copies, *rows, *sums], timeout_s=240)
    assert off(cases, [found[: len(cases)] for found in by_rank]) == {}
    assert off(sums, [found[-len(sums) :] for found in by_rank]) == {}
    for found in by_rank:
        assert unequal(copies, found[: len(copies)], found[len(copies) : 2 * len(copies)]) == []


def witness(**knobs: object) -> list[LayerCase]:
    """The quick part: several local experts with k = 4, a capacity with masks, and no tokens at all."""
    return [each.with_config(transport="auto") for each in every_case(**knobs)[:3]]


def run_witness(cases: Sequence[LayerCase], faulty: Sequence[tuple[str, LayerCase]]) -> tuple[list[Found], list[Found]]:
    links = Links()
    found = run_all(cases, links=links) + run_all(cases[:1], delays=1, links=links)
    return found, [run_all([each], fault, links=links)[0] for fault, each in faulty]


def test_copies_equal_rows_bit_for_bit_sums_equal_the_reference_and_faults_are_seen(pool: RankPool) -> None:
    copies = witness()
    rows, sums = ([each.with_config(two_level=kind) for each in copies] for kind in ("off", "sums"))
    first, dense = sums[0].with_config(schedule="peers"), copies[0]
    faulty = [("wrong rank", dense), ("forgotten sum", first), ("forgotten gradients", first)]
    by_rank = pool.run(4, run_witness, [*copies, *rows, *sums], faulty, timeout_s=120)
    count = len(copies)
    assert off(copies, [found[:count] for found, _ in by_rank]) == {}
    assert off(sums, [found[2 * count : 3 * count] for found, _ in by_rank]) == {}
    for found, _ in by_rank:
        assert unequal(copies, found[:count], found[count : 2 * count]) == []
        assert unequal(copies[:1], found[:1], found[3 * count :]) == [], "random delays change no bit"
    for index, (fault, each) in enumerate(faulty):
        worst = off([each], [[broken[index]] for _, broken in by_rank])
        assert worst, f"{fault} was not seen"
        if fault == "forgotten gradients":
            assert worst[f"{each.name} {each.config.two_level}"][0] in ("d gate", "dx[0]", "dx[1]", "dx[3]")
    check_far_bytes(copies[0], [[found[index][1] for found, _ in by_rank] for index in (0, count, 2 * count)])


def check_far_bytes(each: LayerCase, counted: Sequence[Sequence[dict[str, int]]]) -> None:
    """Far bytes are those of distinct tokens and nodes, counted from the routes that the gate must give."""
    data, per_node = case_data(each), each.config.num_experts // 2
    rows = copies = 0
    for rank, x in enumerate(data.inputs):
        nodes_TK = (x.double() @ data.gate_ED.double().t()).topk(each.config.top_k, dim=1).indices // per_node
        is_far_TK = nodes_TK != rank // each.config.node_size
        rows, copies = rows + int(is_far_TK.sum()), copies + int(is_far_TK.any(1).sum())
    row_bytes, route_bytes, weight_bytes = 8 * D, 4 * each.config.top_k, 8 * each.config.top_k
    of_copies, of_rows, of_sums = (
        {lane: sum(rank.get(lane, 0) for rank in by_rank) for lane in by_rank[0]} for by_rank in counted
    )
    assert 0 < copies < rows
    one_level = dict.fromkeys(
        ("forward dispatch", "forward combine", "backward dispatch", "backward combine"), rows * row_bytes
    )
    assert of_rows == one_level
    assert of_copies == one_level | {"forward dispatch": copies * (row_bytes + route_bytes), "forward spread": 0}
    assert of_sums["forward dispatch"] == copies * (row_bytes + route_bytes + weight_bytes)
    assert of_sums["forward combine"] == of_sums["backward dispatch"] == copies * row_bytes
    assert of_sums["backward combine"] == copies * (row_bytes + weight_bytes)
    assert not any(of_sums[f"{phase} {lane}"] for phase in ("forward", "backward") for lane in ("spread", "gather"))


class Untouched(TransferCallback):
    """A callback that changes nothing, and could."""


def others() -> dict[str, object]:
    """Recomputed and retained passes against plain ones, the measurement of "auto", and what is refused, on a rank."""
    from tests.preloaded import FULL

    tuner.MOST = FULL[0][-1]  # as many schedules as a user's layer measures, if for a short time
    each, links = case("recomputed", two_level="sums", top_k=4), Links()
    layer, found = build_layer(each, data := case_data(each)), dict[str, object]()
    layer.connect(links.of(each), torus_for(each))
    x, dy = data.inputs[dist.get_rank()], data.output_grads[dist.get_rank()]

    def gradients(run: Callable[[torch.Tensor], torch.Tensor], times: int = 1) -> list[torch.Tensor]:
        layer.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        loss = (run(leaf) * dy).sum()
        for index in range(times):
            loss.backward(retain_graph=index < times - 1)
        return [parameter.grad / times for parameter in (leaf, *layer.parameters()) if parameter.grad is not None]

    plain = gradients(lambda leaf: layer(leaf)[0])
    passes = {
        "reentrant": gradients(lambda leaf: checkpoint(lambda t: layer(t)[0], leaf, use_reentrant=True)),
        "not reentrant": gradients(lambda leaf: checkpoint(lambda t: layer(t)[0], leaf, use_reentrant=False)),
        "retained": gradients(lambda leaf: layer(leaf)[0], times=2),
    }
    found["differing"] = [
        name for name, got in passes.items() if not all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    ]
    for kind in ("auto", "sums"):
        auto = case(kind, two_level=kind, schedule="auto")
        layer = build_layer(auto, case_data(auto))
        layer.connect(links.of(auto), torus_for(auto))
        layer(x)
        choice = layer.dispatcher.choice
        found[f"raced of {kind}"] = [] if choice is None else sorted([*choice.raced, str(choice)])
    for name, knobs in (("callbacks", {}), ("without lanes", {"two_level": "off"})):
        layer = build_layer(each, data)
        if name == "callbacks":
            layer.dispatcher.add_callback(Untouched())
        try:
            layer.connect(links.of(each.with_config(**knobs)), torus_for(each))
        except ConfigError as error:
            found[name] = str(error)
    return found


def test_passes_are_recomputed_and_retained_auto_measures_copies_and_the_rest_is_refused(pool: RankPool) -> None:
    by_rank = pool.run(4, others, timeout_s=120)
    assert [found["differing"] for found in by_rank] == [[]] * 4
    for found in by_rank:
        assert any("two_level=copies" in name for name in found["raced of auto"]), found["raced of auto"]
        assert any(name.startswith("peers (row_cuts=1") for name in found["raced of sums"]), found["raced of sums"]
        assert not any("row_cuts=2" in name or "chunks" in name for name in found["raced of sums"])
        assert all(found[key] == by_rank[0][key] for key in found if key.startswith("raced"))
        assert "callback might round" in found["callbacks"]
        assert "no communicators for rows inside of a node" in found["without lanes"]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "node_size"), [(4, 2), (4, 1), (6, 2)])
def test_every_case_with_copies_and_sums_on_two_three_and_four_nodes(
    pool: RankPool, world: int, node_size: int
) -> None:
    compare(pool, world, every_case(world, node_size=node_size))
