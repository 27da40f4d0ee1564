"""Optimizer states of ZeRO 0, 1 and 2 load under another ep_size and on another number of ranks, bit for bit.

By parameter: master weights, both moments of Adam and its step, by its global name. The controls: states that were
not loaded differ, and so do those of an expert beside the right one.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.small_model import NUM_EXPERTS, Job, batches, make_engine, train_steps
from tests.ranks import run_ranks

KINDS = ("exp_avg", "exp_avg_sq")
BASE = Job(top_k=2, stage=1)
States = dict[str, Tensor]


def states_of(engine: Any, job: Job) -> States:
    """Master weights and moments of this rank's parameters, whole and by global name. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    from ds_moe_ep.model.initialize import global_name

    index, found, optimizer = job.expert_index(dist.get_rank()), {}, engine.optimizer
    if job.stage == 0:
        return plain_states_of(engine, index)
    for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):  # DeepSpeed links moments when it steps
        lazy_init_hp_params_optimizer_state(optimizer.bit16_groups[group], flat, optimizer.optimizer.state)
    for name, parameter in engine.module.named_parameters():
        known = global_name(name, index)
        found[f"{known} master"] = safe_get_full_fp32_param(parameter).clone()
        for kind in KINDS:
            found[f"{known} {kind}"] = safe_get_full_optimizer_state(parameter, kind).clone()
    state = engine.optimizer.optimizer.state
    found["step"] = torch.tensor([float(state[flat]["step"]) for flat in state])[:1]
    found["options"] = torch.tensor([group["lr"] for group in engine.optimizer.optimizer.param_groups])[:1]
    return found


def plain_states_of(engine: Any, index: Any) -> States:
    """The same without ZeRO, where nothing is cut."""
    from ds_moe_ep.model.initialize import global_name

    found = {}
    for name, parameter in engine.module.named_parameters():
        state, known = engine.optimizer.state[parameter], global_name(name, index)
        found |= {f"{known} {kind}": state[kind].clone() for kind in (*KINDS, "step")}
        found[f"{known} master"] = parameter.detach().clone()
    found["options"] = torch.tensor([group["lr"] for group in engine.optimizer.param_groups])[:1]
    return found


def save(job: Job, folder: Path) -> tuple[States, list[float]]:
    """The states where the checkpoint was saved, after two steps, and the loss of another."""
    engine, steps = make_engine(job), batches(job)
    train_steps(engine, job, steps[:2])
    optimizer = engine.optimizer if job.stage == 0 else engine.optimizer.optimizer
    optimizer.param_groups[0]["lr"] = 0.02  # as a scheduler does
    engine.save_checkpoint(str(folder), tag="two")
    return states_of(engine, job), train_steps(engine, job, steps[2:])


def load(job: Job, folder: Path) -> tuple[States, list[float]]:
    """The states after loading, and the loss of another step."""
    engine = make_engine(replace(job, seed=job.seed + 1))
    path, _ = engine.load_checkpoint(str(folder))
    assert path is not None and engine.global_steps == 2
    train = job.world_size == BASE.world_size
    return states_of(engine, job), train_steps(engine, job, batches(job)[2:]) if train else []


def run(saves: Sequence[tuple[str, Job]], loads: Sequence[tuple[str, Job]], folder: Path) -> tuple[Any, Any]:
    saved = {name: save(job, folder / name) for name, job in saves}
    return saved, [load(job, folder / name) for name, job in loads]


def merged(by_rank: Sequence[States]) -> States:
    whole: States = {}
    for states in by_rank:
        for name, value in states.items():
            assert torch.equal(whole.setdefault(name, value), value), f"ranks differ in {name}"
    return whole


def differing(found: States, expected: States) -> list[str]:
    assert set(found) == set(expected)
    return [name for name, value in expected.items() if not torch.equal(found[name].cpu(), value.cpu())]


def test_states_load_under_every_ep_size_and_training_goes_on(tmp_path: Path) -> None:
    saves = [(f"ep{ep}", replace(BASE, ep_size=ep)) for ep in (1, 2, 4)]
    loads = [(f"ep{saved}", replace(BASE, ep_size=ep)) for saved, ep in ((1, 2), (2, 4), (4, 1), (4, 2))]
    extra = replace(BASE, stage=2, bf16=True)
    saves.append(("bf16", replace(extra, ep_size=2)))
    loads += [("bf16", replace(extra, ep_size=4)), ("bf16", replace(extra, ep_size=1))]
    expected = all_load(saves, loads, tmp_path)
    assert sum("exp_avg_sq" in name and "deepspeed_experts" in name for name in expected["ep4"]) == 8 * NUM_EXPERTS
    moments = [
        next(name for name in expected["ep4"] if f"experts.{expert}.fc1.weight exp_avg" in name) for expert in (0, 1)
    ]
    assert not torch.equal(*(expected["ep4"][name] for name in moments)), "the control: a neighbour's moments differ"


@pytest.mark.slow
def test_states_load_under_the_other_ep_sizes(tmp_path: Path) -> None:
    saves = [(f"ep{ep}", replace(BASE, ep_size=ep)) for ep in (1, 2)]
    all_load(saves, [("ep1", replace(BASE, ep_size=4)), ("ep2", replace(BASE, ep_size=1))], tmp_path)


def test_states_without_zero_load_under_another_ep_size(tmp_path: Path) -> None:
    """In a world of its own: DeepSpeed names these files by the largest expert-parallel group of the process."""
    plain = replace(BASE, stage=0, ep_size=2)
    all_load([("plain", plain)], [("plain", replace(plain, ep_size=ep)) for ep in (1, 4)], tmp_path)


def all_load(saves: Sequence[tuple[str, Job]], loads: Sequence[tuple[str, Job]], folder: Path) -> dict[str, States]:
    """Asserts that all that is loaded is what was saved, and goes on as it did; returns that by name."""
    by_rank = run_ranks(4, run, saves, loads, folder, timeout_s=280)
    expected = {name: merged([saved[name][0] for saved, _ in by_rank]) for name, _ in saves}
    for index, (name, job) in enumerate(loads):
        found = merged([loaded[index][0] for _, loaded in by_rank])
        assert differing(found, expected[name]) == [], (name, job)
        losses, undisturbed = by_rank[0][1][index][1], by_rank[0][0][name][1]
        assert losses == pytest.approx(undisturbed, rel=2e-2 if job.bf16 else 1e-5), (name, job)
    return expected


def test_states_load_on_more_and_on_fewer_ranks(tmp_path: Path) -> None:
    small = replace(BASE, world_size=2, ep_size=2)
    saved, _ = zip(*run_ranks(2, run, [("two", small)], [], tmp_path, timeout_s=120), strict=True)
    on_two = merged([states["two"][0] for states in saved])
    loads = [("two", replace(BASE, ep_size=ep)) for ep in (2, 4)]
    by_rank = run_ranks(4, run, [("four", replace(BASE, ep_size=4))], loads, tmp_path, timeout_s=150)
    for index in range(len(loads)):
        assert differing(merged([loaded[index][0] for _, loaded in by_rank]), on_two) == []
    on_four = merged([states["four"][0] for states, _ in by_rank])
    back = run_ranks(2, run, [], [("four", small), ("four", replace(small, ep_size=1))], tmp_path, timeout_s=120)
    for index in range(2):
        assert differing(merged([loaded[index][0] for _, loaded in back]), on_four) == []


def refused(job: Job, folders: Sequence[Path]) -> list[str]:
    engine, told = make_engine(job), []
    for folder in folders:
        try:
            engine.load_checkpoint(str(folder))
            told.append("nothing was refused")
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_a_file_too_few_or_of_another_form_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(2, run, [("whole", replace(BASE, world_size=2, ep_size=2))], [], tmp_path, timeout_s=120)
    for name in ("lacking", "other"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
    file = "two/zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (tmp_path / "lacking" / file).unlink()
    states = torch.load(tmp_path / "other" / file, weights_only=False)
    del states["optimizer_state_dict"]["param_slice_mappings"]
    torch.save(states, tmp_path / "other" / file)
    job = replace(BASE, world_size=2, ep_size=1)
    for lacking, other in run_ranks(2, refused, job, [tmp_path / "lacking", tmp_path / "other"], timeout_s=120):
        assert lacking.startswith("EngineError") and "no optimizer states of data-parallel rank 1 of 2" in lacking
        assert other.startswith("EngineError") and "cannot be cut anew (param_slice_mappings)" in other
