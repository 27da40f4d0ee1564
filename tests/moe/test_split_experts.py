"""Memory of a pass: rows are given back with the last product that reads them, and results stay the same."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.experts import GeluMLP, KnownExperts, SwiGLU, start_pass
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.match_expert import match_expert
from ds_moe_ep.moe.split_experts import ActiveRows, GradSums

ROWS, WIDTH = 9, 16


@pytest.mark.parametrize(
    ("expert", "kept_at_last"),
    [
        (GeluMLP(8, WIDTH), {"down": 2 * ROWS, "up": ROWS}),  # hidden rows, and active ones
        (SwiGLU(8, WIDTH), {"down": 3 * ROWS, "up": 2 * ROWS, "gate": ROWS}),
    ],
    ids=["gelu", "swiglu"],
)
@pytest.mark.parametrize("active", [ActiveRows.MADE_AGAIN, ActiveRows.SAVED])
@pytest.mark.parametrize("may_overwrite", [True, False])
def test_kept_rows_go_with_the_last_product_that_reads_them(
    expert: nn.Module,
    kept_at_last: dict[str, int],
    active: ActiveRows,
    may_overwrite: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ActiveRows, "of_this_pass", lambda is_on_cpu: active)
    form = match_expert(expert)
    assert form is not None
    started = start_pass(form, [form.weights_of(expert)], [(0, ROWS)])
    kept: dict[str, int] = {}
    add = GradSums.add

    def count(self: GradSums, part: str, x_nI: Tensor, dy_nO: Tensor, is_only: bool) -> None:
        places = {rows.data_ptr(): len(rows) for rows in [*started.saved, started.gradients(0)[-1]]}
        kept[part] = sum(places.values())
        add(self, part, x_nI, dy_nO, is_only)

    monkeypatch.setattr(GradSums, "add", count)
    x_RD, dy_RD, y_RD, dx_RD = torch.randn(4, ROWS, 8).unbind()
    with torch.no_grad():
        started.may_overwrite = may_overwrite
        started.compute(0, slice(0, ROWS), x_RD, y_RD)
        started.input_grads(0, slice(0, ROWS), dy_RD, dx_RD)
        started.add_weight_grads(0, slice(0, 4), x_RD[:4], dy_RD[:4])
        assert set(kept.values()) == {kept_at_last["down"]}, "other rows are still to come"
        started.add_weight_grads(0, slice(4, ROWS), x_RD[4:], dy_RD[4:])
        assert kept == kept_at_last
        started.add_weight_grads(0, slice(ROWS, ROWS), x_RD[ROWS:], dy_RD[ROWS:])
        grads = started.weight_grads(0)
    assert not any(rows.numel() for rows in started.saved), "rows are kept although nothing reads them any more"
    expected = torch.autograd.grad(expert(x_RD), list(expert.parameters()), dy_RD)
    for mine, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine, reference)


def test_a_layer_keeps_nothing_of_a_pass_that_went_backward_while_its_output_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, passes = ExpertParallel(8, GeluMLP(8, WIDTH), MoEConfig(num_experts=2)), []
    start = KnownExperts.start
    monkeypatch.setattr(KnownExperts, "start", lambda *args: passes.append(start(*args)) or passes[-1])
    output, _, _ = layer(torch.randn(5, 8))
    output.sum().backward(retain_graph=True)
    assert output.grad_fn is not None
    assert [(each.saved, each._weights) for each in passes] == [([], [])]


@pytest.mark.parametrize("is_cast", [False, True], ids=["own type", "autocast"])
def test_rows_and_cast_weights_that_autograd_packs_away_are_held_by_nobody_else(is_cast: bool) -> None:
    layer, rows = ExpertParallel(8, GeluMLP(8, WIDTH), MoEConfig(num_experts=2)), torch.randn(ROWS, 8)
    seen: list[weakref.ref[Tensor]] = []

    def moved(tensor: Tensor) -> Tensor:
        if WIDTH in tensor.shape and not isinstance(tensor, nn.Parameter):
            seen.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda t: moved(t).clone(), lambda t: moved(t.clone())):
        with torch.autocast("cpu", enabled=is_cast):
            output, _, _ = layer(rows)
        num_packed = len(seen)
        assert num_packed >= (6 if is_cast else 2), "a tensor of rows per expert, and two cast weights"
        assert not [each for each in seen if each() is not None], "held after the forward pass"
        output.sum().backward(retain_graph=True)
    assert len(seen) >= 2 * num_packed
    assert not [each for each in seen if each() is not None], "held after the backward pass"
