"""Private names of a step of DeepSpeed's engine: its optimizer's making, its clipping, its end, where its memory lies.

Part of `seams.py`, as to releases and private names.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, Literal
from unittest.mock import patch

import torch
from deepspeed.runtime import compiler
from torch import Tensor

from ds_moe_ep.errors import ConfigError

# Methods of the engine that its `step` goes through.
TAKE_MODEL_STEP = "_take_model_step"
CLIP_GRADIENTS = "clip_fp32_gradients"

# Methods of the wrappers of fp16 and bf16 optimizers that clip.
WRAPPER_NAMES = ("step", "unscale_and_clip_grads")
UNDER_WRAPPER = "optimizer"  # of DeepSpeed's optimizers: the torch optimizer inside
GRADIENTS = ("averaged_gradients", "all_grad_tensors", "grads_in_partition", "fp32_groups_gradients_flat")
PARAMETER_GRADIENT = "grad_accum"  # of a parameter, beside .grad: ZeRO-1's sum in another type
BUCKETS = "ipg_buckets"  # of ZeRO, by type: gradients are copied into .buffer, .elements of them by now, and reduced
GRAD_SCALER = "torch_autocast_z0_gradscaler"  # of an engine: torch's, without ZeRO
PARTITIONS = "fp32_partitioned_groups_flat"  # of ZeRO-3: what it steps
BATCHES = ("training_dataloader", "data_iterator")  # of an engine: the caller's data

# Optimizers of ZeRO, by module and class, and their method that looks for groups of experts.
SHARDING = (
    ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"),
    ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer"),
)
CONFIGURE_EXPERTS = "_configure_moe_settings"

MUON = "deepspeed.runtime.zero.muon.muon_optimizer"  # which ZeRO imports to know an optimizer by its class
COMPILE = "compile"  # of deepspeed.runtime.compiler: decorates Muon's functions


def import_muon_without_compiling() -> None:
    """Imports DeepSpeed's Muon, whose functions then compile at their first call. Local; once for a process.

    Imported by ZeRO it calls torch.compile three times, which loads inductor: a second of processor time on each rank,
    whatever its optimizer is. Releases without Muon have nothing to import.
    """
    if MUON in sys.modules or not hasattr(compiler, COMPILE):
        return
    with patch.object(compiler, COMPILE, functools.partial(_compiled_when_called, getattr(compiler, COMPILE))):
        try:
            importlib.import_module(MUON)
        except ImportError:
            return


def _compiled_when_called(compile_of: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """A decorator that compiles a function at its first call."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = functools.cache(lambda: compile_of()(function))

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    return decorate


@functools.cache
def let_all_experts_be_frozen(is_of_expert: Callable[[Tensor], bool]) -> None:
    """Lets DeepSpeed shard the optimizer of a model whose experts nobody trains. For engines made from now on.

    `is_of_expert` tells experts' parameters. DeepSpeed's optimizers end with an assertion there: no group of
    parameters is an experts'. Where one should be, since experts train among dense parameters, that is a ConfigError,
    and so is a group in which nothing trains, which they end on too.
    """
    for home, name in SHARDING:
        kind = getattr(importlib.import_module(home), name)
        if CONFIGURE_EXPERTS in vars(kind):
            setattr(kind, CONFIGURE_EXPERTS, _where_experts_train(getattr(kind, CONFIGURE_EXPERTS), is_of_expert))


def _where_experts_train(
    configure: Callable[[Any], None], is_of_expert: Callable[[Tensor], bool]
) -> Callable[[Any], None]:
    @functools.wraps(configure)
    def configure_or_pass(optimizer: Any) -> None:
        groups = optimizer.optimizer.param_groups
        empty = [index for index, group in enumerate(groups) if not any(each.requires_grad for each in group["params"])]
        if empty:
            raise ConfigError(
                f"optimizer: none of the {len(groups[empty[0]]['params'])} parameters of group {empty[0]} has "
                "requires_grad=True, and ZeRO shares groups of trained ones; pass model_parameters=[each for each in "
                "model.parameters() if each.requires_grad]"
            )
        trained = (each for group in groups for each in group["params"] if each.requires_grad)
        if any(group.get("moe") for group in groups):
            configure(optimizer)
        elif any(map(is_of_expert, trained)):
            raise ConfigError(
                f"optimizer={type(optimizer.optimizer).__name__}: its groups have experts among dense parameters, and "
                'ZeRO would share them over ranks that hold other experts; write an "optimizer" into the ds_config '
                '(Trainer, Accelerate: with "auto" values), or sort them before it is made: deepspeed.moe.utils.'
                "split_params_into_different_moe_groups_for_optimizer"
            )
        else:
            optimizer.has_moe_layers = False  # of an optimizer: it has experts' gradients to reduce

    return configure_or_pass


def runs_stages(engine: Any) -> bool:
    """True for a pipeline's engine, which steps in its `train_batch`."""
    return hasattr(engine, "train_batch")


def once_it_has_an_optimizer(engine: Any, then: Callable[[], object]) -> None:
    """Calls `then` when an engine that is being made has its optimizer; never where it gets none."""
    configure = engine._configure_optimizer

    @functools.wraps(configure)
    def configure_and_report(*args: Any, **kwargs: Any) -> None:
        del engine._configure_optimizer  # it was this function
        configure(*args, **kwargs)
        then()

    engine._configure_optimizer = configure_and_report


def reporting_model_step(
    engine: Any, take_model_step: Callable[..., Any], then: Callable[[bool], None]
) -> Callable[..., Any]:
    """The engine's model step, which then calls `then` with True where it moved the parameters.

    A plain engine's `step` and a pipeline engine's `train_batch` both come through it.
    """

    def take_and_report(*args: Any, **kwargs: Any) -> Any:
        scaler = getattr(engine, GRAD_SCALER, None)  # it skips a step and tells nobody
        scale = scaler.get_scale() if scaler is not None else 0.0
        result = take_model_step(*args, **kwargs)
        is_skipped = not engine.was_step_applied() or (scaler is not None and scaler.get_scale() < scale)
        then(not is_skipped)
        return result

    return take_and_report


def clipping_of(engine: Any) -> Literal["whole", "gradients", "wrapper"]:
    """Whose norm clips: one of all experts, the engine's of fp32 gradients, or that of the optimizer's wrapper."""
    if engine.optimizer is None or engine.zero_optimization():
        return "whole"
    if all(hasattr(engine.optimizer, name) for name in WRAPPER_NAMES):
        return "wrapper"
    return "whole" if engine.fp16_enabled() or engine.bfloat16_enabled() else "gradients"


def scales_loss(engine: Any) -> bool:
    """True where gradients reach the optimizer with the loss scale that it divides them by."""
    is_divided = clipping_of(engine) == "wrapper" and engine.fp16_enabled()
    return not is_divided or hasattr(engine, "_do_optimizer_backward")  # the wrapper's own backward, until 0.17


def report_norm(owner: Any, norm: torch.Tensor | float) -> None:
    """Makes a norm the one that the engine, or its optimizer, reports for the step."""
    owner._global_grad_norm = norm


def zero_groups(optimizer: Any) -> list[tuple[list[Tensor], bool]]:
    """The parameters of each group that ZeRO made, and whether it is an experts' group; nothing without ZeRO."""
    made = getattr(optimizer, "bit16_groups", None) or getattr(optimizer, "bf16_groups", None) or []
    kinds = [bool(group.get("moe")) for group in optimizer.optimizer.param_groups] if made else []
    return list(zip(made, kinds, strict=False))


def torch_optimizer(engine: Any) -> torch.optim.Optimizer | None:
    """The optimizer inside DeepSpeed's wrappers, or None for an engine without one."""
    optimizer = engine.optimizer
    while optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        optimizer = getattr(optimizer, UNDER_WRAPPER, None)
    return optimizer


def stepped_tensors(engine: Any) -> list[list[Tensor]]:
    """The tensors that the torch optimizer steps, by group; ZeRO-3 hands over one of its partitions after the other."""
    partitions = getattr(engine.optimizer, PARTITIONS, None)
    if partitions is not None:
        return [[each] for each in partitions]
    inner = torch_optimizer(engine)
    return [list(group["params"]) for group in inner.param_groups] if inner is not None else []


def is_own_optimizer(engine: Any) -> bool:
    """True where DeepSpeed made the optimizer from the ds_config."""
    return engine.client_optimizer is None


def gradients_beside(parameter: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of a parameter that DeepSpeed keeps beside `.grad`."""
    return (getattr(parameter, PARAMETER_GRADIENT, None),)


def held_gradients(engine: Any) -> list[Any]:
    """Where the engine's optimizer keeps gradients, containers of tensors."""
    return [getattr(engine.optimizer, name, None) for name in GRADIENTS]


def bucket_buffers(engine: Any) -> list[Any]:
    """The buffers of ZeRO's buckets."""
    return [bucket.buffer for bucket in getattr(engine.optimizer, BUCKETS, {}).values()]


def filled_bucket_bytes(engine: Any) -> int:
    """Bytes of gradients in ZeRO's buckets by now."""
    buckets = getattr(engine.optimizer, BUCKETS, {})
    return sum(bucket.elements * dtype.itemsize for dtype, bucket in buckets.items())
