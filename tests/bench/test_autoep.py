"""AutoEP as a side: on four ranks it computes the dense layer of its case, and an emulated expert gets its rows."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.bench.candidates.cases import LayerCase, expert_ids, gate_weight, output_gradient, tokens
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import EngineError, TopologyError
from tests.ranks import RankPool
from tests.reference import Expert, moe_reference, swiglu_expert

NUM_RANKS = 4
TOLERANCE = 1e-5  # of a tensor's largest element: fp32 against float64 differs by 4e-7 here


def cases(num_experts: int) -> list[LayerCase]:
    """Skewed top-1 leaves the last rank without a row."""
    sizes = {"num_experts": num_experts, "hidden_size": 32, "width": 64}
    return [
        LayerCase(name="k1", top_k=1, load="skewed", num_tokens=16, **sizes),
        LayerCase(name="k2", top_k=2, load="random", num_tokens=40, **sizes),
    ]


def run_case(case: LayerCase, layer: nn.Module) -> dict[str, Tensor]:
    """Results of one forward and backward on this rank."""
    x_TD = tokens(case, dist.get_rank()).requires_grad_()
    layer(x_TD)  # counts and gradients must be those of the second call alone
    y_TD, l_aux, exp_counts_E = layer(x_TD)
    torch.autograd.backward((y_TD, l_aux), (output_gradient(case, dist.get_rank()), torch.ones(())))
    found = {"y": y_TD.detach(), "dx": x_TD.grad, "exp_counts": exp_counts_E}
    return found | {f"d{name.removeprefix('autoep.')}": p.grad for name, p in layer.named_parameters()}


def run_autoep(num_experts: int) -> list[dict[str, Tensor]]:
    import deepspeed

    from ds_moe_ep.bench.candidates.autoep import autoep_layer

    deepspeed.init_distributed("gloo")
    return [run_case(case, autoep_layer(case, NUM_RANKS)) for case in cases(num_experts)]


def run_emulated() -> tuple[int, dict[str, Tensor]]:
    """How many rows the emulated expert of this rank was called on, and the results."""
    import deepspeed

    from ds_moe_ep.bench.candidates.autoep import autoep_layer, emulate_experts

    deepspeed.init_distributed("gloo")
    case = cases(NUM_RANKS)[1]
    layer, expert = autoep_layer(case, NUM_RANKS), nn.Linear(case.hidden_size, case.hidden_size, bias=False)
    nn.init.constant_(expert.weight, dist.get_rank() + 1)
    num_rows = []
    expert.register_forward_hook(lambda module, inputs, output: num_rows.append(len(inputs[0])))
    emulate_experts(layer, expert)
    found = run_case(case, layer)
    with pytest.raises(TopologyError, match="local_experts=4"):
        emulate_experts(autoep_layer(cases(16)[1], NUM_RANKS), expert)
    return num_rows[-1], found


def whole(by_rank: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All ranks' results: the gate's gradient summed, everything else in rank order."""
    joined = {name: torch.cat([found[name] for found in by_rank]) for name in by_rank[0]}
    gate = "drouter.gate.weight"
    return joined | {gate: torch.stack([found[gate] for found in by_rank]).sum(0)}


def expected(case: LayerCase, gate_ED: Tensor, experts: list[Expert]) -> dict[str, Tensor]:
    """The dense layer's results, its gradients left on the leaves."""
    shards = [tokens(case, rank).double().requires_grad_() for rank in range(NUM_RANKS)]
    config = MoEConfig(num_experts=case.num_experts, ep_size=NUM_RANKS, top_k=case.top_k)
    outputs = moe_reference(config, gate_ED, experts, shards)
    y = torch.cat([output.output_TD for output in outputs])
    y.backward(torch.cat([output_gradient(case, rank) for rank in range(NUM_RANKS)]).double())
    counts = torch.tensor([output.exp_counts_E for output in outputs]).flatten()
    dx = torch.cat([x_TD.grad for x_TD in shards])
    return {"y": y.detach(), "dx": dx, "exp_counts": counts, "drouter.gate.weight": gate_ED.grad}


def dense_swiglu(case: LayerCase, swapped: bool) -> dict[str, Tensor]:
    """The dense layer with AutoEP's experts; `swapped` takes gate for up."""
    from ds_moe_ep.bench.candidates.autoep import swiglu_weights

    names = ("up", "gate", "down") if swapped else ("gate", "up", "down")
    pairs = [swiglu_weights(case, expert) for expert in range(case.num_experts)]
    w1, w3 = torch.stack([gate_up.double() for gate_up, _ in pairs]).chunk(2, dim=1)
    w2 = torch.stack([down.double() for _, down in pairs])
    leaves = [weight.detach().requires_grad_() for weight in (w1, w3, w2)]
    experts = [
        swiglu_expert({f"{name}.weight": leaf[expert] for name, leaf in zip(names, leaves, strict=True)})
        for expert in range(case.num_experts)
    ]
    found = expected(case, gate_weight(case).double().requires_grad_(), experts)
    return found | {f"dexperts.{name}": leaf.grad for name, leaf in zip(("w1", "w3", "w2"), leaves, strict=True)}


def differences(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """By tensor, of the reference's largest element."""
    assert found.keys() == reference.keys()
    return {name: float((found[name] - r).abs().max() / r.abs().max()) for name, r in reference.items()}


@pytest.mark.parametrize("num_experts", [4, 16])
def test_autoep_computes_its_case_and_gradients_like_a_dense_layer_in_float64(pool: RankPool, num_experts: int) -> None:
    by_rank = pool.run(NUM_RANKS, run_autoep, num_experts)
    for index, case in enumerate(cases(num_experts)):
        found = whole([results[index] for results in by_rank])
        worst = differences(found, dense_swiglu(case, swapped=False))
        assert max(worst.values()) <= TOLERANCE, (case.name, worst)
        wrong = differences(found, dense_swiglu(case, swapped=True))
        assert wrong.pop("exp_counts") == 0 and min(wrong.values()) > 0.01, "the comparison is blind"


def test_an_emulated_expert_is_called_on_the_rows_that_arrive_padded_to_a_multiple_of_eight(pool: RankPool) -> None:
    case = cases(NUM_RANKS)[1]
    results = pool.run(NUM_RANKS, run_emulated)
    ids = torch.cat([expert_ids(case, rank).flatten() for rank in range(NUM_RANKS)])
    arriving = torch.bincount(ids, minlength=NUM_RANKS).tolist()
    assert [num_rows for num_rows, _ in results] == [max(8, (rows + 7) // 8 * 8) for rows in arriving]
    weights = [torch.full((32, 32), rank + 1.0).double().requires_grad_() for rank in range(NUM_RANKS)]
    reference = expected(
        case, gate_weight(case).double().requires_grad_(), [lambda rows, w=w: rows @ w.T for w in weights]
    )
    reference["dexperts.expert.weight"] = torch.cat([weight.grad for weight in weights])
    worst = differences(whole([found for _, found in results]), reference)
    assert max(worst.values()) <= TOLERANCE, worst


def test_a_release_without_autoeps_layer_is_an_error_that_names_the_tested_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.module_inject import auto_ep_layer

    monkeypatch.delattr(auto_ep_layer, "AutoEPMoELayer")
    monkeypatch.delitem(sys.modules, "ds_moe_ep.bench.candidates.autoep", raising=False)
    with pytest.raises(EngineError, match=r"AutoEPMoELayer.*0\.19\.8"):
        importlib.import_module("ds_moe_ep.bench.candidates.autoep")
