"""Choices of `"schedule": "auto"`: shared by layers alike, told in the log and kept in checkpoints.

So layers alike measure once, and a resumed run repeats itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.convert.read import load_file
from ds_moe_ep.engine.checkpoint.load import MAIN_FILE, folder_to_load
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall, SaveCall, StepCall
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.moe.tuner import Choice
from ds_moe_ep.moe.tuning.alike import AlikeLayers

KEY = "moe_ep_schedules"  # in the checkpoint's client state
OTHERS = "others"  # of a layer there: choices of the expert groups beside that of the rank that wrote the file


class ChoiceKeeper(EngineCallback):
    """Lets layers alike share a choice, logs each once, on rank 0, and takes those of a checkpoint.

    A choice is taken only by a layer whose schedule is 'auto', on the torus that it was made for: that of its own
    expert group where the same ranks are one again, else that of the first group. A layer without one measures in its
    first pass of training.
    """

    def __init__(self, layers: Mapping[str, OverlappedLayer], model: nn.Module) -> None:
        self._layers = layers
        self._logged: dict[str, Choice] = {}
        modules = dict(model.named_modules())
        self._alike = AlikeLayers(
            {layer.dispatcher: modules[name] for name, layer in layers.items() if name in modules}
        )

    def close(self) -> None:
        self._alike.part()

    def after_step(self, step: StepCall) -> None:
        new: dict[int, list[str]] = {}  # by choice, of which layers alike have the same one
        for name, layer in self._layers.items() if step.is_applied else ():
            choice = layer.choice
            if choice is not None and self._logged.get(name) is not choice:
                self._logged[name] = choice
                new.setdefault(id(choice), []).append(name)
        for first, *others in new.values():
            also = f" and {len(others)} layers alike" if others else ""
            seams.log_rank0(f"{first}{also}: schedule chosen: {self._logged[first]}")

    def before_load(self, load: LoadCall) -> None:
        folder = folder_to_load(Path(load.load_dir), load.tag)
        if folder is not None and (folder / MAIN_FILE).is_file():
            try:
                saved = load_file(folder / MAIN_FILE)
            except EngineError:
                return  # told by those that look at files
            choices_in(self._layers, saved.get(KEY, {}) if isinstance(saved, Mapping) else {}, str(folder))

    def around_load(self, load: LoadCall, proceed: Callable[[LoadCall], Any]) -> Any:
        path, state = proceed(load)
        if state:
            take_choices(self._layers, state.pop(KEY, {}), str(path))
        return path, state


class SavedChoices(EngineCallback):
    """Puts the choices into the client state of a checkpoint."""

    def __init__(self, layers: Mapping[str, OverlappedLayer]) -> None:
        self._layers = layers

    def around_save(self, save: SaveCall, proceed: Callable[[SaveCall], Any]) -> Any:
        if not any(layer.config.schedule == "auto" for layer in self._layers.values()):
            return proceed(save)
        made = of_all_groups(choices_of(self._layers))
        state = {**(save.client_state or {}), **({KEY: made} if made else {})}
        return proceed(replace(save, client_state=state))


def choices_of(layers: Mapping[str, OverlappedLayer]) -> dict[str, Any]:
    """The choices as plain values, by layer; layers without one are left out."""
    made = {name: (layer, layer.choice) for name, layer in layers.items()}
    return {
        name: {"torus": torus_of_layer(layer), "ranks": ranks_of_layer(layer), "choice": choice.to_dict()}
        for name, (layer, choice) in made.items()
        if choice is not None
    }


def of_all_groups(made: dict[str, Any]) -> dict[str, Any]:
    """This rank's choices, each with those of the layer's other expert groups. Collective over the world."""
    told = seams.gather(made)
    found: dict[str, Any] = {}
    for name, entry in made.items():
        by_group = {tuple(theirs[name]["ranks"]): theirs[name] for theirs in told if name in theirs}
        by_group.pop(tuple(entry["ranks"]))
        found[name] = {**entry, OTHERS: list(by_group.values())}
    return found


def take_choices(layers: Mapping[str, OverlappedLayer], saved: Mapping[str, Any], path: str) -> None:
    """Gives the layers what `choices_of` gave. Raises ConfigError where it is something else, and changes nothing."""
    for layer, choice in choices_in(layers, saved, path):
        layer.dispatcher.take_choice(choice)


def choices_in(
    layers: Mapping[str, OverlappedLayer], saved: Mapping[str, Any], path: str
) -> list[tuple[OverlappedLayer, Choice]]:
    """The layers that take a saved choice, and their choices. Raises ConfigError for anything but choices."""
    if not isinstance(saved, Mapping):
        raise ConfigError(f"{path}: {KEY}={saved!r}: expected a choice per layer; leave it out of the client state")
    taken: list[tuple[OverlappedLayer, Choice]] = []
    for name, entry in saved.items():
        layer = layers.get(name)
        if not isinstance(entry, Mapping) or not {"torus", "choice"} <= set(entry):
            raise ConfigError(f"{path}: {KEY}.{name}={entry!r}: expected a torus and a choice; leave it out")
        if layer is not None and layer.config.schedule == "auto" and torus_of_layer(layer) == entry["torus"]:
            others = entry.get(OTHERS) or ()
            own = next((each for each in others if each["ranks"] == ranks_of_layer(layer)), entry)
            taken.append((layer, Choice.from_dict(own["choice"], f"{path}: {KEY}.{name}")))
    return taken


def torus_of_layer(layer: OverlappedLayer) -> list[int]:
    """Nodes, and ranks of a node, of the layer's expert group, as JSON has them."""
    torus = layer.dispatcher.torus
    return [torus.num_nodes, torus.node_size]


def ranks_of_layer(layer: OverlappedLayer) -> list[int]:
    """Ranks of the world that share the layer's experts."""
    return list(layer.dispatcher.checked_connection().transport.ranks)
