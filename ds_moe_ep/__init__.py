"""Expert-parallel MoE layers for DeepSpeed that hide their traffic behind the experts' compute.

Names are resolved at first use: importing the package loads neither torch nor DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ds_moe_ep.comm.callbacks import TransferCallback, TransferMessage
    from ds_moe_ep.comm.open import open_transport
    from ds_moe_ep.config.knobs import MEDIUM, MODELS, SMALL, SPECIFICATION, Layout, ModelConfig, MoEConfig
    from ds_moe_ep.config.section import Section, load_ds_config, read_section
    from ds_moe_ep.config.topology import RankGrid
    from ds_moe_ep.engine.checkpoint.finish import load_checkpoint, wait_for_saves
    from ds_moe_ep.engine.hooks.attach import OverlapHandle, attach_overlap
    from ds_moe_ep.engine.hugging_face.blocks import balance_loss
    from ds_moe_ep.engine.hugging_face.export import save_pretrained
    from ds_moe_ep.engine.hugging_face.load import from_pretrained
    from ds_moe_ep.engine.hugging_face.upcycle import upcycle
    from ds_moe_ep.engine.layer import MoE
    from ds_moe_ep.engine.load.routes import record_routes, replay_routes
    from ds_moe_ep.engine.pipeline import Pipeline, build_pipeline
    from ds_moe_ep.engine.seams import init_distributed
    from ds_moe_ep.engine.start import initialize
    from ds_moe_ep.errors import ConfigError, EngineError, MoEError, TopologyError
    from ds_moe_ep.model.initialize import expert_index_of, init_weights
    from ds_moe_ep.model.transformer import ModelOutput, Transformer, build_transformer
    from ds_moe_ep.moe.experts import ClampedSwiGLU, GeluMLP, SharedWithGate, SwiGLU
    from ds_moe_ep.moe.layer import ExpertParallel
    from ds_moe_ep.moe.replay.record import RouteRecord
    from ds_moe_ep.verification.verdicts import EngineReport, TrainingVerdict
    from ds_moe_ep.verification.verify import verify

__all__ = [
    "MEDIUM",
    "MODELS",
    "SMALL",
    "SPECIFICATION",
    "ClampedSwiGLU",
    "ConfigError",
    "EngineError",
    "EngineReport",
    "ExpertParallel",
    "GeluMLP",
    "Layout",
    "MoE",
    "MoEConfig",
    "MoEError",
    "ModelConfig",
    "ModelOutput",
    "OverlapHandle",
    "Pipeline",
    "RankGrid",
    "RouteRecord",
    "Section",
    "SharedWithGate",
    "SwiGLU",
    "TopologyError",
    "TrainingVerdict",
    "TransferCallback",
    "TransferMessage",
    "Transformer",
    "__version__",
    "attach_overlap",
    "balance_loss",
    "build_pipeline",
    "build_transformer",
    "expert_index_of",
    "from_pretrained",
    "init_distributed",
    "init_weights",
    "initialize",
    "load_checkpoint",
    "load_ds_config",
    "open_transport",
    "read_section",
    "record_routes",
    "replay_routes",
    "save_pretrained",
    "upcycle",
    "verify",
    "wait_for_saves",
]

_HOMES = {
    "comm.callbacks": ("TransferCallback", "TransferMessage"),
    "comm.open": ("open_transport",),
    "config.knobs": ("MEDIUM", "MODELS", "SMALL", "SPECIFICATION", "Layout", "ModelConfig", "MoEConfig"),
    "engine.checkpoint.finish": ("load_checkpoint", "wait_for_saves"),
    "engine.hooks.attach": ("OverlapHandle", "attach_overlap"),
    "engine.hugging_face.blocks": ("balance_loss",),
    "engine.hugging_face.export": ("save_pretrained",),
    "engine.hugging_face.load": ("from_pretrained",),
    "engine.hugging_face.upcycle": ("upcycle",),
    "engine.layer": ("MoE",),
    "engine.load.routes": ("record_routes", "replay_routes"),
    "engine.pipeline": ("Pipeline", "build_pipeline"),
    "engine.seams": ("init_distributed",),
    "engine.start": ("initialize",),
    "errors": ("ConfigError", "EngineError", "MoEError", "TopologyError"),
    "model.initialize": ("expert_index_of", "init_weights"),
    "model.transformer": ("ModelOutput", "Transformer", "build_transformer"),
    "moe.experts": ("ClampedSwiGLU", "GeluMLP", "SharedWithGate", "SwiGLU"),
    "moe.layer": ("ExpertParallel",),
    "moe.replay.record": ("RouteRecord",),
    "verification.verdicts": ("EngineReport", "TrainingVerdict"),
    "verification.verify": ("verify",),
    "config.section": ("Section", "load_ds_config", "read_section"),
    "config.topology": ("RankGrid",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
