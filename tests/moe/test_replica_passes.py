"""Windows, recomputation, passes without gradients and frozen experts, with copies of hot experts on other ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ds_moe_ep.config.knobs import ModelConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.config.training import read_training
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.replicas import gradients
from ds_moe_ep.moe.replicas.told import present
from ds_moe_ep.schedule.assignment import assign
from ds_moe_ep.sizing.footprint import slot_bytes
from tests.moe.layer_cases import D, F, LayerCase, LayerResult, case_data, errors, summed
from tests.moe.layer_runs import Links, forward_backward, gather_result
from tests.moe.replica_cases import Windows, connected, hosted_case, let_rows_count_alone, pin, replicas_of
from tests.ranks import RankPool

GUESTS = ((7,), (7,), (1,), (0,))
BOUND = 2e-6  # sums of the same products in another order
Run = Callable[[ExpertParallel, LayerCase], LayerResult]


def plain_of(case: LayerCase) -> LayerCase:
    return replace(case, config=replace(case.config, replicas=0))


def shard(case: LayerCase) -> tuple[Tensor, Tensor]:
    data, rank = case_data(case), dist.get_rank()
    return data.inputs[rank].clone().requires_grad_(), data.output_grads[rank]


def result(layer: ExpertParallel, case: LayerCase, x: Tensor, y: Tensor, l_aux: Tensor) -> LayerResult:
    return gather_result(layer, case, x, y, l_aux.detach(), layer.last_counts_E)


def recomputed(layer: ExpertParallel, case: LayerCase, reentrant: bool) -> LayerResult:
    x, dy = shard(case)
    y, l_aux, _ = checkpoint(layer, x, use_reentrant=reentrant)
    ((y * dy).sum() + l_aux).backward()
    return result(layer, case, x, y, l_aux)


def looked_at_between(layer: ExpertParallel, case: LayerCase) -> LayerResult:
    """Passes without gradient before the backward pass, and a gradient of the input alone, which no weight gets."""
    x, dy = shard(case)
    y, l_aux, _ = layer(x)
    with torch.no_grad():
        layer(x)
    layer.eval()
    layer(x)
    layer.train()
    loss = (y * dy).sum() + l_aux
    torch.autograd.grad(loss, x, retain_graph=True)
    loss.backward()
    return result(layer, case, x, y, l_aux)


def in_windows(layer: ExpertParallel, case: LayerCase) -> LayerResult:
    """Two windows of three micro-batches; weights move between them."""
    windows = Windows()
    layer.dispatcher.follow(windows)
    for windows.number in range(2):
        for micro_batch in range(3):
            windows.last = micro_batch == 2
            found = forward_backward(layer, case, case_data(case))
        with torch.no_grad():
            for parameter in layer.experts.parameters():
                parameter.data.add_(parameter.grad, alpha=-0.01)
    return found


def with_loads_that_change(layer: ExpertParallel, case: LayerCase) -> LayerResult:
    """Two windows of eight micro-batches; from the fourth of the first on, other experts are hot."""
    layer.dispatcher.follow(windows := Windows(micro_batches=8))
    with torch.no_grad():
        layer.gate.wg.weight[0, 1] += 2.0
    placements = []
    for windows.number in range(2):
        for micro_batch in range(8):
            windows.last = micro_batch == 7
            x, dy = shard(case)
            if windows.number or micro_batch >= 3:
                x = (x.detach() + torch.eye(2, x.shape[1])[1] * 3.0).requires_grad_()
            y, l_aux, _ = layer(x)
            ((y * dy).sum() + l_aux).backward()
            placements.append(getattr(layer.dispatcher.replicas, "placement", None))
    if case.config.replicas:
        changes = [number for number in range(1, 16) if placements[number] != placements[number - 1]]
        assert changes == [5], "in the pass behind the second one of other loads, and in no other"
    return result(layer, case, x, y, l_aux)


def with_other_rows_than_foretold(layer: ExpertParallel, case: LayerCase) -> LayerResult:
    """Two windows of one micro-batch; in the second other experts are hot, which nothing foretold."""
    layer.dispatcher.follow(windows := Windows())
    let_rows_count_alone(layer)
    placements = []
    for windows.number in range(2):
        if case.config.replicas and windows.number:
            replicas_of(layer).begin_early()
            placements.append(replicas_of(layer).placement)
        x, dy = shard(case)
        if windows.number:
            with torch.no_grad():
                layer.gate.wg.weight[0, 1] += 2.0
            x = (x.detach() + torch.eye(2, x.shape[1])[1] * 3.0).requires_grad_()
        y, l_aux, _ = layer(x)
        ((y * dy).sum() + l_aux).backward()
        placements.append(getattr(layer.dispatcher.replicas, "placement", None))
    if case.config.replicas:
        first, foretold, moved = placements
        assert first.copies and first == foretold
        assert moved != foretold, "in the window's first pass"
    return result(layer, case, x, y, l_aux)


def with_frozen_experts(layer: ExpertParallel, case: LayerCase) -> LayerResult:
    """All of rank 3's experts, and a part of rank 2's, need no gradient."""
    rank = dist.get_rank()
    for expert in layer.experts.deepspeed_experts if rank >= 2 else ():
        for name, parameter in expert.named_parameters():
            parameter.requires_grad_(rank == 2 and name == "fc1.weight")
    return forward_backward(layer, case, case_data(case))


def two_in_flight(layer: ExpertParallel, case: LayerCase) -> LayerResult:
    """Two forward passes before their backward passes, the first one's last."""
    (x, dy), (other, _) = shard(case), shard(case)
    y, l_aux, _ = layer(x)
    y2, aux2, _ = layer(other * 0.5)
    ((y2 * dy).sum() + aux2).backward()
    ((y * dy).sum() + l_aux).backward()
    return result(layer, case, x, y, l_aux)


RUNS: dict[str, Run] = {
    "recomputed": lambda layer, case: recomputed(layer, case, False),
    "recomputed inside": lambda layer, case: recomputed(layer, case, True),
    "looked at between": looked_at_between,
    "in windows": in_windows,
    "loads change": with_loads_that_change,
    "not foretold": with_other_rows_than_foretold,
    "frozen": with_frozen_experts,
    "two in flight": two_in_flight,
}


def run_both() -> dict[str, tuple[LayerResult, LayerResult, bool]]:
    links, found = Links(), {}
    for name, run in RUNS.items():
        for kind in ("gelu", "swiglu"):
            case = hosted_case(f"{name}, {kind}", expert=kind)
            layer = connected(case, links)
            if name not in (
                "recomputed",
                "loads change",
                "not foretold",
            ):  # there the placement must hold, or move, by itself
                pin(layer, *GUESTS)
            mine = run(layer, case)
            is_clean = not replicas_of(layer)._ledger.sums.owed
            plain = connected(plain_of(case), links)
            found[case.name] = (mine, run(plain, plain_of(case)), is_clean)
    return found


def test_passes_of_every_kind_give_what_they_give_without_copies(pool: RankPool) -> None:
    by_rank = pool.run(4, run_both, timeout_s=120)
    for name in by_rank[0]:
        mine, plain, is_clean = zip(*(found[name] for found in by_rank), strict=True)
        worst = max(errors(mine, plain).items(), key=lambda item: item[1])
        assert worst[1] <= BOUND, (name, worst)
        assert all(is_clean), name


def moved_whole() -> tuple[list[LayerResult], LayerResult, tuple[int, ...]]:
    """All rows of expert 6 move to rank 0: rank 3 has its hands full with expert 7. Twice with copies, and without."""
    links = Links()
    case = replace(hosted_case("whole blocks", bit_equal=True, top_k=1, node_size=2), skew=3.0)
    runs, rows = [], (0, 0)
    for _ in range(2):
        layer = connected(case, links)
        pin(layer, (6,), (None,), (None,), (None,))
        runs.append(forward_backward(layer, case, case_data(case)))
        rows_RE = [[int(count) for count in layer.last_counts_E]]
        dist.all_gather_object(gathered := [None] * 4, rows_RE[0])
        split = assign([list(each) for each in gathered if each], replicas_of(layer).placement, Torus(2, 2)).split[6]
        rows = tuple(sum(column) for column in zip(*split, strict=True))
    plain = forward_backward(connected(plain_of(case), links), plain_of(case), case_data(case))
    return runs, plain, rows


def test_whole_blocks_that_move_give_the_same_bits(pool: RankPool) -> None:
    by_rank = pool.run(4, moved_whole, timeout_s=60)
    at_home, moved = by_rank[0][2]
    assert at_home == 0
    assert moved > 0
    first, again = (summed([found[0][i] for found in by_rank]) for i in (0, 1))
    plain = summed([found[1] for found in by_rank])
    assert [name for name in plain if not torch.equal(first[name], plain[name])] == []
    assert [name for name in plain if not torch.equal(first[name], again[name])] == []


def with_auto() -> tuple[LayerResult, LayerResult, float, tuple[tuple[int, int, int], ...]]:
    """Three passes in which "auto" measures and the placement follows its prices; the last one's gradients alone."""
    links, results = Links(), []
    for slots in ("auto", 0):
        case = hosted_case("auto", rows=(96, 40, 64, 80), schedule="auto")
        case = replace(case, config=replace(case.config, replicas=slots))
        layer = connected(case, links)
        for _ in range(3):
            layer.zero_grad()
            found = forward_backward(layer, case, case_data(case))
        results.append(found)
        if slots:
            costs, copies = replicas_of(layer).costs, replicas_of(layer).placement.copies
            assert costs is not None
    return results[0], results[1], costs.row_us, copies


def test_placements_follow_the_prices_that_auto_measured_and_are_those_of_all_ranks(pool: RankPool) -> None:
    mine, plain, row_us, copies = zip(*pool.run(4, with_auto, timeout_s=100), strict=True)
    assert max(errors(mine, plain).values()) <= BOUND
    assert len(set(row_us)) == len(set(copies)) == 1
    assert row_us[0] not in (0.0, 1.0), "measured, and not what stands for it before"


class Room:
    """torch for `gradients.py`, which counts the bytes of sums that come and are still there."""

    def __init__(self) -> None:
        self.bytes = self.most_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty_like(self, like: Tensor, **how: Any) -> Tensor:
        made = torch.empty_like(like, **how)
        if made.is_floating_point():
            self.bytes += made.nbytes
            self.most_bytes = max(self.most_bytes, self.bytes)
            weakref.finalize(made, self._freed, made.nbytes)
        return made

    def _freed(self, num_bytes: int) -> None:
        self.bytes -= num_bytes


def bytes_in_slots(layer: ExpertParallel) -> int:
    """Bytes of the copies on this rank, and of their gradient sums."""
    replicas = replicas_of(layer)
    copies = [present(named) for named in replicas.copies.held if named is not None]
    sums = replicas._ledger.sums.of.values()
    return sum(each.nbytes for tensors in (*copies, *sums) for each in tensors if each is not None)


def slots_over_time() -> tuple[list[int], int, bool]:
    """Bytes in this rank's slots behind each micro-batch as placements change; the most bytes of sums that came; and
    whether copies are no parameters of the layer."""
    case = hosted_case("slots", rows=(24,) * 4)
    layer = connected(case, Links())
    layer.dispatcher.follow(windows := Windows())
    held, gradients.torch = [], (room := Room())  # type: ignore[attr-defined]
    for windows.number, guests in enumerate((GUESTS, ((None,),) * 4, GUESTS)):
        pin(layer, *guests)
        for windows.last in (False, True):
            forward_backward(layer, case, case_data(case))
            held.append(bytes_in_slots(layer))
    assert room.bytes == 0, "what came is free"
    names = [name for name, _ in [*layer.named_parameters(), *layer.named_buffers()]]
    return held, room.most_bytes, not any("cop" in name or "replica" in name for name in names)


def test_slots_have_the_bytes_that_check_config_counts_while_the_placement_needs_them_and_no_longer(
    pool: RankPool,
) -> None:
    model = ModelConfig(num_layers=1, hidden_size=D, num_heads=1, expert_width=F)
    ds_config = {"train_batch_size": 4, "optimizer": {"type": "Adam"}}
    slot = slot_bytes(model, read_training(ds_config, ep_size=4, world_size=4))
    weights = 4 * model.expert_params
    found = pool.run(4, slots_over_time)
    assert all(held == [slot, weights, 0, 0, slot, weights] for held, *_ in found)
    # Expert 7 of rank 3 has two copies: a sum, and one that is added to it. One of rank 0's two has rows on its copy.
    assert [most_bytes for _, most_bytes, _ in found] == [weights, 0, 0, 2 * weights]
    assert all(is_hidden for *_, is_hidden in found)
