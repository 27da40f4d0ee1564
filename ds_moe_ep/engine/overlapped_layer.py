"""Interface of a layer for an engine's extensions (meter, choices, reports), whether it is made here or hooked."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.balance import BatchLoad, StepsBias
from ds_moe_ep.moe.dispatcher import Dispatcher
from ds_moe_ep.moe.tuner import Choice


class OverlappedLayer(Protocol):
    """A layer whose experts' traffic the package moves."""

    @property
    def kind(self) -> str:
        """The origin of the layer: its own class, or that of DeepSpeed which is hooked."""

    @property
    def ep_size(self) -> int:
        """Ranks that share its experts."""

    @property
    def config(self) -> MoEConfig:
        """Its knobs as they are in force."""

    @property
    def choice(self) -> Choice | None:
        """The schedule that 'auto' chose, the same on every rank; None before the first pass of training."""

    @property
    def dispatcher(self) -> Dispatcher:
        """The dispatcher that moves its rows."""

    @property
    def balance(self) -> StepsBias | None:
        """Its balancing bias, where it has one that the package moves."""

    @property
    def batch_load(self) -> BatchLoad | None:
        """Its load of the batch so far, where the package computes its losses."""

    @property
    def last_counts_E(self) -> Tensor:
        """This rank's choices per expert in the last forward pass."""


class OwnLayer(OverlappedLayer, Protocol):
    """Interface of a layer made here, which takes its knobs from the section of an engine that is being made."""

    def configure(self, config: MoEConfig, path: str = "moe_ep") -> None:
        """Puts knobs in force. Raises ConfigError in the name of `path` where the layer was made with other ones."""

    def fingerprint(self) -> str:
        """Digest of what all ranks that share its experts must have alike."""
