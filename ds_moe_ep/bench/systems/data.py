"""Where the sequences of a step come from, the same for every system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ds_moe_ep.bench.candidates.even import even_windows
from ds_moe_ep.bench.systems.plan import SystemsPlan
from ds_moe_ep.model.text import Batch, load_corpus, training_batch


class Data(Protocol):
    """Sequences by step and number."""

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Token ids and targets [count, S] of the sequences `first` and following."""


@dataclass(frozen=True)
class Text:
    """Sequences of real text: the standard library's sources."""

    plan: SystemsPlan
    text: Tensor

    def batch(self, step: int, first: int, count: int) -> Batch:
        size = (count, self.plan.model.sequence_length)
        return training_batch(
            self.text, size, seed=self.plan.seed, step=step, first=first, num_sequences=self.plan.num_sequences
        )


@dataclass(frozen=True)
class EvenText:
    """Sequences whose tokens route evenly; the same in every step."""

    windows: Tensor

    def batch(self, step: int, first: int, count: int) -> Batch:
        here = self.windows[first : first + count]
        return here[:, :-1].contiguous(), here[:, 1:].contiguous()


def make_data(plan: SystemsPlan) -> Data:
    """The data of a run: text for real devices, evenly routed tokens for emulated ones."""
    if not plan.is_emulated:
        return Text(plan, load_corpus().train)
    model = plan.model
    return EvenText(even_windows(plan.num_sequences, model.sequence_length, model.vocab_size, plan.seed))
