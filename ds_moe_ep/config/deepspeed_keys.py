"""The keys that each tested release of DeepSpeed reads from a ds_config, so that a misspelt one can be named.

DeepSpeed refuses unknown keys inside `zero_optimization` and passes over those at the top level in silence.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

TESTED = ("0.17.6", "0.18.9", "0.19.8")  # the last of each series; engine/releases.py has their names


@dataclass(frozen=True, kw_only=True)
class KeyTable:
    """Keys of one object: read by every tested release, read from one on, and refused from one on."""

    always: str
    since: Mapping[str, str]
    removed: Mapping[str, str]
    never_read: str = ""  # refused by a later release, and read by no tested one


TOP_LEVEL = KeyTable(
    always="""
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
    optimizer scheduler fp16 bf16 bfloat16 torch_autocast data_types zero_optimization gradient_clipping
    prescale_gradients gradient_predivide_factor communication_data_type
    seq_parallel_communication_data_type disable_allgather zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer activation_checkpointing comms_logger tensorboard wandb csv_monitor comet
    flops_profiler wall_clock_breakdown memory_breakdown autotuning use_data_before_expert_parallelism
    hybrid_engine pipeline data_efficiency checkpoint aio dataloader_drop_last
    weight_quantization compile timers tensor_parallel steps_per_print
    dump_state vocabulary_size sequence_parallel_size data_parallel_size
    """,
    since={
        "0.18.9": "datastates_ckpt",
        "0.19.8": "managed_gradient_accumulation gradient_allreduce_op log_level disable_python_gc expert_parallel",
    },
    removed={
        "0.19.8": """
        amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula
        progressive_layer_drop quantize_training sparse_attention sparse_gradients
        """
    },
    never_read="quantize_training",
)

ZERO = KeyTable(
    always="""
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm load_from_fp32_weights
    elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
    cpu_offload_use_pin_memory cpu_offload prefetch_bucket_size param_persistence_threshold
    model_persistence_threshold max_live_parameters max_reuse_distance
    gather_16bit_weights_on_model_save gather_fp16_weights_on_model_save
    module_granularity_threshold use_all_reduce_for_fetch_params
    ignore_unused_parameters legacy_stage1 round_robin_gradients
    zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights
    zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply
    log_trace_cache_warnings enable_sanity_checks
    """,
    since={
        "0.18.9": "allgather_sequential save_muon_momentum_buffer_in_memory leaf_module",
        "0.19.8": "compute_grad_norm parameter_alignment",
    },
    removed={"0.19.8": "mics_shard_size mics_hierarchical_params_gather zeropp_loco_param"},
)


@dataclass(frozen=True)
class Keys:
    """The keys of one object in one release. A release between two tested ones knows what either knows."""

    known: frozenset[str]
    removed: frozenset[str]
    later: Mapping[str, str]  # keys that it passes over, and the first tested release that reads each


def keys_of(table: KeyTable, release: str) -> Keys:
    """The keys of `table` in a release of DeepSpeed."""
    number = number_of(release)
    at_most = min((tested for tested in TESTED if number_of(tested) >= number), key=number_of, default=TESTED[-1])
    known, removed, later = set(table.always.split()), set(), {}
    for first, keys in table.since.items():
        if number_of(first) <= number_of(at_most):
            known.update(keys.split())
        else:
            later.update(dict.fromkeys(keys.split(), first))
    for first, keys in table.removed.items():
        if number_of(first) <= number:
            removed.update(keys.split())
        else:
            known.update(set(keys.split()) - set(table.never_read.split()))
    return Keys(frozenset(known), frozenset(removed), later)


def number_of(release: str) -> tuple[int, ...]:
    """A release as numbers that can be compared; what follows them is left out."""
    match = re.match(r"\d+(\.\d+)*", release)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


@functools.cache
def installed_release() -> str:
    """The release of the installed DeepSpeed, or the last tested one where there is none. Imports nothing of it."""
    try:
        return metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return TESTED[-1]
