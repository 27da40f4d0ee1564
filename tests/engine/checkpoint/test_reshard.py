"""Optimizer states of ZeRO 0, 1 and 2, in fp32 and 16 bits, load under another ep_size and number of ranks bit for bit.

By parameter: master weights, both moments of Adam and its step, by its global name. The controls: states that were
not loaded differ, and so do those of an expert beside the right one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.small_model import NUM_EXPERTS, Job, batches, make_engine, train_steps
from tests.ranks import RankPool

KINDS = ("exp_avg", "exp_avg_sq")
BASE = Job(top_k=2, stage=1)
ELASTIC = ("elastic", replace(BASE, ep_size=2, elastic=True))


class Span(NamedTuple):
    """Values from `start` on of a parameter that has `num_values`: one rank's cut of them."""

    start: int
    num_values: int
    values: Tensor


States = dict[str, Tensor | Span]


def states_of(engine: Any, job: Job) -> States:
    """This rank's weights, master weights and moments by global name: of what ZeRO cuts its own spans. Local."""
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    from ds_moe_ep.engine.checkpoint.reshard import cuts_of
    from ds_moe_ep.model.initialize import global_name

    index, optimizer = job.expert_index(dist.get_rank()), engine.optimizer
    found: States = {
        f"{global_name(name, index)} weight": parameter.detach().clone()
        for name, parameter in engine.module.named_parameters()
    }
    if job.stage == 0:
        return found | plain_states_of(engine, index)
    for parameters, flat in zip(cuts_of(optimizer)[1], cuts_of(optimizer)[0], strict=True):
        lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)  # DeepSpeed does it in a step
    for name, parameter in engine.module.named_parameters():
        if (cut := parameter._hp_mapping) is None:  # all of it lies on other ranks
            continue
        known, start = global_name(name, index), cut.lp_fragment_address.start
        for kind in ("master", *KINDS):
            values = cut.get_hp_fragment(None if kind == "master" else kind)
            found[f"{known} {kind}"] = Span(start, parameter.numel(), values.detach().clone())
    state = optimizer.optimizer.state
    found["step"] = torch.tensor([float(state[flat]["step"]) for flat in state])[:1]
    found["options"] = torch.tensor([group["lr"] for group in optimizer.optimizer.param_groups])[:1]
    if job.fp16:
        found["scale"] = torch.tensor([optimizer.loss_scaler.cur_scale])
    return found


def plain_states_of(engine: Any, index: Any) -> States:
    """The same without ZeRO, where nothing is cut."""
    from ds_moe_ep.model.initialize import global_name

    found, optimizer = {}, engine.optimizer
    if hasattr(optimizer, "fp32_groups_flat"):
        return flat_states_of(engine, index)
    master_of = {parameter: parameter for parameter in engine.module.parameters()}
    for own, masters in zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True):
        master_of |= dict(zip(own, masters, strict=True))
    for name, parameter in engine.module.named_parameters():
        state, known = optimizer.state[master_of[parameter]], global_name(name, index)
        found |= {f"{known} {kind}": state[kind].clone() for kind in (*KINDS, "step")}
        found[f"{known} master"] = master_of[parameter].detach().clone()
    found["options"] = torch.tensor([group["lr"] for group in optimizer.param_groups])[:1]
    if hasattr(optimizer, "loss_scale_config"):
        found["scale"] = torch.tensor([optimizer.loss_scale_config.cur_scale])
    return found


def flat_states_of(engine: Any, index: Any) -> States:
    """The same of one vector per group, which holds its parameters in their order."""
    from ds_moe_ep.model.initialize import global_name

    optimizer, name_of = engine.optimizer, {p: name for name, p in engine.module.named_parameters()}
    found: States = {}
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        state, sizes = optimizer.optimizer.state[flat], [parameter.numel() for parameter in group]
        for kind, vector in {**{kind: state[kind] for kind in KINDS}, "master": flat.detach()}.items():
            for parameter, values in zip(group, vector.split(sizes), strict=True):
                found[f"{global_name(name_of[parameter], index)} {kind}"] = values.clone()
        found["step"] = state["step"].clone()
    found["options"] = torch.tensor([group["lr"] for group in optimizer.optimizer.param_groups])[:1]
    return found | {"scale": torch.tensor([optimizer.loss_scale_config.cur_scale])}


def engine_of(job: Job) -> Any:
    """The job's engine with the package's own loads; DeepSpeed's layer gets them with its hooks. Collective."""
    import ds_moe_ep

    engine = make_engine(job)
    if job.layer == "native":
        ds_moe_ep.attach_overlap(engine)
    return engine


def save(job: Job, folder: Path) -> tuple[States, list[float]]:
    """The states where the checkpoint was saved, after two steps, and the loss of another."""
    engine, steps = engine_of(job), batches(job)
    train_steps(engine, job, steps[:2])
    optimizer = engine.optimizer if job.stage == 0 else engine.optimizer.optimizer
    optimizer.param_groups[0]["lr"] = 0.02  # as a scheduler does
    if job.fp16:
        scale = engine.optimizer.loss_scale_config if job.stage == 0 else engine.optimizer.loss_scaler
        scale.cur_scale = 64.0  # as an overflow does
    engine.save_checkpoint(str(folder), tag="two")
    return states_of(engine, job), train_steps(engine, job, steps[2:])


def load(job: Job, folder: Path) -> tuple[States, list[float]]:
    """The states after loading, and the loss of another step."""
    engine = engine_of(replace(job, seed=job.seed + 1))
    path, _ = engine.load_checkpoint(str(folder))
    assert path is not None and engine.global_steps == 2
    train = job.world_size == BASE.world_size
    return states_of(engine, job), train_steps(engine, job, batches(job)[2:]) if train else []


def run(saves: Sequence[tuple[str, Job]], loads: Sequence[tuple[str, Job]], folder: Path) -> tuple[Any, Any]:
    saved = {name: save(job, folder / name) for name, job in saves}
    return saved, [load(job, folder / name) for name, job in loads]


def merged(by_rank: Sequence[States]) -> dict[str, Tensor]:
    """All ranks' states, whole. What several ranks hold is the same on each; spans give each value once."""
    whole: dict[str, Tensor] = {}
    for states in by_rank:
        for name, value in states.items():
            if isinstance(value, Span):
                row = whole.setdefault(name, torch.full([value.num_values], torch.nan))
                own = row[value.start : value.start + len(value.values)]
                assert own.isnan().all() and len(own) == len(value.values), f"two ranks hold values of {name}"
                own.copy_(value.values)
            else:
                assert torch.equal(whole.setdefault(name, value), value), f"ranks differ in {name}"
    assert not (lacking := [name for name, value in whole.items() if value.isnan().any()]), f"nobody holds {lacking}"
    return whole


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    assert set(found) == set(expected)
    return [name for name, value in expected.items() if not torch.equal(found[name].cpu(), value.cpu())]


def test_states_load_under_every_ep_size_and_training_goes_on(pool: RankPool, tmp_path: Path) -> None:
    native = replace(BASE, layer="native")
    saves = [("native", replace(native, ep_size=2)), ("ep4", BASE)]
    loads = [("native", native), ("native", replace(native, ep_size=1)), ("ep4", replace(BASE, ep_size=1))]
    extra = replace(BASE, stage=2, bf16=True)
    for name, job in (
        ("bf16", extra),
        ("bf16 with sums in fp32", replace(extra, stage=1, sums_in="fp32")),
        ("fp16", replace(BASE, fp16=True, stage=2)),
    ):
        saves.append((name, replace(job, ep_size=2)))
        loads.append((name, replace(job, ep_size=1 if job.sums_in else 4)))
    saves.append(ELASTIC)
    loads.append(ELASTIC)  # DeepSpeed itself loads elastic states of torch's Adam at no size
    expected = all_load(pool, saves, loads, tmp_path)
    assert sum("exp_avg_sq" in name and "deepspeed_experts" in name for name in expected["ep4"]) == 8 * NUM_EXPERTS
    moments = [
        next(name for name in expected["ep4"] if f"experts.{expert}.fc1.weight exp_avg" in name) for expert in (0, 1)
    ]
    assert not torch.equal(*(expected["ep4"][name] for name in moments)), "the control: a neighbour's moments differ"


@pytest.mark.slow
def test_states_load_under_the_other_ep_sizes(pool: RankPool, tmp_path: Path) -> None:
    saves = [(f"ep{ep}", replace(BASE, ep_size=ep)) for ep in (1, 2, 4)]
    pairs = ((1, 2), (1, 4), (2, 1), (4, 2))
    loads = [(f"ep{saved}", replace(BASE, ep_size=ep)) for saved, ep in pairs]
    loads += [("elastic", replace(ELASTIC[1], ep_size=ep)) for ep in (1, 4)]
    all_load(pool, [*saves, ELASTIC], loads, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_fp16_states_load_under_every_other_ep_size(pool: RankPool, stage: int, tmp_path: Path) -> None:
    base, sizes = replace(BASE, stage=stage, fp16=True), (1, 2, 4)
    for flat in (False, True) if stage == 0 else (False,):
        for saved in (
            sizes if stage == 0 else (0,)
        ):  # a world per ep_size: files without ZeRO have the largest one's name
            saves = [(f"ep{ep}", replace(base, flat=flat, ep_size=ep)) for ep in sizes if saved in (0, ep)]
            loads = [(name, replace(job, ep_size=ep)) for name, job in saves for ep in sizes if ep != job.ep_size]
            all_load(pool, saves, loads, tmp_path / f"{flat}{saved}")


def test_states_without_zero_load_under_another_ep_size(pool: RankPool, tmp_path: Path) -> None:
    """In a world of its own: DeepSpeed names these files by the largest expert-parallel group of the process."""
    plain = replace(BASE, stage=0, ep_size=2)
    jobs = {"plain": plain, "bf16": replace(plain, bf16=True), "fp16": replace(plain, fp16=True, flat=True)}
    loads = [("plain", 1), ("plain", 4), ("bf16", 1), ("fp16", 4)]
    ways = [(name, replace(jobs[name], ep_size=ep)) for name, ep in loads]
    expected = all_load(pool, list(jobs.items()), ways, tmp_path)
    one, other = (f"layers.0.experts.deepspeed_experts.{expert}.fc1.weight exp_avg" for expert in (0, 5))
    assert not torch.equal(expected["fp16"][one], expected["fp16"][other]), "the control: another expert's moments"


def all_load(
    pool: RankPool, saves: Sequence[tuple[str, Job]], loads: Sequence[tuple[str, Job]], folder: Path
) -> dict[str, dict[str, Tensor]]:
    """Asserts that all that is loaded is what was saved, and goes on as it did; returns that by name."""
    by_rank = pool.run(4, run, saves, loads, folder, timeout_s=280)
    expected = {name: merged([saved[name][0] for saved, _ in by_rank]) for name, _ in saves}
    for index, (name, job) in enumerate(loads):
        found = merged([loaded[index][0] for _, loaded in by_rank])
        # elastic states have no learning rate: the run's own stays
        assert differing(found, expected[name]) == ["options"] * job.elastic, (name, job)
        if job.elastic:
            continue
        losses, undisturbed = by_rank[0][1][index][1], by_rank[0][0][name][1]
        assert losses == pytest.approx(undisturbed, rel=2e-2 if job.bf16 or job.fp16 else 1e-5), (name, job)
    return expected


def test_states_load_on_more_and_on_fewer_ranks(pool: RankPool, tmp_path: Path) -> None:
    small = replace(BASE, world_size=2, ep_size=2)
    saved, _ = zip(*pool.run(2, run, [("two", small)], [], tmp_path, timeout_s=120), strict=True)
    on_two = merged([states["two"][0] for states in saved])
    loads = [("two", replace(BASE, ep_size=ep)) for ep in (2, 4)]
    by_rank = pool.run(4, run, [("four", replace(BASE, ep_size=4))], loads, tmp_path, timeout_s=150)
    for index in range(len(loads)):
        assert differing(merged([loaded[index][0] for _, loaded in by_rank]), on_two) == []
    on_four = merged([states["four"][0] for states, _ in by_rank])
    back = pool.run(2, run, [], [("four", small), ("four", replace(small, ep_size=1))], tmp_path, timeout_s=120)
    for index in range(2):
        assert differing(merged([loaded[index][0] for _, loaded in back]), on_four) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("layer", ["ours", "native"])
def test_all_25_pairs_of_ep_sizes_on_16_ranks(
    pool: RankPool, layer: str, stage: int, precision: str, tmp_path: Path
) -> None:
    """One MoE layer, as 16 ranks read the files of 16 on two cores; in other tests there are two."""
    kind = {} if precision == "fp32" else {precision: True}
    base = replace(BASE, layer=layer, stage=stage, world_size=16, num_experts=16, num_layers=1, **kind)
    sizes = (1, 2, 4, 8, 16)
    expected: dict[str, dict[str, Tensor]] = {}
    for saved in [[ep] for ep in sizes] if stage == 0 else [sizes]:  # files without ZeRO: see above
        saves = [(f"ep{ep}", replace(base, ep_size=ep)) for ep in saved]
        loads = [(name, replace(base, ep_size=ep)) for name, _ in saves for ep in sizes]
        by_rank = pool.run(16, run, saves, loads, tmp_path, timeout_s=1700)
        expected |= {name: merged([saved[name][0] for saved, _ in by_rank]) for name, _ in saves}
        for index, (name, job) in enumerate(loads):
            assert differing(merged([loaded[index][0] for _, loaded in by_rank]), expected[name]) == [], (name, job)
    assert len(differing(expected["ep1"], expected["ep16"])) > 100, "the control: other routing groups, other rounding"
