"""Same weights: our MoE and DeepSpeed's native MoE give the same output, losses and gradients.

Each stays within 1e-6 of the float64 reference (tests/moe/test_parity.py tells why), so they differ by 2e-6 at most.
"""

from __future__ import annotations

import pytest
import torch

from ds_moe_ep.engine import seams
from ds_moe_ep.moe.tuner import Choice
from tests.engine.native_layers import first_of_equals, native_layer, our_layer, run_layer
from tests.moe.layer_cases import LayerCase, LayerResult, errors, reference_results
from tests.moe.layer_runs import config
from tests.ranks import RankPool

# The layers' schedule is "auto", as DeepSpeed's arguments leave it: every twelfth measures, which takes ten passes.
BY_PEERS = Choice(
    knobs={"schedule": "peers"}, time_to_serial=1.0, predicted_to_serial=1.0, serial_ms=1.0, raced={"chunks": 1.0}
)


def cases(dtype: torch.dtype = torch.float32, *, are_all: bool = False) -> list[LayerCase]:
    """Everything that the installed DeepSpeed's layer can do without drawing numbers: all of it, or every pair."""
    table = []
    for i, (ep_size, num_experts) in enumerate(((4, 8), (2, 8), (4, 4), (1, 4))):
        for j, top_k in enumerate((1, 2, 4)):
            for k, factor in enumerate((None, 0.75, 8.0)):
                if not native_runs(num_experts, top_k, factor) or not (are_all or (i + j + k) % 2 == 0):
                    continue
                policy = "score" if top_k > 2 else "position"
                knobs = config(
                    num_experts=num_experts, ep_size=ep_size, top_k=top_k, capacity_factor=factor, drop_policy=policy
                )
                expert = ("gelu", "swiglu_bias", "module")[len(table) % 3]
                name = f"EP={ep_size} E={num_experts} k={top_k} capacity={factor} {expert} {dtype}"
                table.append(LayerCase(name=name, config=knobs, rows=(24,) * 4, expert=expert, dtype=dtype))
    masked = [LayerCase(name=f"masked {dtype}", config=config(ep_size=4), rows=(24,) * 4, masked=True, dtype=dtype)]
    return table + masked


def native_runs(num_experts: int, top_k: int, factor: float | None) -> bool:
    """True where the installed release's gate computes what 0.19.8's does.

    Before it, a gate of more than two choices drops by the logits, where a negative one loses against no choice at all.
    One of one choice fails where the capacity exceeds the tokens, and its compiled topk cannot be told which of equals
    to drop.
    """
    if factor is None or top_k == 2 or seams.has("sparse routes"):
        return True
    return top_k == 1 and 1 < factor <= num_experts


def run_both(table: list[LayerCase], arguments: dict[str, object]) -> list[tuple[LayerResult, LayerResult]]:
    """Each case through our layer and through DeepSpeed's, on this rank."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    results = []
    for index, case in enumerate(table):
        layer = our_layer(case, **arguments)
        if index % 12:
            layer.deepspeed_moe.dispatcher.take_choice(BY_PEERS)
        ours = run_layer(layer, case)
        with first_of_equals():
            native = run_layer(native_layer(case, **arguments), case)
        assert ours.l_aux.dtype == native.l_aux.dtype
        assert ours.output.dtype == native.output.dtype
        results.append((ours, native))
    return results


@pytest.mark.parametrize("are_all", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_our_layer_equals_deepspeeds_and_both_equal_the_reference(pool: RankPool, are_all: bool) -> None:
    table = cases(are_all=are_all)
    by_rank = pool.run(4, run_both, table, {}, timeout_s=120)
    for index, case in enumerate(table):
        ours, native = ([results[index][side] for results in by_rank] for side in (0, 1))
        expected = reference_results(case)
        assert max(errors(native, expected).values()) <= 1e-6, f"DeepSpeed's layer, {case.name}"
        assert max(errors(ours, expected).values()) <= 1e-6, case.name
        assert max(errors(ours, native).values()) <= 2e-6, case.name
        assert [r.exp_counts for r in ours] == [r.exp_counts for r in native], case.name


def test_in_bf16_our_layer_is_as_close_to_the_reference_as_deepspeeds(pool: RankPool) -> None:
    """Within half again of DeepSpeed's own error: the same roundings, in another order.

    Arbitrary modules get a gradient per run, each rounded to bf16 before they are summed and cancel: 2.5 times.
    """
    table = cases(torch.bfloat16)[:9]
    by_rank = pool.run(4, run_both, table, {}, timeout_s=120)
    for index, case in enumerate(table):
        ours, native = ([results[index][side] for results in by_rank] for side in (0, 1))
        expected = reference_results(case)
        allowed = 2.5 if case.expert == "module" else 1.5
        assert max(errors(ours, expected).values()) <= allowed * max(errors(native, expected).values()), case.name


def test_residual_layers_equal_deepspeeds(pool: RankPool) -> None:
    table = [case for case in cases() if case.config.capacity_factor is None and case.expert != "module"]
    by_rank = pool.run(4, run_both, table, {"use_residual": True}, timeout_s=120)
    for index, case in enumerate(table):
        ours, native = ([results[index][side] for results in by_rank] for side in (0, 1))
        assert {"coefficient.weight", "mlp.fc1.weight"} & ours[0].expert_grads["dense"].keys()
        assert max(errors(ours, native).values()) <= 2e-6, case.name


def run_perturbed(case: LayerCase) -> tuple[LayerResult, LayerResult]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    layer = our_layer(case)
    if torch.distributed.get_rank() == 3:
        with torch.no_grad():
            next(layer.deepspeed_moe.experts.parameters()).view(-1)[0] += 0.5
    return run_layer(layer, case), run_layer(native_layer(case), case)


def test_one_perturbed_remote_weight_is_seen(pool: RankPool) -> None:
    case = cases()[3]
    by_rank = pool.run(4, run_perturbed, case)
    off = errors([ours for ours, _ in by_rank], [native for _, native in by_rank])
    assert max(off[f"y[{rank}]"] for rank in range(3)) > 1e-4


def describe(case: LayerCase, residual: bool) -> list[list[tuple[object, ...]]]:
    """Names, shapes and marks of both layers' parameters, in order."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    layers = [make(case, use_residual=residual) for make in (our_layer, native_layer)]
    marks = [
        [
            (name, tuple(p.shape), getattr(p, "allreduce", None), getattr(p, "group_name", None))
            for name, p in layer.named_parameters()
        ]
        for layer in layers
    ]
    return [*marks, *([(key,) for key in layer.state_dict()] for layer in layers)]


def test_parameters_have_deepspeeds_names_shapes_order_and_marks(pool: RankPool) -> None:
    for residual in (False, True):
        for ours, native, our_keys, native_keys in pool.run(2, describe, cases_of_two_ranks(), residual):
            assert ours == native
            assert our_keys == native_keys


def cases_of_two_ranks() -> LayerCase:
    return LayerCase(name="marks", config=config(ep_size=2, top_k=2), rows=(8, 8), expert="gelu_bias")
