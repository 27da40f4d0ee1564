"""The small transformer trained in three ways: on one device in float64, by experts over ranks, by shares and stages.

A step has several micro-batches. One device and each pipeline take them one after the other; an
expert-parallel group shares each of them, so that with balance_scope "group" all three see the same auxiliary losses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.parallel.tensor import Share
from tests.parallel.outcomes import WHOLE, Outcome
from tests.parallel.tampering import tampered

NUM_TOKENS = 8
# One step of plain gradient descent by 2^20: a weight's change, divided by it, is its gradient up to rounding.
GRADIENT_STEP = 2.0**20
SGD = {"type": "SGD", "params": {"lr": GRADIENT_STEP}}
# Adam's eps is larger than most gradients here: rounding is not blown up to whole steps.
ADAM = {"type": "Adam", "params": {"lr": 0.03, "eps": 1e-2, "weight_decay": 0.0, "torch_adam": True}}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. `ep_size` counts where experts lie on ranks, `tp_size` and `pp_size` where a pipeline runs.

    `is_staged`: a pipeline's stages share their experts over ep_size ranks.
    """

    world_size: int = 4
    ep_size: int = 4
    tp_size: int = 2
    pp_size: int = 2
    model: dict[str, Any] = field(default_factory=dict, hash=False)
    top_k: int = 1
    num_experts: int = 4
    num_sequences: int = 4  # of a micro-batch
    num_micro_batches: int = 4  # of a step
    stage: int = 0
    bf16: bool = False
    fp16: bool = False
    clipping: float = 0.0
    steps: int = 1  # one step is one of SGD, more are of Adam
    balance_scope: str = "group"
    tampering: str = ""
    is_staged: bool = False

    @property
    def model_config(self) -> ModelConfig:
        knobs = {"hidden_size": 32, "num_heads": 4, "expert_width": 32, "vocab_size": 32, "recompute": False}
        return ModelConfig(sequence_length=NUM_TOKENS, **(knobs | self.model))

    def moe_config(self, ep_size: int = 1) -> MoEConfig:
        knobs = {"aux_loss_weight": 0.5, "z_loss_weight": 0.1, "balance_scope": self.balance_scope, "schedule": "peers"}
        return MoEConfig(num_experts=self.num_experts, top_k=self.top_k, ep_size=ep_size, **knobs)

    def ds_config(self, sequences_of_rank: int, accumulation: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": sequences_of_rank,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": self.clipping,
            "optimizer": SGD if self.steps == 1 else ADAM,
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.bf16},
            "fp16": {"enabled": self.fp16, "initial_scale_power": 8},
            "steps_per_print": 10**9,
        }

    def batches(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Token ids and target ids of each micro-batch of each step."""
        size = (self.steps, self.num_micro_batches, self.num_sequences, NUM_TOKENS + 1)
        texts = torch.randint(self.model_config.vocab_size, size, generator=torch.Generator().manual_seed(5))
        return [[(text[:, :-1], text[:, 1:]) for text in of_step] for of_step in texts]


def on_one_device(run: Run) -> Outcome:
    """The run in one process and float64, by torch alone."""
    import ds_moe_ep
    from ds_moe_ep.model.initialize import init_weights

    model = ds_moe_ep.build_transformer(run.model_config, run.moe_config(), ds_moe_ep.ExpertParallel)
    init_weights(model, seed=1)
    model.double()
    make = torch.optim.SGD if run.steps == 1 else torch.optim.Adam
    optimizer = make(model.parameters(), lr=0.0) if run.steps == 1 else make(model.parameters(), lr=0.03, eps=1e-2)
    losses, cross_entropies, norms = [], [], []
    for micro_batches in run.batches():
        optimizer.zero_grad()
        total = torch.zeros(2, dtype=torch.float64)
        for token_ids, target_ids in micro_batches:
            output = model(token_ids)
            cross_entropy = F.cross_entropy(output.logits_BSV.flatten(0, 1), target_ids.flatten())
            loss = cross_entropy + output.l_aux
            (loss / len(micro_batches)).backward()
            total += torch.stack((loss.detach(), cross_entropy.detach())) / len(micro_batches)
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), run.clipping or float("inf"))))
        optimizer.step()
        losses.append(float(total[0]))
        cross_entropies.append(float(total[1]))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if run.steps == 1}
    return Outcome(losses=losses, cross_entropies=cross_entropies, norms=norms, weights=weights, gradients=gradients)


def by_experts(runs: Sequence[Run]) -> list[Outcome]:
    """Each run with its experts over this world's ranks. Collective."""
    return [run_by_experts(run) for run in runs]


def allow_fp16(run: Run) -> None:
    """Lets DeepSpeed train in fp16 on a CPU, where it is slow and not wrong."""
    if run.fp16:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True


def make_experts(run: Run, seed: int = 1) -> tuple[Any, dict[str, nn.Parameter]]:
    """The run's model in the engine that shares its experts, and its parameters by their names on one device."""
    import deepspeed

    import ds_moe_ep
    from ds_moe_ep.model.initialize import expert_index_of, global_name, init_weights

    deepspeed.utils.logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("gloo")
    allow_fp16(run)
    moe = run.moe_config(run.ep_size)
    index = expert_index_of(dist.get_rank() % run.ep_size, moe.num_local_experts)
    model = ds_moe_ep.build_transformer(run.model_config, moe, ds_moe_ep.MoE)
    init_weights(model, seed, index)
    config = run.ds_config(run.num_sequences // run.ep_size, run.num_micro_batches * run.ep_size // run.world_size)
    engine = ds_moe_ep.initialize(model=model, config=config)[0]
    return engine, {global_name(name, index): parameter for name, parameter in engine.module.named_parameters()}


def run_by_experts(run: Run) -> Outcome:
    engine, named = make_experts(run)
    group_index, place = divmod(dist.get_rank(), run.ep_size)
    num_groups, mine = run.world_size // run.ep_size, run.num_sequences // run.ep_size
    before = copies(named)
    losses, cross_entropies, norms = [], [], []
    for micro_batches in run.batches():
        total = torch.zeros(2)
        for token_ids, target_ids in micro_batches[group_index::num_groups]:
            part = slice(place * mine, (place + 1) * mine)
            output = engine(token_ids[part], target_ids[part])
            engine.backward(output.loss)
            engine.step()
            total += torch.stack((output.loss.detach(), output.cross_entropy)) / engine.gradient_accumulation_steps()
        dist.all_reduce(total)
        losses.append(float(total[0]) / run.world_size)
        cross_entropies.append(float(total[1]) / run.world_size)
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    return finished(run, losses, cross_entropies, norms, before, copies(named))


def by_pipeline(runs: Sequence[Run]) -> list[Outcome]:
    """Each run as pipelines of shares over this world's ranks. Collective."""
    outcomes = []
    for run in runs:
        with tampered(run.tampering):
            outcomes.append(run_by_pipeline(run))
    return outcomes


def make_pipeline(run: Run, seed: int = 1) -> Any:
    """The run's pipeline in its engine. Collective."""
    import deepspeed

    import ds_moe_ep
    from ds_moe_ep.engine.layouts.known_groups import forget_groups

    deepspeed.utils.logger.setLevel(logging.ERROR)
    allow_fp16(run)
    layout = Layout(tp_size=run.tp_size, pp_size=run.pp_size)
    forget_groups()
    ep_size = run.ep_size if run.is_staged else 1
    net = ds_moe_ep.build_pipeline(run.model_config, run.moe_config(ep_size), layout, seed)
    num_copies = run.world_size // layout.size
    num_sharing = max(1, ep_size // layout.tp_size)  # copies that share a micro-batch of the reference, as experts do
    config = run.ds_config(run.num_sequences // num_sharing, run.num_micro_batches * num_sharing // num_copies)
    return deepspeed.initialize(model=net, config=config)[0]


def stage_parameters(engine: Any) -> dict[str, nn.Parameter]:
    """This stage's parameters, or shares of them, by their names on one device."""
    from ds_moe_ep.engine.layer import moe_layers
    from ds_moe_ep.model.initialize import expert_index_of, global_name
    from ds_moe_ep.parallel.stages import name_on_one_device

    index = expert_index_of(0, 0)
    for layer in moe_layers(engine.module).values():
        transport = layer.dispatcher.checked_connection().transport
        index = expert_index_of(transport.rank, layer.num_local_experts)
    return {
        global_name(name_on_one_device(module, name), index): parameter
        for module in engine.module.forward_funcs
        for name, parameter in module.named_parameters()
    }


class ShareOfDense(Share):
    """Part of a model whose experts are whole, and all that lies in their layers."""

    def of(self, value: Tensor, name: str) -> Tensor:
        return value if ".feed_forward." in name else super().of(value, name)


def of_this_copy(engine: Any, micro_batches: Sequence[Any], num_sharing: int = 1) -> Iterator[Any]:
    """The micro-batches that this copy of the model takes: copies take them in turns, or `num_sharing` share each."""
    turn, place = divmod(engine.grid.get_data_parallel_rank(), num_sharing)
    num_turns = engine.grid.get_data_parallel_world_size() // num_sharing
    for token_ids, target_ids in micro_batches[turn::num_turns]:
        yield token_ids.chunk(num_sharing)[place], target_ids.chunk(num_sharing)[place]


def run_by_pipeline(run: Run) -> Outcome:
    engine = make_pipeline(run)
    named = stage_parameters(engine)
    before = copies(named)
    losses, cross_entropies, norms = [], [], []
    for micro_batches in run.batches():
        num_sharing = max(1, run.ep_size // run.tp_size) if run.is_staged else 1
        losses.append(float(engine.train_batch(of_this_copy(engine, micro_batches, num_sharing))))
        cross_entropies.append(float(engine.agg_additional_losses["cross_entropy"]))
        norms.append(float(engine.get_global_grad_norm() or 0.0))
    kind = ShareOfDense if run.is_staged else Share
    share = kind(engine.grid.get_slice_parallel_rank(), run.tp_size)
    return finished(run, losses, cross_entropies, norms, before, copies(named), share)


def copies(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().float().clone() for name, parameter in named.items()}


def finished(
    run: Run,
    losses: list[float],
    cross_entropies: list[float],
    norms: list[float],
    before: dict[str, Tensor],
    weights: dict[str, Tensor],
    share: Share = WHOLE,
) -> Outcome:
    """The outcome, with the gradients that a step of SGD tells."""
    gradients = {name: (before[name].double() - weights[name]) / GRADIENT_STEP for name in before if run.steps == 1}
    return Outcome(
        losses=losses,
        cross_entropies=cross_entropies,
        norms=norms,
        weights=weights,
        gradients=gradients,
        share=share,
    )
