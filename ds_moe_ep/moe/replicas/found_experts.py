"""Experts by their weights, as copies of them need them."""

from __future__ import annotations

from typing import Literal

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.experts import KnownExperts, LocalExperts


def detached(known: KnownExperts) -> KnownExperts:
    """The same memory without a graph."""
    weights = [{name: None if w is None else w.detach() for name, w in named.items()} for named in known.weights]
    return KnownExperts(known.form, weights)


def known_or_refused(experts: LocalExperts, slots: int | Literal["auto"], layer: str) -> KnownExperts:
    """The experts by their weights. Raises ConfigError where their mathematics is unknown."""
    known = experts.known()
    if known is None:
        raise ConfigError(
            f"moe_ep.replicas={slots!r}: the experts of {layer or 'the layer'} are none whose weights are all that "
            "they compute with (Linear-GELU-Linear, or SwiGLU, of plain Linears), so that no other rank can compute "
            "for them; set it to 0"
        )
    return KnownExperts(*known)
