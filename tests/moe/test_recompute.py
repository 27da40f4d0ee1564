"""Recomputation, accumulation and several layers in flight give the gradients of a plain pass, bit for bit.

The module adapter keeps an autograd graph of its own, and is tested beside the two known forms for that reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.experts import GeluMLP, KnownExperts, SwiGLU
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.split_experts import ActiveRows
from tests.moe.layer_cases import CaseData, D, LayerCase, LayerResult, OddExpert, case_data
from tests.moe.layer_runs import Links, build_layer, config, forward_backward, gather_result, run_case, torus_for
from tests.moe.test_schedules import differences
from tests.ranks import RankPool

ALL = {
    (kind, name): LayerCase(
        name=f"recompute {kind} {knobs}",
        config=config(ep_size=4, top_k=2, row_cuts=2, bit_equal=True, **knobs),
        rows=(18, 18, 18, 18) if name == "capacity" else (18, 5, 0, 27),
        expert=kind,
        shared=kind != "module",
    )
    for kind in ("gelu", "swiglu_bias", "module")
    for name, knobs in {"dropless": {}, "capacity": {"capacity_factor": 1.0, "transport": "collective"}}.items()
}
REST = [ALL["gelu", "dropless"], ALL["swiglu_bias", "capacity"]]
CASES = [case for case in ALL.values() if case not in REST]


def connected(case: LayerCase, data: CaseData, links: Links) -> ExpertParallel:
    layer = build_layer(case, data)
    layer.connect(links.of(case), torus_for(case))
    return layer


def shard(case: LayerCase, data: CaseData) -> tuple[Tensor, Tensor]:
    """This rank's input, a leaf, and the gradient of its output."""
    rank = dist.get_rank()
    return data.inputs[rank].clone().requires_grad_(), data.output_grads[rank]


def for_each_case(run: Callable[[LayerCase, Links], list[str]]) -> list[str]:
    links = Links()
    return [f"{case.name}: {wrong}" for case in CASES if (wrong := run(case, links))]


def checkpointed(case: LayerCase, links: Links) -> list[str]:
    wrong = []
    expected = run_case(case, links.of(case))
    for reentrant in (False, True):
        data = case_data(case)
        layer = connected(case, data, links)
        result = forward_backward(
            layer, case, data, lambda x, used, r=reentrant, f=layer: checkpoint(f, x, used, use_reentrant=r)
        )
        wrong += [f"use_reentrant={reentrant}: {name}" for name in differences(result, expected)]
    return wrong


def test_recomputed_layers_give_the_same_bits(pool: RankPool) -> None:
    assert pool.run(4, for_each_case, checkpointed, timeout_s=120) == [[]] * 4


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("expert", [GeluMLP, SwiGLU])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_active_rows_are_made_again_on_a_gpu_unless_a_recomputation_has_just_made_them(
    reentrant: bool, expert: type[nn.Module], on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    layer = ExpertParallel(8, expert(8, 16), MoEConfig(num_experts=2))
    start, choose = KnownExperts.start, ActiveRows.of_this_pass
    monkeypatch.setattr(ActiveRows, "of_this_pass", lambda is_on_cpu: choose(is_on_cpu and on_cpu))

    def started(*args: Any) -> Any:
        made = start(*args)
        seen.append([rows.untyped_storage().nbytes() for rows in made.saved])
        return made

    monkeypatch.setattr(KnownExperts, "start", started)
    x = torch.randn(6, 8, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad is not None
    plain, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=reentrant)[0].sum().backward()
    alone, first, again = (sum(sizes) for sizes in seen)
    num_hidden = 1 if expert is GeluMLP else 2
    all_rows = 6 * 16 * 4  # one tensor of rows [6, F] in fp32, over both experts
    assert alone == (num_hidden + on_cpu) * all_rows and again == (num_hidden + 1) * all_rows
    assert first <= alone + 2 * 4, "a place for what comes later, without its memory"
    assert torch.equal(x.grad, plain)


def without_gradients(case: LayerCase, links: Links) -> list[str]:
    data = case_data(case)
    layer = connected(case, data, links)
    x, _ = shard(case, data)
    expected, l_aux, counts = layer(x)
    wrong = []
    for name, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
        with mode():
            output, loss, seen = layer(x)
        same = torch.equal(output, expected) and torch.equal(loss, l_aux) and torch.equal(seen, counts)
        wrong += [name] if not same or output.requires_grad or loss.requires_grad else []
    layer.eval()
    plain = case.config.eval_capacity_factor is None and case.config.capacity_factor is None
    output, loss, _ = layer(x)
    wrong += ["eval"] if plain and not (torch.equal(output, expected) and torch.equal(loss, l_aux)) else []
    return wrong


def test_no_grad_inference_and_eval_give_the_output_of_training(pool: RankPool) -> None:
    assert pool.run(4, for_each_case, without_gradients, timeout_s=120) == [[]] * 4


def accumulated(case: LayerCase, links: Links) -> list[str]:
    """Two passes in flight, the later one's backward first; and one after the other. Both add up."""
    wrong, single = [], run_case(case, links.of(case))
    for order in ((1, 0), (0, 1)):
        data = case_data(case)
        layer = connected(case, data, links)
        inputs, losses = [], []
        for _ in range(2):
            x, grad = shard(case, data)
            output, l_aux, counts = layer(x)
            inputs.append(x)
            losses.append((output * grad).sum() + l_aux)
        for index in order:
            losses[index].backward()
        result = gather_result(layer, case, inputs[0], output, l_aux, counts)
        doubled = LayerResult(
            single.output,
            single.l_aux,
            single.exp_counts,
            single.input_grad,
            2 * single.gate_grad,
            {e: {name: 2 * grad for name, grad in grads.items()} for e, grads in single.expert_grads.items()},
        )
        wrong += [f"order {order}: {name}" for name in differences(result, doubled)]
    return wrong


def test_two_passes_in_flight_accumulate_their_gradients(pool: RankPool) -> None:
    assert pool.run(4, for_each_case, accumulated, timeout_s=120) == [[]] * 4


def stack_gradients(case: LayerCase, links: Links, recompute: bool) -> list[Tensor]:
    """Three layers of other weights, one after the other and a fourth beside them, over one transport."""
    cases = [case, *(LayerCase(**{**vars(case), "name": f"{case.name} {i}"}) for i in range(3))]
    layers = [connected(c, case_data(c), links) for c in cases]
    x, grad = shard(case, case_data(case))
    hidden, losses = x, []
    for layer in layers[:3]:
        y, l_aux, _ = checkpoint(layer, hidden, use_reentrant=False) if recompute else layer(hidden)
        hidden = hidden + y
        losses.append(l_aux)
    beside, l_aux, _ = layers[3](x)
    ((hidden + beside) * grad).sum().add(sum(losses) + l_aux).backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for layer in layers for p in layer.parameters())]


def layers_in_flight(case: LayerCase, links: Links) -> list[str]:
    serial = stack_gradients(case.with_config(schedule="serial", depth=0), links, recompute=False)
    wrong = []
    for recompute in (False, True):
        found = stack_gradients(case, links, recompute)
        exact = case.expert != "module"
        for index, (a, b) in enumerate(zip(found, serial, strict=True)):
            same = torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-4, atol=1e-6)
            wrong += [] if same else [f"recompute={recompute}: tensor {index}"]
    return wrong


def test_several_layers_in_flight_equal_the_serial_ones(pool: RankPool) -> None:
    assert pool.run(4, for_each_case, layers_in_flight, timeout_s=120) == [[]] * 4


def partly_frozen(case: LayerCase, links: Links) -> list[str]:
    """Inputs, gate or experts without gradient: the others' gradients stay, the frozen have none."""
    wrong, expected = [], run_case(case, links.of(case))
    for frozen in ("input", "experts", "gate"):
        data = case_data(case)
        layer = connected(case, data, links)
        x, grad = shard(case, data)
        if frozen == "input":
            x = x.detach()
        else:
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(not name.startswith(frozen))
        output, l_aux, counts = layer(x)
        ((output * grad).sum() + l_aux).backward()
        result = gather_result(layer, case, x, output, l_aux, counts)
        of_experts = [name for name in differences(result, expected) if name.startswith("d ") and name != "d gate"]
        of_experts = [name for name in of_experts if "shared" not in name]
        others = [name for name in differences(result, expected) if name not in of_experts]
        if frozen == "experts":
            wrong += [] if all(p.grad is None for p in layer.experts.parameters()) else ["frozen experts got gradients"]
            wrong += others
        elif frozen == "gate":
            wrong += [] if layer.gate.wg.weight.grad is None else ["a frozen gate got a gradient"]
            wrong += [f"frozen gate: {name}" for name in of_experts]
        else:
            wrong += [f"frozen input: {name}" for name in (*of_experts, *others) if name != "dx"]
    return wrong


def test_frozen_parts_leave_the_others_gradients_alone(pool: RankPool) -> None:
    assert pool.run(4, for_each_case, partly_frozen, timeout_s=120) == [[]] * 4


def backward_twice(case: LayerCase, links: Links) -> list[str]:
    data = case_data(case)
    layer = connected(case, data, links)
    x, grad = shard(case, data)
    output, l_aux, _ = layer(x)
    loss = (output * grad).sum() + l_aux
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in (x, *layer.parameters())]
    loss.backward()
    second = [p.grad for p in (x, *layer.parameters())]
    return [f"tensor {i}" for i, (a, b) in enumerate(zip(first, second, strict=True)) if not torch.equal(2 * a, b)]


def test_a_retained_graph_can_go_backward_twice(pool: RankPool) -> None:
    assert pool.run(4, for_each_case, backward_twice, timeout_s=60) == [[]] * 4


def hooks_fire_once(case: LayerCase, links: Links) -> list[str]:
    """Engines reduce gradients in these hooks, and expect one accumulation a backward pass."""
    data = case_data(case)
    layer = connected(case, data, links)
    fired: dict[str, int] = {}
    for name, parameter in layer.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, n=name: fired.update({n: fired.get(n, 0) + 1}))
    forward_backward(layer, case, data)
    return [f"{name}: {fired.get(name, 0)} times" for name, _ in layer.named_parameters() if fired.get(name, 0) != 1]


def test_each_parameters_gradient_hook_fires_once_even_without_rows(pool: RankPool) -> None:
    assert pool.run(4, for_each_case, hooks_fire_once, timeout_s=60) == [[]] * 4


def for_the_rest() -> list[str]:
    links = Links()
    runs = (checkpointed, without_gradients, accumulated, layers_in_flight, partly_frozen, backward_twice)
    return [f"{case.name}: {wrong}" for case in REST for run in runs if (wrong := run(case, links))]


@pytest.mark.slow
def test_the_other_pairs_of_experts_and_routing_do_all_of_this(pool: RankPool) -> None:
    assert pool.run(4, for_the_rest, timeout_s=240) == [[]] * 4


def live_bytes() -> int:
    gc.collect()
    return sum(o.untyped_storage().nbytes() for o in gc.get_objects() if issubclass(type(o), Tensor))


@pytest.mark.parametrize("expert", [GeluMLP(D, 512), SwiGLU(D, 512), OddExpert()])
def test_backward_keeps_no_rows_while_its_output_lives(expert: torch.nn.Module) -> None:
    """A training loop's `loss` lives on through the next forward pass; the last pass's buffers must not."""
    layer = ExpertParallel(D, expert, config(num_experts=2))
    x = torch.randn(4096, D)
    before = live_bytes()
    output, l_aux, _ = layer(x)
    (output.sum() + l_aux).backward()
    grads = sum(p.grad.nbytes for p in layer.parameters() if p.grad is not None)
    assert live_bytes() - before - grads <= 4 * x.nbytes, "output, results and index maps: a few rows of width D"
