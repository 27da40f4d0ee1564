"""Engines in shadow mode, with a transport that flips a value and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_moe_ep.comm.callbacks import TransferCallback, TransferMessage
from tests.verification.engines import FEW, Layout, OwnJob
from tests.verification.layouts import sequence_layout, stages_layout, tensor_layout

SHADOWED = Layout("own, shadow", OwnJob(**FEW, accumulation=2, verify_every=1))
EVERY: dict[str, Any] = {"knobs": {"verify_every": 1, "meter_every": 1}}
# Layouts with a shadow, the layer whose turn it is in their second step, and how often it was checked then.
SHADOWED_LAYOUTS = {
    "tensor ranks": (tensor_layout("tensor", ep_size=4, **EVERY), "layers.1"),
    "tensor ranks, tokens that come cut": (
        tensor_layout(
            "cut", cuts_tokens=True, tokens=8, knobs={"sequence_parallel": True, "verify_every": 1, "meter_every": 1}
        ),
        "layers.1",
    ),
    "sequence ranks": (sequence_layout("sequence", **EVERY), "layers.1"),
    "replicas": (Layout("replicas", OwnJob(**FEW, accumulation=2, replicas=1, verify_every=1)), "layers.1"),
    "stages": (stages_layout("stages", section={"verify_every": 1, "meter_every": 1}), "2.moe"),
}


class FlippedValue(TransferCallback):
    """One number that comes back to a rank from its peer's experts in a layer is another."""

    def __init__(self, layer: str = "layers.1", rank: int = 1) -> None:
        self.is_on, self._layer, self._rank = True, layer, rank

    def after_receive(self, message: TransferMessage, wire: torch.Tensor) -> None:
        is_here = message.layer.endswith(self._layer) and dist.get_rank() == self._rank
        is_back = (message.phase, message.lane) == ("forward", "combine")
        if self.is_on and is_here and is_back and len(message.rows):
            message.rows[0, 0] += 0.5


def take_steps(engine: Any, layout: Layout) -> None:
    for batch in layout.batches():
        output = engine(**batch) if isinstance(batch, dict) else engine(*batch)
        engine.backward(getattr(output, "loss", output))
        engine.step()


def shadowed() -> dict[str, Any]:
    """What two steps with the fault found, two steps without it, and what the meter tells."""
    engine, flip = SHADOWED.make(), FlippedValue()
    for layer in engine.moe_ep_layers.values():
        layer.dispatcher.add_callback(flip)
    take_steps(engine, SHADOWED)
    found = list(engine.moe_ep_shadow.findings)
    flip.is_on = False
    take_steps(engine, SHADOWED)
    rest = engine.moe_ep_shadow.findings[len(found) :]
    told, cost = engine.moe_ep_meter.report(), engine.moe_ep_shadow.last_ms
    return {"found": found, "rest": rest, "meter": told, "ms": cost, "checks": engine.moe_ep_shadow.num_checks}


def shadowed_in(name: str) -> dict[str, Any]:
    """The same of a layout, whose second step, and the fourth, checks the layer with the fault."""
    import ds_moe_ep

    ds_moe_ep.init_distributed()
    layout, at = SHADOWED_LAYOUTS[name]
    engine, flip = layout.make(), FlippedValue(at)
    for layer in engine.moe_ep_layers.values():
        layer.dispatcher.add_callback(flip)
    batches = layout.endless(engine)
    for _ in range(2):
        layout.step(engine, batches)
    found = list(engine.moe_ep_shadow.findings)
    flip.is_on = False
    for _ in range(2):
        layout.step(engine, batches)
    rest = engine.moe_ep_shadow.findings[len(found) :]
    told = engine.moe_ep_meter.report()
    return {"found": found, "rest": rest, "meter": told, "checks": engine.moe_ep_shadow.num_checks}


def all_shadowed() -> dict[str, dict[str, Any]]:
    return {name: shadowed_in(name) for name in SHADOWED_LAYOUTS}


def all_sound(layouts: Sequence[Layout]) -> list[tuple[int, list[Any]]]:
    """How many checks each layout's engine made in as many steps as it has, and what they found."""
    counted = []
    for layout in layouts:
        engine = layout.make()
        take_steps(engine, layout)
        counted.append((engine.moe_ep_shadow.num_checks, engine.moe_ep_shadow.findings))
    return counted
