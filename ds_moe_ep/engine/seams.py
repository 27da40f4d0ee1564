"""Every name of DeepSpeed that the package relies on without DeepSpeed promising it.

Tested with the releases in TESTED; releases.py says what stands in for names that the older ones lack. Another release
is told about once in the log; a name that is gone raises an EngineError that says which. A test reads this file's names
from the installed release.
"""

from __future__ import annotations

import functools
import importlib
import logging
import operator
import os
import socket
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.engine import InferenceEngine
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate
from deepspeed.utils import groups, log_dist, logger
from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
from torch import nn

from ds_moe_ep.comm.lane_groups import LaneGroups, open_lanes
from ds_moe_ep.comm.transport import NEAR_LANES, REPLICAS
from ds_moe_ep.config.deepspeed_keys import TESTED as TESTED
from ds_moe_ep.engine.releases import LATER as LATER
from ds_moe_ep.engine.releases import dense_routes
from ds_moe_ep.engine.step_seams import import_muon_without_compiling
from ds_moe_ep.errors import EngineError, MoEError
from ds_moe_ep.health.watch import Unwatched, Watch, open_watch

GROUP_NAMES = (
    "_create_expert_and_data_parallel",
    "_get_expert_parallel_group",
    "_get_expert_parallel_group_dict",
    "_get_expert_parallel_group_ranks",
    "_get_expert_data_parallel_group",
    "_get_expert_data_parallel_rank",
    "_get_expert_data_parallel_world_size",
    "_get_data_parallel_group",
    "_get_sequence_data_parallel_group",
    "_get_sequence_parallel_world_size",
    "mpu",
)

# What the hooks use of layers that DeepSpeed made.
MOE_LAYER_NAMES = ("gate", "experts.deepspeed_experts", "ep_group", "use_tutel", "timers", "wall_clock_breakdown")
GATE_NAMES = (
    "wg.weight",
    "k",
    "drop_tokens",
    "ep_group",
    "capacity_factor",
    "eval_capacity_factor",
    "min_capacity",
    "use_rts",
    "noisy_gate_policy",
    "top2_2nd_expert_sampling",
)
AUTOEP_NAMES = (
    "router.score_func",
    "router.route_norm",
    "expert_bias",
    "tokens_per_expert",
    "num_experts",
    "ep_size",
    "top_k",
    "hidden_size",
    "score_apply",
    "comm_backend",
    "async_split_plan",
    "folding_group_handles",
    "ep_group",
    "_finalize_output",
    "_forward",
    "experts.w1",
    "experts.w2",
    "experts.w3",
    "experts.activation",
    "experts.activation_alpha",
    "experts.activation_limit",
)

# Modules that unpickle files of a checkpoint past the checkpoint engine: universal ones, and weights under ZeRO-3.
UNPICKLING = frozenset((
    "deepspeed.checkpoint.universal_checkpoint",
    "deepspeed.runtime.base_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.utils.zero_to_fp32",
))  # fmt: skip

# Lanes live and die with the DeepSpeed group that they run beside; layers of one model share them.
_LANES: weakref.WeakKeyDictionary[dist.ProcessGroup, LaneGroups] = weakref.WeakKeyDictionary()

# So does the watch over all ranks, with the group of the world.
_WATCHES: weakref.WeakKeyDictionary[dist.ProcessGroup, Watch] = weakref.WeakKeyDictionary()


@functools.cache
def check_release() -> None:
    """Raises EngineError where the installed DeepSpeed lacks a name; logs once where it is not a tested release."""
    missing = [name for name in GROUP_NAMES if not hasattr(groups, name)]
    if missing:
        raise EngineError(
            f"deepspeed={deepspeed.__version__}: deepspeed.utils.groups has no {', '.join(missing)}; install a "
            f"tested release ({', '.join(TESTED)})"
        )
    if deepspeed.__version__ not in TESTED:
        logger.warning(f"ds_moe_ep was tested with DeepSpeed {', '.join(TESTED)}; installed is {deepspeed.__version__}")


@functools.cache
def keep_shm_build_away() -> None:
    """On a CPU, keeps DeepSpeed from compiling its shared-memory extension when process groups start.

    The build takes a minute, and a killed one leaves a lock on which every later start hangs. Without it gloo does
    all collectives, as between nodes. Called on import of the engine room; says so once in the log.
    """
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    if get_accelerator().device_name() == "cpu" and compatible.get("deepspeed_shm_comm"):
        compatible["deepspeed_shm_comm"] = False
        if os.environ.get("RANK", "0") == "0":  # the launcher's: no process group exists yet
            logger.info("ds_moe_ep: DeepSpeed's shared-memory extension is left out on CPU; gloo does all collectives")


def init_distributed(**kwargs: Any) -> None:
    """deepspeed.init_distributed without the compilation on CPU; does nothing where it was called already.

    Finds its ranks from the deepspeed launcher, torchrun, or MPI (through mpi4py).
    """
    import_muon_without_compiling()
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(**kwargs)


def expert_group(ep_size: int, data_before_expert: bool) -> tuple[dist.ProcessGroup, list[int]]:
    """DeepSpeed's expert-parallel group of this rank and its global ranks, made where it does not exist yet.

    Collective over the world on the first call for an ep_size.
    """
    check_release()
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size, use_data_before_expert_parallel_=data_before_expert)
    return groups._get_expert_parallel_group(name), list(groups._get_expert_parallel_group_ranks(name))


def known_expert_group(ep_size: int) -> dist.ProcessGroup | None:
    """DeepSpeed's expert-parallel group of an ep_size; None where it does not exist. Local."""
    found: dist.ProcessGroup | None = groups._get_expert_parallel_group_dict().get(f"ep_size_{ep_size}")
    return found


def lanes_beside(
    group: dist.ProcessGroup, all_groups: list[list[int]], timeout_s: float, replicas: bool = False, near: bool = False
) -> LaneGroups:
    """The lanes beside DeepSpeed's `group`; the first call opens them, collective over the world.

    So does the first call of a layer with replicas, or with two-level dispatch (`near`), where those before had none.
    The opening call's time limit holds for all. Lanes that a failure has closed stay closed.
    """
    had = _LANES[group].lanes if group in _LANES else {}
    replicas, near = replicas or REPLICAS in had, near or NEAR_LANES[0] in had
    if not had or replicas > (REPLICAS in had) or near > (NEAR_LANES[0] in had):
        watch = watch_of_world(timeout_s)
        _LANES[group] = open_lanes(all_groups, timeout_s, watch, with_replicas=replicas, with_near=near)
    return _LANES[group]


def watch_of_world(timeout_s: float) -> Watch:
    """The watch over all ranks, which every rank opens with its first call; one rank alone has none."""
    world = dist.group.WORLD
    assert world is not None, "torch.distributed is initialized"
    if world not in _WATCHES:
        _WATCHES[world] = open_watch(timeout_s) if dist.get_world_size() > 1 else Unwatched()
    return _WATCHES[world]


def at_init_inference(connect: Callable[[nn.Module], None]) -> None:
    """Has deepspeed.init_inference call `connect` with the model where it makes groups for MoE layers.

    It makes some that it gives to nobody: DeepSpeed's own layers exchange their rows over the whole world there. Once,
    for all engines of the process; they do so where there are several ranks.
    """
    make_groups = InferenceEngine._create_ep_parallel_group

    @functools.wraps(make_groups)
    def make_and_connect(engine: Any, *sizes: Any, **others: Any) -> None:
        make_groups(engine, *sizes, **others)
        connect(engine.module)

    InferenceEngine._create_ep_parallel_group = make_and_connect


def is_moe_layer(module: Any) -> bool:
    """True where DeepSpeed takes a module for an MoE layer, as it numbers them in checkpoints."""
    return isinstance(module, MoE) or is_autoep_layer(module)


def is_expert_parameter(parameter: torch.Tensor) -> bool:
    """True where DeepSpeed averages a parameter's gradient over the replicas of one expert, and not over all ranks."""
    return not getattr(parameter, "allreduce", True)


def is_autoep_layer(module: Any) -> bool:
    """True where AutoEP put a module in the place of a block of experts."""
    return bool(getattr(module, "_is_autoep_layer", False))


def autoep_presets() -> list[str]:
    """The families of models that AutoEP knows by name; none before AutoEP."""
    if not has("AutoEP"):
        return []
    registry = importlib.import_module("deepspeed.module_inject.auto_ep_presets.registry")
    return list(registry.PRESET_MODELS)


def missing_of(layer: object, names: Sequence[str], tested: Sequence[str] = TESTED) -> str:
    """Why a layer is not as in the tested releases, or an empty string."""
    missing = [name for name in names if not _has(layer, name)]
    if not missing:
        return ""
    return (
        f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)} there; install a tested release "
        f"({', '.join(tested)})"
    )


def _has(owner: object, path: str) -> bool:
    try:
        operator.attrgetter(path)(owner)
    except AttributeError:
        return False
    return True


def engine_being_made() -> Any:
    """The engine whose constructor calls from further up the stack, or None.

    DeepSpeed calls a layer's `set_deepspeed_parallelism` from there and does not say for which engine.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), deepspeed.DeepSpeedEngine):
            return owner
        frame = frame.f_back
    return None


def ds_config_of(engine: Any) -> Mapping[str, Any]:
    """The ds_config that an engine was made with, keys that DeepSpeed does not know included."""
    if not _has(engine, "_config._param_dict"):
        raise EngineError(
            f"deepspeed={deepspeed.__version__}: engine._config has no _param_dict to read a section from; install a "
            f"tested release ({', '.join(TESTED)})"
        )
    found: Mapping[str, Any] = engine._config._param_dict
    return found


def has_data_before_experts(engine: Any) -> bool:
    """True where an engine's expert-parallel groups hold ranks that are apart, as its ds_config says."""
    return bool(engine._config.use_data_before_expert_parallel_)


def release() -> str:
    """The installed release."""
    return str(deepspeed.__version__)


def has(name: str) -> bool:
    """True where the installed release has a name of `LATER`."""
    return LATER[name].find() is not None


def sparse_routes(gate: TopKGate, x_TD: torch.Tensor, used_token: torch.Tensor | None) -> tuple[Any, ...]:
    """(l_aux, capacity, number of experts, experts, places and weights [K, T], exp_counts) of a gate's pass.

    An expert below 0 stands for a choice that is dropped, or left out. Collective where the gate has no capacity.
    """
    if has("sparse routes"):
        answer: tuple[Any, ...] = gate(x_TD, used_token, sparse_routes=True)
        return answer
    return dense_routes(gate, x_TD, used_token)


def tensor_parallel_size() -> int:
    """Ranks of the tensor group that DeepSpeed was given; 1 without one."""
    if groups.mpu is None or hasattr(groups.mpu, "initialize_sequence_parallel"):
        return 1  # DeepSpeed's own unit of sequence parallelism calls its groups "model parallel"
    return int(bwc_tensor_model_parallel_world_size(groups.mpu))


def sequence_parallel_size() -> int:
    """Ranks that share a sequence, by the mesh or the unit that DeepSpeed was given; 1 without one."""
    return int(groups._get_sequence_parallel_world_size())


def has_mesh() -> bool:
    """True where DeepSpeed was given a mesh of data-parallel and sequence ranks."""
    return getattr(groups, "mesh_device", None) is not None


def num_pipeline_stages() -> int:
    """Stages of the pipeline that DeepSpeed was given; 1 without one."""
    for name in ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size"):
        if hasattr(groups.mpu, name):
            return int(getattr(groups.mpu, name)())
    return 1


def pipeline_stage() -> int:
    """The stage of this rank in the pipeline that DeepSpeed was given; 0 without one."""
    names = ("get_pipeline_model_parallel_rank", "get_pipe_parallel_rank")
    return next((int(getattr(groups.mpu, name)()) for name in names if hasattr(groups.mpu, name)), 0)


def is_first_holder(group_name: str) -> bool:
    """True where no rank before this one holds the same experts."""
    return bool(groups._get_expert_data_parallel_rank(group_name) == 0)


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks over which DeepSpeed averages the dense parameters."""
    group: dist.ProcessGroup = groups._get_data_parallel_group()
    return group


def gather(value: Any) -> list[Any]:
    """Every rank's value, in rank order. Collective over the world."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def settle(error: MoEError | None) -> None:
    """Raises, on every rank, the error of the first rank that has one. Collective over the world."""
    for theirs in gather(error):
        if theirs is not None:
            raise theirs


def compare_ranks(what: str, fingerprint: str) -> list[str]:
    """The host names of all ranks, once all ranks gave the same fingerprint. Collective over the world.

    Raises EngineError on every rank where they differ.
    """
    gathered = gather((fingerprint, socket.gethostname()))
    fingerprints = [theirs for theirs, _ in gathered]
    odd = [rank for rank, theirs in enumerate(fingerprints) if theirs != fingerprints[0]]
    if odd:
        raise EngineError(
            f"{what} on ranks {odd} differs from that on rank 0: every rank must start with the same configuration "
            f"and model; compare their ds_config and arguments ({fingerprints[odd[0]]} against {fingerprints[0]})"
        )
    return [host for _, host in gathered]


def log_rank0(message: str, level: int = logging.INFO) -> None:
    """One log line on rank 0."""
    log_dist(f"ds_moe_ep: {message}", ranks=[0], level=level)


def sum_over_batch(engine: Any, values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks whose tokens make up the engine's batch. Collective, without gradient."""
    total = values.clone()
    dist.all_reduce(total, group=engine.seq_data_parallel_group)
    return total


def sum_over_tokens(values: torch.Tensor) -> torch.Tensor:
    """The sum over the ranks that hold tokens of the batch. Collective, without gradient."""
    total = values.clone()
    dist.all_reduce(total, group=groups._get_sequence_data_parallel_group())
    return total


def write_picture(engine: Any, name: str, picture: torch.Tensor, num_samples: int) -> None:
    """Writes a picture [height, width, 3] to the TensorBoard of an engine's monitor, where there is one. Local."""
    writer = getattr(getattr(engine.monitor, "tb_monitor", None), "summary_writer", None)
    if writer is not None:
        writer.add_image(name, picture.numpy(), num_samples, dataformats="HWC")
        writer.flush()
