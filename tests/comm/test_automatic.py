"""The transport "auto", and rows that are sent from their places and received into them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.automatic import Automatic
from ds_moe_ep.comm.collective import Collective, side_by_side
from ds_moe_ep.comm.lane_groups import LaneGroups, open_lanes
from ds_moe_ep.comm.open import open_transport
from ds_moe_ep.comm.pairwise import Pairwise
from ds_moe_ep.comm.transport import Message
from ds_moe_ep.config.knobs import MoEConfig
from tests.ranks import RankPool


def messages(rows_ND: Tensor, *spans: tuple[int, int]) -> list[Message]:
    return [Message(peer, rows_ND, *span) for peer, span in enumerate(spans)]


def test_rows_side_by_side_are_one_view_of_their_buffer() -> None:
    rows_ND = torch.arange(24.0).view(8, 3)
    view = side_by_side(messages(rows_ND, (1, 1), (1, 4), (0, 0), (4, 6)))
    assert view is not None and torch.equal(view, rows_ND[1:6]) and view.data_ptr() == rows_ND[1].data_ptr()


def test_rows_with_a_gap_out_of_order_or_of_two_buffers_are_no_view() -> None:
    rows_ND = torch.zeros(8, 3)
    assert side_by_side(messages(rows_ND, (0, 2), (3, 4))) is None
    assert side_by_side(messages(rows_ND, (2, 4), (0, 2))) is None
    assert side_by_side([Message(0, rows_ND, 0, 2), Message(1, torch.zeros(8, 3), 2, 4)]) is None


def test_no_rows_at_all_are_an_empty_view() -> None:
    view = side_by_side(messages(torch.zeros(8, 3), (0, 0), (2, 2)))
    assert view is not None and view.shape == (0, 3)


def exchanged() -> tuple[list[list[float]], list[str]]:
    """Rows of three transfers over each transport, and what "auto" moved them by."""
    lanes, brought = open_lanes([[0, 1, 2]], 30.0), []
    used = _watched()
    for transport in (Pairwise(lanes, 30.0), Collective(lanes, 30.0), Automatic(lanes, 30.0)):
        used.clear()
        for peers in ([0, 1, 2], [lanes.rank], [p for p in range(3) if p != lanes.rank]):
            brought.append(_transfer(lanes, transport, peers))
    return brought, used


def _transfer(lanes: LaneGroups, transport: Pairwise | Collective, peers: list[int]) -> list[float]:
    """Peer p gets p rows from everybody; the values name both ends."""
    rank = lanes.rank
    sent_ND = torch.tensor([[10.0 * rank + p] * 2 for p in range(3) for _ in range(p)])
    received_RD = torch.full((3 * rank, 2), -1.0)
    sends = [Message(p, sent_ND, (p - 1) * p // 2, p * (p + 1) // 2) for p in peers]
    receives = [Message(p, received_RD, p * rank, (p + 1) * rank) for p in reversed(peers)]
    transport.start("dispatch", sends, receives).wait()
    return received_RD[:, 0].tolist()


def _watched() -> list[str]:
    used: list[str] = []
    for kind in (Pairwise, Collective):
        original = kind.start

        def start(self, *words, kind=kind, original=original):  # type: ignore[no-untyped-def]
            used.append(kind.__name__)
            return original(self, *words)

        kind.start = start  # type: ignore[method-assign]
    return used


def test_every_transport_brings_the_same_and_auto_takes_all_to_all_between_all_ranks(pool: RankPool) -> None:
    for rank, (brought, used) in enumerate(pool.run(3, exchanged)):
        assert brought[:3] == brought[3:6] == brought[6:]
        for peers, found in zip(([0, 1, 2], [rank], [p for p in range(3) if p != rank]), brought[:3], strict=True):
            assert found == [10.0 * p + rank if p in peers else -1 for p in range(3) for _ in range(rank)]
        assert used == ["Collective", "Pairwise", "Pairwise"]


def opened() -> tuple[list[type], int]:
    """The transports, and how many communicators began with a call of all their ranks, which NCCL wants."""
    begun, barrier = [], dist.barrier
    names = ("auto", "pairwise", "collective")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "barrier", lambda group: (begun.append(group), barrier(group)))
        transports = [open_transport([[0, 1]], MoEConfig(num_experts=2, ep_size=2, transport=name)) for name in names]
        default = open_transport([[0, 1]], MoEConfig(num_experts=2, ep_size=2))
    return [type(transport) for transport in (*transports, default)], len(set(begun))


def test_the_knob_names_the_transport_and_auto_is_its_default(pool: RankPool) -> None:
    for kinds, num_begun in pool.run(2, opened):
        assert kinds == [Automatic, Pairwise, Collective, Automatic]
        assert num_begun == 3 * 4, "two lanes and one for control, of each transport"
