"""One answer for a model and for its cut: the memory of the fullest device, and the fix where it does not fit."""

from __future__ import annotations

from dataclasses import replace

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.config.training import WHOLE, Training, micro_batch_fix, most_sequences
from ds_moe_ep.records.quantity import gigabytes, number
from ds_moe_ep.sizing.footprint import Memory, count_memory
from ds_moe_ep.sizing.pipeline import fullest_stage


def fullest_memory(model: ModelConfig, moe: MoEConfig, training: Training, load: float = 1.0) -> Memory:
    """Bytes of a device by kind: of a rank that receives `load` times the mean rows, or of a layout's fullest stage."""
    if training.layout != WHOLE:
        return fullest_stage(model, moe, training).memory
    return count_memory(model, moe, training, load)


def largest_micro_batch(
    model: ModelConfig, moe: MoEConfig, training: Training, free_bytes: float, load: float = 1.0
) -> int:
    """The most sequences per micro-batch for which every device fits `free_bytes`; 0 when one does not fit."""

    def fits(micro_batch: int) -> bool:
        return fullest_memory(model, moe, replace(training, micro_batch=micro_batch), load).peak <= free_bytes

    return most_sequences(fits)


def memory_fix(model: ModelConfig, moe: MoEConfig, training: Training, free_bytes: float, load: float = 1.0) -> str:
    """The change that makes a job fit which is too large for a device, or at least makes it smaller."""

    def fits(smaller: Training) -> bool:
        return fullest_memory(model, moe, smaller, load).peak <= free_bytes

    layout = training.layout
    slots = 1 if moe.replicas == "auto" else moe.replicas
    for fewer in range(slots)[::-1]:
        if fullest_memory(model, replace(moe, replicas=fewer), training, load).peak <= free_bytes:
            return f"lower moe_ep.replicas from {moe.replicas} to {fewer}"
    smaller = micro_batch_fix(training, fits)
    if smaller:
        return smaller
    if not model.recompute:
        return "set moe_ep.model.recompute to true"
    if training.zero_stage == 0 and (layout == WHOLE or training.num_copies > 1):
        return "set zero_optimization.stage to 1"
    if layout != WHOLE:
        if layout.pp_size < model.num_layers:
            return f"raise moe_ep.layout.pp_size from {layout.pp_size}, so that a stage holds fewer layers"
        return f"raise moe_ep.layout.tp_size from {layout.tp_size}, so that a rank holds less of each layer"
    if moe.ep_size < moe.num_experts:
        return f"raise moe_ep.ep_size from {moe.ep_size}, so that a rank holds fewer experts"
    if not training.offload:
        return "move the optimizer to the host with zero_optimization.offload_optimizer"
    return "make the model smaller"


def needs(memory: Memory) -> str:
    """The bytes that a GPU needs by kind, for the error of one that has less."""
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations and buffers": memory.peak - memory.persistent,
    }
    if memory.replicas:
        parts["replicas"] = memory.replicas
    listed = ", ".join(f"{name} {number(num_bytes / 1e9, 1)}" for name, num_bytes in parts.items())
    return f"a GPU needs {gigabytes(memory.peak, 1)} ({listed})"
