"""deepspeed.init_inference connects the package's layers, in every type, and evaluates as a training engine does."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.native_layers import PlainGelu
from tests.moe.layer_cases import D
from tests.ranks import RankPool

TOKENS = 8


class Model(nn.Module):
    def __init__(self, cls: type[nn.Module], **arguments: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = cls(
            D, PlainGelu(bias=True), num_experts=4, use_rts=False, top2_2nd_expert_sampling=False, **arguments
        )
        first = dist.get_rank() % arguments["ep_size"] * self.moe.num_local_experts
        for index, expert in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts, first):
            for parameter in expert.parameters():
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x)[0]


def tokens(dtype: torch.dtype) -> Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(dist.get_rank())).to(dtype)


def inferred(model: nn.Module, dtype: torch.dtype, ep_size: int, inject: bool = False) -> Tensor:
    import deepspeed

    knobs = {"enabled": True, "ep_size": ep_size, "moe_experts": [4]}
    engine = deepspeed.init_inference(model.eval(), dtype=dtype, replace_with_kernel_inject=inject, moe=knobs)
    with torch.no_grad():
        return engine(tokens(dtype))


def wrong_engines() -> list[str]:
    """Faults of each type, gate and group size: against a connected layer, and against DeepSpeed's own."""
    import deepspeed
    from deepspeed.moe.layer import MoE as Native

    import ds_moe_ep

    deepspeed.init_distributed("gloo")
    wrong = []
    for ep_size in (2, 4):
        for dtype in (torch.float32, torch.bfloat16):
            for k, drops in ((1, True), (2, True), (2, False)):
                arguments = {"ep_size": ep_size, "k": k, "drop_tokens": drops, "eval_capacity_factor": 4.0}
                case = f"{arguments} {dtype}"
                mine = inferred(Model(ds_moe_ep.MoE, **arguments), dtype, ep_size)
                connected = Model(ds_moe_ep.MoE, **arguments).to(dtype).eval()
                connected.moe.set_deepspeed_parallelism()
                with torch.no_grad():
                    expected = connected(tokens(dtype))
                wrong += [] if mine.dtype == dtype and torch.equal(mine, expected) else [f"{case}: other results"]
                if ep_size == dist.get_world_size() and drops:  # its own layers know no other group there
                    native = inferred(Model(Native, **arguments), dtype, ep_size)
                    bound = (1e-6 if dtype == torch.float32 else 2**-7) * float(native.abs().max())
                    wrong += [] if float((mine - native).abs().max()) <= bound else [f"{case}: not as DeepSpeed's"]
                if torch.equal(mine, torch.zeros_like(mine)):
                    wrong.append(f"{case}: nothing was computed")
    arguments = {"ep_size": 4, "k": 1, "eval_capacity_factor": 4.0}
    injected = inferred(Model(ds_moe_ep.MoE, **arguments), torch.float32, 4, inject=True)
    plain = inferred(Model(ds_moe_ep.MoE, **arguments), torch.float32, 4)
    return wrong + ([] if torch.equal(injected, plain) else ["kernel injection changes the results"])


def test_init_inference_connects_the_layers(pool: RankPool) -> None:
    assert pool.run(4, wrong_engines, timeout_s=120) == [[]] * 4


def without_the_seam() -> str:
    """The error of a layer that nobody connected: the negative control."""
    import deepspeed
    from deepspeed.inference.engine import InferenceEngine

    import ds_moe_ep

    deepspeed.init_distributed("gloo")
    InferenceEngine._create_ep_parallel_group = InferenceEngine._create_ep_parallel_group.__wrapped__
    try:
        inferred(Model(ds_moe_ep.MoE, ep_size=2), torch.float32, 2)
    except ds_moe_ep.MoEError as error:
        return str(error)
    return ""


def test_a_layer_that_nobody_connects_says_so(pool: RankPool) -> None:
    for error in pool.run(2, without_the_seam):
        assert "no expert-parallel group yet" in error
