"""The layer asks the device for numbers once a forward pass, and never with a capacity."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_moe_ep.comm.transport import Loopback
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.dispatch_plan import make_plan
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel

# What makes the host wait on CUDA: a value for Python, or a shape that depends on values.
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2"}


class CountWaits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        is_mask = name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITING or is_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every wait of the code inside: ops by name, and `tolist`, which dispatches none on the CPU."""
    mode, tolist = CountWaits(), torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        mode.seen.append("tolist")
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with mode:
        yield mode.seen
    monkeypatch.undo()


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_dropless_pass_waits_once(monkeypatch: pytest.MonkeyPatch, top_k: int, with_mask: bool) -> None:
    layer = ExpertParallel(8, GeluMLP(8, 16), MoEConfig(num_experts=4, top_k=top_k))
    x_TD, used = torch.randn(20, 8, requires_grad=True), torch.arange(20) % 3 if with_mask else None
    with counting(monkeypatch) as waits:
        y_TD, loss, _ = layer(x_TD, used)
        assert waits == ["tolist"]
        (y_TD.sum() + loss).backward()
        assert waits == ["tolist"]


@pytest.mark.parametrize("policy", ["position", "score"])
def test_a_pass_with_a_capacity_waits_for_the_peers_agreement_alone(
    monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    config = MoEConfig(num_experts=4, top_k=2, capacity_factor=1.0, drop_policy=policy)
    layer = ExpertParallel(8, GeluMLP(8, 16), config)
    x_TD = torch.randn(20, 8, requires_grad=True)
    with counting(monkeypatch) as waits:
        routing = layer.gate(x_TD)
        plan = make_plan(routing, 4, Loopback(), (8, torch.float32))
        assert waits == ["tolist"]  # the check of sizes, which is made on the CPU only
        assert plan.send_rows_PL == ((routing.capacity,) * 4,)


def test_the_counter_sees_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with counting(monkeypatch) as waits:
        x = torch.arange(4)
        x[x > 1].tolist()
        x.sum().item()
    assert waits == ["aten::index", "tolist", "aten::_local_scalar_dense"]
