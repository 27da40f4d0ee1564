"""Optimizer states by parameter: the pieces of them that files hold, and the parts of them that this rank keeps.

1. A parameter's states are vectors: its master weight, and what the optimizer keeps beside it. Files hold pieces of
   them, each at an offset among the parameter's values. An expert is known by its index over all ranks; what stacks a
   rank's experts in one parameter (AutoEP) is one vector over the experts of all ranks.
2. `check_states` finds every part that this rank keeps in the pieces: nothing is changed before it has passed.
3. `take_states` copies each part from the pieces that it overlaps. Files are mapped into memory and read where a part
   lies, so nothing is in memory beside the rank's own states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.errors import EngineError

MASTER = "the master weight"
OF_THE_GROUP = ("params", "name", "moe")  # options of a parameter group that are this run's own
EXPERT_NAME = re.compile(r"(.*\.deepspeed_experts\.)(\d+)\.(.*)")  # of a parameter: its layer, the expert, the rest
_EXPERT = re.compile(r"(\.deepspeed_experts\.)(\d+)\.")


@dataclass(frozen=True)
class StatePiece:
    """Values `offset` on of a parameter's, at `start` of the vectors of a file.

    `state` and `options` are the optimizer's, of what the piece lies in: a cut of a group, or the parameter.
    """

    state: Mapping[str, Any]
    options: Mapping[str, Any]
    master: Tensor | None
    start: int
    num_values: int
    offset: int = 0

    def vector(self, kind: str) -> Tensor | None:
        """All of the vector that the piece is in; None where the file has none of that kind."""
        found = self.master if kind == MASTER else self.state.get(kind)
        return found.detach().flatten() if isinstance(found, Tensor) else None


@dataclass(frozen=True)
class StatePart:
    """The part of a parameter's states that this rank keeps: values `first` on of `total`, at `start` of vectors.

    `vector` is the optimizer's: a cut of a group, or the parameter. `master` is where master weights go, if anywhere.
    """

    name: str
    group: int
    vector: Tensor
    master: Tensor | None
    start: int
    num_values: int
    first: int
    total: int


class SavedPieces:
    """The states of a checkpoint by parameter. `first` has the values that all ranks have alike.

    `groups` and `states` are those of the first rank's optimizer.
    """

    def __init__(
        self,
        folder: Path,
        pieces: Mapping[str, Sequence[StatePiece]],
        first: Mapping[str, Any],
        base: Mapping[str, Any],
    ) -> None:
        self._folder, self._pieces = folder, pieces
        self.first = first
        self.groups: Sequence[Mapping[str, Any]] = base["param_groups"]
        self.states: Mapping[Any, Mapping[str, Any]] = base["state"]

    def of_group(self, name: str) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """The optimizer's state and options of the group that a parameter was in."""
        piece = self._found(name)[0]
        return piece.state, piece.options

    def check(self, name: str, kinds: Iterable[str], total: int) -> None:
        """Raises EngineError where a parameter does not have `total` values of each kind there."""
        pieces = self._found(name)
        for kind in kinds:
            there = 0
            for piece in pieces:
                vector = piece.vector(kind)
                if vector is None or vector.numel() < piece.start + piece.num_values:
                    raise EngineError(
                        f"{self._folder}: {name} lacks values of {kind} there; the file is damaged, or of another "
                        "form: take another copy, or load the weights alone (load_checkpoint(..., "
                        "load_module_only=True))"
                    )
                there += piece.num_values
            self._check_total(name, kind, there, total)

    def _check_total(self, name: str, kind: str, there: int, here: int) -> None:
        if there != here:
            raise EngineError(
                f"{self._folder}: {name} has {there:,} values of {kind} there and {here:,} here; the checkpoint is of "
                "another model"
            )

    def copy(self, name: str, kind: str, first: int, target: Tensor) -> None:
        """Fills `target` with values `first` on of one state of a parameter."""
        stop = first + target.numel()
        for piece in self._found(name):
            start, end = max(first, piece.offset), min(stop, piece.offset + piece.num_values)
            vector = piece.vector(kind)
            if start < end and vector is not None:
                shift = piece.start - piece.offset
                target[start - first : end - first].copy_(vector[start + shift : end + shift])

    def whole(self, name: str, kind: str, num_values: int) -> Tensor:
        """All values of one state of a parameter, flat, in their own type."""
        self.check(name, (kind,), num_values)
        vectors = [(piece, piece.vector(kind)) for piece in self._found(name)]
        return torch.cat([v[p.start : p.start + p.num_values] for p, v in vectors if v is not None])

    def _found(self, name: str) -> Sequence[StatePiece]:
        if name not in self._pieces:
            raise EngineError(
                f"{self._folder}: has no optimizer states of {name}; load the weights alone "
                "(load_checkpoint(..., load_module_only=True)), or give the model that was saved"
            )
        return self._pieces[name]


def check_states(parts: Iterable[StatePart], saved: SavedPieces) -> None:
    """Raises EngineError where something of the parts is not in the checkpoint. Local; changes nothing."""
    for part in parts:
        kinds = [kind for kind, value in saved.of_group(part.name)[0].items() if is_vector(value)]
        saved.check(part.name, kinds if part.master is None else [*kinds, MASTER], part.total)


def take_states(base: Any, parts: Iterable[StatePart], saved: SavedPieces) -> None:
    """Gives the optimizer `base`, which is torch's, the parts of the saved states. Local."""
    filled: dict[Tensor, dict[str, Tensor]] = {}
    groups: set[int] = set()
    for part in parts:
        state, options = saved.of_group(part.name)
        if part.vector not in filled:
            filled[part.vector] = _vectors(base.state[part.vector], part.vector, state)
        if part.group not in groups:
            groups.add(part.group)
            _take_options(base.param_groups[part.group], options)
        targets = list(filled[part.vector].items())
        for kind, target in targets if part.master is None else [*targets, (MASTER, part.master)]:
            flat = target.detach().view(-1)
            saved.copy(part.name, kind, part.first, flat[part.start : part.start + part.num_values])
    for index, group in enumerate(base.param_groups[: len(saved.groups)]):
        if (
            index not in groups
        ):  # the rank's cut of a small group is padding alone; its steps and options are the others'
            _take_options(group, saved.groups[index])
            own = base.state[group["params"][0]]
            common = saved.states.get(index, {}).items() if len(group["params"]) == 1 else ()
            own.update({kind: _own(value) for kind, value in common if not is_vector(value)})


def is_vector(value: Any) -> bool:
    """True for a state with a value for each of the parameter's; False for what is one for all, as torch's step."""
    return isinstance(value, Tensor) and value.dim() > 0


def _vectors(own: dict[str, Any], like: Tensor, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The vectors of this run's optimizer to fill, by kind, in place where it has them; what is one value is copied."""
    before = dict(own)
    own.clear()
    vectors: dict[str, Tensor] = {}
    for kind, value in state.items():
        if is_vector(value):
            is_there = isinstance(before.get(kind), Tensor) and before[kind].shape == like.shape
            # In place: parameters are linked to the vectors that they have.
            own[kind] = before[kind].zero_() if is_there else torch.zeros_like(like, dtype=value.dtype).detach()
            vectors[kind] = own[kind]
        else:
            own[kind] = _own(value)
    return vectors


def _own(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _take_options(own: dict[str, Any], saved: Mapping[str, Any]) -> None:
    own.update({name: value for name, value in saved.items() if name not in OF_THE_GROUP})


def global_name(name: str, ep_rank: int, ep_size: int, num_experts: Mapping[str, int]) -> str:
    """A parameter's name with the global index of its expert; `num_experts` is that of each layer, by its name."""
    match = _EXPERT.search(name)
    if match is None:
        return name
    index = ep_rank * (num_experts_of(name, num_experts) // ep_size) + int(match[2])
    return f"{name[: match.end(1)]}{index}.{name[match.end() :]}"


def num_experts_of(name: str, num_experts: Mapping[str, int]) -> int:
    """The number of experts of the layer that a parameter is in."""
    return next(size for layer, size in num_experts.items() if name.startswith(f"{layer}.") or not layer)
