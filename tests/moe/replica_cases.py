"""Layers with replicas on layer cases: what each rank executes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

from torch import nn

from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.replicas.gradients import Loan
from ds_moe_ep.moe.replicas.replicas import Replicas
from ds_moe_ep.schedule.placement import CopyCosts, Placement
from tests.moe.layer_cases import LayerCase, LayerResult, case_data
from tests.moe.layer_runs import Links, build_layer, config, forward_backward, torus_for

SKEW = 1.5  # of the last expert's logits
ROWS_ALONE = CopyCosts(row_us=1.0)


@dataclass(frozen=True)
class Hosted:
    """A result, and the copies that were in use for it."""

    result: LayerResult
    copies: tuple[tuple[int, int, int], ...]


def hosted_case(name: str, *, rows: Sequence[int] = (24, 9, 0, 31), **knobs: Any) -> LayerCase:
    """A skewed case over ranks that share the experts, with one slot per rank unless said otherwise."""
    case_knobs = {key: knobs.pop(key) for key in ("expert", "dtype", "shared", "masked", "training") if key in knobs}
    size = knobs.pop("ep_size", len(rows))
    layer = config(**{"ep_size": size, "top_k": 2, "replicas": 1, **knobs})
    return LayerCase(name=name, config=layer, rows=tuple(rows), skew=SKEW, **case_knobs)


@dataclass
class Windows:
    """Windows that a test moves on by hand."""

    number: int = 0
    last: bool = True
    micro_batches: int = 1
    is_in_order: bool = True

    def is_last(self, passes: int) -> bool:
        return self.last


def connected(case: LayerCase, links: Links) -> ExpertParallel:
    """The case's layer on its links."""
    layer = build_layer(case, case_data(case))
    layer.connect(links.of(case), torus_for(case))
    return layer


@contextmanager
def forgetting_copies(*, is_here: bool = True) -> Iterator[None]:
    """A scope in which this home takes in no gradients of its experts' copies: the control of those that do."""
    collect = Loan.collect
    with patch.object(Loan, "collect", lambda loan: [None for _ in collect(loan)] if is_here else collect(loan)):
        yield


def replicas_of(layer: ExpertParallel) -> Replicas:
    """The layer's slots."""
    assert layer.dispatcher.replicas is not None
    return layer.dispatcher.replicas


def let_rows_count_alone(model: nn.Module) -> None:
    """Lets copies cost nothing in a model's layers with slots: beside the few rows of a test none would pay."""
    for replicas in slots_of(model):
        replicas.costs = ROWS_ALONE


def slots_of(model: nn.Module) -> Iterator[Replicas]:
    """The slots of a model's own and hooked layers, where they have some."""
    for module in model.modules():
        dispatcher = getattr(getattr(module, "overlap", module), "dispatcher", None)
        if (replicas := getattr(dispatcher, "replicas", None)) is not None:
            yield replicas


def copies_in(model: nn.Module) -> int:
    """Copies of experts that a model's layers have now."""
    return sum(len(replicas.placement.copies) for replicas in slots_of(model))


def pin(layer: ExpertParallel, *guests: tuple[int | None, ...]) -> None:
    """Lets the layer have these guests on each rank, whatever the load."""
    replicas = replicas_of(layer)
    placement = Placement(replicas.link.size, replicas.num_local, len(guests[0]), guests)
    replicas.choose = replicas.choose_anew = lambda rows_E, before: placement


def run_hosted(cases: Sequence[LayerCase]) -> list[tuple[Hosted, LayerResult]]:
    """Each case on this rank with replicas, and without."""
    links, found = Links(), []
    for case in cases:
        layer = connected(case, links)
        let_rows_count_alone(layer)
        if case.config.top_k == case.config.num_experts:  # every expert gets every token: none is hot
            pin(layer, *[(number * 2 % case.config.num_experts,) for number in range(1, 5)])
        result = forward_backward(layer, case, case_data(case))
        hosted = Hosted(result, replicas_of(layer).placement.copies)
        plain_case = replace(case, config=replace(case.config, replicas=0))
        plain = connected(plain_case, links)
        found.append((hosted, forward_backward(plain, plain_case, case_data(case))))
    return found
