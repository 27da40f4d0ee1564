"""DeepSpeed's layers with and without the hooks, on the same data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.native_layers import first_of_equals, native_layer, run_layer
from tests.engine.small_model import Job, batches, make_engine, named_weights, train_steps
from tests.moe.layer_cases import LayerCase, LayerResult

KNOBS: tuple[dict[str, Any], ...] = (
    {"schedule": "peers", "node_size": 2, "row_cuts": 2},
    {"schedule": "chunks", "chunks": 3},
    {"schedule": "serial", "transport": "collective"},
    {"schedule": "auto", "node_size": 1},
    {"schedule": "peers", "node_size": 1, "depth": 1, "transport": "pairwise"},
)


@contextmanager
def hooked(model: nn.Module, **knobs: Any) -> Iterator[Any]:
    """The handle of a model's hooks, which end with the scope. Collective."""
    import ds_moe_ep

    with ds_moe_ep.attach_overlap(model, knobs) as handle:
        yield handle


def run_hooked_and_plain(table: Sequence[LayerCase], **arguments: object) -> list[tuple[LayerResult, LayerResult]]:
    """Each case through DeepSpeed's layer, hooked with one of KNOBS in turn, and as it is, on this rank.

    With several experts per token the last of KNOBS sends copies, and has them summed, in turn.
    """
    import deepspeed

    deepspeed.init_distributed("gloo")
    results = []
    for index, case in enumerate(table):
        with first_of_equals():
            plain = run_layer(native_layer(case, **arguments), case)
            layer = native_layer(case, **arguments)
            knobs = KNOBS[index % len(KNOBS)]
            if knobs is KNOBS[-1] and case.config.top_k > 1:
                knobs = {**knobs, "two_level": ("copies", "sums")[index // len(KNOBS) % 2]}
            with hooked(layer, **knobs):
                mine = run_layer(layer, case)
        results.append((mine, plain))
    return results


def train_hooked(job: Job, knobs: dict[str, Any] | None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and last weights of a job with DeepSpeed's layer on this rank; None for no hooks."""
    engine = make_engine(job)
    if knobs is None:
        return train_steps(engine, job, batches(job)), named_weights(engine.module, job)
    with hooked(engine, **knobs):
        losses = train_steps(engine, job, batches(job))
    return losses, named_weights(engine.module, job)


def train_all(jobs: Sequence[tuple[Job, dict[str, Any] | None]]) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [train_hooked(job, knobs) for job, knobs in jobs]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that hooks could change: classes, attributes and tensors of each module."""
    state: dict[str, Any] = {key: value.clone() for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        state[f"{name} class"] = type(module).__qualname__
        state[f"{name} attributes"] = sorted(vars(module))
        state[f"{name} hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
    for name, parameter in model.named_parameters():
        state[f"{name} marks"] = (getattr(parameter, "allreduce", None), getattr(parameter, "group_name", None))
    return state


def same_state(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Keys that differ."""
    if mine.keys() != theirs.keys():
        return sorted(mine.keys() ^ theirs.keys())

    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return [key for key in mine if not equal(mine[key], theirs[key])]


def rank() -> int:
    return dist.get_rank()
