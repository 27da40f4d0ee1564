"""Instructions of each stage of a pipeline, in their order: DeepSpeed's 1F1B and its forward passes, as data.

The order is that of TrainSchedule and InferenceSchedule (deepspeed/runtime/pipe/schedule.py; PipeDream-Flush, Megatron,
arXiv 2104.04473, section 2.2.1). Sends and receives block until both sides are there: each stage holds both ends of a
message at the same place in the other's order, which `in_order` relies on. Without communication all m micro-batches
take (m + p - 1)*(forward + backward): a bubble of (p - 1)/(m + p - 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Act(Enum):
    """Instruction of a stage for one micro-batch."""

    FORWARD = "forward"
    BACKWARD = "backward"
    SEND_ACTIVATION = "send activation"
    RECV_ACTIVATION = "recv activation"
    SEND_GRAD = "send grad"
    RECV_GRAD = "recv grad"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One act of one stage."""

    act: Act
    micro_batch: int


RECEIPTS = {Act.SEND_ACTIVATION: (Act.RECV_ACTIVATION, 1), Act.SEND_GRAD: (Act.RECV_GRAD, -1)}  # and by which stage


def training_order(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """The stage's instructions of a training step: it alternates between forward and backward passes."""
    found: list[Instruction] = []
    previous: int | None = None
    for turn in range(2 * (num_micro_batches + num_stages - 1)):
        is_forward = (turn - stage) % 2 == 0
        first = stage if is_forward else 2 * num_stages - 1 - stage  # the turn of the first micro-batch
        index = (turn - first) // 2
        here = index if 0 <= index < num_micro_batches else None
        has_former, has_next = stage > 0, stage < num_stages - 1
        if is_forward and has_former:
            found += _with(Act.SEND_GRAD, previous) + _with(Act.RECV_ACTIVATION, here)
        if not is_forward and has_next:
            found += _with(Act.RECV_GRAD, here) + _with(Act.SEND_ACTIVATION, previous)
        found += _with(Act.FORWARD if is_forward else Act.BACKWARD, here)
        previous = here
    return found


def forward_order(stage: int, num_stages: int, num_micro_batches: int) -> list[Instruction]:
    """The stage's instructions of a pass without gradients; even stages send first, odd ones receive first."""
    found: list[Instruction] = []
    for turn in range(num_micro_batches + num_stages - 1):
        here, former = (i if 0 <= i < num_micro_batches else None for i in (turn - stage, turn - stage - 1))
        send = _with(Act.SEND_ACTIVATION, former if stage < num_stages - 1 else None)
        receive = _with(Act.RECV_ACTIVATION, here if stage > 0 else None)
        found += (receive + send if stage % 2 else send + receive) + _with(Act.FORWARD, here)
    return found


def _with(act: Act, micro_batch: int | None) -> list[Instruction]:
    return [] if micro_batch is None else [Instruction(act, micro_batch)]


def in_order(orders: list[list[Instruction]]) -> Iterator[tuple[int, Instruction]]:
    """(stage, instruction) of all stages, each behind what it needs. A message is one event, told at its sender.

    Raises ValueError where stages wait for each other in a circle.
    """
    next_of = [0] * len(orders)

    def at(stage: int) -> Instruction | None:
        return orders[stage][next_of[stage]] if next_of[stage] < len(orders[stage]) else None

    moved = True
    while moved:
        moved = False
        for stage in range(len(orders)):
            while (instruction := at(stage)) is not None:
                if instruction.act in RECEIPTS:
                    receipt, step = RECEIPTS[instruction.act]
                    if at(stage + step) != Instruction(receipt, instruction.micro_batch):
                        break
                    next_of[stage + step] += 1
                elif instruction.act in (Act.RECV_ACTIVATION, Act.RECV_GRAD):
                    break
                next_of[stage] += 1
                moved = True
                yield stage, instruction
    if any(at(stage) is not None for stage in range(len(orders))):
        raise ValueError(f"pipeline: stages wait for each other in a circle, at {[at(s) for s in range(len(orders))]}")
