"""A training step of an expert-parallel job on a cluster.

    micro-batch   per layer: attention, gate, exchange of counts, rows out and experts and results back, then the head;
                  backward in reverse, with each layer's forward pass again where it is recomputed
    step          micro-batches one after the other, then gradients (dense ones over all ranks, experts' over those that
                  hold the same), the optimizer, and under ZeRO the updated weights to all ranks
    shared        tokens, of tensor or sequence ranks (shares.py): collectives around attention, a shared expert and the
                  head that are cut; each takes its part of the tokens to the experts, and results are gathered, those
                  that are complete under the combines that are left
    copies        of experts: their weights leave as the first micro-batch begins, and each layer's rows wait for its
                  own; their gradient sums leave as the layer's last backward pass ends

Nothing of one micro-batch runs beside another's, so one of them is simulated and counts for all. Where there are copies
one more is, that both sends weights and returns gradient sums: the first and the last of a step in one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ds_moe_ep.config.topology import Torus, torus_of
from ds_moe_ep.config.training import BYTES
from ds_moe_ep.kernels.traffic import LARGE_PRODUCT
from ds_moe_ep.schedule.build import Schedule
from ds_moe_ep.schedule.program import NOBODY, START, Event, Load, Program
from ds_moe_ep.schedule.spans import LANES, NEAR_LANES, Span, Tags, length, overlap, union
from ds_moe_ep.simulate.cluster.machine import Machine, Volume, machine_for_group, machine_for_one
from ds_moe_ep.simulate.step.copies import CopyTraffic
from ds_moe_ep.simulate.step.costs import LayerCosts
from ds_moe_ep.simulate.step.data_parallel import finish_step
from ds_moe_ep.simulate.step.moe_pass import ExpertTimes, LayerPass, Rows, WorkShare
from ds_moe_ep.simulate.step.setup import Setup, Step
from ds_moe_ep.simulate.step.shares import Collectives, EarlyTokens, Shares, early_shares, shared_parts, shares_of
from ds_moe_ep.sizing.footprint import SUM_BYTES

COUNT_BYTES = 8  # of one expert's count in the exchange before rows are posted


@dataclass(frozen=True)
class EpJob:
    """The job of a Setup, as what its parts take and who is simulated."""

    setup: Setup

    @cached_property
    def torus(self) -> Torus:
        """The ranks of one expert group, of that with the fewest on a node where groups lie on nodes differently."""
        size, node_size = self.setup.moe.ep_size, self.setup.cluster.node_size
        starts = range(0, min(math.lcm(size, node_size), self.setup.training.world_size), size)
        return max((torus_of(range(i, i + size), node_size) for i in starts), key=lambda torus: torus.num_nodes)

    @cached_property
    def costs(self) -> LayerCosts:
        """Times of the parts of the model."""
        setup = self.setup
        on_host = setup.cluster.computes_on == "host"
        precision = setup.training.precision
        return LayerCosts(setup.model, setup.moe, setup.cluster.device, precision, self.shares, on_host)

    @cached_property
    def shares(self) -> Shares:
        """Ranks that share the dense part."""
        return shares_of(self.setup.training, self.setup.model)

    @cached_property
    def collectives(self) -> Collectives:
        """Collectives of those ranks."""
        return Collectives(self.machine, self.shares, self.setup.algorithm)

    @property
    def tokens(self) -> int:
        """Tokens that a rank takes to the experts in a micro-batch: its part of a tensor group's."""
        return -(-self.setup.micro_batch_tokens // self.shares.tokens)

    @property
    def tokens_bytes(self) -> float:
        """Bytes of one tensor of a rank's, or a tensor group's, tokens."""
        return float(
            self.setup.micro_batch_tokens * self.setup.model.hidden_size * BYTES[self.setup.training.precision]
        )

    @cached_property
    def rows(self) -> Rows:
        """Rows of one exchange in a micro-batch."""
        return Rows(self.torus, float(self.tokens * self.setup.moe.top_k), self.setup.loads)

    @cached_property
    def machine(self) -> Machine:
        """The resources of the ranks that are simulated."""
        cluster = self.setup.cluster
        if len(self.rows.ranks) > 1:
            return machine_for_group(cluster, self.torus)
        return machine_for_one(cluster, self.rows.far_share(cluster.far.shared_by))

    @property
    def num_local(self) -> int:
        """Experts of a rank, with the copies of others' that it hosts."""
        placement = self.setup.placement
        return self.setup.moe.num_local_experts + (0 if placement is None else placement.slots)

    @cached_property
    def layer(self) -> LayerPass:
        """The experts' part of a layer; `rows` of its times fall evenly on the rank's experts."""
        setup = self.setup
        times = ExpertTimes(self._experts, self._input_grads, self._weight_grads)
        row_bytes = setup.model.hidden_size * BYTES[setup.training.precision]
        return LayerPass(setup.moe, self.machine, self.rows, row_bytes, times, self.num_local)

    @cached_property
    def copies(self) -> CopyTraffic | None:
        """Weights and gradient sums of the experts' copies in a layer; None where there are none."""
        setup = self.setup
        if setup.placement is None or setup.mode == "forward" or not setup.placement.copies:
            return None
        weight_bytes = float(setup.model.expert_params * BYTES[setup.training.precision])
        gradient_bytes = float(setup.model.expert_params * SUM_BYTES)
        return CopyTraffic(setup.placement, self.torus, self.machine, weight_bytes, gradient_bytes)

    @cached_property
    def is_grouped(self) -> bool:
        """True where one product serves all experts of a rank, as moe/grouped/choice.py has it for weights in a row."""
        moe, schedule = self.setup.moe, self.layer.schedules[1]
        if self.num_local == 1 or moe.grouped_products == "off" or schedule.is_bit_equal:
            return False
        if len(schedule.blocks) > 1 or moe.grouped_products == "on":
            return len(schedule.blocks) == 1
        is_one_kernel = self.setup.training.precision == "bf16" or moe.capacity_factor is not None
        runs = len(schedule.pieces) * self.num_local
        numbers = self.rows.received(self.rows.ranks[0]) * self.setup.model.expert_width / runs
        is_large = len(schedule.pieces) > 1 and numbers > LARGE_PRODUCT
        return self.setup.cluster.computes_on == "device" and is_one_kernel and not is_large

    def _experts(self, share: WorkShare) -> float:
        """A piece forward: rows into the order of experts and out of it, products, the shared expert's tokens."""
        own_us = self.costs.shared_expert(self._beside(share))
        return self._moves(share) + self.costs.experts(share.rows, share.num_runs, is_grouped=self.is_grouped) + own_us

    def _input_grads(self, share: WorkShare) -> float:
        """A piece backward, without weight gradients."""
        own_us = self.costs.shared_expert(self._beside(share), backward=True)
        products_us = self.costs.input_grads(share.rows, share.num_runs, is_grouped=self.is_grouped)
        return self._moves(share) + products_us + own_us

    def _weight_grads(self, share: WorkShare) -> float:
        """A block of weight gradients; where there are several they are summed in fp32 and cast behind the last."""
        costs, schedule = self.costs, self.layer.schedules[1]
        is_only = len(schedule.blocks) == 1
        found_us = costs.weight_grads(
            share.rows,
            share.num_runs,
            is_only=is_only,
            is_grouped=self.is_grouped,
            num_pieces=len(schedule.pieces),
        )
        if self._beside(share):
            found_us += costs.shared_weight_grads(self._beside(share))
        if share.is_last and not is_only:
            found_us += costs.cast_weight_grads(self.num_local)
        return found_us

    def _beside(self, share: WorkShare) -> float:
        """Tokens of the shared expert beside a piece; that of tensor ranks, which has all of theirs, comes behind."""
        return share.tokens * self.tokens if self.shares.tokens == 1 else 0.0

    def _moves(self, share: WorkShare) -> float:
        """Copies between the order of messages and that of experts; none with one expert per rank, or no peers."""
        return self.costs.moves(share.rows) if self.num_local > 1 and self.setup.moe.ep_size > 1 else 0.0

    def _own_rows(self, schedule: Schedule) -> float:
        """Copies of the rows that stay on the rank."""
        if self.setup.moe.ep_size == 1:
            return 0.0
        pieces = sum((0, 0) in piece.offsets for piece in schedule.pieces)
        return self.costs.own_rows(self.rows.to(0), pieces)

    def forward(self, program: Program, start: Event, name: str, ready: Event = START) -> Event:
        """One layer forward; its rows wait for `ready`."""
        tags, tokens = Tags(name, "forward"), self.setup.micro_batch_tokens
        event = self._attention(program, self.costs.attention(tokens), start, tags)
        before = self.costs.gate(tokens) + self.costs.permute(self.tokens)
        event = self._compute(program, "gate, permute", before, event, tags)
        event = self.host(program, self.setup.cluster.host.forward_us, event, tags)
        return self.through_experts(program, event, name, ready)

    def backward(self, program: Program, start: Event, name: str) -> Event:
        """One layer backward."""
        tags, tokens = Tags(name, "backward"), self.setup.micro_batch_tokens
        event = self.back_to_results(program, start, tags)
        event = self.host(program, self.setup.cluster.host.backward_us, event, tags)
        event = self.back_through_experts(program, event, name)
        event = self._compute(program, "gate", self.costs.gate(tokens, backward=True), event, tags)
        return self._attention(program, self.costs.attention(tokens, backward=True), event, tags)

    def through_experts(self, program: Program, start: Event, name: str, ready: Event = START) -> Event:
        """A layer's experts forward: counts, rows out and results back, sums, and what tensor ranks gather."""
        costs, tags, schedule = self.costs, Tags(name, "forward"), self.layer.schedules[0]
        event = program.join([self.counts(program, start, tags), ready])
        early = self._early(program, event, tags)
        event = self.layer.forward(program, event, name, early.behind if early else NOBODY)
        after = costs.unpermute(self.tokens) + self._own_rows(schedule)
        event = self._compute(program, "unpermute", after, event, tags)
        if self.shares.tokens == 1:
            return event
        if early:
            arrived = early.arrived(event)
        else:
            arrived = self.collectives.gather(program, "results", self.tokens_bytes, event, tags)
        shared_us = costs.shared_expert(self.setup.micro_batch_tokens)
        event = program.join([arrived, self._compute(program, "shared expert", shared_us, event, tags)])
        placed_us = costs.spend("results of tensor ranks", (), 2 * self.tokens_bytes, 1) if early else 0.0
        event = self._compute(program, "results", placed_us, event, tags)
        return self._reduced(program, "shared expert", self.shares.shared_expert, event, tags)

    def _early(self, program: Program, start: Event, tags: Tags) -> EarlyTokens | None:
        """The gather that runs beside the combines of a pass, one way; None where there is none."""
        tensor, top_k, is_forward = self.shares.tokens, self.setup.moe.top_k, tags.phase == "forward"
        forward, backward = self.layer.schedules
        shares = early_shares(forward if is_forward else backward, top_k)
        is_one_piece = len(early_shares(forward, top_k)) < 2
        if tensor == 1 or is_one_piece or forward.gathers or self.setup.moe.ep_size % tensor:
            return None
        ways = 2 if self.setup.mode == "training" else 1  # whose orders are told at once, in front of the first
        told = ways * tensor * (self.tokens + len(shares)) if is_forward else 0
        to = (program, self.collectives)
        return EarlyTokens(to, shares, self.tokens_bytes, start, tags, num_told=told, ends_behind=is_forward)

    def back_to_results(self, program: Program, start: Event, tags: Tags) -> Event:
        """Backward, from a layer's output to the rows' results; the shared expert of tensor ranks, too."""
        costs, tokens, event = self.costs, self.setup.micro_batch_tokens, start
        if self.shares.tokens > 1 and self.setup.model.shared_expert_width:
            shared_us = costs.shared_expert(tokens, backward=True) + costs.shared_weight_grads(tokens)
            event = self._compute(program, "shared expert", shared_us, event, tags)
            event = self._reduced(program, "shared expert", self.shares.shared_expert, event, tags)
        return self._compute(program, "unpermute", costs.unpermute(self.tokens, backward=True), event, tags)

    def back_through_experts(self, program: Program, start: Event, name: str) -> Event:
        """The rows' gradients out, the experts backward, gradients back, and what tensor ranks gather of them."""
        tags = Tags(name, "backward")
        early = self._early(program, start, tags)
        event = self.layer.backward(program, start, name, early.behind if early else NOBODY)
        after = self.costs.permute(self.tokens, backward=True) + self._own_rows(self.layer.schedules[1])
        event = self._compute(program, "permute", after, event, tags)
        if self.shares.tokens == 1:
            return event
        event = program.join([event, early.arrived(event)]) if early else event
        weights_bytes = 4.0 * self.setup.moe.top_k * self.setup.micro_batch_tokens
        event = self.collectives.gather(program, "routing weights", weights_bytes, event, tags)
        if early:
            return event
        return self.collectives.gather(program, "gradients", self.tokens_bytes, event, tags)

    def _attention(self, program: Program, time_us: float, start: Event, tags: Tags) -> Event:
        """An attention's compute, one way, and its collectives: an all-reduce, or the all-to-alls of sequence ranks."""
        event = self._compute(program, "attention", time_us, start, tags)
        event = self._reduced(program, "attention", self.shares.attention, event, tags)
        if self.shares.sequences == 1:
            return event
        shape, num_bytes = self.setup.model.attention, BYTES[self.setup.training.precision]
        widths = {"q": shape.key_width, "k": shape.key_width, "v": shape.value_width, "heads": shape.value_width}
        for what, width in widths.items():
            sent = float(self.setup.micro_batch_tokens * width * num_bytes)
            event = self.collectives.exchange(program, what, sent, event, tags)
        return event

    def _reduced(self, program: Program, what: str, ranks: int, start: Event, tags: Tags) -> Event:
        """The tokens' sum over the tensor group behind a part that so many ranks share."""
        if ranks == 1:
            return start
        return self.collectives.all_reduce(program, what, self.tokens_bytes, start, tags)

    def _head(self, program: Program, start: Event, phase: str) -> Event:
        """Embedding, head and loss, one way, with the collectives of those that are cut."""
        tokens, shares, tags = self.setup.micro_batch_tokens, self.shares, Tags("head", phase)
        event, is_forward = start, phase == "forward"
        if is_forward:
            event = self._reduced(program, "embedding", shares.loss, event, tags)
        event = self._compute(program, "head", self.costs.head(tokens, backward=not is_forward), event, tags)
        if not is_forward:
            return self._reduced(program, "head", shares.head, event, tags)
        for what in ("maxima", "chosen", "sums") if shares.loss > 1 else ():
            event = self.collectives.all_reduce(program, f"loss: {what}", 4.0 * tokens, event, tags)
        if shares.head > 1 and shares.loss == 1:
            logits_bytes = float(tokens * self.setup.model.vocab_size * BYTES[self.setup.training.precision])
            event = self.collectives.gather(program, "logits", logits_bytes, event, tags)
        return event

    def micro_batch(self, copies: CopyTraffic | None = None) -> Program:
        """The whole model on one micro-batch, with that of copies: forward, and backward where the job trains."""
        setup, program, event = self.setup, Program(), START
        names = [f"layers.{index}" for index in range(setup.model.num_layers)]
        ready = copies.send_weights(program, names) if copies else {}
        for name in names:
            event = self.forward(program, event, name, ready.get(name, START))
        event = self._head(program, event, "forward")
        if setup.mode == "forward":
            return program
        event = self._head(program, event, "backward")
        for name in reversed(names):
            if setup.model.recompute:
                event = self.forward(program, event, name)
            event = self.backward(program, event, name)
            if copies:
                copies.send_gradients(program, event, name)
        return program

    def copies_us(self, micro_us: float) -> float:
        """Time that copies add to a step whose micro-batches take `micro_us` each: of transfers that nothing hides."""
        if self.copies is None:
            return 0.0
        return self.micro_batch(self.copies).run(self.machine.capacities).makespan_us - micro_us

    def _compute(self, program: Program, name: str, time_us: float, start: Event, tags: Tags) -> Event:
        """The same work on every rank that is simulated."""
        if not time_us:
            return start
        load = Load((self.machine.compute(time_us),))
        return program.join([program.add(name, rank, "compute", load, start, tags) for rank in self._actors])

    def host(self, program: Program, core_us: float, start: Event, tags: Tags) -> Event:
        """Core time of a layer on the host, beside rows and experts."""
        phases = self.machine.host(core_us)
        if not phases:
            return start
        return program.join([program.add("host", rank, "host", Load(phases), start, tags) for rank in self._actors])

    def counts(self, program: Program, start: Event, tags: Tags) -> Event:
        """The small exchange of counts before rows are posted, and the sync that brings sizes to the host."""
        near, far = self.torus.node_size - 1, (self.torus.num_nodes - 1) * self.torus.node_size
        num_bytes = COUNT_BYTES * self.setup.moe.num_local_experts
        volume = Volume(
            near_out=near * num_bytes,
            near_in=near * num_bytes,
            far_out=far * num_bytes,
            far_in=far * num_bytes,
            near_messages=near,
            far_messages=far,
            is_joint=True,
        )
        events = [
            program.add("counts", rank, "counts", self.machine.transfer(rank, volume), start, tags)
            for rank in self._actors
        ]
        sync = Load((self.machine.compute(self.setup.cluster.device.sync_us),))
        return program.add("sizes", 0, "counts", sync, program.join(events), tags)

    @property
    def _actors(self) -> range:
        return range(self.machine.num_actors)


def ep_step(setup: Setup) -> Step:
    """One step of the job: its time, its parts and its spans."""
    job = EpJob(setup)
    outcome = job.micro_batch().run(job.machine.capacities)
    spans, times, micro_us = outcome.spans(), setup.training.accumulation, outcome.makespan_us
    mine = _busiest(spans)
    traffic = overlap(span for span in mine if span.lane in (*LANES, *NEAR_LANES))
    compute_us = times * _length(mine, "compute")
    end = finish_step(setup, job.costs) if setup.mode == "training" else Program().run()
    copies_us = job.copies_us(micro_us) if setup.mode == "training" else 0.0
    step_us = times * micro_us + copies_us + end.makespan_us
    parts = {
        "compute": compute_us,
        "experts_traffic": times * traffic.exposed_us,
        **{part: times * us for part, us in shared_parts(mine).items() if us},
        "gradients": end.makespan_us + copies_us,
    }
    return Step(
        setup=setup,
        step_us=step_us,
        parts_us={**parts, "rest": max(step_us - sum(parts.values()), 0.0)},
        traffic_us=times * traffic.total_us,
        exposed_us=times * traffic.exposed_us,
        busy_us=compute_us + _length(end.spans(), "compute"),
        spans=[*spans, *(_later(span, micro_us) for span in end.spans())],
    )


def _busiest(spans: Sequence[Span]) -> list[Span]:
    """The spans of the rank that computes longest: others wait for it."""
    compute: dict[int, float] = {}
    for span in spans:
        compute[span.rank] = compute.get(span.rank, 0.0) + (span.stop_us - span.start_us) * (span.lane == "compute")
    busiest = max(compute, key=lambda rank: compute[rank], default=0)
    return [span for span in spans if span.rank == busiest]


def _length(spans: Sequence[Span], lane: str) -> float:
    """Microseconds in which something of these spans is on the lane."""
    return length(union([(span.start_us, span.stop_us) for span in spans if span.lane == lane]))


def _later(span: Span, by_us: float) -> Span:
    return replace(span, start_us=span.start_us + by_us, stop_us=span.stop_us + by_us)
