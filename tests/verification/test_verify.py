"""A verified engine is told what is wrong with it, by name, and is afterwards what it was."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep import GeluMLP, MoE, MoEConfig
from ds_moe_ep.engine import step_seams
from ds_moe_ep.engine.views.layers import viewed_layers
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import number
from ds_moe_ep.verification.command import run, run_rank
from ds_moe_ep.verification.options import VerifyOptions
from ds_moe_ep.verification.verdicts import EngineReport, TrainingVerdict
from tests.policy.sources import PACKAGE
from tests.ranks import RankPool
from tests.verification.converted import sourced
from tests.verification.engines import BIAS, LAYOUTS, MORE_ZERO_3, OF_EACH_MAKER, ZERO_3, Layout, OwnJob
from tests.verification.layout_mutants import LAYOUT_MUTANTS, OF_OFFLOAD, OF_ZERO_3, TOGETHER
from tests.verification.layouts import MORE_OF_LAYOUTS, OF_EACH_LAYOUT
from tests.verification.maker_mutants import AUTOEP_BIAS, AUTOEP_ROUTED, OF_AUTOEP, OF_AUTOEP_BESIDE, OF_DEEPSPEED
from tests.verification.mutants import MORE_MUTANTS, MUTANTS, Mutant
from tests.verification.shadowed import SHADOWED, SHADOWED_LAYOUTS, all_shadowed, all_sound, shadowed, shadowed_in


def copied(value: Any) -> Any:
    """A copy of tensors and the containers that hold them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    return [copied(each) for each in value] if isinstance(value, (list, tuple)) else value


def whole_state(engine: Any) -> dict[str, Any]:
    """All that training goes on from."""
    inner = step_seams.torch_optimizer(engine)
    return {
        "model": copied(dict(engine.module.state_dict())),
        "buffers": {name: each.clone() for name, each in engine.module.named_buffers()},
        "optimizer": copied(engine.optimizer.state_dict()),
        "masters": copied(step_seams.stepped_tensors(engine)),
        "states": copied(list(inner.state.values())),
        "options": [{name: each for name, each in group.items() if name != "params"} for group in inner.param_groups],
        "counters": (engine.global_steps, engine.micro_steps, engine.global_samples, engine.skipped_steps),
        "random": (torch.get_rng_state(), str(numpy.random.get_state()), random.getstate()),
        "methods": {name: value for name, value in vars(engine).items() if callable(value)},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.module.modules()],
        "gradients": [parameter.grad is None for parameter in engine.module.parameters()],
    }


def differences(mine: Any, theirs: Any, path: str = "") -> list[str]:
    """Where two states differ."""
    if isinstance(mine, Tensor):
        return [] if torch.equal(mine, theirs) else [path]
    if isinstance(mine, dict):
        if mine.keys() != theirs.keys():
            return [f"{path} {sorted(map(str, mine.keys() ^ theirs.keys()))}"]
        return [each for key in mine for each in differences(mine[key], theirs[key], f"{path}/{key}")]
    if isinstance(mine, (list, tuple)):
        if len(mine) != len(theirs):
            return [path]
        return [d for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    is_plain = mine is None or isinstance(mine, (int, float, str, bool))
    return [] if not is_plain or mine == theirs else [path]


@dataclass(frozen=True)
class Examined:
    """The verdicts on a sound engine after a step, where its state differs afterwards, and those on its faults."""

    sound: tuple[TrainingVerdict, ...]
    changed: list[str]
    of_faults: list[tuple[TrainingVerdict, ...]]


def examined(layouts: Sequence[Any], faults: Sequence[Sequence[Mutant]] = ()) -> list[Examined]:
    """The verdicts on an engine of each layout: sound, then with each set of faults that is for it."""
    import ds_moe_ep

    found = []
    for layout in layouts:
        engine = layout.make()
        batches = layout.endless(engine)
        layout.step(engine, batches)
        before = whole_state(engine)
        sound = ds_moe_ep.verify(engine, batches).verdicts
        changed = differences(before, whole_state(engine))
        found.append(Examined(sound, changed, [with_faults(engine, together) for together in of(layout, faults)]))
    return found


def of(layout: Any, faults: Sequence[Sequence[Mutant]]) -> list[Sequence[Mutant]]:
    """The sets of faults that are planted in a layout's engine."""
    return [together for together in faults if together[0].layout.name == layout.name]


def faulty(layout: Any, faults: Sequence[Sequence[Mutant]]) -> list[tuple[TrainingVerdict, ...]]:
    """The verdicts on an engine of a layout with each set of faults that is for it."""
    engine = layout.make()
    return [with_faults(engine, together) for together in of(layout, faults)]


def with_faults(engine: Any, together: Sequence[Mutant]) -> tuple[TrainingVerdict, ...]:
    """The verdicts on an engine with all of some faults."""
    import ds_moe_ep

    with ExitStack() as planted:
        for mutant in together:
            planted.enter_context(mutant.plant(engine))
        batches, checkpoint = together[0].layout.endless(engine), together[0].checkpoint
        return ds_moe_ep.verify(engine, batches, checkpoint=checkpoint).verdicts


def judged(mutants: Sequence[Mutant]) -> list[tuple[TrainingVerdict, ...]]:
    """The verdicts on an engine with each fault alone; those of one layout in a row share its engine."""
    import ds_moe_ep

    ds_moe_ep.init_distributed()
    found, name, engine = [], "", None
    for mutant in mutants:
        if mutant.layout.name != name:
            name, engine = mutant.layout.name, mutant.layout.make()
        found.append(with_faults(engine, [mutant]))
    return found


def more_examined() -> list[Examined]:
    import ds_moe_ep

    ds_moe_ep.init_distributed()
    return examined([*MORE_OF_LAYOUTS, AUTOEP_BIAS, AUTOEP_ROUTED])


def each_alone(name: str) -> list[tuple[TrainingVerdict, ...]]:
    return judged(by_layout(SINGLE_FAULTS[name]))


def by_layout(mutants: Sequence[Mutant]) -> list[Mutant]:
    return sorted(mutants, key=lambda mutant: mutant.layout.name)


def failing() -> tuple[str, list[str]]:
    """The error of a verification in which rank 1 raises, and where the engine's state differs afterwards."""
    import ds_moe_ep

    layout = Layout("own", OwnJob(num_experts=4, ep_size=4, steps=2, timeout_s=5.0))
    engine = layout.make()
    before = whole_state(engine)

    def loss_of(output: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            raise ValueError("rank 1 cannot read its batch")
        return output

    try:
        ds_moe_ep.verify(engine, iter(layout.batches()), loss_of=loss_of)
    except Exception as error:
        return f"{type(error).__name__}: {error}", differences(before, whole_state(engine))
    return "", []


SCRIPT = """
import sys
from tests.verification.engines import AUX
engine = AUX.make()
while True:
    for batch in AUX.batches():
        loss = engine(*batch)
        engine.backward(loss * float(sys.argv[1]))
        engine.step()
"""


def commanded(script: str) -> EngineReport:
    """The report of the command on this rank of a job, for a script whose loss is not the model's."""
    return run_rank(VerifyOptions(script=script, checkpoint=False, arguments=("2.0",)))


def all_of_it(script: str) -> tuple[Any, ...]:
    of_makers, of_bias = examined(OF_EACH_MAKER, TOGETHER), faulty(BIAS, TOGETHER)
    beside = shadowed(), commanded(script), sourced()
    of_layouts = examined(OF_EACH_LAYOUT, TOGETHER)  # layouts forget DeepSpeed's groups
    return [*of_makers, *of_layouts], *beside, of_bias, shadowed_in("stages")


def check_sound(layout: Any, found: Examined) -> None:
    assert [str(each) for each in found.sound if each.status == "problem"] == [], layout.name
    well = {each.check for each in found.sound if each.status == "ok"}
    assert well >= {"gradients", "routing", "movement", "norm", "replicas"}, layout.name
    assert ("checkpoint" in well) == getattr(layout, "is_saved", True), layout.name
    assert not [str(each) for each in found.sound if "cannot be asked" in each.found], layout.name
    assert found.changed == [], f"{layout.name}: the state was not put back"


def check_named(together: Sequence[Mutant], verdicts: tuple[TrainingVerdict, ...]) -> None:
    assert [told for mutant in together if (told := missed(mutant, verdicts))] == []


def missed(mutant: Mutant, verdicts: tuple[TrainingVerdict, ...]) -> str:
    """What was told in place of a mutant's name; an empty string where it was named."""
    problems = [each for each in verdicts if each.status == "problem"]
    assert all(each.fix for each in problems)
    named = [
        each
        for each in problems
        if each.check == mutant.check
        and mutant.words in each.found
        and each.parameter.startswith(mutant.parameter)
        and each.rank is not None
        and mutant.rank in (None, each.rank)
    ]
    return "" if named else f"{mutant.name}: {[f'{each.check}: {each}' for each in problems]}"


def unnamed(mutants: Sequence[Mutant], found: Sequence[tuple[TrainingVerdict, ...]]) -> list[str]:
    """The mutants that no verdict names."""
    return [told for mutant, verdicts in zip(mutants, found, strict=True) if (told := missed(mutant, verdicts))]


def check_shadow(found: dict[str, Any]) -> None:
    """The flipped value is told of its layer and rank, with the rank it came from; without it nothing is found."""
    assert {(each.layer, each.rank, each.step) for each in found["found"]} == {("layers.1", 1, 2)}
    output = next(each for each in found["found"] if each.what == "output")
    assert 0 in output.from_ranks and output.distance > output.bound
    assert "layers.1 on rank 1: the output is off by" in str(output)
    assert found["rest"] == [] and found["checks"] == 4
    assert f"verify_every: {number(found['ms'], 2)} ms in step 4" in found["meter"]


def test_each_planted_fault_is_named_and_a_sound_engine_has_none_and_is_what_it_was(
    pool: RankPool, tmp_path: Path
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    by_rank = pool.run(4, all_of_it, str(script), timeout_s=300)
    layouts = [*OF_EACH_MAKER, *OF_EACH_LAYOUT]
    for theirs in by_rank:
        assert [each.sound for each in theirs[0]] == [each.sound for each in by_rank[0][0]], "ranks' reports differ"
        for layout, found in zip(layouts, theirs[0], strict=True):
            check_sound(layout, found)
    told = [*((layout, found.of_faults) for layout, found in zip(layouts, by_rank[0][0], strict=True))]
    for layout, of_faults in (*told, (BIAS, by_rank[0][4])):
        for together, verdicts in zip(of(layout, TOGETHER), of_faults, strict=True):
            check_named(together, verdicts)
    for rank, theirs in enumerate(by_rank):
        assert theirs[1]["found"] == by_rank[0][1]["found"], rank
    check_shadow(by_rank[0][1])
    report = by_rank[0][2]
    assert report.is_ok and "with a weight of 0.1 in the loss" in str(report)
    assert [each.status for each in report.verdicts if each.check == "checkpoint"] == ["note"], "none was asked for"
    check_sources(by_rank[0][3])
    check_drift("stages", by_rank[0][5])


def check_drift(name: str, found: dict[str, Any]) -> None:
    """The flipped value is told of its layer and rank, once per value that it spoils, and nothing without it."""
    told = {(each.layer, each.rank, each.step) for each in found["found"]}
    assert told == {(SHADOWED_LAYOUTS[name][1], 1, 2)}, (name, told)
    assert "output" in {each.what for each in found["found"]}, name
    assert found["rest"] == [] and found["checks"] == 4, (name, found)
    assert "verify_every: " in found["meter"] and "ms in step 4" in found["meter"], name


def check_sources(found: dict[str, list[str]]) -> None:
    """What a converter may leave behind of DeepSeek-V3's routing is named; nothing is left behind by AutoEP."""
    assert found["nothing"] == []
    assert "has e_score_correction_bias, and the layer has none" in found["bias"][0]
    for left in ("scale", "groups", "bias's numbers"):
        assert "tokens are routed otherwise than by the block that it replaced" in found[left][0], left
    assert all(each.startswith("model.layers.1.mlp on rank 0") for told in found.values() for each in told)


@pytest.mark.slow
def test_a_rank_that_fails_in_the_middle_ends_all_ranks_and_their_state_is_put_back(pool: RankPool) -> None:
    by_rank = pool.run(4, failing, timeout_s=100)
    assert "ValueError: rank 1 cannot read its batch" in by_rank[1][0]
    assert all("PeerError" in by_rank[rank][0] and "rank 1" in by_rank[rank][0] for rank in (0, 2, 3)), by_rank
    assert all(changed == [] for _, changed in by_rank)


@pytest.mark.slow
def test_a_sound_engine_of_each_layout_has_no_finding_and_is_what_it_was(pool: RankPool) -> None:
    worlds: dict[tuple[int, bool], list[Any]] = {}  # DeepSpeed's groups, and their sizes, are a process's
    for layout in LAYOUTS:
        worlds.setdefault((layout.job.ep_size, getattr(layout.job, "interleaved", False)), []).append(layout)
    for layouts in worlds.values():
        for theirs in pool.run(4, examined, layouts, timeout_s=400):
            for layout, found in zip(layouts, theirs, strict=True):
                check_sound(layout, found)


SINGLE_FAULTS: dict[str, Sequence[Mutant]] = {
    "plain": [*MUTANTS, *MORE_MUTANTS],
    "layouts": LAYOUT_MUTANTS,
    "offload": OF_OFFLOAD,
    "ZeRO 3": OF_ZERO_3,
    "DeepSpeed's": OF_DEEPSPEED,
    "AutoEP's": OF_AUTOEP,
    "AutoEP's others": OF_AUTOEP_BESIDE,
}


EVERY_MUTANT = [mutant for mutants in SINGLE_FAULTS.values() for mutant in mutants]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [ZERO_3, *MORE_ZERO_3], ids=lambda layout: layout.name)
def test_a_sound_engine_under_zero_3_has_no_finding_and_is_what_it_was(pool: RankPool, layout: Layout) -> None:
    for theirs in pool.run(4, examined, [layout], timeout_s=200):
        check_sound(layout, theirs[0])


@pytest.mark.slow
def test_more_sound_engines_beside_other_ranks_have_no_finding(pool: RankPool) -> None:
    for theirs in pool.run(4, more_examined, timeout_s=400):
        for layout, found in zip([*MORE_OF_LAYOUTS, AUTOEP_BIAS, AUTOEP_ROUTED], theirs, strict=True):
            check_sound(layout, found)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen verifications, on busy machines too
@pytest.mark.parametrize("name", SINGLE_FAULTS)
def test_each_fault_alone_is_named(pool: RankPool, name: str) -> None:
    found = pool.run(4, each_alone, name, timeout_s=800)[0]
    assert unnamed(by_layout(SINGLE_FAULTS[name]), found) == []


@pytest.mark.slow
def test_the_shadow_finds_nothing_in_sound_layers_of_each_maker(pool: RankPool) -> None:
    layouts = [SHADOWED, *(layout for layout in LAYOUTS if layout.hooks)]
    for found in pool.run(4, all_sound, layouts, timeout_s=200):
        assert [checks for checks, _ in found] == [layout.job.steps for layout in layouts]
        assert [findings for _, findings in found] == [[] for _ in layouts]


@pytest.mark.slow
def test_a_drift_is_told_with_its_layer_and_rank_in_each_layout(pool: RankPool) -> None:
    by_rank = pool.run(4, all_shadowed, timeout_s=400)
    for name, found in by_rank[0].items():
        check_drift(name, found)
        assert all(theirs[name]["found"] == found["found"] for theirs in by_rank), name


def test_the_page_names_ten_public_faults_and_the_words_of_the_mutants_that_are_planted() -> None:
    page = (PACKAGE / "docs/verify.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.split("## The public faults")[1].splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 10
    for *_, named, told, _ in rows:
        names, words = re.findall(r"`([^`]+)`", named), re.findall(r'"([^"]+)"', told)
        for mutants in (MUTANTS + MORE_MUTANTS, OF_DEEPSPEED, OF_AUTOEP + OF_AUTOEP_BESIDE):
            found = [each for each in mutants if each.name in names]
            has_no_bias = mutants is OF_DEEPSPEED and "[1]" in named
            assert has_no_bias or {each.name for each in found} == set(names), named
            assert all(any(word in each.words for word in words) for each in found), told
        assert all(any(word in each.words for each in EVERY_MUTANT if each.name in names) for word in words), told


def test_a_bias_that_a_layer_starts_from_counts_in_the_routing_that_is_asked_for() -> None:
    layer = MoE(8, GeluMLP(8, 16), config=MoEConfig(num_experts=4, top_k=2, score="sigmoid", balance="bias"))
    start_E = torch.tensor([0.3, -0.2, 0.0, 0.1])
    layer.balance.start_from(start_E)
    layer.balance.steps_E += torch.tensor([0, 1, 0, -2])
    (view,) = viewed_layers(torch.nn.ModuleDict({"moe": layer}))
    asked_E = start_E + layer.config.bias_step * layer.balance.steps_E
    assert torch.allclose(view.choice_bias_E(), asked_E.double(), rtol=0, atol=1e-7)
    assert not torch.allclose(view.choice_bias_E(), (asked_E - start_E).double(), atol=1e-2), "the control"


def test_a_report_ends_with_one_where_there_is_a_problem_and_says_so_in_json() -> None:
    well = TrainingVerdict("norm", "ok", "all is well")
    ill = TrainingVerdict("groups", "problem", "lies in no group", "give it to the optimizer", "gate.wg.weight", 3)
    assert (EngineReport((well,)).exit_code, EngineReport((well, ill)).exit_code) == (0, 1)
    told = json.loads(json.dumps(EngineReport((well, ill)).to_dict()))
    assert (told["verdict"], told["problems"]) == ("problem", 1)
    assert EngineReport(tuple(TrainingVerdict(**each) for each in told["verdicts"])) == EngineReport((well, ill))
    assert "gate.wg.weight on rank 3: lies in no group" in str(EngineReport((ill,)))


def test_without_a_launcher_the_command_asks_for_ranks_and_for_a_script_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"verify.script=.*no such file"):
        run(VerifyOptions(script=str(tmp_path / "none.py"), ranks=2))
    with pytest.raises(ConfigError, match=r"verify.ranks: .*--ranks N"):
        run(VerifyOptions(script=__file__))
