"""A step of a layout, TP and PP: the tasks of DeepSpeed's 1F1B schedule, one rank of a stage for all of its ranks.

1. A stage's ranks and all copies of it do the same at the same moment, so a stage stands for them. It does one thing
   after the other: it computes, waits for an all-reduce, waits for a message that the other stage must be ready for.
2. A layer is attention, an all-reduce, the gate and the experts, an all-reduce; backward mirrored, with an all-reduce
   for the gradients of the routing weights; with recompute its forward pass comes again before. Experts that the ranks
   of a stage share (ep_size above 1) have no all-reduce: tensor ranks take a part of the tokens each to them, gather
   the results, partly beside the rows, and backward the gradients of tokens and routing weights (`stage_experts.py`).
3. A stage sends 1/t of a message; where it arrives it is gathered in the tensor group, and where it began both it and
   its gradient are gathered before the backward pass. Parts of unequal size are broadcast one by one.
4. At the end gradients are reduced over the copies, those of experts that are whole over the ranks of the stage that
   hold the same ones, all ranks agree on their norm, each updates its part, and under
   ZeRO-1 the copies exchange the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from ds_moe_ep.config.training import BYTES
from ds_moe_ep.records.names import PARTS
from ds_moe_ep.schedule.events import Phase
from ds_moe_ep.schedule.program import START, Event, Load, Outcome, Program
from ds_moe_ep.schedule.spans import Tags
from ds_moe_ep.simulate.cluster.all_reduce import (
    Group,
    all_reduce_load,
    broadcasts_load,
    gather_load,
    group_of,
    host_load,
    on_host,
    send_us,
)
from ds_moe_ep.simulate.step.costs import LayerCosts
from ds_moe_ep.simulate.step.data_parallel import reduce_load
from ds_moe_ep.simulate.step.pipeline_schedule import Act, forward_order, in_order, training_order
from ds_moe_ep.simulate.step.setup import Setup, Step
from ds_moe_ep.simulate.step.shares import shares_of
from ds_moe_ep.simulate.step.stage_experts import ExpertsPass, StageExperts
from ds_moe_ep.sizing.pipeline import count_stage_parameters, message_numbers

LANES = {  # lane -> part
    "compute": "compute",
    "experts": "experts_traffic",
    "tensor": "tensor_traffic",
    "pipeline": "pipeline",
    "host": "rest",
}
STEP = Tags("step", "step")  # of what a step does once


def pipeline_step(setup: Setup) -> Step:
    """The simulated step of a layout; its spans are of all micro-batches, with a stage for a rank.

    Its parts are the mean stage's: where a stage neither computes nor reduces, it sends or waits for another one.
    """
    setup.training.layout.check(setup.model, setup.moe)
    builder = _Builder(setup)
    outcome = builder.build().run([setup.cluster.host.cores])
    return _step_of(setup, outcome, builder.passes)


def _step_of(setup: Setup, outcome: Outcome, passes: Sequence[ExpertsPass]) -> Step:
    spans, step_us = outcome.spans(), outcome.makespan_us
    parts, busy_us = dict.fromkeys(PARTS, 0.0), 0.0
    for span in spans:
        mean_us = (span.stop_us - span.start_us) / setup.training.layout.pp_size
        part = "gradients" if span.tags.phase == "step" else LANES[span.lane]
        parts[part] += mean_us * (part != "pipeline")
        busy_us += mean_us * (span.lane == "compute")
    parts["pipeline"] = max(step_us - sum(parts.values()), 0.0)
    return Step(
        setup=setup,
        step_us=step_us,
        parts_us=parts,
        traffic_us=sum(each.traffic_us for each in passes) / setup.training.layout.pp_size,
        exposed_us=sum(each.exposed_us for each in passes) / setup.training.layout.pp_size,
        busy_us=busy_us,
        spans=spans,
    )


class _Builder:
    """Puts the ops of all stages together; `at` is what each stage has done last."""

    def __init__(self, setup: Setup) -> None:
        training = setup.training
        self.setup, self.program = setup, Program()
        self.layout, self.cluster = training.layout, setup.cluster
        self.tokens, num_bytes = setup.micro_batch_tokens, BYTES[training.precision]
        self.tokens_bytes = float(self.tokens * setup.model.hidden_size * num_bytes)
        self.message_bytes = float(message_numbers(setup.model, training) * num_bytes)
        self.stage_ranks = training.world_size // self.layout.pp_size
        on_host = self.cluster.computes_on == "host"
        shares = shares_of(training, setup.model)
        self.costs = LayerCosts(setup.model, setup.moe, self.cluster.device, training.precision, shares, on_host)
        self.experts = StageExperts(setup) if setup.moe.ep_size > 1 else None
        self.passes: list[ExpertsPass] = []  # of all stages through experts that a stage's ranks share
        self.tensor_group = group_of(self.cluster, self.layout.tp_size)
        self.at: list[Event] = [START] * self.layout.pp_size

    def build(self) -> Program:
        """All of a step."""
        order = training_order if self.setup.mode == "training" else forward_order
        stages, micro_batches = self.layout.pp_size, self.setup.training.accumulation
        for stage, instruction in in_order([order(stage, stages, micro_batches) for stage in range(stages)]):
            if instruction.act is Act.FORWARD:
                self._forward(stage)
            elif instruction.act is Act.BACKWARD:
                self._backward(stage)
            else:
                to = stage + 1 if instruction.act is Act.SEND_ACTIVATION else stage - 1
                self._send(stage, to, f"{instruction.act.value} {instruction.micro_batch}")
        if self.setup.mode == "training":
            self._finish()
        return self.program

    def _forward(self, stage: int) -> None:
        if stage > 0:
            self._gather(stage, "forward")
        for layer in self._layers(stage):
            self._layer_forward(stage, layer, "forward")
        if stage == self.layout.pp_size - 1:
            self._compute("head and loss", stage, self.costs.head(self.tokens), Tags(phase="forward"))

    def _backward(self, stage: int) -> None:
        if stage == self.layout.pp_size - 1:
            self._compute("head and loss", stage, self.costs.head(self.tokens, backward=True), Tags(phase="backward"))
        else:
            self._gather(stage, "backward")
            self._gather(stage, "backward")
        for layer in reversed(self._layers(stage)):
            if self.setup.model.recompute:
                self._layer_forward(stage, layer, "backward")
            self._layer_backward(stage, layer)

    def _layers(self, stage: int) -> range:
        share = self.setup.model.num_layers // self.layout.pp_size
        return range(stage * share, (stage + 1) * share)

    def _layer_forward(self, stage: int, layer: int, phase: str) -> None:
        costs, tags, tokens = self.costs, Tags(f"layers.{layer}", phase), self.tokens
        self._host(stage, self.cluster.host.forward_us, tags)
        self._compute("attention", stage, costs.attention(tokens), tags)
        self._reduce("attention", stage, self.tokens_bytes, tags)
        if self.experts is not None:
            self._shared_forward(stage, self.experts, tags)
            return
        rows = self.setup.moe.top_k * tokens
        experts_us = costs.experts(rows, self.setup.moe.num_experts) + costs.shared_expert(tokens)
        moved_us = costs.permute(tokens) + costs.unpermute(tokens)
        self._compute("experts", stage, costs.gate(tokens) + moved_us + experts_us, tags)
        self._reduce("experts", stage, self.tokens_bytes, tags)

    def _layer_backward(self, stage: int, layer: int) -> None:
        costs, tags, tokens = self.costs, Tags(f"layers.{layer}", "backward"), self.tokens
        self._host(stage, self.cluster.host.backward_us, tags)
        if self.experts is not None:
            self._experts(stage, self.experts.backward, tags)
            self._layer_gradients(stage, tags)
            return
        rows, num_experts = self.setup.moe.top_k * tokens, self.setup.moe.num_experts
        experts_us = costs.input_grads(rows, num_experts) + costs.weight_grads(rows, num_experts)
        experts_us += costs.shared_expert(tokens, backward=True) + costs.shared_weight_grads(tokens)
        moved_us = costs.permute(tokens, backward=True) + costs.unpermute(tokens, backward=True)
        self._compute("experts", stage, moved_us + experts_us, tags)
        self._reduce("routing weights", stage, 4.0 * rows, tags)
        self._reduce("experts", stage, self.tokens_bytes, tags)
        self._layer_gradients(stage, tags)

    def _layer_gradients(self, stage: int, tags: Tags) -> None:
        """The rest of a layer backward: the gate, and the attention."""
        self._compute("gate", stage, self.costs.gate(self.tokens, backward=True), tags)
        self._compute("attention", stage, self.costs.attention(self.tokens, backward=True), tags)
        self._reduce("attention", stage, self.tokens_bytes, tags)

    def _shared_forward(self, stage: int, experts: StageExperts, tags: Tags) -> None:
        """Experts that the stage's ranks share, forward."""
        before = self.costs.gate(self.tokens) + self.costs.permute(experts.tokens)
        self._compute("gate, permute", stage, before, tags)
        self._experts(stage, experts.forward, tags)

    def _experts(self, stage: int, found: ExpertsPass, tags: Tags) -> None:
        """A pass through the experts, with what a rank does right before and behind it."""
        self.passes.append(found)
        computes_us = found.total_us - found.exposed_us - found.tensor_us
        self._add("experts", stage, "compute", Load((Phase(computes_us),)), tags)
        self._add("rows", stage, "experts", Load((Phase(found.exposed_us),)), tags)
        self._add("gather tokens", stage, "tensor", Load((Phase(found.tensor_us),)), tags)

    def _add(self, name: str, stage: int, lane: str, load: Load, tags: Tags) -> None:
        if load != Load():
            self.at[stage] = self.program.add(name, stage, lane, load, self.at[stage], tags)

    def _compute(self, name: str, stage: int, time_us: float, tags: Tags) -> None:
        is_host = self.cluster.computes_on == "host"
        phase = on_host(time_us, self.stage_ranks) if is_host else Phase(time_us)
        self._add(name, stage, "compute", Load((phase,)), tags)

    def _host(self, stage: int, core_us: float, tags: Tags) -> None:
        if self.cluster.host.cores and core_us:
            self._add("host", stage, "host", Load((on_host(core_us, self.stage_ranks),)), tags)

    def _reduce(self, what: str, stage: int, num_bytes: float, tags: Tags) -> None:
        load = all_reduce_load(self.cluster, self.tensor_group, num_bytes, self.stage_ranks, self.setup.algorithm)
        self._add(f"all-reduce {what}", stage, "tensor", load, tags)

    def _gather(self, stage: int, phase: str) -> None:
        """Makes a message whole in the tensor group."""
        numbers = message_numbers(self.setup.model, self.setup.training)
        gather = gather_load if numbers % self.layout.tp_size == 0 else broadcasts_load
        load = gather(self.cluster, self.tensor_group, self.message_bytes, self.stage_ranks)
        self._add("gather message", stage, "tensor", load, Tags(phase=phase))

    def _send(self, stage: int, to: int, name: str) -> None:
        """A message of all ranks of a stage, for which both sides wait."""
        part_bytes = self.message_bytes / self.layout.tp_size
        senders = range(stage * self.stage_ranks, (stage + 1) * self.stage_ranks)
        wire_us = send_us(self.cluster, part_bytes, senders, (to - stage) * self.stage_ranks)
        load = host_load(self.cluster, wire_us, self.cluster.host.pairwise_us, part_bytes, self.stage_ranks)
        self.at[stage] = self.program.join((self.at[stage], self.at[to]))
        self._add(name, stage, "pipeline", load, Tags(peers=f"stage {to}"))
        self.at[to] = self.at[stage]

    def _finish(self) -> None:
        """Gradients over the copies, their norm over all, the optimizer, weights over the copies."""
        setup, stages = self.setup, range(self.layout.pp_size)
        shares = [self._shares(stage) for stage in stages]
        everyone = group_of(self.cluster, setup.training.world_size)
        for stage in stages:
            for what, group, parameters in shares[stage]:
                gradients = reduce_load(setup, group, parameters, self.stage_ranks)
                self._add(f"reduce gradients{what}", stage, "gradients", gradients, STEP)
        self._meet()
        for stage in stages:
            norm = all_reduce_load(self.cluster, everyone, 4.0, self.stage_ranks, setup.algorithm)
            self._add("norm of gradients", stage, "gradients", norm, STEP)
        self._meet()
        is_cut = setup.training.zero_stage > 0
        for stage in stages:
            partition = sum(parameters / (group.size if is_cut else 1) for _, group, parameters in shares[stage])
            self._compute("optimizer", stage, self.costs.optimizer(setup.training, partition), STEP)
            for what, group, parameters in shares[stage] if is_cut else ():
                weights_bytes = float(parameters * BYTES[setup.training.precision])
                weights = gather_load(self.cluster, group, weights_bytes, self.stage_ranks)
                self._add(f"gather weights{what}", stage, "gradients", weights, STEP)

    def _shares(self, stage: int) -> list[tuple[str, Group, int]]:
        """Parameters of a rank of the stage, with the ranks that hold the same ones."""
        setup, training = self.setup, self.setup.training
        held = count_stage_parameters(setup.model, setup.moe, self.layout, stage)
        copies = group_of(self.cluster, training.num_copies, stride=self.layout.tp_size)
        if self.experts is None:
            return [("", copies, held.total)]
        owners = group_of(self.cluster, training.num_replicas, stride=setup.moe.ep_size)
        return [(", dense", copies, held.dense), (", experts", owners, held.experts)]

    def _meet(self) -> None:
        self.at = [self.program.join(self.at)] * len(self.at)
