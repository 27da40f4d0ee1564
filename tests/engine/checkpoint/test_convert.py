"""Weights and optimizer states carried to another layout: DeepSpeed loads them, and training goes on as it would have.

Two layouts add up the same products in another order: the logits of four fp32 layers differ by 2e-6 of the largest at
most (measured: 2e-7; an expert or a slice in the wrong place: 0.07 and more). Weights, moments and steps are copied and
never computed with: bit for bit, and the way back is exact. The control of the losses is a run without states.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine.checkpoint.convert.prepare import prepare
from ds_moe_ep.parallel.tensor import Share, cut_dimension
from tests.engine.checkpoint.checkpoints import target_config, weights_in, write_experts
from tests.parallel.training_runs import (
    Run,
    copies,
    make_experts,
    make_pipeline,
    of_this_copy,
    stage_parameters,
)
from tests.ranks import RankPool

LOGITS = 2e-6
LOSSES = 2e-5  # of two steps of Adam behind the load; without states they are another's by far more
MODEL = {"num_layers": 2, "expert": "swiglu", "shared_expert_width": 16}
RUN = Run(steps=4, num_micro_batches=2, stage=1, top_k=2, model=MODEL)
TOKEN_IDS = torch.arange(4 * 8).view(4, 8) * 7 % 32


@dataclass(frozen=True)
class Seen:
    """State of a rank after two steps or loading, and the loss of one more step, and of another behind that."""

    logits: Tensor | None  # of TOKEN_IDS; None before the last stage
    weights: dict[str, Tensor]  # by their names on one device
    share: Share
    states: dict[str, Tensor]  # master weights, moments and steps, by the weights' names
    losses: tuple[float, float]


def with_experts(run: Run, folder: str, loads: bool) -> Seen:
    """Trains two steps and saves, or loads into another seed's model."""
    engine, named = make_experts(run, seed=2 if loads else 1)
    group_index, place = divmod(dist.get_rank(), run.ep_size)
    num_groups, mine = run.world_size // run.ep_size, run.num_sequences // run.ep_size

    def step(micro_batches: Any) -> float:
        total = torch.zeros(())
        for token_ids, target_ids in micro_batches[group_index::num_groups]:
            part = slice(place * mine, (place + 1) * mine)
            loss = engine(token_ids[part], target_ids[part]).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() / engine.gradient_accumulation_steps()
        dist.all_reduce(total)
        return float(total) / run.world_size

    if loads:
        load(engine, folder)
    else:
        for micro_batches in run.batches()[:2]:
            step(micro_batches)
        change_scale(engine, run)
        engine.save_checkpoint(folder)
    engine.eval()
    with torch.no_grad():
        logits = engine(TOKEN_IDS).logits_BSV
    engine.train()
    weights, states = copies(named), states_of(engine, run, named)
    first, second = map(step, run.batches()[2:])
    return Seen(logits, weights, Share(0, 1), states, (first, second))


def with_pipeline(run: Run, folder: str, loads: bool) -> Seen:
    """The same with shares and stages."""
    engine = make_pipeline(run, seed=2 if loads else 1)
    if loads:
        load(engine, folder)
    else:
        for micro_batches in run.batches()[:2]:
            engine.train_batch(of_this_copy(engine, micro_batches))
        change_scale(engine, run)
        engine.save_checkpoint(folder)
    _, outputs = engine.eval_batch(iter([(TOKEN_IDS, TOKEN_IDS)]), return_logits=True, num_micro_batches=1)
    share, named = Share(engine.grid.get_slice_parallel_rank(), run.tp_size), stage_parameters(engine)
    weights, states = copies(named), states_of(engine, run, named)
    first, second = (float(engine.train_batch(of_this_copy(engine, each))) for each in run.batches()[2:])
    return Seen(None if outputs is None else outputs[0], weights, share, states, (first, second))


def load(engine: Any, folder: str) -> None:
    """Loads a checkpoint, with its states unless the folder's name says otherwise."""
    has_states = not folder.endswith("weights")
    assert engine.load_checkpoint(folder, load_module_only=not has_states)[0] is not None
    assert engine.global_steps == (2 if has_states else 0)


def scale_of(engine: Any) -> Any:
    """What keeps the loss scale of an engine in fp16."""
    optimizer = engine.optimizer
    return optimizer.loss_scale_config if hasattr(optimizer, "loss_scale_config") else optimizer.loss_scaler


def change_scale(engine: Any, run: Run) -> None:
    """Gives an engine in fp16 another loss scale than it begins with, as overflows do."""
    if run.fp16:
        scale_of(engine).cur_scale, scale_of(engine).last_overflow_iter = 32.0, 1


def states_of(engine: Any, run: Run, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Master weights, both moments and the step of this rank's parameters, by kind and name. Collective.

    In fp16 the loss scale too, with its counters.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    from ds_moe_ep.engine.checkpoint.reshard import can_reshard, cuts_of

    optimizer, found = engine.optimizer, {}
    is_cut = can_reshard(optimizer)
    if is_cut:
        for flat, parameters in zip(*cuts_of(optimizer), strict=True):
            lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)
        steps = [float(state["step"]) for state in optimizer.optimizer.state.values() if "step" in state]
    else:
        steps = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    master_of = {parameter: parameter for parameter in named.values()}
    for own, masters in zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False):
        master_of |= dict(zip(own, masters, strict=True))
    for name, parameter in named.items():
        plain = master_of[parameter]
        for kind in ("exp_avg", "exp_avg_sq") if steps else ():
            value = safe_get_full_optimizer_state(parameter, kind) if is_cut else optimizer.state[plain][kind]
            found[f"{kind} {name}"] = value.detach().clone()
        master = safe_get_full_fp32_param(parameter) if is_cut else plain
        found[f"master {name}"] = master.detach().clone()
    if run.fp16:
        scale = scale_of(engine)
        counters = (scale.cur_scale, scale.cur_iter, scale.last_overflow_iter, scale.scale_factor, scale.scale_window)
        found["scale"] = torch.tensor(counters)
    return found | {"step": torch.tensor(sorted(set(steps)))}


def assert_same_states(found: Sequence[Seen], expected: Sequence[Seen]) -> None:
    """Every rank holds its share of the states that others held, bit for bit; together they hold all of them."""
    shares: dict[str, dict[int, Tensor]] = {}
    for seen in expected:
        for name, value in seen.states.items():
            shares.setdefault(name, {})[seen.share.index] = value
    assert {name for seen in found for name in seen.states} == set(shares)
    assert sum(name.startswith("exp_avg_sq") for name in shares) > 2 * 4 * 3, "of experts too"
    for seen in found:
        for name, value in seen.states.items():
            parts, dimension = [shares[name][index] for index in sorted(shares[name])], cut_dimension(name)
            whole = parts[0] if dimension is None else torch.cat(parts, dimension)
            assert torch.equal(value, seen.share.of(whole, name)), name


def losses_distance(found: Sequence[Seen], expected: Sequence[Seen]) -> float:
    """The largest relative difference of a loss of the two steps after two others."""
    return max(abs(one - other) / other for one, other in zip(found[0].losses, expected[0].losses, strict=True))


def saved_by(pool: RankPool, train: Any, run: Run, folder: pathlib.Path) -> list[Seen]:
    return pool.run(4, train, run, str(folder), False)


def loaded_by(pool: RankPool, load: Any, run: Run, folder: pathlib.Path) -> list[Seen]:
    return pool.run(4, load, run, str(folder), True)


def each_loaded_by(pool: RankPool, load: Any, runs: Sequence[Run], folders: Sequence[pathlib.Path]) -> list[list[Seen]]:
    """Of each folder what every rank has loaded, in one world."""
    by_rank = pool.run(4, in_turns, load, runs, [str(folder) for folder in folders], timeout_s=150)
    return [list(of_folder) for of_folder in zip(*by_rank, strict=True)]


def in_turns(load: Any, runs: Sequence[Run], folders: Sequence[str]) -> list[Seen]:
    return [load(run, folder, True) for run, folder in zip(runs, folders, strict=True)]


def logits_distance(found: Sequence[Seen], expected: Sequence[Seen]) -> float:
    """The largest difference of any rank's logits from those of the other side, over the largest logit."""
    (whole, *_) = [seen.logits for seen in expected if seen.logits is not None]
    parts = [seen.logits for seen in found if seen.logits is not None]
    assert parts
    return max(float(((part - whole).abs().max() / whole.abs().max()).nan_to_num(torch.inf)) for part in parts)


def assert_same_weights(found: Sequence[Seen], folder: pathlib.Path, run: Run) -> None:
    """Every rank holds its share of the checkpoint in `folder`, bit for bit, and together they hold all of it."""
    whole = weights_in(folder, run)
    assert {name for seen in found for name in seen.weights} == whole.keys()
    for seen in found:
        for name, weight in seen.weights.items():
            assert torch.equal(weight, seen.share.of(whole[name], name)), name


OTHERS = [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((4, 1, 1), (2, 0, 2), (2, 1, 2))]


@pytest.mark.parametrize(("ep_size", "stage", "pp_size"), [(4, 0, 1), *OTHERS])
def test_experts_become_shares_and_stages_that_go_on_as_they_would_and_come_back_bit_for_bit(
    pool: RankPool, ep_size: int, stage: int, pp_size: int, tmp_path: pathlib.Path
) -> None:
    """With one stage two ranks hold the same shares."""
    run = replace(RUN, ep_size=ep_size, stage=stage, pp_size=pp_size)
    ways = [tmp_path / name for name in ("trained", "pipeline", "back")]
    trained = saved_by(pool, with_experts, run, ways[0])
    for source, target, pipeline in ((ways[0], ways[1], True), (ways[1], ways[2], False)):
        prepare(source, target, target_config(run, pipeline=pipeline)).write()
    as_pipeline = loaded_by(pool, with_pipeline, run, ways[1])
    assert_same_weights(as_pipeline, ways[0], run)
    assert_same_states(as_pipeline, trained)
    assert logits_distance(as_pipeline, trained) <= LOGITS
    assert losses_distance(as_pipeline, trained) <= LOSSES
    back = loaded_by(pool, with_experts, replace(run, ep_size=6 - ep_size), ways[2])  # 2 comes back as 4, and 4 as 2
    assert_same_states(back, trained)
    assert logits_distance(back, trained) <= LOGITS
    assert losses_distance(back, trained) <= LOSSES
    before, after = (weights_in(folder, run) for folder in (ways[0], ways[2]))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_trained_pipeline_becomes_experts_and_pipelines_of_other_sizes(
    pool: RankPool, tmp_path: pathlib.Path
) -> None:
    run = replace(RUN, tp_size=2, pp_size=2, model={**MODEL, "num_layers": 4})
    trained = saved_by(pool, with_pipeline, run, tmp_path / "trained")
    prepare(tmp_path / "trained", tmp_path / "experts", target_config(run, pipeline=False)).write()
    loaded = loaded_by(pool, with_experts, run, tmp_path / "experts")
    assert_same_states(loaded, trained)
    assert logits_distance(loaded, trained) <= LOGITS
    assert losses_distance(loaded, trained) <= LOSSES
    others = [replace(run, tp_size=tp_size, pp_size=pp_size) for tp_size, pp_size in ((4, 1), (1, 4))]
    folders = [tmp_path / f"{other.tp_size}x{other.pp_size}" for other in others]
    for other, folder in zip(others, folders, strict=True):
        prepare(tmp_path / "trained", folder, target_config(other, pipeline=True)).write()
    for loaded in each_loaded_by(pool, with_pipeline, others, folders):
        assert_same_weights(loaded, tmp_path / "experts", run)
        assert_same_states(loaded, trained)
        assert logits_distance(loaded, trained) <= LOGITS
        assert losses_distance(loaded, trained) <= LOSSES


def swap(folder: pathlib.Path, first: str, second: str) -> None:
    """Exchanges two files of a checkpoint."""
    one, other = (next(folder.glob(f"*/{name}")) for name in (first, second))
    shutil.copy(one, folder / "kept")
    shutil.copy(other, one)
    shutil.copy(folder / "kept", other)


def exchange_experts(folder: pathlib.Path) -> None:
    """Gives experts 0 and 3 of a layer each other's weights."""
    (path,) = folder.glob("*/layer_02-model_00-model_states.pt")
    weights = torch.load(path, weights_only=True)
    keys = [f"layer.feed_forward.experts.deepspeed_experts.{expert}.down.weight" for expert in (0, 3)]
    weights[keys[0]], weights[keys[1]] = weights[keys[1]], weights[keys[0]]
    torch.save(weights, path)


def test_one_expert_or_one_slice_in_the_wrong_place_is_seen(pool: RankPool, tmp_path: pathlib.Path) -> None:
    """The controls of the comparisons above: each fault moves the logits by far more than the bound."""
    trained = saved_by(pool, with_experts, RUN, tmp_path / "trained")
    config = target_config(RUN, pipeline=True)
    for name in ("slices", "experts"):
        prepare(tmp_path / "trained", tmp_path / name, config).write()
    swap(tmp_path / "slices", "layer_01-model_00-model_states.pt", "layer_02-model_00-model_states.pt")
    exchange_experts(tmp_path / "experts")
    prepare(tmp_path / "trained", tmp_path / "weights", config, weights_only=True).write()
    folders = [tmp_path / name for name in ("slices", "experts", "weights")]
    *damaged, alone = each_loaded_by(pool, with_pipeline, [RUN] * 3, folders)
    for wrong in damaged:
        assert logits_distance(wrong, trained) > 1000 * LOGITS
        with pytest.raises(AssertionError):
            assert_same_weights(wrong, tmp_path / "trained", RUN)
    assert losses_distance(alone, trained) > 100 * LOSSES
    with pytest.raises(AssertionError):
        assert_same_states(alone, trained)


def load_more(run: Run, folder: str) -> tuple[int, str]:
    """The step after a load without optimizer states, and why one with them fails."""
    engine = make_pipeline(run)
    engine.load_checkpoint(folder, load_optimizer_states=False)
    step = engine.global_steps
    try:
        engine.load_checkpoint(folder)
    except Exception as error:
        return step, type(error).__name__
    return step, ""


@pytest.mark.parametrize("stage", [0, 1])
def test_the_step_counter_is_kept_and_a_load_with_optimizer_states_fails_aloud(
    pool: RankPool, stage: int, tmp_path: pathlib.Path
) -> None:
    run = replace(RUN, stage=stage)
    write_experts(tmp_path / "experts", run)
    prepare(tmp_path / "experts", tmp_path / "pipeline", target_config(run, pipeline=True)).write()
    for step, failure in pool.run(4, load_more, run, str(tmp_path / "pipeline")):
        assert step == 7
        assert failure == ("ZeRORuntimeException" if stage else "KeyError")
