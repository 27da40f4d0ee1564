"""Files whose tests one worker runs, one after the other, in an order that is always the same.

They share ranks (the fixture `pool`), names on the machine, parsed sources, or the process that interprets kernels. No
set takes longer than the longest single files: at the end of a run no worker waits for another. Its first place tells
where it stands in the queue of `tests.lanes`.
"""

from __future__ import annotations

TOGETHER = tuple(
    places.split()
    for places in (
        "tests/testbed",
        "tests/policy",
        "tests/kernels",
        "tests/engine/hooks",
        "tests/engine/layouts",
        "tests/engine/extensions tests/engine/load tests/engine/hugging_face",
        "tests/engine/checkpoint/test_convert.py tests/engine/checkpoint/test_convert_16_bits.py"
        " tests/engine/checkpoint/test_convert_states.py",
        "tests/engine/checkpoint/test_background.py tests/engine/checkpoint/test_choices.py"
        " tests/engine/checkpoint/test_folders.py tests/engine/checkpoint/test_save.py",
        "tests/engine/checkpoint/test_damaged.py tests/engine/checkpoint/test_memory.py"
        " tests/engine/checkpoint/test_model_files.py tests/engine/checkpoint/test_universal.py",
        "tests/engine/checkpoint/test_load.py tests/engine/checkpoint/test_reshard.py",
        "tests/engine/test_native_parity.py tests/engine/test_replicas.py tests/engine/test_auto_replicas.py",
        "tests/engine/test_lora.py tests/engine/test_lora_checkpoints.py tests/engine/test_pipeline.py"
        " tests/engine/test_replay.py",
        "tests/engine/test_autocast.py tests/engine/test_bad_input.py tests/engine/test_balance_losses.py"
        " tests/engine/test_copies.py tests/engine/test_diagnostics.py tests/engine/test_doors.py"
        " tests/engine/test_grouped_products.py tests/engine/test_inference.py tests/engine/test_initialize.py"
        " tests/engine/test_parallelism.py",
        "tests/moe/test_early_gather.py tests/moe/test_fp16.py tests/moe/test_grouped_experts.py"
        " tests/moe/test_recompute.py tests/moe/test_replica_passes.py tests/moe/test_replicas.py"
        " tests/moe/test_rounding.py tests/moe/test_two_level.py",
        "tests/moe/test_schedules.py tests/moe/test_gradcheck.py tests/moe/test_out_of_step.py"
        " tests/moe/test_tensor_ranks.py",
        "tests/moe/test_tuner.py tests/moe/test_alike_layers.py",
        "tests/comm/test_agreement.py tests/comm/test_automatic.py tests/comm/test_callbacks.py",
        "tests/account tests/bench/test_autoep.py tests/bench/test_memory_breakdown.py tests/bench/test_windows.py",
        "tests/examples/test_finetune_mixtral.py tests/examples/test_hook_megatron_moe.py"
        " tests/examples/test_train_with_hugging_face.py tests/examples/test_training_scripts.py",
    )
)


def unit_of(nodeid: str) -> str:
    """The first place of the set that a test's file is in, or the file itself."""
    file = nodeid.split("::", 1)[0]
    return next((places[0] for places in TOGETHER if any(is_in(file, place) for place in places)), file)


def is_in(file: str, place: str) -> bool:
    return file == place or file.startswith(f"{place}/")
