"""Footprints: every number by hand from shapes, and the parameter counts against the model as torch builds it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ds_moe_ep.config.knobs import MODELS, SPECIFICATION, ModelConfig, MoEConfig
from ds_moe_ep.config.training import Training, read_training
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.sizing.footprint import (
    activation_bytes,
    count_memory,
    count_parameters,
    count_rank_parameters,
    dispatch_bytes,
    forward_flops,
    largest_load,
    training_flops,
)

TINY = ModelConfig(
    num_layers=2, hidden_size=8, num_heads=2, expert_width=32, vocab_size=10, sequence_length=6, recompute=False
)
EP16 = MoEConfig(num_experts=16, ep_size=16)


def train(ep_size: int, world_size: int, **ds_config: Any) -> Training:
    return read_training({"train_micro_batch_size_per_gpu": 1, **ds_config}, ep_size, world_size)


def test_parameters_by_kind_are_those_counted_by_hand() -> None:
    moe = MoEConfig(num_experts=4, ep_size=2)
    whole = count_parameters(TINY, moe)
    assert dataclasses.asdict(whole) == {
        "embedding": 10 * 8,
        "attention": 2 * 4 * 8 * 8,
        "gate": 2 * 8 * 4,
        "experts": 2 * 4 * 2 * 8 * 32,
        "shared_experts": 0,
        "norms": 2 * 4 * 8 + 2 * 8,
        "head": 10 * 8,
    }
    rank = count_rank_parameters(TINY, moe)
    assert (rank.experts, rank.dense) == (whole.experts // 2, whole.dense)


@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared_width", [0, 12])
def test_parameters_equal_those_of_the_model_that_torch_builds(expert: Any, bias: bool, shared_width: int) -> None:
    torch = pytest.importorskip("torch")
    transformer = pytest.importorskip("ds_moe_ep.model.transformer")
    layer = pytest.importorskip("ds_moe_ep.moe.layer")
    model = dataclasses.replace(TINY, expert=expert, expert_bias=bias, shared_expert_width=shared_width)
    moe = MoEConfig(num_experts=4)
    with torch.device("meta"):
        built = transformer.build_transformer(model, moe, layer.ExpertParallel)
    counted = count_parameters(model, moe)
    assert counted.total == sum(parameter.numel() for parameter in built.parameters())
    experts = sum(p.numel() for name, p in built.named_parameters() if "deepspeed_experts" in name)
    assert counted.experts == experts


def test_ep16_keeps_what_the_specifications_shapes_imply() -> None:
    fp16 = train(16, 16, fp16={"enabled": True}, zero_optimization={"stage": 1})
    memory = count_memory(SPECIFICATION, EP16, fp16)
    # 16 bytes per expert parameter; 2 + 2 + 12/16 per dense one; 4 layers (figures of the specification, checked)
    by_hand = 4 * (536_870_912 * 16 + 268_435_456 * (2 + 2 + 12 / 16))
    assert memory.persistent == pytest.approx(by_hand, rel=1e-3)  # the rest: embedding, gate, norms, head


@pytest.mark.parametrize(
    ("ds_config", "weights", "gradients", "optimizer"),
    [
        # one dense (d) and one expert (e) parameter: bytes of weight, gradient, master weight and Adam's states
        ({}, 4, 4, lambda d, e: 8 * (d + e)),
        ({"fp16": {"enabled": True}}, 2, 2, lambda d, e: 12 * (d + e)),
        ({"bf16": {"enabled": True}}, 2, 2, lambda d, e: 12 * (d + e)),
        ({"zero_optimization": {"stage": 1}}, 4, 4, lambda d, e: 12 * (d / 8 + e / 2)),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}, 2, 2, lambda d, e: 12 * (d / 8 + e / 2)),
        (
            {
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 1},
                "data_types": {"grad_accum_dtype": "fp32"},
            },
            2,
            4,
            lambda d, e: 12 * (d / 8 + e / 2),
        ),
    ],
)
def test_bytes_follow_precision_and_zero_stage(
    ds_config: dict[str, Any], weights: int, gradients: int, optimizer: Any
) -> None:
    moe = MoEConfig(num_experts=4, ep_size=4)
    rank = count_rank_parameters(TINY, moe)
    memory = count_memory(TINY, moe, train(4, 8, **ds_config))  # 8 ranks: 2 of them hold the same expert
    assert memory.weights == weights * rank.total
    assert memory.gradients == gradients * rank.total
    assert memory.optimizer == optimizer(rank.dense, rank.experts)


def test_zero_2_divides_gradients_too_and_by_the_owners_of_each_parameter() -> None:
    moe = MoEConfig(num_experts=4, ep_size=4)
    rank = count_rank_parameters(TINY, moe)
    memory = count_memory(TINY, moe, train(4, 8, zero_optimization={"stage": 2}))
    assert memory.gradients == 4 * (rank.dense // 8 + rank.experts // 2)


def test_offload_moves_the_optimizer_to_the_host() -> None:
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    here = count_memory(TINY, EP16, train(16, 16, zero_optimization={"stage": 2}))
    there = count_memory(TINY, EP16, train(16, 16, zero_optimization=zero))
    assert (there.optimizer, there.host_optimizer) == (0, here.optimizer)
    assert there.peak < here.peak


def test_buffers_are_deepspeeds_buckets_and_twice_with_overlap() -> None:
    for overlap, times in ((False, 1), (True, 2)):
        zero = {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": overlap}
        assert count_memory(TINY, EP16, train(16, 16, zero_optimization=zero)).buffers == 4 * 1000 * times
    assert count_memory(TINY, EP16, train(16, 16)).buffers == 0


def test_activations_are_those_counted_by_hand() -> None:
    # T=6 tokens, D=8, F=32, E=16, k=2, V=10, fp32, 2 layers without recompute
    T, D, F, b = 6, 8, 32, 4
    moe = MoEConfig(ep_size=16, top_k=2)
    rows = 2 * T * (2 * D + 2 * F) * b
    layer = 9 * T * D * b + (3 + 4) * T * D * b + rows + 3 * T * 16 * 4
    training = train(16, 16)
    assert activation_bytes(TINY, moe, training) == 2 * layer + rows + T * 10 * (b + 12)
    again = dataclasses.replace(TINY, recompute=True)
    assert activation_bytes(again, moe, training) == 2 * T * D * b + layer + rows + T * 10 * (b + 12)


def test_the_largest_load_is_the_one_that_just_fits() -> None:
    training = train(16, 16, fp16={"enabled": True}, zero_optimization={"stage": 1})
    free = int(76e9)
    load = largest_load(SPECIFICATION, EP16, training, free)
    assert load is not None
    assert count_memory(SPECIFICATION, EP16, training, load * 0.999).peak <= free
    assert count_memory(SPECIFICATION, EP16, training, load * 1.001).peak > free
    assert largest_load(SPECIFICATION, EP16, training, int(40e9)) is None


@pytest.mark.parametrize(("ep_size", "top_k", "expected"), [(1, 1, 0), (2, 1, 8000), (16, 1, 15000), (16, 4, 60000)])
def test_dispatch_leaves_out_the_rows_that_stay(ep_size: int, top_k: int, expected: int) -> None:
    # 1,000 tokens of 8 numbers of 2 bytes: 16,000 bytes per choice, of which 1/P stays
    moe = MoEConfig(ep_size=ep_size, top_k=top_k)
    assert dispatch_bytes(1000, TINY, moe, "bf16") == expected


def test_arithmetic_of_a_token_is_that_of_its_matrices() -> None:
    # D=8, F=32, S=6, E=4, k=1, V=10: by hand
    layer = 2 * (4 * 8 * 8) + 2 * 6 * 8 + 2 * 8 * 4 + 2 * (2 * 8 * 32)
    moe = MoEConfig(num_experts=4)
    assert forward_flops(TINY, moe) == 2 * layer + 2 * 10 * 8
    assert training_flops(TINY, moe) == 3 * forward_flops(TINY, moe)
    assert forward_flops(SPECIFICATION, EP16) == pytest.approx(7.10e9, rel=1e-3)


def test_a_model_fits_or_not_by_its_peak_alone() -> None:
    for model in MODELS.values():
        memory = count_memory(model, EP16, train(16, 16, zero_optimization={"stage": 1}))
        assert memory.peak >= memory.persistent
        assert memory.peak == memory.persistent + max(memory.activations + memory.buffers, memory.step)


def cut_by(*specs: tuple[str, str]) -> dict[str, Any]:
    """AutoTP over two ranks, of matrices by a pattern of their names each."""
    layer_specs = [{"patterns": [pattern], "partition_type": how} for pattern, how in specs]
    return {"tensor_parallel": {"autotp_size": 2, "partition_config": {"layer_specs": layer_specs}}}


ATTENTION = (r".*attention\.qkv\.weight$", "column"), (r".*attention\.out\.weight$", "row")
SHARED = (r".*shared\.fc1\.weight$", "column"), (r".*shared\.fc2\.weight$", "row")
D, FS, V, L, NORMS, GATES = 8, 12, 10, 2, 2 * 4 * 8 + 2 * 8, 2 * 8 * 4


@pytest.mark.parametrize(
    ("keys", "held"),
    [
        (cut_by(*ATTENTION), L * 2 * D * D + L * (2 * D * FS + FS + D) + 2 * V * D),
        (cut_by(*ATTENTION, *SHARED), L * 2 * D * D + L * (D * FS + FS // 2 + D) + 2 * V * D),
        (cut_by((r"head\.weight", "column")), L * 4 * D * D + L * (2 * D * FS + FS + D) + V * D + V * D // 2),
        (cut_by((r"layers\.1\.attention.*", "row")), L * 3 * D * D + L * (2 * D * FS + FS + D) + 2 * V * D),
        (cut_by((r"embedding.*", "column")), L * 4 * D * D + L * (2 * D * FS + FS + D) + V * D + V * D // 2),
        ({"tensor_parallel": {"autotp_size": 2}}, L * 2 * D * D + L * (2 * D * FS + FS + D) + 2 * V * D),
        ({}, L * 2 * D * D + L * (D * FS + FS // 2 + D) + V * D),
    ],
    ids=["attention", "shared expert too", "head", "one layer", "embedding", "no plan", "mpu"],
)
def test_a_tensor_rank_holds_its_part_of_what_autotp_cuts(keys: dict[str, Any], held: int) -> None:
    model = dataclasses.replace(TINY, shared_expert_width=FS, expert_bias=True)
    moe, config = MoEConfig(num_experts=4, ep_size=2), {"train_micro_batch_size_per_gpu": 1, **keys}
    training = read_training(config | {"zero_optimization": {"stage": 1}}, 2, 4, tensor_ranks=1 if keys else 2)
    rank = count_rank_parameters(model, moe, training.dense_cut)
    assert rank.dense == held + NORMS + GATES
    memory = count_memory(model, moe, training)
    assert memory.weights == 4 * rank.total
    owned = -(-rank.dense // 2) + rank.experts // 2  # two ranks hold the same part, and two the same experts
    assert memory.optimizer == 3 * 4 * owned


def test_ranks_that_share_a_copy_keep_their_part_of_its_activations() -> None:
    moe = MoEConfig(num_experts=4, ep_size=2, top_k=2)
    tensor, sequence = train(2, 4, **cut_by(*ATTENTION)), train(2, 4, sequence_parallel_size=2)
    rows, u, scores, loss = 2 * 6 * (2 * D + 2 * 32) * 4, 6 * D * 4, 3 * 6 * 4 * 4, 6 * V * 16
    assert activation_bytes(TINY, moe, train(2, 4)) == L * (16 * u + rows + scores) + rows + loss
    assert activation_bytes(TINY, moe, tensor) == L * (10.5 * u + rows // 2 + scores) + rows // 2 + loss
    of_mpu = read_training({"train_micro_batch_size_per_gpu": 1}, 2, 4, tensor_ranks=2)
    assert activation_bytes(TINY, moe, of_mpu) == activation_bytes(TINY, moe, tensor) - loss // 2
    half = dataclasses.replace(TINY, sequence_length=3)
    assert activation_bytes(TINY, moe, sequence) == activation_bytes(half, moe, train(2, 4))


def test_tensor_ranks_of_an_mpu_beside_autotp_or_that_do_not_divide_the_world_are_refused() -> None:
    keys = {"train_micro_batch_size_per_gpu": 1}
    with pytest.raises(ConfigError, match=r"tensor_ranks=2 with tensor_parallel\.autotp_size=2"):
        read_training(keys | cut_by(*ATTENTION), 2, 4, tensor_ranks=2)
    with pytest.raises(ConfigError, match="tensor_ranks=3: does not divide the world of 4 ranks"):
        read_training(keys, 2, 4, tensor_ranks=3)
