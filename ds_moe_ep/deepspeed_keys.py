"""The keys that DeepSpeed 0.19.8 reads from a ds_config, so that a misspelt one can be named.

DeepSpeed refuses unknown keys inside `zero_optimization` and passes over those at the top level in silence.
"""

from __future__ import annotations

TOP_LEVEL = frozenset(
    """
    train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation
    optimizer scheduler fp16 bf16 bfloat16 torch_autocast data_types zero_optimization gradient_clipping
    prescale_gradients gradient_predivide_factor gradient_allreduce_op communication_data_type
    seq_parallel_communication_data_type disable_allgather zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer activation_checkpointing comms_logger tensorboard wandb csv_monitor comet
    flops_profiler wall_clock_breakdown memory_breakdown autotuning use_data_before_expert_parallelism
    hybrid_engine pipeline data_efficiency checkpoint aio dataloader_drop_last log_level
    datastates_ckpt weight_quantization compile timers tensor_parallel expert_parallel steps_per_print
    dump_state disable_python_gc vocabulary_size sequence_parallel_size
    """.split()
)

REMOVED = frozenset(
    """
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula
    progressive_layer_drop quantize_training sparse_attention sparse_gradients
    """.split()
)

ZERO = frozenset(
    """
    stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
    allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
    elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
    cpu_offload_use_pin_memory cpu_offload prefetch_bucket_size param_persistence_threshold
    model_persistence_threshold max_live_parameters max_reuse_distance
    gather_16bit_weights_on_model_save gather_fp16_weights_on_model_save
    module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential
    ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment
    zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights
    zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply
    log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module
    """.split()
)
