"""Parallelisms of DeepSpeed's beside which the experts' gradients or groups would be wrong, as the engine has them."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.pipe.engine import PipelineEngine

from ds_moe_ep.config.parallel_keys import FIX, MESH_FIX, MESH_RULE, STAGES_RULE
from ds_moe_ep.engine import seams


def problem_of_parallelism(engine: Any) -> str:
    """Why the layer cannot be connected in the ranks of an engine that is being made, or an empty string.

    The same on every rank.
    """
    num_stages = 1 if isinstance(engine, PipelineEngine) else seams.num_pipeline_stages()
    return _problem("pipeline stages", num_stages, STAGES_RULE) or problem_of_sequences()


def problem_of_sequences() -> str:
    """Why the ranks of DeepSpeed's mesh, which share sequences, do not go with experts, or an empty string."""
    size = seams.sequence_parallel_size() if seams.has_mesh() else 1
    return _problem("sequence parallel size", size, MESH_RULE, MESH_FIX)


def _problem(name: str, size: int, rule: str, fix: str = FIX) -> str:
    return f"{name}={size}: {rule}; {fix}" if size > 1 else ""
