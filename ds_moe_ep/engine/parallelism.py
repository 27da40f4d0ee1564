"""Parallelisms of DeepSpeed's beside which the experts' gradients or groups would be wrong, as the engine has them."""

from __future__ import annotations

from ds_moe_ep.config.parallel_keys import FIX, SEQUENCE_RULE, STAGES_RULE
from ds_moe_ep.engine import seams


def problem_of_parallelism() -> str:
    """Why the layer cannot be connected in the engine's ranks, or an empty string. The same on every rank."""
    return _problem("pipeline stages", seams.num_pipeline_stages(), STAGES_RULE) or problem_of_sequences()


def problem_of_sequences() -> str:
    """Why the engine's ranks, which share sequences, do not go with experts, or an empty string."""
    return _problem("sequence parallel size", seams.sequence_parallel_size(), SEQUENCE_RULE)


def _problem(name: str, size: int, rule: str) -> str:
    return f"{name}={size}: {rule}; {FIX}" if size > 1 else ""
