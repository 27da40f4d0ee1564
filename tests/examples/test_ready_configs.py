"""The ds_configs to begin with on 1, 4 and 8 GPUs: they fit their GPUs, and their twins train on the CPU."""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from ds_moe_ep.check.config import Budget, ModelCheck, check_config
from ds_moe_ep.config.knobs import MEDIUM, ModelConfig
from ds_moe_ep.config.section import load_ds_config, read_section
from ds_moe_ep.config.shipped import shipped_ds_configs
from ds_moe_ep.config.training import read_training, shipped_sizes
from ds_moe_ep.errors import MoEError, TopologyError
from tests.examples.training_scripts import EXAMPLES
from tests.ranks import RankError, RankPool, signal_itself

NUM_STEPS = 4


@pytest.mark.parametrize(("ranks", "gpu_gb"), [(1, 24), (4, 40), (8, 80)])
def test_each_fills_its_gpus_and_leaves_room_for_uneven_routing(ranks: int, gpu_gb: int) -> None:
    check = check_config(f"ep{ranks}", ranks, Budget(gpu_gb=gpu_gb))
    assert isinstance(check.details, ModelCheck)
    assert check.training.world_size == check.training.ep_size == ranks
    assert check.training.precision == "bf16"
    assert 0.7 * gpu_gb * 1e9 < check.details.memory.peak, "a smaller GPU would do"
    assert check.details.load_that_fits > 3
    with pytest.raises(MoEError, match="gpu_gb="):  # the control: half of that is too little
        check_config(f"ep{ranks}", ranks, Budget(gpu_gb=gpu_gb / 2))


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_each_has_the_medium_models_widths_and_a_twin_of_the_same_routing(ranks: int) -> None:
    section, twin = (read_section(load_ds_config(f"ep{ranks}{kind}")) for kind in ("", "_cpu"))
    assert section.moe == twin.moe
    assert widths(section.model) == widths(MEDIUM) != widths(twin.model)


def widths(model: ModelConfig | None) -> tuple[int, ...]:
    assert model is not None
    return (model.hidden_size, model.num_heads, model.expert_width, model.sequence_length)


@pytest.mark.parametrize(
    ("name", "ranks", "fitting"),
    [
        ("ep16", 8, "ep8.json or ep8_cpu.json, which fit 8 ranks"),
        ("ep16_cpu", 1, "ep1.json or ep1_cpu.json, which fit 1 rank"),
        ("ep8", 4, "ep4.json or ep4_cpu.json, which fit 4 ranks"),
        ("ep1", 8, "ep8.json or ep8_cpu.json, which fit 8 ranks"),
        ("tp8_pp2", 8, "ep8.json or ep8_cpu.json, which fit 8 ranks"),
        (
            "ep8",
            16,
            "ep16.json or ep16_cpu.json or pp2_ep8.json or pp2_ep8_cpu.json or tp2_ep8.json or tp2_ep8_cpu.json or "
            "tp2_pp2_ep4.json or tp2_pp2_ep4_cpu.json or tp8_pp2.json or tp8_pp2_cpu.json, which fit 16 ranks",
        ),
    ],
)
def test_a_world_of_another_size_is_told_the_ds_config_that_fits_it(name: str, ranks: int, fitting: str) -> None:
    with pytest.raises(MoEError, match=f", or take {re.escape(fitting)}$"):
        check_config(name, ranks)


@pytest.mark.parametrize(
    "changes",
    [
        {"train_batch_size": None, "train_micro_batch_size_per_gpu": None},
        {"train_micro_batch_size_per_gpu": "x"},
        {"gradient_accumulation_steps": 3},
        {"zero_optimization": {"stage": 3}},
    ],
)
def test_what_is_wrong_for_another_reason_names_no_other_ds_config(changes: dict[str, Any]) -> None:
    with pytest.raises(MoEError) as caught:
        read_training({**load_ds_config("ep8"), **changes}, 8, 8)
    assert "or take" not in str(caught.value)


def test_where_nothing_fits_the_world_nothing_is_offered() -> None:
    with pytest.raises(TopologyError, match=r"lower ep_size$"):
        check_config("ep16", 12)


def test_the_size_of_every_shipped_ds_config_is_that_of_its_name() -> None:
    sizes = shipped_sizes()
    assert sizes.keys() == shipped_ds_configs().keys() and len(sizes) == 16
    for name, size in sizes.items():
        assert size == (16 if "_ep" in name or "pp2" in name else int(name.removesuffix("_cpu").removeprefix("ep")))


def run_script(name: str, text: str) -> tuple[str, str]:
    """Output of train_ep16.py with a ds_config, and how it ended; the world stays for the next one."""
    sys.path.insert(0, str(EXAMPLES))
    import train_ep16

    sys.argv = ["train_ep16.py", "--deepspeed_config", name, "--data", text, "--steps", str(NUM_STEPS)]
    sys.argv += ["--report-every", "1", "--eval-batches", "1"]
    printed = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            mock.patch.object(dist, "destroy_process_group"),
        ):
            train_ep16.main()
    except (MoEError, SystemExit) as error:
        return printed.getvalue(), f"{type(error).__name__}: {error}"
    return printed.getvalue(), "done"


@pytest.mark.parametrize("ranks", [1, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_the_cpu_twin_trains_with_the_script_and_the_loss_falls(pool: RankPool, ranks: int, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the rows of one peer go out while the experts compute those of another; " * 4000)
    results = pool.run(ranks, run_script, f"ep{ranks}_cpu", str(text), timeout_s=120)
    assert [ended for _, ended in results] == ["done"] * ranks
    losses = [float(loss) for loss in re.findall(r"step \d+/4 \| loss ([\d.]+)", results[0][0])]
    assert len(losses) == NUM_STEPS and losses[-1] < losses[0] - 0.3
    assert all(printed == "" for printed, _ in results[1:])


def test_the_script_tells_a_world_of_another_size_what_is_wrong_before_it_builds_anything(
    pool: RankPool, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("some text. " * 4000)
    for printed, ended in pool.run(4, run_script, "ep16_cpu", str(tmp_path / "text.txt")):
        assert "ep4.json or ep4_cpu.json, which fit 4 ranks" in printed + ended
        assert "step" not in printed


def train_until_rank_1_stops(text: str, config: str) -> None:
    """Rank 1 stops where the script sums the figures of a step, in which the others wait for it."""
    sys.path.insert(0, str(EXAMPLES))
    import train_ep16

    def stop_or(values: Sequence[float], device: torch.device) -> list[float]:
        if dist.get_rank() == 1:
            signal_itself(signal.SIGSTOP)
        return largest(values, device)

    largest, train_ep16.largest = train_ep16.largest, stop_or
    train_ep16.main(["--deepspeed_config", config, "--data", text, "--steps", "3"])


def test_a_rank_that_stops_between_steps_ends_the_others_within_the_limit(pool: RankPool, tmp_path: Path) -> None:
    text, config = tmp_path / "text.txt", tmp_path / "ds.json"
    text.write_text("some text. " * 4000)
    values = load_ds_config("ep4_cpu")
    config.write_text(json.dumps({**values, "moe_ep": {**values["moe_ep"], "timeout_s": 2, "schedule": "serial"}}))
    with pytest.raises(RankError) as caught:
        pool.run(4, train_until_rank_1_stops, str(text), str(config), timeout_s=120)
    ends = {rank: failure.message for rank, failure in caught.value.failures.items() if rank != 1}
    by_watch = {rank for rank, message in ends.items() if message.startswith("exit code 70")}
    assert by_watch and ends.keys() == {0, 2, 3}
    assert all("Connection closed by peer" in ends[rank] for rank in ends.keys() - by_watch), ends  # another was first
