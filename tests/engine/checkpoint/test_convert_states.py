"""Optimizer states carried to another ep_size without ranks: DeepSpeed's own layer loads them by its own rules.

By parameter, bit for bit: what is loaded is what was saved (the controls of that comparison are `test_reshard`'s), and
what the loading engine saves again is, file by file, what the conversion wrote. A killed conversion goes on.
"""

from __future__ import annotations

import os
import pathlib
import re
import runpy
import shutil
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.checkpoint.convert import groups
from ds_moe_ep.engine.checkpoint.convert.prepare import prepare
from ds_moe_ep.errors import EngineError, MoEError
from tests.engine.checkpoint.checkpoints import same, tensors
from tests.engine.checkpoint.test_reshard import differing, merged, states_of
from tests.engine.small_model import Job, batches, make_engine, train_steps
from tests.ranks import RankPool, _fork_server

Folder = pathlib.Path
SIZES = ("param_shapes", "dp_world_size", "num_experts", "global_steps")  # of the file with the dense weights
BASE = Job(top_k=2, stage=1)
CONSECUTIVE: list[tuple[Job, Job]] = [  # the run that saves, and the one that loads
    (BASE, replace(BASE, ep_size=2)),
    (replace(BASE, stage=2, bf16=True, ep_size=2), replace(BASE, stage=2, bf16=True)),
]
PLAIN = (replace(BASE, stage=0, ep_size=1), replace(BASE, stage=0, ep_size=4))
APART = [PLAIN, (replace(BASE, ep_size=2, interleaved=True), BASE)]  # ranks of a group in one world lie in one way


def target_config(job: Job) -> dict[str, Any]:
    return job.ds_config | {"moe_ep": {"ep_size": job.ep_size, "num_experts": job.num_experts}}


def carry(ways: Sequence[tuple[Job, Job]], folder: Folder) -> list[tuple[Any, Any]]:
    """The states of each run when it saved, and those of DeepSpeed's layer that loaded the converted folder."""
    found = []
    for index, (saves, loads) in enumerate(ways):
        place = folder / str(index)
        engine = make_engine(saves)
        train_steps(engine, saves, batches(saves)[:2])
        engine.save_checkpoint(str(place / "saved"), tag="two")
        before = states_of(engine, saves)
        if saves.ep_size > 1:  # else an expert's place on a rank is its place over all ranks
            engine._config.load_universal_checkpoint = True
            with pytest.raises(
                EngineError, match="a universal checkpoint has one set of states per place of an expert"
            ):
                engine.load_checkpoint(str(place / "saved"))
        if dist.get_rank() == 0:
            prepare(place / "saved", place / "carried", target_config(loads)).write()
        dist.barrier()
        native = replace(loads, layer="native", seed=saves.seed + 1)
        engine = make_engine(native)
        assert engine.load_checkpoint(str(place / "carried"))[0] is not None
        assert engine.global_steps == 2
        found.append((before, states_of(engine, native)))
        engine.save_checkpoint(str(place / "again"), tag="two")
    return found


def assert_carried(pool: RankPool, ways: Sequence[tuple[Job, Job]], folder: Folder) -> None:
    """The states of each way are loaded as they were saved; what is saved then is what the conversion wrote."""
    by_rank = pool.run(4, carry, ways, folder, timeout_s=200)
    for index, way in enumerate(ways):
        expected, found = (merged([ranks[index][which] for ranks in by_rank]) for which in (0, 1))
        assert differing(found, expected) == [], way
        carried, again = (
            {path.name: path for path in (folder / str(index) / name / "two").iterdir()}
            for name in ("carried", "again")
        )
        assert set(carried) == set(again)
        for name, path in carried.items():
            one, other = (torch.load(each, weights_only=False) for each in (path, again[name]))
            key = next((key for key in one if "optim_states" in name and key.startswith("optimizer")), None)
            assert "mp_rank" in name
            if key is not None or "expert" in name:
                assert same(one.get(key, one), other.get(key, other)), (way, name)
            else:
                assert same([one[each] for each in SIZES], [other[each] for each in SIZES]), way


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A checkpoint of ep_size=4 on four ranks."""
    folder = tmp_path_factory.mktemp("carried")
    assert_carried(pool, CONSECUTIVE, folder)
    return folder / "0" / "saved"


@pytest.mark.slow
def test_states_without_zero_and_of_groups_whose_ranks_lie_apart_are_carried(pool: RankPool, tmp_path: Folder) -> None:
    assert_carried(pool, APART, tmp_path)
    there_and_back(tmp_path / "0" / "carried", tmp_path, PLAIN[1], (2, 4))


def there_and_back(source: Folder, folder: Folder, run: Job, sizes: tuple[int, int]) -> None:
    """Asserts that states come back bit for bit from another ep_size and number of ranks."""
    prepare(source, folder / "there", target_config(replace(run, ep_size=sizes[0])), world_size=sizes[1]).write()
    prepare(folder / "there", folder / "back", target_config(run), world_size=4).write()
    paths = list((source / "two").glob("*optim_states.pt"))
    assert len(paths) == 4
    for path in paths:
        one, other = (torch.load(each, weights_only=False) for each in (path, folder / "back" / "two" / path.name))
        key = next(key for key in one if key.startswith("optimizer"))
        assert same(one[key], other[key]), path.name


def test_more_ranks_and_back_is_exact(saved: Folder, tmp_path: Folder) -> None:
    there_and_back(saved, tmp_path, BASE, (8, 16))


def die_at(number: int, source: Folder, target: Folder) -> None:
    """Converts, and is killed with a file written and not yet renamed."""
    torch.set_num_threads(1)
    replace_file, count = pathlib.Path.replace, 0

    def dies(path: Folder, place: Folder) -> Folder:
        nonlocal count
        count += 1
        if count == number:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return replace_file(path, place)

    pathlib.Path.replace = dies  # type: ignore[assignment, method-assign]
    prepare(source, target, target_config(replace(BASE, ep_size=2))).write()


def test_a_killed_conversion_goes_on_and_gives_the_same_bytes(saved: Folder, tmp_path: Folder) -> None:
    source, config = saved, target_config(replace(BASE, ep_size=2))
    prepare(source, tmp_path / "undisturbed", config).write()
    for number in (3, 15):
        killed = _fork_server().Process(target=die_at, args=(number, source, tmp_path / "target"))
        killed.start()
        killed.join(60)
        assert killed.exitcode == -signal.SIGKILL
        assert not (tmp_path / "target").exists()
    partial = tmp_path / "target.part"
    finished = {path.name: path.stat().st_ino for path in (partial / "two").glob("*.pt")}
    damaged = partial / "two" / "layer_0_expert_3_mp_rank_00_model_states.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError, match=r"target\.part: exists, .*no unfinished conversion of this"):
        prepare(source, tmp_path / "target", target_config(replace(BASE, ep_size=1)))
    conversion = prepare(source, tmp_path / "target", config)
    assert "are there from an earlier run), " in conversion.room()
    conversion.write()
    kept = [name for name, node in finished.items() if (tmp_path / "target/two" / name).stat().st_ino == node]
    assert len(finished) == 14 and set(finished) - set(kept) == {damaged.name}
    whole, resumed = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("undisturbed", "target")
    )
    assert whole == resumed
    assert {f"{path}" for path in whole} >= {"SHA256SUMS", "conversion.json", "latest"}


def test_a_damaged_file_is_named(saved: Folder, tmp_path: Folder) -> None:
    for name in ("layer_1_expert_5_mp_rank_00_model_states.pt", "zero_pp_rank_2_mp_rank_00_optim_states.pt"):
        source = tmp_path / name
        shutil.copytree(saved, source)
        path = source / "two" / name
        content = bytearray(path.read_bytes())
        values = next(tensors(torch.load(path, weights_only=False))).numpy().tobytes()
        content[content.index(values) + len(values) // 2] ^= 1
        path.write_bytes(content)
        conversion = prepare(source, tmp_path / "target", target_config(replace(BASE, ep_size=2)))
        with pytest.raises(EngineError, match=rf"{name}: is damaged, the checksum of its part .*; take another copy"):
            conversion.write()
        assert not (tmp_path / "target.part").exists()


def test_states_that_cannot_be_carried_are_refused_by_name(saved: Folder, tmp_path: Folder) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(saved, plain)
    for path in (plain / "two").glob("zero_*"):
        path.unlink()
    of_experts = {"moe": True, "params": [0]}
    states = {"optimizer": {"state": {}, "param_groups": [of_experts]}}
    torch.save(states, plain / "two" / "expp_rank_0_mp_rank_00_optim_states.pt")
    even = target_config(replace(BASE, ep_size=2))
    refusals: list[tuple[Folder, dict[str, Any], str]] = [
        (
            plain,
            even | {"zero_optimization": {"stage": 0}},
            r"has states of 1 parameters of experts, and its experts' ",
        ),
        (plain, even, r"stage=1: .* has optimizer states without ZeRO, which load with stage 0 alone"),
        (saved, even | {"zero_optimization": {"stage": 3}}, r"stage=3: .* of ZeRO 1 or 2, which load with these alone"),
        (
            saved,
            even | {"moe_ep": {"num_experts": 9, "ep_size": 3}},
            r"ep_size=3 does not divide the 8 experts of layers\.0",
        ),
    ]
    for source, config, message in refusals:
        with pytest.raises(MoEError, match=message):
            prepare(source, tmp_path / "target", config)
    without = prepare(saved, tmp_path / "target", even, weights_only=True)
    assert "load_module_only=True" in str(without) and not any("optim" in file.name for file in without.target.files)


def test_weights_leave_in_fp32_with_every_expert_and_deepspeeds_scripts_fail_aloud(
    saved: Folder, tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from safetensors.torch import load_file

    monkeypatch.setattr(sys, "argv", ["zero_to_fp32.py", str(saved), str(tmp_path / "weights")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(saved / "zero_to_fp32.py"), run_name="__main__")
    assert end.value.code == 0
    weights = {
        name: value for file in (tmp_path / "weights").glob("*.safetensors") for name, value in load_file(file).items()
    }
    expected = masters(saved)
    assert set(weights) == set(expected) and len(weights) == 2 * 8 * 4 + 10
    assert all(torch.equal(weights[name].flatten(), value) for name, value in expected.items())
    one, other = (f"layers.0.deepspeed_moe.experts.deepspeed_experts.{index}.fc1.weight" for index in (0, 2))
    assert not torch.equal(weights[one], weights[other]), "the control: the same place on two ranks is two experts"
    with pytest.raises(ValueError, match="is not a model state checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(str(saved))
    options = {"inject_missing_state": True, "num_extract_workers": 1, "num_merge_workers": 1, "strict": True}
    places = {"input_folder": str(saved / "two"), "output_folder": str(tmp_path / "universal")}
    ended = ""
    try:
        ds_to_universal.main(Namespace(**options, **places, keep_temp_folder=False))
    except Exception as error:
        ended = repr(error)
    assert ended, "it would put experts of different ranks together"


def masters(folder: Folder) -> dict[str, Tensor]:
    """The master weights of a checkpoint of ep_size=4 on four ranks, read by hand: experts have one holder each."""
    found: dict[str, list[Tensor]] = {}
    for rank in range(4):
        states = torch.load(folder / f"two/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", weights_only=False)
        states = states["optimizer_state_dict"]
        for values, spans in zip(
            states["single_partition_of_fp32_groups"], states["param_slice_mappings"], strict=True
        ):
            for name, span in spans.items():
                known = re.sub(r"(deepspeed_experts\.)(\d+)", lambda m: f"{m[1]}{2 * rank + int(m[2])}", name)  # noqa: B023
                found.setdefault(known, []).append(values[span.start : span.start + span.numel])
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_groups_are_cut_where_deepspeed_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    def made_by_deepspeed(ep_size: int, most: int) -> list[groups.ParameterGroup]:
        names = [f"{place}.weight" for place in ("enter", "leave")]
        for layer, size in (("a", 8), ("b", 16)):
            prefix = f"{layer}.deepspeed_moe.experts.deepspeed_experts"
            names += [f"{prefix}.{index}.{rest}" for index in range(size // ep_size) for rest in ("fc1", "fc2")]
        parameters = {name: torch.nn.Parameter(torch.zeros(3, 7 if "fc1" in name else 5)) for name in names}
        for name, parameter in parameters.items():
            if "experts" in name:
                parameter.allreduce, parameter.group_name = False, f"ep_size_{ep_size}"  # type: ignore[attr-defined]
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        made = split({"params": list(parameters.values()), "name": "all", "lr": 0.1}, max_group_size=most)
        return [
            groups.ParameterGroup(
                {name_of[id(each)]: tuple(each.shape) for each in group["params"]},
                {name: value for name, value in group.items() if name != "params"},
            )
            for group in made
        ]

    for most in (60, 100, 10_000):
        monkeypatch.setattr(groups, "most_values", lambda most=most: most)
        for ep_size in (1, 2, 8):
            found = groups.resized(made_by_deepspeed(4, most), {"a": 8, "b": 16}, ep_size)
            expected = made_by_deepspeed(ep_size, most)
            assert [list(group.shapes.items()) for group in found] == [list(group.shapes.items()) for group in expected]
            assert [group.options for group in found] == [group.options for group in expected]
