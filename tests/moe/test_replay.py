"""Recorded routes, replayed: the same bits from one's own record, this gate's weights for others, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_moe_ep import ExpertParallel, GeluMLP, RouteRecord, record_routes, replay_routes
from ds_moe_ep.comm.transport import Loopback
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.moe.replay.record import LayerRoutes
from ds_moe_ep.simulate.job.routing import read_rows

WIDTH, NUM_EXPERTS, NUM_TOKENS = 8, 8, 24
CASES: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 2},
    "top-1": {"top_k": 1},
    "noise": {"top_k": 1, "noise": "rsample"},
    "drawn second": {"top_k": 2, "sample_second": True, "balance": "bias"},
    "deepseek": {"top_k": 3, "score": "sigmoid", "n_group": 4, "topk_group": 2, "route_scale": 2.5, "balance": "bias"},
    "position": {"top_k": 2, "capacity_factor": 0.7, "min_capacity": 1},
    "score": {"top_k": 3, "capacity_factor": 0.6, "min_capacity": 1, "drop_policy": "score"},
}


def make_layer(seed: int = 0, **knobs: Any) -> ExpertParallel:
    torch.manual_seed(seed)
    config = MoEConfig(num_experts=NUM_EXPERTS, kernels="torch", **({"z_loss_weight": 0.1} | knobs))
    layer = ExpertParallel(WIDTH, GeluMLP(WIDTH, 16), config)
    layer.connect(Loopback())
    if layer.gate.balance is not None:
        layer.gate.balance.start_from(torch.randn(NUM_EXPERTS) / 4)
    return layer


def tokens(seed: int, count: int = NUM_TOKENS) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def results(layer: ExpertParallel, passes: int = 2, used_T: Tensor | None = None) -> list[Tensor]:
    """Outputs, losses, counts and all gradients of some passes."""
    layer.zero_grad()
    found = []
    for index in range(passes):
        x_TD = tokens(index).requires_grad_()
        y_TD, loss, counts_E = layer(x_TD, used_T)
        (y_TD.square().sum() + loss).backward()
        found += [y_TD.detach(), loss.detach(), counts_E, x_TD.grad]
    return [*found, *(parameter.grad for parameter in layer.parameters())]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


def chosen(coded_TK: Tensor) -> Tensor:
    """The experts of a record, those of dropped choices too."""
    return torch.where(coded_TK < -1, -2 - coded_TK, coded_TK)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("with_padding", [False, True])
def test_replaying_ones_own_record_gives_the_same_bits(case: str, with_padding: bool, tmp_path: Path) -> None:
    layer = make_layer(**CASES[case])
    used_T = torch.arange(NUM_TOKENS) % 3 != 0 if with_padding else None
    with record_routes(layer) as record:
        expected = results(layer, used_T=used_T)
    again = RouteRecord.load(record.save(tmp_path / "routes.safetensors"))
    with replay_routes(layer, again):
        assert same(results(layer, used_T=used_T), expected)
    (its,) = again.layers.values()
    others = [torch.where(ids_TK < 0, ids_TK, (ids_TK + 1) % NUM_EXPERTS) for ids_TK in map(chosen, its.passes)]
    with replay_routes(layer, RouteRecord({"": replace(its, passes=others)})):
        assert not torch.equal(results(layer, used_T=used_T)[0], expected[0])
    rows = [float((torch.cat(its.passes) == e).sum() + (torch.cat(its.passes) == -2 - e).sum()) for e in range(8)]
    assert read_rows(str(tmp_path / "routes.safetensors"), NUM_EXPERTS) == rows
    assert read_rows(str(tmp_path), NUM_EXPERTS) == rows
    assert sum(rows) == sum(int(counts_E.sum()) for counts_E in expected[2:8:4])


def test_replayed_routes_have_the_weights_of_the_gate_as_it_is_now() -> None:
    rollout, trainer = make_layer(seed=1, top_k=2), make_layer(seed=2, top_k=2, router_dtype="fp64")
    with record_routes(rollout) as record:
        rollout(tokens(0))
    ids_TK = record.layers[""].passes[0].long()
    assert not torch.equal(trainer.gate(tokens(0)).expert_ids_TK, ids_TK)
    gate_ED = trainer.gate.wg.weight.detach().double().requires_grad_()
    scores_TE = torch.softmax(tokens(0).double() @ gate_ED.T, 1)
    expected_TK = torch.stack([scores_TE[t, ids_TK[t]] / scores_TE[t, ids_TK[t]].sum() for t in range(NUM_TOKENS)])
    with replay_routes(trainer, record):
        routing = trainer.gate(tokens(0))
    torch.testing.assert_close(routing.weights_TK.double(), expected_TK, rtol=1e-6, atol=1e-7)
    pull_TK = torch.randn(expected_TK.shape, generator=torch.Generator().manual_seed(3))
    (routing.weights_TK * pull_TK).sum().backward()
    (expected_TK * pull_TK).sum().backward()
    assert gate_ED.grad is not None and gate_ED.grad.abs().max() > 1e-3
    torch.testing.assert_close(trainer.gate.wg.weight.grad.double(), gate_ED.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_passes_get_the_routes_of_their_first_pass(use_reentrant: bool) -> None:
    """Three passes before the first gradient, which come back in the reverse order."""
    from torch.utils.checkpoint import checkpoint

    layer = make_layer(top_k=2)

    def run(recomputes: bool) -> list[Tensor]:
        layer.zero_grad()
        inputs = [tokens(index).requires_grad_() for index in range(3)]
        outputs = [
            checkpoint(layer, x_TD, use_reentrant=use_reentrant) if recomputes else layer(x_TD) for x_TD in inputs
        ]
        sum(y_TD.square().sum() + loss for y_TD, loss, _ in outputs).backward()
        grads = [x_TD.grad for x_TD in inputs if x_TD.grad is not None]
        return [*(y_TD.detach() for y_TD, *_ in outputs), *grads, *(p.grad for p in layer.parameters())]

    plain = run(False)
    with record_routes(layer) as record:
        recorded = run(True)
    assert len(record.layers[""].passes) == 3, "recomputed passes are not written down twice"
    shifted = [(coded_TK + 1) % NUM_EXPERTS for coded_TK in record.layers[""].passes]
    for passes in (record.layers[""].passes, shifted):
        with replay_routes(layer, RouteRecord({"": LayerRoutes(NUM_EXPERTS, 2, passes)})):
            without = run(False)
        with replay_routes(layer, RouteRecord({"": LayerRoutes(NUM_EXPERTS, 2, passes)})):
            assert same(run(True), without)
    assert same(recorded, plain) and not torch.equal(without[0], plain[0])


def refusal(action: Callable[[], Any], kind: type[Exception] = EngineError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def test_records_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    layer = make_layer(top_k=2)
    with record_routes(layer) as record:
        layer(tokens(0))

    def entered(changed: RouteRecord) -> str:
        return refusal(lambda: replay_routes(layer, changed).__enter__())

    (its,) = record.layers.values()
    assert "has no routes of the layer ''; it has those of ['other']" in entered(RouteRecord({"other": its}))
    assert "has routes of 'more', and the model no such layer" in entered(RouteRecord({"": its, "more": its}))
    assert "has 9 experts in '', and the layer 8" in entered(RouteRecord({"": replace(its, num_experts=9)}))
    assert "has 3 choices per token in '', and the layer visits 2" in entered(RouteRecord({"": replace(its, top_k=3)}))
    outside, twice = torch.full((4, 2), 8), torch.zeros(4, 2)
    assert "experts outside of 0 to 7" in entered(RouteRecord({"": replace(its, passes=[outside])}))
    assert "sends a token to one expert twice" in entered(RouteRecord({"": replace(its, passes=[twice])}))
    with replay_routes(layer, record):
        assert "has 24 tokens, and this one 5" in refusal(lambda: layer(tokens(0, 5)))
    with replay_routes(layer, record):
        layer(tokens(0))
        assert "the record has 1 passes, and this is one more" in refusal(lambda: layer(tokens(0)))
        assert "recorded or replayed already" in refusal(lambda: record_routes(layer).__enter__())
    assert "has no MoE layer" in refusal(lambda: record_routes(torch.nn.Linear(2, 2)).__enter__())
    (tmp_path / "broken.safetensors").write_bytes(b"1234567890")
    assert "no record of routes can be read" in refusal(lambda: RouteRecord.load(tmp_path / "broken.safetensors"))
    assert "no record of routes" in refusal(lambda: read_rows(str(tmp_path), 8), ConfigError)
    from safetensors.torch import save_file

    save_file({"0.": its.passes[0]}, tmp_path / "other.safetensors")
    assert "is no record of routes (format None" in refusal(lambda: RouteRecord.load(tmp_path / "other.safetensors"))
    assert "no record of routes" in refusal(lambda: read_rows(str(tmp_path / "other.safetensors"), 8), ConfigError)
