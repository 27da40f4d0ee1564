"""Model files that would hold one rank's experts in the place of all: refused.

DeepSpeed's `save_16bit_model`, Accelerate's `get_state_dict` and others write a model file from the `state_dict()` of
one rank, which has that rank's experts alone. A layer that shares its experts looks up the stack who asks. A rank's own
use of its state goes on, and so do checkpoints of DeepSpeed's engine, which hold all ranks' experts. Where every rank
asks, a layer of an engine that the package has extended completes its state instead (`whole_files`).

The error is a ValueError too: Hugging Face's Trainer takes one at this place for a sign that no rank has the whole
model, and saves the engine's checkpoint in the folder instead. So no weights are lost at the end of a training.
"""

from __future__ import annotations

import logging
import sys
from types import FrameType
from typing import Any

from torch import nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hugging_face.families import FAMILIES
from ds_moe_ep.errors import ExportError

# Who writes a file of one rank's state, by module and function. Named only: they are other libraries' and not imported.
WRITERS = {
    ("accelerate.accelerator", "get_state_dict"): "accelerator.get_state_dict",
    ("accelerate.accelerator", "save_model"): "accelerator.save_model",
    ("deepspeed.runtime.engine", "save_16bit_model"): "engine.save_16bit_model",
    ("huggingface_hub.serialization._torch", "save_torch_model"): "huggingface_hub.save_torch_model",
    ("peft.peft_model", "save_pretrained"): "model.save_pretrained",
    ("safetensors.torch", "save_model"): "safetensors.torch.save_model",
    ("transformers.modeling_utils", "save_pretrained"): "model.save_pretrained",
    ("transformers.trainer", "save_model"): "trainer.save_model",
}
TRAINER = "trainer.save_model"
BY_ALL_RANKS = (TRAINER, "engine.save_16bit_model")  # every rank takes the model's state there
OF_ADAPTERS = (
    TRAINER,
    "model.save_pretrained",
    "accelerator.get_state_dict",
)  # what leads to PEFT's file, for its models
OF_ALL_RANKS = ("deepspeed.runtime.engine", "save_checkpoint")  # there every rank writes its experts


def refuse_part_of_experts(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A pre-hook of `state_dict` for a layer whose experts lie on several ranks: keeps it out of model files.

    Local. Raises ExportError on every rank that asks.
    """
    writer, root = writer_of_file()
    if not writer or (writer in OF_ADAPTERS and has_adapters_elsewhere(root, layer)):
        return
    if writer in BY_ALL_RANKS and getattr(layer, "completes_files", False):
        return
    name = prefix.removesuffix(".") or type(layer).__name__
    words = (
        f"{writer}: the experts of {name} lie on {layer.ep_size} ranks, and the file would hold those of one rank; "
        f"engine.save_checkpoint(folder) saves all of them{way_to_one_file(layer, root)}"
    )
    if writer == TRAINER:
        words += (
            ". The Trainer saves the engine's checkpoint in place of the model file (zero_to_fp32.py cannot read it)"
        )
        seams.log_rank0(words, logging.WARNING)  # it goes on after the error
    raise ExportError(words)


def way_to_one_file(layer: nn.Module, root: Any) -> str:
    """How the weights of all ranks become one model, as far as the package can tell."""
    if getattr(getattr(root, "config", None), "model_type", None) in FAMILIES:
        return "; ds_moe_ep.save_pretrained(engine, folder) writes the whole model as a Hugging Face folder"
    if seams.is_autoep_layer(layer):
        return " and training goes on from it; DeepSpeed's ds_to_universal.py puts AutoEP's experts together"
    return (
        "; for one file, load that checkpoint in one process, in the model made with ep_size=1 "
        "(engine.load_checkpoint(folder, load_module_only=True)), and save there"
    )


def writer_of_file() -> tuple[str, Any]:
    """Who writes a model file up the stack, in words, and the module whose state it takes; "" where nobody does."""
    writer, root = "", None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        place = (frame.f_globals.get("__name__", ""), frame.f_code.co_name)
        if place == OF_ALL_RANKS:
            return "", None
        if place == ("torch.nn.modules.module", "state_dict"):
            root = frame.f_locals["self"]
        writer = WRITERS.get(place, writer)
        frame = frame.f_back
    return writer, root


def has_adapters_elsewhere(root: Any, layer: nn.Module) -> bool:
    """True for a model of PEFT's, whose file holds what was trained alone, where nothing of the layer's experts was."""
    if not hasattr(root, "peft_config"):
        return False
    experts = [module for name, module in layer.named_modules() if name.split(".")[-1] == "experts"]
    adapted = [part for module in experts for part in module.modules() if hasattr(part, "active_adapter")]
    trained = [p for module in experts for p in module.parameters() if p.requires_grad]
    return not adapted and not trained
