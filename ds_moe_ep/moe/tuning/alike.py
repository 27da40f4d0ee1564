"""Layers that are alike share one measurement of their schedule.

1. Layers are alike where all is the same that a schedule's time depends on: knobs, ranks and their places, kinds,
   shapes and types of modules and parameters. Each rank says which layers are alike for it, in a collective behind the
   measurement; those of which every rank says so take the choice over. So no two ranks can differ.
2. What is measured in a layer's first pass goes to those that have no choice yet. What is measured because the link has
   changed goes to all of them.
3. The rows of the layer that measured are what each of them compares its own with. One whose rows are others (by
   `retune_drift`, as ever) measures for itself, for no other, and goes its own way from then on.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from itertools import islice
from typing import Protocol
from weakref import WeakKeyDictionary, ref

from torch import nn

from ds_moe_ep.comm.callbacks import WithCallbacks
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.moe.tuner import Choice
from ds_moe_ep.moe.tuning.retuning import Agree, Retuning
from ds_moe_ep.moe.two_level.connection import Connection

MOST_LAYERS = 255  # that a measurement may serve; its collective has as many numbers in every layer


class TunedLayer(Protocol):
    """A layer's dispatcher, as those that are alike see it."""

    @property
    def retuning(self) -> Retuning: ...

    @property
    def config(self) -> MoEConfig: ...

    @property
    def torus(self) -> Torus: ...

    @property
    def connection(self) -> Connection | None: ...

    @property
    def choice(self) -> Choice | None: ...

    def take_choice(self, choice: Choice) -> None: ...


class AlikeLayers:
    """The layers of one model, in its order, of which those alike share their choices. The same on every rank.

    It keeps none of them alive: a layer that is gone has given back its groups and lanes.
    """

    def __init__(self, layers: Mapping[TunedLayer, nn.Module]) -> None:
        self._layers = WeakKeyDictionary({layer: ref(module) for layer, module in islice(layers.items(), MOST_LAYERS)})
        for layer in self._layers:
            layer.retuning.alike = self

    def part(self) -> None:
        """Lets each layer measure for itself from now on. Local, alike on every rank."""
        for layer in self._layers:
            layer.retuning.alike = None

    def hand_out(self, source: TunedLayer, choice: Choice, agree: Agree, is_first: bool, is_of_rows: bool) -> None:
        """Gives the choice that `source` has just measured to the layers alike. Collective, behind the measurement.

        `is_first`: the layer had no choice before. `is_of_rows`: this rank's rows had drifted.
        """
        kind = self._kind(source)

        def takes(layer: TunedLayer) -> bool:
            is_free = layer.choice is None if is_first else not layer.retuning.is_apart
            return layer is not source and is_free and self._kind(layer) == kind

        serves = kind is not None and not source.retuning.is_apart
        said = [serves and takes(layer) for layer in self._layers]
        is_for_all, *agreed = agree([not is_of_rows, *said, *[False] * (MOST_LAYERS - len(said))])
        source.retuning.is_apart |= not is_for_all
        for layer, is_agreed in zip(self._layers, agreed, strict=False):
            if is_agreed and is_for_all:
                layer.take_choice(choice)
                layer.retuning.restart(True, source.retuning)

    def _module_of(self, layer: TunedLayer) -> nn.Module | None:
        module = self._layers.get(layer)
        return None if module is None else module()

    def _kind(self, layer: TunedLayer) -> Hashable:
        """All that the time of a layer's schedules depends on, but for its rows; None where no other's choice serves.

        Copies of experts are priced by what their own layer has measured, and callbacks may take any time.
        """
        connection, config, module = layer.connection, layer.config, self._module_of(layer)
        if connection is None or module is None or config.schedule != "auto" or config.replicas:
            return None
        if isinstance(connection.transport, WithCallbacks):
            return None
        modules = tuple((name, type(each)) for name, each in module.named_modules())
        parameters = tuple(
            (name, each.shape, each.dtype, each.device, each.requires_grad) for name, each in module.named_parameters()
        )
        return config, layer.torus, tuple(connection.transport.ranks), modules, parameters, module.training
