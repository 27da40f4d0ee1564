"""Ranks that share a layer's dense part: the widths and tokens of each, and what travels between them.

u = T*D*b bytes of one tensor of a group's tokens, t tensor ranks, s sequence ranks; volumes are of one rank.

    attention cut by t       an all-reduce of u behind it, and one of its input's gradient (Megatron, AutoTP alike)
    shared expert cut by t   the same
    head cut by t            an mpu: an all-reduce of u behind the embedding, one of the gradient before the head, and
                             three of 4*T bytes in the loss; AutoTP: the logits are gathered, T*V*b
    whole experts            each rank takes T/t tokens to them; u of the results is gathered, backward u of the tokens'
                             gradients, both behind the combines that complete them, and 4*k*T of the routing weights'
    Ulysses                  T are a rank's own tokens: (s - 1)/s of q, k and v each leave it before the scores, and
                             of the heads' output behind them; the same backward
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ds_moe_ep.config.knobs import ModelConfig
from ds_moe_ep.config.parallel_keys import CUT_EXPERTS_RULE, DenseCut
from ds_moe_ep.config.training import WHOLE, Training
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.schedule.build import Op, OpKind, Schedule
from ds_moe_ep.schedule.events import Phase
from ds_moe_ep.schedule.program import Event, Load, Program
from ds_moe_ep.schedule.spans import LANES, NEAR_LANES, Span, Tags, length, union, without
from ds_moe_ep.simulate.cluster.all_reduce import SEGMENTS, Group, all_reduce_us, group_of
from ds_moe_ep.simulate.cluster.machine import Machine, Volume
from ds_moe_ep.simulate.step.setup import Algorithm

TENSOR, SEQUENCE = "tensor", "sequence"  # lanes
SHARED_PARTS = {"tensor_traffic": TENSOR, "sequence_traffic": SEQUENCE}  # of a step, with their lanes
INDEX_BYTES = 8  # of a token's place, by which ranks tell each other whose results come early
LAYER = "layers.0."
EXPERTS = ("feed_forward.deepspeed_moe.experts.deepspeed_experts.0.", "feed_forward.deepspeed_moe.gate.wg.")


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Ranks that share the columns of a part; 1 where each rank has all of them."""

    attention: int = 1
    experts: int = 1
    shared_expert: int = 1
    head: int = 1  # and the embedding, of an mpu
    loss: int = 1  # over parts of the logits
    tokens: int = 1  # tensor ranks of which each takes its part of the tokens to whole experts
    sequences: int = 1  # that share sequences, and in the scores heads

    @classmethod
    def of_all(cls, size: int) -> Shares:
        """Every width cut, as the baseline has it."""
        return cls(attention=size, experts=size, shared_expert=size)

    @property
    def adds_apart(self) -> bool:
        """True where residual and shared expert are added behind a collective, not where results are summed."""
        return self.experts > 1 or self.tokens > 1


WHOLE_WIDTHS = Shares()


def shares_of(training: Training, model: ModelConfig) -> Shares:
    """The ranks that share the dense part of a job, by its layout or its ds_config."""
    if training.layout != WHOLE:
        size = training.layout.tp_size
        return Shares.of_all(size) if training.ep_size == 1 else Shares(attention=size, tokens=size)
    cut = training.dense_cut
    if cut.size == 1:
        return Shares(sequences=training.sequence_ranks)
    head = cut.shares("head.weight")
    return Shares(
        attention=cut.shares(f"{LAYER}attention.qkv.weight"),
        shared_expert=max((cut.shares(LAYER + name) for name in _shared_names(model)), default=1),
        head=head,
        loss=head if cut.source == "mpu" else 1,
        tokens=cut.size,
        sequences=training.sequence_ranks,
    )


def check_shares(training: Training, model: ModelConfig, *, sequence_parallel: bool | None) -> None:
    """Raises ConfigError for ranks that share sequences in a way that is not simulated."""
    cut, sequences = training.dense_cut, training.sequence_ranks
    if training.sharing_ranks == 1:
        return
    if cut.size > 1 and sequences > 1:
        raise ConfigError(
            f"sequence_parallel_size={sequences} with {cut.size} tensor ranks: no mpu of DeepSpeed's has both; set one "
            "to 1"
        )
    if training.layout != WHOLE:
        raise ConfigError(
            f"moe_ep.layout with {training.sharing_ranks} ranks that share sequences "
            "(tensor_parallel.autotp_size, sequence_parallel_size): a layout has tensor ranks of its own; leave one out"
        )
    if sequences > 1 and model.num_heads % sequences:
        raise ConfigError(
            f"sequence_parallel_size={sequences}: does not divide moe_ep.model.num_heads={model.num_heads}, and heads "
            "shared unequally are not simulated; take a size that does"
        )
    if cut.size > 1:
        _check_cut(cut, model, sequence_parallel)


def _check_cut(cut: DenseCut, model: ModelConfig, sequence_parallel: bool | None) -> None:
    """Raises ConfigError for a cut of the dense part that is not simulated."""
    if sequence_parallel:
        raise ConfigError(
            f"moe_ep.sequence_parallel=true with {cut.size} tensor ranks: tokens that come cut are not simulated; "
            "remove it to have whole tokens foretold"
        )
    path = "tensor_parallel.partition_config"
    layers = [f"layers.{index}." for index in range(model.num_layers)]
    matrices = ("fc1", "fc2") if model.expert_matrices == 2 else ("gate", "up", "down")
    whole = [f"{EXPERTS[0]}{name}.weight" for name in matrices] + [f"{EXPERTS[1]}weight"]
    if cut_ones := [layer + name for layer in layers for name in whole if cut.shares(layer + name) > 1]:
        raise ConfigError(f"{path} cuts {cut_ones[0]}: {CUT_EXPERTS_RULE}")
    if cut.source != "mpu" and cut.shares("embedding.weight") > 1:
        raise ConfigError(f"{path} cuts the embedding: its collectives are not simulated; leave it whole")
    for part, names, width in (
        ("attention", ("attention.qkv.weight", "attention.out.weight"), ("num_heads", model.num_heads)),
        ("the shared expert", _shared_names(model), ("shared_expert_width", model.shared_expert_width)),
        ("the head", ("head.weight",), ("vocab_size", model.vocab_size)),
    ):
        of_layers: Iterable[str] = [""] if part == "the head" else layers
        found = {cut.shares(layer + name) for layer in of_layers for name in names}
        if len(found) > 1:
            raise ConfigError(
                f"{path} cuts some matrices of {part} and not all of them, in each layer: it is simulated whole or cut "
                "in columns and rows; name all"
            )
        if found == {cut.size} and width[1] % cut.size:
            raise ConfigError(
                f"{cut.size} tensor ranks: do not divide moe_ep.model.{width[0]}={width[1]}, and unequal parts are not "
                "simulated; take a size that does"
            )


def _shared_names(model: ModelConfig) -> Sequence[str]:
    """The matrices of a layer's shared expert, by the package's names."""
    if not model.shared_expert_width:
        return ()
    names = ("fc1", "fc2") if model.expert_matrices == 2 else ("gate", "up", "down")
    return [f"feed_forward.deepspeed_moe.shared.{name}.weight" for name in names]


@dataclass(frozen=True)
class Collectives:
    """Collectives of a layer's tensor or sequence groups, ranks side by side, as ops of the ranks that are simulated.

    They share the links with the rows that travel meanwhile.
    """

    machine: Machine
    shares: Shares
    algorithm: Algorithm = "auto"

    @property
    def group(self) -> Group:
        """The tensor group, or that of sequence ranks."""
        return group_of(self.machine.cluster, max(self.shares.tokens, self.shares.sequences, self.shares.attention))

    def all_reduce(self, program: Program, what: str, num_bytes: float, start: Event, tags: Tags) -> Event:
        """The sum of u bytes per rank; nothing runs beside it."""
        group = self.group
        wire_us = all_reduce_us(self.machine.cluster, group, num_bytes, self.algorithm)
        load = self._load((Phase(wire_us),), group, 2 * num_bytes * (group.size - 1) / group.size, rounds=2)
        return program.join(
            program.add(f"all-reduce {what}", actor, TENSOR, load, start, tags) for actor in self._actors
        )

    def gather(self, program: Program, what: str, num_bytes: float, start: Event, tags: Tags) -> Event:
        """The tokens of all tensor ranks, u bytes in all, behind `start`."""
        return program.join(each[1] for each in self.gathers(program, what, num_bytes, [start], tags))

    def gathers(
        self, program: Program, what: str, num_bytes: float, starts: Sequence[Event], tags: Tags
    ) -> list[tuple[Event, Event]]:
        """The same behind the start of each simulated rank, or one of all: when its lane is free, and its end."""
        found = []
        for actor in self._actors:
            mates = starts if len(starts) == 1 else self._mates(starts, actor)
            load, after = self._gather_load(actor, num_bytes), program.join(mates)
            found.append(program.add_apart(f"gather {what}", actor, TENSOR, load, after, tags))
        return found

    def exchange(self, program: Program, what: str, num_bytes: float, start: Event, tags: Tags) -> Event:
        """An all-to-all of u bytes per sequence rank, its own part among them."""
        group = self.group
        near, far = group.node_size - 1, group.size - group.node_size
        near_bytes, far_bytes = (num_bytes * peers / group.size for peers in (near, far))
        volume = Volume(near_bytes, near_bytes, far_bytes, far_bytes, near, far, is_joint=True)
        return program.join(
            program.add(f"all-to-all {what}", actor, SEQUENCE, self.machine.transfer(actor, volume), start, tags)
            for actor in self._actors
        )

    @property
    def _actors(self) -> range:
        return range(self.machine.num_actors)

    def _mates(self, of_actors: Sequence[Event], actor: int) -> Sequence[Event]:
        first = actor - actor % self.shares.tokens
        return of_actors[first : first + self.shares.tokens]

    def _gather_load(self, actor: int, num_bytes: float) -> Load:
        """A ring over the group: (t - 1)/t*u bytes past each rank, t - 1 hops of latency behind them."""
        group, ways, far = self.group, self.machine.ways[actor], self.machine.cluster.far
        uses = [(ways.near_out, 1.0)] if math.isfinite(group.near) else []
        if math.isfinite(group.far):  # what a rank has of its node's links, over what the ring gets of them
            uses.append((ways.far_out, far.rate / far.shared_by * self.machine.share / group.far))
        passed = num_bytes * (group.size - 1) / group.size
        hops_us = group.hops_us(group.size - 1, group.num_nodes - 1)
        wire = (Phase(passed, math.inf, tuple(uses)),) if uses else ()
        return self._load(wire, group, passed, rounds=1, delay_us=hops_us)

    def _load(
        self, wire: tuple[Phase, ...], group: Group, num_bytes: float, *, rounds: int, delay_us: float = 0.0
    ) -> Load:
        """First the host's messages, then the wire beside what its bytes cost the host."""
        host = self.machine.cluster.host
        messages_us = rounds * (group.size - 1) * SEGMENTS * host.collective_us
        first, beside = self.machine.host(host.transfer_us + messages_us), self.machine.host(host.byte_us * num_bytes)
        chains = tuple(chain for chain in (wire, beside) if chain)
        return Load(first, chains, delay_us) if first or chains or delay_us else Load()


def early_shares(schedule: Schedule, top_k: int) -> tuple[float, ...]:
    """The share of all tokens whose last row comes back with each combine, where choices fall evenly: they sum to 1.

    Of S equal pieces (1 - 1/S)^k come before the last one. The order is that of the combines.
    """
    pieces = [schedule.pieces[op.piece] for op in schedule.ops if op.kind is OpKind.COMBINE]
    back = accumulate((len(piece.offsets) / piece.num_cuts / schedule.torus.size for piece in pieces), initial=0.0)
    return tuple(stop**top_k - start**top_k for start, stop in pairwise(back))


class EarlyTokens:
    """Tokens of one way through the experts that tensor ranks gather while others come back, as the layer does.

    `behind` is called with each op's end: what a combine completes is gathered, but of the last one where the way
    `ends_behind` the pass. Where numbers are told, ranks first tell each other which tokens each combine completes.
    """

    def __init__(
        self,
        to: tuple[Program, Collectives],
        shares: Sequence[float],
        num_bytes: float,
        start: Event,
        tags: Tags,
        *,
        num_told: int = 0,
        ends_behind: bool = True,
    ) -> None:
        self._program, self._collectives = to
        self._shares, self._bytes, self._tags = shares, num_bytes, tags
        self._free: list[Event] = [start] * self._collectives.machine.num_actors
        if num_told:
            told = self._collectives.gathers(self._program, "places", float(num_told * INDEX_BYTES), [start], tags)
            self._free = [done for _, done in told]
        self._places = len(shares) - ends_behind  # that are gathered in the midst of the pass
        self._place = 0
        self._ends: list[Event] = []
        self._done: list[Event] = []

    def behind(self, op: Op, actor: int, end: Event) -> None:
        """Gathers what a combine completes, once all simulated ranks are told of."""
        if op.kind is not OpKind.COMBINE or self._place == self._places:
            return
        self._ends.append(self._program.join([end, self._free[actor]]))
        if len(self._ends) == len(self._free):
            self._gather("early tokens", self._ends)
            self._ends = []

    def arrived(self, end: Event) -> Event:
        """The end of all gathers; what is left begins at `end`."""
        if self._place < len(self._shares):
            self._gather("results", [self._program.join([end, free]) for free in self._free])
        return self._program.join(self._done)

    def _gather(self, what: str, starts: Sequence[Event]) -> None:
        num_bytes = self._shares[self._place] * self._bytes
        found = self._collectives.gathers(self._program, what, num_bytes, starts, self._tags)
        self._free, self._place = [free for free, _ in found], self._place + 1
        self._done += [done for _, done in found]


def shared_parts(spans: Sequence[Span]) -> dict[str, float]:
    """Time of each kind of collective, of one rank, that nothing hides, by part of a step."""
    return {part: exposed_us(spans, lane) for part, lane in SHARED_PARTS.items()}


def exposed_us(spans: Sequence[Span], lane: str) -> float:
    """Time of a lane's collectives, of one rank, in which neither it computes nor rows of experts travel."""
    covers = [(span.start_us, span.stop_us) for span in spans if span.lane in (*LANES, *NEAR_LANES)]
    return length(without(union([(s.start_us, s.stop_us) for s in spans if s.lane == lane]), union(covers)))
