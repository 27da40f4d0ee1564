"""A record of routes: where each token of each pass went in each layer, and the file that holds it.

The file is safetensors: a tensor `<pass>.<layer>` [tokens, k] of int32 for each pass from 0 and each layer by its name
in the model, coded as `tape.py` says, and the metadata `format` ("ds_moe_ep.routes"), `version` ("1") and `layers`
(JSON: the number of experts, k and the number of passes of each layer). A rank's file has that rank's tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.replay.tape import NO_PART

FORMAT, VERSION = "ds_moe_ep.routes", "1"


@dataclass
class LayerRoutes:
    """One layer's choices [T, K] of each pass, in int32: an expert, -1 for none, -2 - expert for a dropped one."""

    num_experts: int
    top_k: int
    passes: list[Tensor] = field(default_factory=list)

    def problem(self) -> str:
        """Why these cannot be routes of such a layer, or an empty string."""
        for index, coded_TK in enumerate(self.passes):
            if coded_TK.dim() != 2 or coded_TK.shape[1] != self.top_k:
                return f"pass {index} has the shape {tuple(coded_TK.shape)}, not [tokens, {self.top_k}]"
            ids_TK = torch.where(coded_TK < NO_PART, NO_PART - 1 - coded_TK, coded_TK)
            if len(ids_TK) and not (int(ids_TK.min()) >= NO_PART and int(ids_TK.max()) < self.num_experts):
                return f"pass {index} has experts outside of 0 to {self.num_experts - 1}"
            in_order_TK = ids_TK.sort(1).values
            is_twice = (in_order_TK[:, 1:] == in_order_TK[:, :-1]) & (in_order_TK[:, 1:] != NO_PART)
            if is_twice.any():
                return f"pass {index} sends a token to one expert twice"
        return ""


@dataclass
class RouteRecord:
    """Routes of this rank's tokens, by the layer's name. `record_routes` makes a record, `replay_routes` takes one."""

    layers: dict[str, LayerRoutes]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the record to a file of safetensors; each rank names its own. Local."""
        from safetensors.torch import save_file

        tensors = {
            f"{index}.{name}": coded_TK.contiguous()
            for name, layer in self.layers.items()
            for index, coded_TK in enumerate(layer.passes)
        }
        shapes = {
            name: {"num_experts": layer.num_experts, "top_k": layer.top_k, "num_passes": len(layer.passes)}
            for name, layer in self.layers.items()
        }
        save_file(tensors, path, {"format": FORMAT, "version": VERSION, "layers": json.dumps(shapes)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RouteRecord:
        """The record of a file. Raises EngineError where it holds none, or routes that cannot be."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                told = file.metadata() or {}
                if (told.get("format"), told.get("version")) != (FORMAT, VERSION):
                    raise EngineError(
                        f"{path}: is no record of routes (format {told.get('format')!r}, version "
                        f"{told.get('version')!r}); name one of format {FORMAT!r}, version {VERSION!r}"
                    )
                shapes: Mapping[str, Mapping[str, Any]] = json.loads(told["layers"])
                layers = {
                    name: LayerRoutes(
                        int(shape["num_experts"]),
                        int(shape["top_k"]),
                        [file.get_tensor(f"{index}.{name}") for index in range(int(shape["num_passes"]))],
                    )
                    for name, shape in shapes.items()
                }
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise EngineError(f"{path}: no record of routes can be read ({error}); record it again") from error
        for name, layer in layers.items():
            if problem := layer.problem():
                raise EngineError(f"{path}: {name}: {problem}; record it again")
        return cls(layers)

    def digest(self) -> int:
        """A number that records of other routes do not have, but by chance."""
        found = 0
        for name in sorted(self.layers):
            for coded_TK in self.layers[name].passes:
                found = crc32(coded_TK.contiguous().numpy().tobytes(), crc32(f"{name} {len(coded_TK)}".encode(), found))
        return found

    def problem(self, layers: Mapping[str, tuple[int, int]]) -> str:
        """Why it does not fit layers with these numbers of experts and k, or an empty string."""
        if missing := sorted(set(layers) - set(self.layers)):
            return f"has no routes of the layer {missing[0]!r}; it has those of {sorted(self.layers)}"
        if unknown := sorted(set(self.layers) - set(layers)):
            return f"has routes of {unknown[0]!r}, and the model no such layer; it has {sorted(layers)}"
        for name, (num_experts, top_k) in layers.items():
            its = self.layers[name]
            if its.num_experts != num_experts:
                return f"has {its.num_experts} experts in {name!r}, and the layer {num_experts}"
            if its.top_k != top_k:
                return f"has {its.top_k} choices per token in {name!r}, and the layer visits {top_k} experts"
            if problem := its.problem():
                return f"{name!r}: {problem}"
        return ""
