"""Costs of a rank of a layout: every number by hand from shapes, parameters against the model as torch cuts it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ds_moe_ep.config.knobs import SPECIFICATION, Layout, ModelConfig, MoEConfig
from ds_moe_ep.config.training import Training, read_training
from ds_moe_ep.sizing.fit import largest_micro_batch
from ds_moe_ep.sizing.footprint import count_parameters, forward_flops
from ds_moe_ep.sizing.pipeline import (
    bubble,
    count_stage,
    count_stage_parameters,
    count_work,
    fullest_stage,
    stage_activation_bytes,
)

TINY = ModelConfig(num_layers=4, hidden_size=8, num_heads=2, expert_width=32, vocab_size=10, sequence_length=6)
MOE = MoEConfig(num_experts=4)
TP2_PP2 = Layout(tp_size=2, pp_size=2)
SPECIFIED = Layout(tp_size=8, pp_size=2)
FP16_ZERO1 = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}


def train(layout: Layout, copies: int = 1, micro_batches: int = 3, **ds_config: Any) -> Training:
    values = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": micro_batches, **ds_config}
    return read_training(values, 1, copies * layout.size, layout)


def test_the_specifications_weights_are_one_sixteenth_on_each_gpu() -> None:
    """70.87 GB / 16 = 4.43 GB: what is whole on every rank of a tensor group weighs nothing beside the matrices."""
    moe, training = MoEConfig(num_experts=16), train(SPECIFIED, **FP16_ZERO1)
    whole = 2 * count_parameters(SPECIFICATION, moe).total
    assert whole == pytest.approx(70.87e9, rel=1e-3)
    for index in range(2):
        assert count_stage(SPECIFICATION, moe, training, index).memory.weights == pytest.approx(4.43e9, rel=1e-3)


def test_parameters_of_each_stage_are_those_counted_by_hand() -> None:
    stages = [dataclasses.asdict(count_stage_parameters(TINY, MOE, TP2_PP2, index)) for index in range(2)]
    both = {  # 2 of 4 layers, matrices halved
        "attention": 2 * 4 * 8 * 8 // 2,
        "gate": 2 * 8 * 4,
        "experts": 2 * 4 * 2 * 8 * 32 // 2,
        "shared_experts": 0,
    }
    assert stages[0] == {**both, "embedding": 10 * 8, "norms": 2 * 4 * 8, "head": 0}
    assert stages[1] == {**both, "embedding": 0, "norms": 2 * 4 * 8 + 2 * 8, "head": 10 * 8}


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_parameters_of_each_stage_equal_those_of_the_model_that_torch_cuts(
    tp_size: int, pp_size: int, expert: Any
) -> None:
    torch = pytest.importorskip("torch")
    tensor = pytest.importorskip("ds_moe_ep.parallel.tensor")
    stages = pytest.importorskip("ds_moe_ep.parallel.stages")
    layer = pytest.importorskip("ds_moe_ep.moe.layer")
    transformer = pytest.importorskip("ds_moe_ep.model.transformer")
    model = dataclasses.replace(TINY, expert=expert, shared_expert_width=12)
    with torch.device("meta"):
        whole = transformer.build_transformer(model, MOE, layer.ExpertParallel)
        tensor.cut(whole, tensor.Share(0, tp_size))
    layout = Layout(tp_size=tp_size, pp_size=pp_size)
    for index, modules in enumerate(stages.stage_modules(whole, pp_size)):
        held = sum(parameter.numel() for module in modules for parameter in module.parameters())
        assert count_stage_parameters(model, MOE, layout, index).total == held


@pytest.mark.parametrize("knob", [field.name for field in dataclasses.fields(Layout)])
def test_each_knob_of_a_layout_makes_a_rank_smaller(knob: str) -> None:
    whole = count_parameters(TINY, MOE)
    cut = count_stage_parameters(TINY, MOE, Layout(**{knob: 2}), 0)
    assert (cut.attention, cut.experts) == (whole.attention // 2, whole.experts // 2)


@pytest.mark.parametrize(
    ("ds_config", "copies", "weights", "gradients", "optimizer", "step"),
    [
        # of one parameter: bytes of weight, gradient, master weight and Adam's states, and those of an optimizer step
        ({}, 2, 4, 4, 8, 0),
        ({"fp16": {"enabled": True}}, 2, 2, 2, 12, 4),
        (FP16_ZERO1, 1, 2, 2, 12, 6),
        (FP16_ZERO1, 2, 2, 2, 12 / 2, 6 / 2),
        (FP16_ZERO1 | {"optimizer": {"type": "Lion"}}, 2, 2, 2, 8 / 2, 6 / 2),
    ],
)
def test_bytes_follow_precision_and_zero_shares_them_among_copies(
    ds_config: dict[str, Any], copies: int, weights: int, gradients: int, optimizer: float, step: float
) -> None:
    stage = count_stage(TINY, MOE, train(TP2_PP2, copies, **ds_config), 0)
    held, memory = stage.parameters.total, stage.memory
    assert (memory.weights, memory.gradients) == (weights * held, gradients * held)
    assert (memory.optimizer, memory.step) == (optimizer * held, step * held)


def test_offload_moves_the_optimizer_to_the_host() -> None:
    here = count_stage(TINY, MOE, train(TP2_PP2, **FP16_ZERO1), 0).memory
    zero = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    there = count_stage(TINY, MOE, train(TP2_PP2, fp16={"enabled": True}, zero_optimization=zero), 0).memory
    assert (there.optimizer, there.step, there.host_optimizer) == (0, 0, here.optimizer)


@pytest.mark.parametrize("overlap", [False, True])
def test_buffers_are_one_bucket_since_a_pipeline_overlaps_none(overlap: bool) -> None:
    zero = {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": overlap}
    assert count_stage(TINY, MOE, train(TP2_PP2, zero_optimization=zero), 0).memory.buffers == 4 * 1000


def test_activations_of_each_stage_are_those_counted_by_hand() -> None:
    # T=6 tokens, D=8, F=32, E=4, k=2, V=10, fp32, 2 layers of each of 2 stages, widths halved, 3 micro-batches
    T, D, F, E, b = 6, 8, 32, 4, 4
    u = T * D * b
    moe, training = MoEConfig(num_experts=E, top_k=2), train(TP2_PP2)
    layer = (3 + 4) * u + 4 * T * D + 3 * T * E * 4 + (7 * u + 2 * 2 * T * F * b) // 2
    gradients = u + max(8 * 2 * T * D, 2 * u + b * E * 2 * D * F // 2)
    first = 2 * 2 * u + layer + gradients + (2 + 1) * u // 2 + 2 * u  # two micro-batches in flight; messages sent
    last = 2 * 1 * u + layer + gradients + (1 + 1) * u + u // 2 + T * 10 * (b + 12)  # messages received; the loss
    assert [stage_activation_bytes(TINY, moe, training, index) for index in range(2)] == [first, last]
    stored = dataclasses.replace(TINY, recompute=False)
    more = stage_activation_bytes(stored, moe, training, 0) - first
    assert more == (2 * 2 - 1) * layer  # each micro-batch in flight keeps both layers' sets


@pytest.mark.parametrize(("micro_batches", "in_flight"), [(1, 1), (2, 2), (4, 4), (9, 4)])
def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages_behind_it(
    micro_batches: int, in_flight: int
) -> None:
    layout = Layout(pp_size=4)
    u = 6 * 8 * 4
    one, more = (stage_activation_bytes(TINY, MOE, train(layout, micro_batches=m), 0) for m in (1, micro_batches))
    assert more - one == (in_flight - 1) * 2 * u  # of each the layer's input, and the message


def test_a_tensor_group_of_one_and_a_pipeline_of_one_pay_for_no_messages() -> None:
    T, D, b = 6, 8, 4
    u = T * D * b
    layer = 5 * u + 4 * T * D + 3 * T * 4 * 4 + 7 * u + 2 * T * 32 * b
    gradients = u + max(8 * T * D, u + b * 4 * 2 * D * 32)
    whole = stage_activation_bytes(TINY, MOE, train(Layout()), 0)
    assert whole == 4 * u + layer + gradients + T * 10 * (b + 12)


def test_the_fullest_stage_is_the_one_with_the_highest_peak() -> None:
    training = train(TP2_PP2, **FP16_ZERO1)
    peaks = [count_stage(TINY, MOE, training, index).memory.peak for index in range(2)]
    assert fullest_stage(TINY, MOE, training).memory.peak == max(peaks)
    large_head = dataclasses.replace(TINY, vocab_size=10_000)
    assert fullest_stage(large_head, MOE, training).index == 1


def test_the_largest_micro_batch_is_the_one_that_just_fits() -> None:
    moe, training = MoEConfig(num_experts=16), train(SPECIFIED, micro_batches=4, **FP16_ZERO1)
    free = int(76e9)
    largest = largest_micro_batch(SPECIFICATION, moe, training, free)
    assert largest == 11
    for micro_batch, fits in ((largest, True), (largest + 1, False)):
        job = dataclasses.replace(training, micro_batch=micro_batch)
        assert (fullest_stage(SPECIFICATION, moe, job).memory.peak <= free) is fits
    assert largest_micro_batch(SPECIFICATION, moe, training, int(35e9)) == 0  # weights and optimizer alone are more


@pytest.mark.parametrize(("recompute", "passes"), [(True, 6), (False, 4)])
def test_all_reduces_are_those_of_a_ring_counted_by_hand(recompute: bool, passes: int) -> None:
    model = dataclasses.replace(TINY, recompute=recompute)
    work = count_work(model, MOE, train(Layout(tp_size=2, pp_size=2), micro_batches=3))
    one = 2 * (2 - 1) * 6 * 8 * 4 // 2
    assert (work.all_reduce_bytes, work.all_reduces) == (one, passes)
    assert work.step_all_reduce_bytes == one * passes * 2 * 3  # 2 layers of a stage, 3 micro-batches


def test_a_batch_of_the_specification_costs_587_gb_of_all_reduce_a_layer_forward() -> None:
    """The checked figure: 2 all-reduces of 10,240,000 tokens, 2 * 7/8 * 2 * T * d * 2 bytes."""
    moe, training = MoEConfig(num_experts=16), train(SPECIFIED, micro_batches=1024, **FP16_ZERO1)
    work = count_work(SPECIFICATION, moe, training)
    assert 2 * 1024 * work.all_reduce_bytes == pytest.approx(587e9, rel=1e-3)


def test_messages_between_stages_are_cut_over_the_tensor_group_and_gathered() -> None:
    numbers = 2 * (6 * 8 + 1)  # two sequences, each with a column for the routing losses
    cut = count_work(TINY, MOE, train(TP2_PP2, train_micro_batch_size_per_gpu=2))
    assert (cut.send_bytes, cut.gather_bytes) == (4 * numbers // 2, 4 * numbers // 2)
    whole = count_work(TINY, MOE, train(Layout(pp_size=2), train_micro_batch_size_per_gpu=2))
    assert (whole.send_bytes, whole.gather_bytes, whole.all_reduce_bytes) == (4 * numbers, 0, 0)
    one_stage = count_work(TINY, MOE, train(Layout(tp_size=2)))
    assert (one_stage.send_bytes, one_stage.gather_bytes, one_stage.bubble) == (0, 0, 0)


@pytest.mark.parametrize(("micro_batches", "expected"), [(1, 1 / 2), (4, 1 / 5), (128, 1 / 129)])
def test_the_bubble_shrinks_with_the_micro_batches(micro_batches: int, expected: float) -> None:
    assert bubble(train(SPECIFIED, micro_batches=micro_batches)) == expected


def test_tokens_and_arithmetic_do_not_depend_on_the_layout() -> None:
    work = count_work(TINY, MOE, train(TP2_PP2, copies=2, micro_batches=3))
    assert (work.micro_batch_tokens, work.batch_tokens) == (6, 6 * 3 * 2)
    assert work.forward_flops == forward_flops(TINY, MOE)
