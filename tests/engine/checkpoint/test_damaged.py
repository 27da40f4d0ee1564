"""A checkpoint that cannot be loaded whole changes nothing: it is refused before the first weight is."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.checkpoint.test_reshard import BASE, run
from tests.engine.small_model import Job, make_engine
from tests.ranks import run_ranks

MAIN = "mp_rank_00_model_states.pt"
STATES = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
EXPERT = "layer_1_expert_5_mp_rank_00_model_states.pt"
JOB = replace(BASE, world_size=2, ep_size=2)
Told = tuple[str, bool]  # the refusal, and that no weight or state is another


def refused(jobs: Sequence[Job], folders: Sequence[Path]) -> list[dict[str, Told]]:
    return [{folder.name: refusal(engine, folder) for folder in folders} for engine in map(with_scheduler, jobs)]


def with_scheduler(job: Job) -> Any:
    return make_engine(job, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))


def refusal(engine: Any, folder: Path) -> Told:
    kept = [*engine.module.state_dict().values(), *engine.optimizer.single_partition_of_fp32_groups]
    before = [tensor.detach().clone() for tensor in kept]
    told = "nothing was refused"
    try:
        options = {"load_lr_scheduler_states": folder.name == "scheduler"}
        engine.load_checkpoint(str(folder), **options)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    return told, all(map(torch.equal, before, kept))


class Crafted:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def change(folder: Path, file: str, act: Callable[[Any], None]) -> None:
    content = torch.load(folder / "two" / file, weights_only=False)
    act(content)
    torch.save(content, folder / "two" / file)


def cut_short(folder: Path, file: str) -> None:
    path = folder / "two" / file
    path.write_bytes(path.read_bytes()[:-100])


def shorten_moments(content: Any) -> None:
    state = content["optimizer_state_dict"]["base_optimizer_state"]["state"]
    state[0]["exp_avg"] = state[0]["exp_avg"][:7].clone()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "lacking": (lambda folder: (folder / "two" / STATES).unlink(), "no optimizer states of data-parallel rank 1 of 2"),
    "other": (
        lambda folder: change(folder, STATES, lambda it: it["optimizer_state_dict"].pop("param_slice_mappings")),
        "cannot be cut anew (param_slice_mappings)",
    ),
    "moments": (lambda folder: change(folder, STATES, shorten_moments), "exp_avg"),
    "states": (lambda folder: cut_short(folder, STATES), "is cut off"),
    "expert": (lambda folder: cut_short(folder, EXPERT), "is cut off"),
    "weight": (
        lambda folder: change(folder, MAIN, lambda it: it["module"].update({"enter.bias": torch.zeros(1)})),
        "enter.bias is (1,) there",
    ),
    "counters": (lambda folder: change(folder, MAIN, lambda it: it.pop("skipped_steps")), "lacks skipped_steps"),
    "scheduler": (lambda folder: None, "no state of a learning rate's scheduler"),
}


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (("moments", "weight", "scheduler"), (EXPERT,)),
        pytest.param(tuple(DAMAGES), (MAIN, EXPERT, STATES), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_a_damaged_checkpoint_is_refused_on_every_rank_before_anything_is_changed(
    names: Sequence[str], files: Sequence[str], tmp_path: Path
) -> None:
    """Under its own ep_size and another. The control: the same folder undamaged loads, and changes weights."""
    run_ranks(2, run, [("whole", JOB)], [], tmp_path, timeout_s=120)
    for name in names:
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        DAMAGES[name][0](tmp_path / name)
    marker = tmp_path / "it ran"
    for file in files:
        folder = tmp_path / f"crafted {file}"
        shutil.copytree(tmp_path / "whole", folder)
        change(folder, file, lambda it: it.update(note=Crafted(marker)))
    crafted = sorted(tmp_path.glob("crafted*"))
    folders = [*(tmp_path / name for name in names), *crafted, tmp_path / "whole"]
    jobs = [replace(JOB, seed=9), replace(JOB, seed=9, ep_size=1)]
    for by_size in run_ranks(2, refused, jobs, folders, timeout_s=240):
        for told in by_size:
            assert told.pop("whole") == ("nothing was refused", False)
            for folder in crafted:
                refusal, is_unchanged = told.pop(folder.name)
                assert is_unchanged and "could run code of the file's" in refusal, refusal
            for name, (refusal, is_unchanged) in told.items():
                assert is_unchanged, (name, refusal)
                assert refusal.startswith("EngineError") and DAMAGES[name][1] in refusal, (name, refusal)
    assert not marker.exists()
    torch.load(crafted[0] / "two" / crafted[0].name.removeprefix("crafted "), weights_only=False)
    assert marker.exists(), "the control: read as any pickle it runs"
