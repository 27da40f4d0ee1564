"""DeepSpeed's AutoEP layer as a candidate: dropless, with blocking all-to-all calls around the experts.

AutoEP replaces a Hugging Face block inside `deepspeed.initialize`. Here its layer is built straight from a block of
Mixtral's shape, so that nothing but DeepSpeed is needed. Against DeepSpeed's native layer it differs in this:

1. Experts are SwiGLU without biases: three matrices, of 2/3 of the case's width (see `inner_width`).
2. There is no auxiliary loss: l_aux is a zero.
3. Rows travel unpadded; each local expert's rows are then padded with zeros to a multiple of 8, at least 8.
4. The gate runs in the tokens' dtype, not always in fp32.
"""

from __future__ import annotations

from dataclasses import replace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_moe_ep.bench.candidates.cases import LayerCase, expert_weights, gate_weight
from ds_moe_ep.engine import seams
from ds_moe_ep.errors import EngineError, TopologyError

ADVICE = f"pip install 'deepspeed>={seams.LATER['AutoEP'].since}'"

try:
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
except ImportError as error:
    raise EngineError(f"deepspeed={deepspeed.__version__}: {error}; {ADVICE}") from error

LAYER_NAMES = ("set_deepspeed_parallelism", "router", "experts", "num_local_experts", "tokens_per_expert")


class AutoEPLayer(nn.Module):
    """AutoEP's layer behind the benchmark's protocol: layer(x_TD) -> (y_TD, l_aux, exp_counts_E)."""

    def __init__(self, autoep: nn.Module) -> None:
        super().__init__()
        self.autoep = autoep

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output, a zero that a loss may contain, and this rank's choices per expert. Collective."""
        counts_E: Tensor = self.autoep.tokens_per_expert  # type: ignore[assignment]
        counts_E.zero_()  # AutoEP adds every call's to it
        y_TD: Tensor = self.autoep(x_TD[None])[0]
        return y_TD, y_TD.new_zeros((), requires_grad=True), counts_E.long()


class OneExpert(nn.Module):
    """An expert of any kind, called as AutoEP calls its GroupedExperts."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.expert = expert

    def forward(self, rows_RD: Tensor, rows_per_expert_L: Tensor) -> Tensor:
        """Rows behind the counted ones are the tail of a buffer: AutoEP computes no product with them either."""
        num_rows = int(rows_per_expert_L[0])  # a sync on a GPU; AutoEP's own loop over experts has it too
        y_RD: Tensor = self.expert(rows_RD[:num_rows])
        return nn.functional.pad(y_RD, (0, 0, 0, len(rows_RD) - num_rows))


def autoep_layer(case: LayerCase, ep_size: int) -> nn.Module:
    """AutoEP's layer over DeepSpeed's expert-parallel groups of `ep_size`, with the case's gate and sizes.

    Collective over the world on first use. The weights of a token's experts are native's: the softmax value for
    top-1 (Mixtral's preset would always make it 1), divided by their sum otherwise. On a GPU experts run as AutoEP's
    default, grouped products; on the CPU as its loop over experts, which takes the same time there, since the default
    calls a Triton kernel on any machine with a GPU.
    Raises TopologyError where the experts cannot be shared, EngineError where DeepSpeed is not as tested.
    """
    if case.num_experts % ep_size:
        raise TopologyError(
            f"case.num_experts={case.num_experts} cannot be shared by ep_size={ep_size}: use a multiple of it"
        )
    group, _ = seams.expert_group(ep_size, data_before_expert=False)
    ep_rank = dist.get_rank(group)
    block = _mixtral_block(case, ep_size, ep_rank)
    try:
        config = AutoEPConfig(comm_backend="comm", use_grouped_mm=get_accelerator().device_name() != "cpu")
        layer = AutoEPMoELayer(_spec(case), block, ep_size=ep_size, ep_rank=ep_rank, config=config)
    except TypeError as error:
        raise EngineError(f"deepspeed={deepspeed.__version__}: {error}; {ADVICE}") from error
    missing = [name for name in LAYER_NAMES if not hasattr(layer, name)]
    if missing:
        raise EngineError(f"deepspeed={deepspeed.__version__}: AutoEPMoELayer has no {', '.join(missing)}; {ADVICE}")
    layer.set_deepspeed_parallelism()
    return AutoEPLayer(layer)


def emulate_experts(layer: nn.Module, expert: nn.Module) -> None:
    """Puts `expert`, rows [n, D] -> rows [n, D], in place of the one local expert of an `autoep_layer`.

    It is called on the rows that AutoEP computes: those that arrive and, behind them, zeros up to the next multiple
    of 8, at least 8. The zeros belong to AutoEP's work: they are added before its experts are called.
    Raises TopologyError where a rank has more than one expert, EngineError for another layer.
    """
    if not isinstance(layer, AutoEPLayer):
        raise EngineError(f"bench.layer={type(layer).__name__}: not AutoEP's; build it with autoep_layer")
    if layer.autoep.num_local_experts != 1:
        raise TopologyError(
            f"bench.local_experts={layer.autoep.num_local_experts}: an emulated expert stands for one per rank; "
            "make num_experts equal to ep_size"
        )
    layer.autoep.experts = OneExpert(expert)


def inner_width(case: LayerCase) -> int:
    """F of the SwiGLU experts: three matrices of 2/3 of the width multiply as much as two of the whole.

    Rounded to a multiple of 8: 680 for 1,024, which is 0.4 % less arithmetic.
    """
    return max(8, round(case.width * 2 / 3 / 8) * 8)


def swiglu_weights(case: LayerCase, expert: int) -> tuple[Tensor, Tensor]:
    """(gate and up projection stacked [2F, D], down projection [D, F]) of an expert, by its global index."""
    width = inner_width(case)
    gate_up = expert_weights(replace(case, width=2 * width), expert).w1_FD
    down = expert_weights(replace(case, width=width), case.num_experts + expert).w2_DF  # other random numbers
    return gate_up, down


def _mixtral_block(case: LayerCase, ep_size: int, ep_rank: int) -> nn.Module:
    """The block that AutoEP reads: `gate.weight`, `experts.gate_up_proj` and `experts.down_proj` of all experts.

    Only this rank's experts are filled in: AutoEP copies no others.
    """
    width, local = inner_width(case), case.num_experts // ep_size
    block = nn.Module()
    block.gate = nn.Linear(case.hidden_size, case.num_experts, bias=False)
    block.experts = nn.Module()
    gate_up_EFD = torch.empty(case.num_experts, 2 * width, case.hidden_size)
    down_EDF = torch.empty(case.num_experts, case.hidden_size, width)
    for expert in range(ep_rank * local, (ep_rank + 1) * local):
        gate_up_EFD[expert], down_EDF[expert] = swiglu_weights(case, expert)
    block.experts.gate_up_proj = nn.Parameter(gate_up_EFD)
    block.experts.down_proj = nn.Parameter(down_EDF)
    with torch.no_grad():
        block.gate.weight.copy_(gate_weight(case))
    return block


def _spec(case: LayerCase) -> MoELayerSpec:
    """The description that AutoEP would have made of `_mixtral_block`."""
    return MoELayerSpec(
        moe_module_name="mlp",
        model_family="mixtral",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=case.num_experts,
        top_k=case.top_k,
        hidden_size=case.hidden_size,
        ffn_hidden_size=inner_width(case),
        score_func="softmax",
        score_apply="post",
        route_norm=case.top_k > 1,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
