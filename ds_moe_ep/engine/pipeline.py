"""The same model under DeepSpeed's pipeline engine, cut by tensor and pipeline parallelism.

With ep_size 1 it is the baseline: each rank has its share of every expert. Above 1 the ranks of a stage share its
experts, which are `MoE` layers of the engine's.

1. The whole model is made without memory, and this rank's share of each matrix is cut from it.
2. This rank's stage gets memory and its first values, which are those of one device.
3. DeepSpeed's PipelineModule makes the groups over pipe x data x model, and the shares are connected to the tensor
   group. In DeepSpeed's grid that is the *slice* group: its "model parallel" group spans the stages as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.errors import EngineError, TopologyError
from ds_moe_ep.model.initialize import expert_index_of, first_value, global_name
from ds_moe_ep.model.transformer import build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.parallel.stages import Block, name_on_one_device, stage_modules
from ds_moe_ep.parallel.tensor import Share, connect, cut


class Pipeline(PipelineModule):
    """This rank's part of the model for `deepspeed.initialize`, whose engine then has `train_batch` and `eval_batch`.

    A micro-batch is (token ids [B, S], target ids [B, S]). The loss is cross-entropy plus routing losses in training,
    where `engine.agg_additional_losses["cross_entropy"]` has its first part, and cross-entropy alone in evaluation.
    """

    def __init__(self, modules: list[nn.Module], layout: Layout) -> None:
        num_copies = dist.get_world_size() // layout.size
        topology = PipeModelDataParallelTopology(num_pp=layout.pp_size, num_mp=layout.tp_size, num_dp=num_copies)
        with redirect_stdout(StringIO()):  # DeepSpeed prints its topology
            super().__init__(modules, topology=topology, loss_fn=self.loss_of, partition_method="type:Block")
        self.layout = layout
        self.cross_entropy = torch.zeros(())

    @property
    def tensor_group(self) -> dist.ProcessGroup:
        """The ranks that share this stage's matrices."""
        group: dist.ProcessGroup = self._grid.get_slice_parallel_group()
        return group

    @property
    def blocks(self) -> list[Block]:
        """The layers of this stage."""
        return [module for module in self.forward_funcs if isinstance(module, Block)]

    def loss_of(self, outputs: tuple[Tensor, Tensor], target_ids_BS: Tensor) -> Tensor:
        """The loss of a micro-batch, in fp32, on the last stage."""
        logits_BSV, routing_losses = outputs
        loss = F.cross_entropy(logits_BSV.float().flatten(0, 1), target_ids_BS.flatten())
        self.cross_entropy = loss.detach()
        return loss + routing_losses if self.training else loss

    def get_additional_losses(self) -> Mapping[str, Tensor]:
        """The losses that the engine averages over micro-batches and tells every stage."""
        return {"cross_entropy": self.cross_entropy}


def build_pipeline(model: ModelConfig, moe: MoEConfig, layout: Layout, seed: int = 0) -> Pipeline:
    """The model cut into `layout`, with the first values that `init_weights(..., seed)` gives one device.

    Collective over the world. Raises ConfigError or TopologyError where the model or the world cannot be cut so.
    """
    layout.check(model, moe)
    seams.init_distributed()
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size % layout.size:
        raise TopologyError(
            f"moe_ep.layout={layout.tp_size}x{layout.pp_size}: the world of {world_size} ranks is no multiple of "
            f"{layout.size}; start {layout.size} processes or change the layout"
        )
    # DeepSpeed numbers ranks by (pipe, data, model).
    share = Share(rank % layout.tp_size, layout.tp_size)
    stage_index = rank // (world_size // layout.pp_size)
    with torch.device("meta"):
        whole = build_transformer(model, moe, MoE if moe.ep_size > 1 else ExpertParallel)
        cut(whole, share)
    stages = stage_modules(whole, layout.pp_size)
    grid = RankGrid(world_size=world_size, ep_size=moe.ep_size, num_stages=layout.pp_size)
    expert_index = expert_index_of(grid.ep_rank(rank), moe.num_local_experts)
    for module in stages[stage_index]:
        module.to_empty(device=get_accelerator().current_device_name())
        init_stage(module, seed, share, model.num_layers, expert_index)
    net = Pipeline([module for stage in stages for module in stage], layout)
    if net.parts != stage_bounds(stages):
        raise EngineError(f"deepspeed divided the modules at {net.parts}, the model at {stage_bounds(stages)}")
    connect(net, net.tensor_group)
    return net


def init_stage(module: nn.Module, seed: int, share: Share, num_layers: int, expert_index: Callable[[int], int]) -> None:
    """Gives the parameters of a stage's module their share of one device's first values. Local."""
    for name, parameter in module.named_parameters():
        shape = share.whole_shape(parameter.shape, name)
        whole_name = global_name(name_on_one_device(module, name), expert_index)
        value = first_value(whole_name, shape, seed, num_layers)
        with torch.no_grad():
            parameter.copy_(share.of(value, name))


def stage_bounds(stages: list[list[nn.Module]]) -> list[int]:
    """Where stages begin in the list of all modules, and its length."""
    bounds = [0]
    for stage in stages:
        bounds.append(bounds[-1] + len(stage))
    return bounds
