"""What `"schedule": "auto"` chose: told in the log and kept in checkpoints, so that a run repeats itself."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.tuner import Choice

KEY = "moe_ep_schedules"  # in the checkpoint's client state


class ChoiceLog:
    """Says each choice once, on rank 0."""

    def __init__(self, layers: Mapping[str, OverlappedLayer]) -> None:
        self._layers = layers
        self._said: dict[str, Choice] = {}

    def tell(self) -> None:
        """Says what was chosen since the last call. Local."""
        for name, layer in self._layers.items():
            choice = layer.choice
            if choice is not None and self._said.get(name) is not choice:
                self._said[name] = choice
                seams.log_rank0(f"{name}: schedule chosen: {choice}")


def keep_choices(engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
    """Wraps the engine's save_checkpoint and load_checkpoint so that choices travel in the client state.

    A choice is taken only by a layer whose schedule is 'auto', on the torus that it was made for; a layer without one
    measures in its first pass of training.
    """
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(
        save_dir: str, tag: Any = None, client_state: Mapping[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        made = choices_of(layers)
        state = {**(client_state or {}), **({KEY: made} if made else {})}
        return save(save_dir, tag, state, *args, **kwargs)

    @functools.wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, state = load(*args, **kwargs)
        if state:
            take_choices(layers, state.pop(KEY, {}), str(path))
        return path, state

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def choices_of(layers: Mapping[str, OverlappedLayer]) -> dict[str, Any]:
    """The choices as plain values, by layer; layers without one are left out."""
    made = {name: (layer, layer.choice) for name, layer in layers.items()}
    return {
        name: {"torus": torus_of_layer(layer), "choice": choice.to_dict()}
        for name, (layer, choice) in made.items()
        if choice is not None
    }


def take_choices(layers: Mapping[str, OverlappedLayer], saved: Mapping[str, Any], path: str) -> None:
    """Gives the layers what `choices_of` gave. Raises ConfigError where it is something else."""
    if not isinstance(saved, Mapping):
        raise ConfigError(f"{path}: {KEY}={saved!r}: expected a choice a layer; leave it out of the client state")
    for name, entry in saved.items():
        layer = layers.get(name)
        if not isinstance(entry, Mapping) or not {"torus", "choice"} <= set(entry):
            raise ConfigError(f"{path}: {KEY}.{name}={entry!r}: expected a torus and a choice; leave it out")
        if layer is not None and layer.config.schedule == "auto" and torus_of_layer(layer) == entry["torus"]:
            layer.dispatcher.take_choice(Choice.from_dict(entry["choice"], f"{path}: {KEY}.{name}"))


def torus_of_layer(layer: OverlappedLayer) -> list[int]:
    """Nodes, and ranks of a node, of the layer's expert group, as JSON has them."""
    torus = layer.dispatcher.torus
    return [torus.num_nodes, torus.node_size]
