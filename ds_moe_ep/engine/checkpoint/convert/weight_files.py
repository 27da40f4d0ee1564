"""Where the weights of the one-device model lie in DeepSpeed's checkpoint files.

Expert parallelism: one file per expert of a layer, and one file that holds everything else; equal for every ep_size.
Tensor and pipeline parallelism: one file per module of the pipeline and tensor rank; equal for every pp_size.
In both, `mp_rank` files tell the state of the run, which `convert.py` knows.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.engine.checkpoint.load import EXPERT_FILE, MAIN_FILE
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.model.initialize import LOCAL_EXPERT, global_name
from ds_moe_ep.model.transformer import build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.parallel.stages import name_on_one_device, stage_modules
from ds_moe_ep.parallel.tensor import Share

WHOLE = Share(0, 1)
_MODULE_FILE = re.compile(r"layer_\d+-model_(\d+)-model_states\.pt")


@dataclass(frozen=True)
class WeightPlace:
    """Where a share of a weight lies; `name` is the weight's name on one device."""

    file: str
    key: str
    name: str
    share: Share

    def of(self, whole: Tensor) -> Tensor:
        """The share of `whole` that lies here."""
        return self.share.of(whole, self.name)


@dataclass(frozen=True)
class WeightFiles:
    """The files of one layout. Shares of a weight stand in their order."""

    words: str  # the layout, for people
    places: tuple[WeightPlace, ...]
    num_state_files: int  # files that tell the state of the run
    is_pipeline: bool

    def by_file(self) -> list[tuple[str, list[WeightPlace]]]:
        """The places of each file with weights."""
        return [(file, list(places)) for file, places in groupby(self.places, key=lambda place: place.file)]

    def holders(self, folder: Path) -> dict[str, set[Path]]:
        """The files in `folder` that hold each weight, or shares of it, by the weight's name."""
        found: dict[str, set[Path]] = {}
        for place in self.places:
            found.setdefault(place.name, set()).add(folder / place.file)
        return found

    def state_files(self) -> list[str]:
        """The files that tell the state of the run. Without a pipeline it is one, which holds weights too."""
        return [f"mp_rank_{index:02d}_model_states.pt" for index in range(self.num_state_files)]


def whole_weights(model: ModelConfig, moe: MoEConfig) -> dict[str, Tensor]:
    """Every weight and buffer of the model on one device, by name, on the meta device."""
    with torch.device("meta"):
        return build_transformer(model, dataclasses.replace(moe, ep_size=1), ExpertParallel).state_dict()


def expert_files(model: ModelConfig, moe: MoEConfig) -> WeightFiles:
    """The files of expert parallelism, for any ep_size."""
    with torch.device("meta"):
        keys = build_transformer(model, dataclasses.replace(moe, ep_size=1), MoE).state_dict()
    places = sorted((_expert_place(key) for key in keys), key=lambda place: (place.file != MAIN_FILE, place.file))
    return WeightFiles(f"expert parallelism with {moe.num_experts} experts", tuple(places), 1, is_pipeline=False)


def _expert_place(key: str) -> WeightPlace:
    expert = LOCAL_EXPERT.search(key)
    if expert is None:
        return WeightPlace(MAIN_FILE, key, global_name(key), WHOLE)
    layer_index = key.split(".")[1]
    return WeightPlace(f"layer_{layer_index}_expert_{expert[1]}_{MAIN_FILE}", key, global_name(key), WHOLE)


def pipeline_files(model: ModelConfig, moe: MoEConfig, layout: Layout) -> WeightFiles:
    """The files of tensor and pipeline parallelism. Raises ConfigError where the model cannot be cut so."""
    layout.check(model, moe)
    with torch.device("meta"):
        (modules,) = stage_modules(build_transformer(model, moe, ExpertParallel), 1)
    places = [
        WeightPlace(
            f"layer_{index:02d}-model_{tp_rank:02d}-model_states.pt", key, name_on_one_device(module, key), share
        )
        for index, module in enumerate(modules)
        for tp_rank in range(layout.tp_size)
        for share in [Share(tp_rank, layout.tp_size)]
        for key in module.state_dict()
    ]
    words = f"a pipeline of tp_size={layout.tp_size} and pp_size={layout.pp_size}"
    return WeightFiles(words, tuple(places), layout.size, is_pipeline=True)


def find_files(names: Iterable[str], folder: str, model: ModelConfig, moe: MoEConfig) -> WeightFiles:
    """The layout of the checkpoint in `folder`, whose files have these names.

    Raises EngineError where it is none of the two, or where files are missing or left over.
    """
    present = {name for name in names if name.endswith("model_states.pt")}
    tensor_ranks = [int(match[1]) for name in present if (match := _MODULE_FILE.fullmatch(name))]
    has_experts = any(EXPERT_FILE.fullmatch(name) for name in present)
    if has_experts == bool(tensor_ranks):
        raise EngineError(
            f"{folder}: holds files of {'two layouts' if has_experts else 'no known layout'}; name a folder that "
            "engine.save_checkpoint wrote, of a model with ds_moe_ep.MoE layers or of a ds_moe_ep.build_pipeline"
        )
    num_states = sum(name.startswith("mp_rank_") for name in present)
    if has_experts:
        files = expert_files(model, moe)
    else:
        files = _found_pipeline(max(tensor_ranks) + 1, num_states, folder, model, moe)
    planned = {place.file for place in files.places} | set(files.state_files())
    for wrong, what in ((planned - present, "are missing"), (present - planned, "are left over")):
        if wrong:
            raise EngineError(
                f"{folder}: of {files.words}, {len(wrong)} files {what}, {sorted(wrong)[0]} first; complete the "
                "folder, or give the ds_config of the model that was saved"
            )
    return files


def _found_pipeline(tp_size: int, num_states: int, folder: str, model: ModelConfig, moe: MoEConfig) -> WeightFiles:
    try:
        pp_size = max(num_states // tp_size, 1)
        return pipeline_files(model, MoEConfig(num_experts=moe.num_experts), Layout(tp_size=tp_size, pp_size=pp_size))
    except ConfigError as error:
        raise EngineError(
            f"{folder}: was saved by tp_size={tp_size}, which the model of the ds_config cannot have ({error}); give "
            "the ds_config of the model that was saved"
        ) from None
