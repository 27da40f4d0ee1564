"""What `check-config` says a tensor rank of AutoTP's holds is what the engine's ranks hold; and the model runs so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from ds_moe_ep.check.config import check_config
from tests.engine.layouts.tensor_models import mpu_of
from tests.ranks import RankPool

MODEL = {
    "num_layers": 2, "hidden_size": 16, "num_heads": 4, "expert_width": 8, "vocab_size": 32, "sequence_length": 8,
    "shared_expert_width": 12, "expert_bias": True,
}  # fmt: skip
ATTENTION = ((r".*attention\.qkv\.weight$", "column"), (r".*attention\.out\.weight$", "row"))
SHARED = ((r".*shared\.fc1\.weight$", "column"), (r".*shared\.fc2\.weight$", "row"))
PLANS = {"attention": ATTENTION, "the shared expert too": ATTENTION + SHARED}
NAMES = [(name, stage) for name in PLANS for stage in (0, 1)]
Held = tuple[int, int, float]  # parameters, those whose optimizer states it has, loss


def ds_config(plan: Sequence[tuple[str, str]], stage: int) -> dict[str, Any]:
    specs = [{"patterns": [pattern], "partition_type": how} for pattern, how in plan]
    cut = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        **({"train_batch_size": 4} if plan else {}),  # DeepSpeed counts AutoTP's ranks as copies
        "optimizer": {"type": "Adam", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 5000},
        "moe_ep": {"num_experts": 4, "ep_size": 2, "top_k": 2, "schedule": "peers", "model": MODEL},
        "steps_per_print": 10**9,
        **({"tensor_parallel": cut} if plan else {}),
    }


def held(config: dict[str, Any]) -> Held:
    import ds_moe_ep
    from ds_moe_ep.config.section import read_section
    from ds_moe_ep.engine.layouts.known_groups import forget_groups
    from ds_moe_ep.model.initialize import expert_index_of, init_weights

    ds_moe_ep.init_distributed()
    section = read_section(config)
    model = ds_moe_ep.build_transformer(section.model, section.moe, ds_moe_ep.MoE)
    init_weights(model, 1, expert_index_of(torch.distributed.get_rank() % 2, 2))
    engine = ds_moe_ep.initialize(model=model, config=config)[0]
    ids = torch.randint(32, (1, 8), generator=torch.Generator().manual_seed(2))
    loss = engine(ids, ids).loss
    engine.backward(loss)
    engine.step()
    numbers = [parameter.numel() for parameter in engine.module.parameters()]
    owned = getattr(engine.optimizer, "single_partition_of_fp32_groups", [])
    forget_groups()
    return sum(numbers), sum(part.numel() for part in owned), float(loss.detach())


def cut_as_megatron(model: Any, rank: int) -> None:
    """This rank's half of each matrix, which then bears Megatron's mark."""

    def halve(owner: Any, name: str, dimension: int) -> None:
        part = nn.Parameter(getattr(owner, name).detach().chunk(2, dimension)[rank % 2].clone())
        part.tensor_model_parallel = True
        setattr(owner, name, part)

    halve(model.embedding, "weight", 0)
    halve(model.head, "weight", 0)
    for layer in model.layers:
        halve(layer.attention.qkv, "weight", 0)
        halve(layer.attention.out, "weight", 1)
        shared = layer.feed_forward.deepspeed_moe.shared
        for name in ("weight", "bias"):
            halve(shared.fc1, name, 0)
        halve(shared.fc2, "weight", 1)


def held_beside_mpu(config: dict[str, Any]) -> tuple[int, int]:
    """Parameters of this rank, and those whose optimizer states it has; nothing is computed with these halves."""
    import ds_moe_ep
    from ds_moe_ep.config.section import read_section
    from ds_moe_ep.engine.layouts.known_groups import forget_groups

    ds_moe_ep.init_distributed()
    section = read_section(config)
    model = ds_moe_ep.build_transformer(section.model, section.moe, ds_moe_ep.MoE)
    cut_as_megatron(model, torch.distributed.get_rank())
    engine = ds_moe_ep.initialize(model=model, config=config, mpu=mpu_of(2))[0]
    owned = sum(part.numel() for part in engine.optimizer.single_partition_of_fp32_groups)
    forget_groups()
    return sum(parameter.numel() for parameter in engine.module.parameters()), owned


def all_held(configs: Sequence[dict[str, Any]]) -> list[Held]:
    return [held(config) for config in configs]


def everything_held(configs: Sequence[dict[str, Any]]) -> tuple[list[Held], tuple[int, int]]:
    return all_held(configs), held_beside_mpu(ds_config((), 1))


@pytest.mark.slow
def test_an_engines_tensor_ranks_hold_what_check_config_says_and_have_the_loss_of_one_rank(pool: RankPool) -> None:
    configs = [ds_config(PLANS[name], stage) for name, stage in NAMES]
    of_mpu = check_config(ds_config((), 1), 4, tensor_ranks=2).to_dict()["details"]
    for found, (numbers_of_mpu, owned_of_mpu) in pool.run(
        4, everything_held, [*configs, ds_config((), 0)], timeout_s=200
    ):
        assert numbers_of_mpu == of_mpu["rank_parameters"]["total"]
        assert owned_of_mpu - of_mpu["memory"]["optimizer"] // 12 in range(8)
        *cut, (_, _, loss) = found
        for (name, stage), config, (numbers, owned, cut_loss) in zip(NAMES, configs, cut, strict=True):
            details = check_config(config, world_size=4).to_dict()["details"]
            assert numbers == details["rank_parameters"]["total"], name
            if stage:  # fp32 weights, and Adam's two states of each; ZeRO pads a group to equal parts
                assert owned - details["memory"]["optimizer"] // 12 in range(8), (name, owned)
            assert cut_loss == pytest.approx(loss, rel=1e-6)
