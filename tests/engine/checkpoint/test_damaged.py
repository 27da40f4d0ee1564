"""A checkpoint that cannot be loaded whole changes nothing: it is refused before the first weight is."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ds_moe_ep
from ds_moe_ep.engine.checkpoint.convert.read import check_undamaged, load_file
from ds_moe_ep.engine.checkpoint.loading.random_states import KEY, give_back, problem_of, states_of
from ds_moe_ep.engine.checkpoint.preflight import Preflight
from ds_moe_ep.errors import EngineError
from tests.engine.checkpoint.checkpoints import same, tensors
from tests.engine.checkpoint.test_reshard import BASE, run
from tests.engine.small_model import Job, make_engine, make_model
from tests.moe.layer_cases import D
from tests.ranks import RankPool

MAIN = "mp_rank_00_model_states.pt"
STATES = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
EXPERT = "layer_1_expert_5_mp_rank_00_model_states.pt"
JOB = replace(BASE, world_size=2, ep_size=2)
Told = tuple[str, bool]  # the refusal, and that no weight or state is another


def refused(
    jobs: Sequence[Job], folders: Sequence[Path], unchecked: Path
) -> tuple[list[dict[str, Told]], Told, dict[str, str]]:
    """Refusals of each job's engine by folder, that of the folder `unchecked` without the knob `check_crc`, and those
    of folders whose crafted file takes its place behind the preflight, and of a crafted universal checkpoint.
    """
    engines = list(map(with_scheduler, jobs))
    told = [{folder.name: refusal(engine, folder) for folder in folders} for engine in engines]
    swapped = {
        folder.name: swapped_refusal(engines[0], folder) for folder in folders if folder.name.startswith("crafted")
    }
    engines[1]._config.load_universal_checkpoint = True
    swapped["universal"] = refusal(engines[1], unchecked.with_name("universal"), tag="two")[0]
    config = jobs[0].ds_config | {"moe_ep": {"check_crc": False}}
    return told, refusal(ds_moe_ep.initialize(model=make_model(jobs[0]), config=config)[0], unchecked), swapped


def swapped_refusal(engine: Any, crafted: Path) -> str:
    """The error of a load whose folder is whole until the preflight has looked through it. Collective."""
    folder, is_first = crafted.with_name(f"swapped {crafted.name}"), dist.get_rank() == 0
    if is_first:
        shutil.copytree(crafted.with_name("whole"), folder)
    dist.barrier()
    before_load, name = Preflight.before_load, crafted.name.removeprefix("crafted ")
    kind = f"{name.split('_')[0]}_*"  # of every rank: one that is refused alone would leave the others waiting

    def swap(self: Preflight, load: Any) -> None:
        before_load(self, load)
        for path in (folder / "two").glob(kind) if is_first else ():
            shutil.copyfile(crafted / "two" / name, path)
        dist.barrier()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Preflight, "before_load", swap)
        return refusal(engine, folder)[0]


def with_scheduler(job: Job) -> Any:
    return make_engine(job, lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))


def refusal(engine: Any, folder: Path, tag: str | None = None) -> Told:
    kept = [*engine.module.state_dict().values(), *engine.optimizer.single_partition_of_fp32_groups]
    before = [tensor.detach().clone() for tensor in kept]
    told = "nothing was refused"
    try:
        options = {"load_lr_scheduler_states": folder.name.startswith("scheduler")}
        engine.load_checkpoint(str(folder), tag=tag, **options)
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


def flip_bit(folder: Path, file: str) -> None:
    """Changes one bit in the middle of the file's largest tensor."""
    path = folder / "two" / file
    content, largest = bytearray(path.read_bytes()), max(tensors(torch.load(path, weights_only=False)), key=torch.numel)
    values = largest.detach().numpy().tobytes()
    content[content.index(values) + len(values) // 2] ^= 4
    path.write_bytes(content)


def other_width(content: Any) -> None:
    name = next(name for name in content if name.endswith("fc1.weight"))
    content[name] = content[name][:, :-1].clone()


def other_name(content: Any) -> None:
    name = next(name for name in content if name.endswith("fc1.weight"))
    content[name.replace("fc1", "fc3")] = content.pop(name)


GATE = "layers.1.deepspeed_moe.gate.wg.weight"
OTHER_SCHEDULER = {"step_size": 3, "gamma": 0.1, "base_lrs": [0.03] * 2, "last_epoch": 2, "_last_lr": [0.03] * 2}
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
    "scheduler of a kind": (
        lambda folder: change(folder, MAIN, lambda it: it.update(lr_scheduler=OTHER_SCHEDULER)),
        "its scheduler's state lacks factor, and this run's ConstantLR does: another scheduler was saved",
    ),
    "scheduler of groups": (
        lambda folder: change(folder, MAIN, lambda it: it.update(lr_scheduler=constant_rate(3))),
        "the scheduler's base_lrs has 3 values there and 2 here",
    ),
    "bit of a weight": (lambda folder: flip_bit(folder, MAIN), f"{MAIN}: is damaged, the checksum of its part"),
    "bit of an expert": (lambda folder: flip_bit(folder, EXPERT), f"{EXPERT}: is damaged, the checksum of its part"),
    "bit of states": (lambda folder: flip_bit(folder, STATES), f"{STATES}: is damaged, the checksum of its part"),
    "shape of an expert": (lambda folder: change(folder, EXPERT, other_width), "experts.5.fc1.weight is"),
    "name in an expert": (lambda folder: change(folder, EXPERT, other_name), "lacks 1 tensors of the expert"),
    "gate": (
        lambda folder: change(folder, MAIN, lambda it: it["module"].update({GATE: torch.zeros(4, D)})),
        f"{GATE} is (4, {D}) there",
    ),
    "random": (lambda folder: change(folder, MAIN, lambda it: it[KEY].pop("ranks")), f"{KEY} is no list"),
}


SOME = ("moments", "weight", "scheduler of a kind", "bit of an expert", "bit of states", "shape of an expert")


def constant_rate(num_groups: int) -> dict[str, Any]:
    """The state of the scheduler for so many parameter groups."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)]} for _ in range(num_groups)]
    return dict(torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(groups, lr=0.03), 1.0).state_dict())


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (SOME, (EXPERT,)),
        pytest.param(tuple(DAMAGES), (MAIN, EXPERT, STATES), marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_a_damaged_checkpoint_is_refused_on_every_rank_before_anything_is_changed(
    pool: RankPool, names: Sequence[str], files: Sequence[str], tmp_path: Path
) -> None:
    """Under its own ep_size and another. The control: the same folder undamaged loads, and changes weights."""
    pool.run(2, run, [("whole", JOB)], [], tmp_path, timeout_s=120)
    for name in names:
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        DAMAGES[name][0](tmp_path / name)
    marker = tmp_path / "it ran"
    for file in files:
        folder = tmp_path / f"crafted {file}"
        shutil.copytree(tmp_path / "whole", folder)
        change(folder, file, lambda it: it.update(note=Crafted(marker)))
    crafted = sorted(tmp_path.glob("crafted*"))
    of_parameter = tmp_path / "universal" / "two" / "zero" / "enter.weight"
    of_parameter.mkdir(parents=True)
    torch.save({"param": Crafted(marker)}, of_parameter / "fp32.pt")
    folders = [*(tmp_path / name for name in names), *crafted, tmp_path / "whole"]
    jobs = [replace(JOB, seed=9), replace(JOB, seed=9, ep_size=1)]
    for by_size, unchecked, swapped in pool.run(
        2, refused, jobs, folders, tmp_path / "bit of an expert", timeout_s=240
    ):
        assert unchecked == ("nothing was refused", False), "the control: without the checksums the bit is not seen"
        assert set(swapped) == {"universal", *(folder.name for folder in crafted)}
        for name, told in swapped.items():
            assert "could run code of the file's" in told, (name, told)
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


def flips(path: Path, content: bytes, bits: Sequence[int]) -> tuple[int, int]:
    """How many single flipped bits are refused, and how many of those load as something else where none is looked for.

    Asserts that what is not refused loads as it was written.
    """
    written = torch.load(path, weights_only=False)
    refused = silent = 0
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        is_same = loaded = False
        try:
            found = load_file(path)
            loaded, is_same = True, same(found, written)
        except EngineError:
            pass
        try:
            check_undamaged(path)
        except EngineError:
            refused, silent = refused + 1, silent + (loaded and not is_same)
            continue
        assert not loaded or is_same, f"bit {bit} passes silently"
    return refused, silent


@pytest.mark.parametrize("step", [41, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_flipped_bit_anywhere_in_a_file_is_refused_or_changes_nothing_that_is_loaded(
    step: int, tmp_path: Path
) -> None:
    """The control: without the checksums many would be loaded as other numbers, without a word."""
    path = tmp_path / MAIN
    tensor = torch.arange(64.0).sin()
    torch.save({"module": {"weight": tensor}, "moments": tensor.view(8, 8) ** 2, "steps": 7, "note": "kept"}, path)
    content = path.read_bytes()
    refused, silent = flips(path, content, range(0, 8 * len(content), step))
    assert refused > 512 // step and silent > 256 // step


def test_random_states_of_another_size_are_told() -> None:
    own = states_of(torch.device("cpu"))
    assert problem_of(own, own) == ""
    for name in ("torch", "python", "numpy"):
        assert problem_of({key: value for key, value in own.items() if key != name}, own) == "lacks a generator's state"
    assert "torch's generator" in problem_of(own | {"torch": own["torch"][:-8]}, own)
    assert "Python's or numpy's" in problem_of(own | {"python": (3, own["python"][1][:-1], None)}, own)


@pytest.mark.parametrize("is_earlier", [False, True], ids=["a tensor", "plain values"])
def test_pythons_random_state_is_given_back_in_either_form(is_earlier: bool) -> None:
    device = torch.device("cpu")
    saved, plain = states_of(device), random.getstate()
    assert isinstance(saved["python"][1], torch.Tensor)
    if is_earlier:
        saved["python"] = plain
    assert problem_of(saved, states_of(device)) == ""
    drawn = random.random()
    assert random.random() != drawn, "the control: it draws on"
    give_back(saved, device)
    assert random.getstate() == plain and random.random() == drawn
