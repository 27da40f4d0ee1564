"""Engines in shadow mode, with a transport that flips a value and without."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_moe_ep.comm.callbacks import TransferCallback, TransferMessage
from tests.verification.engines import FEW, Layout, OwnJob

SHADOWED = Layout("own, shadow", OwnJob(**FEW, accumulation=2, verify_every=1))


class FlippedValue(TransferCallback):
    """One number that comes back to rank 1 from its peer's experts in the second layer is another."""

    is_on = True

    def after_receive(self, message: TransferMessage, wire: torch.Tensor) -> None:
        here = (message.layer, message.phase, message.lane, dist.get_rank())
        if self.is_on and here == ("layers.1", "forward", "combine", 1) and len(message.rows):
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


def all_sound(layouts: Sequence[Layout]) -> list[tuple[int, list[Any]]]:
    """How many checks each layout's engine made in as many steps as it has, and what they found."""
    counted = []
    for layout in layouts:
        engine = layout.make()
        take_steps(engine, layout)
        counted.append((engine.moe_ep_shadow.num_checks, engine.moe_ep_shadow.findings))
    return counted
