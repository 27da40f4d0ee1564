"""`MoE` in a PipelineModule of a user's own: DeepSpeed's layer in the same pipeline has the same losses and weights.

Layers carry their routing losses as a second tensor, for which DeepSpeed runs a second backward pass, or in one. The
pipeline of the package's own model stands against float64 on one device in tests/parallel/test_parity.py.
"""

from __future__ import annotations

import functools
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.layouts.stage_models import (
    DenseBlock,
    Enter,
    MoEBlock,
    ds_config,
    layers_in_one_tensor,
    layers_of,
    make_engine,
    mine,
)
from tests.ranks import RankError, RankPool

Outcome = tuple[list[float], dict[str, Tensor]]
# ZeRO stage, experts per token, layers between two that are kept (0: all are kept)
CASES = [(0, 1, 0), (1, 2, 1), (0, 2, 2)]


def trained(engine: Any, steps: range = range(2)) -> Outcome:
    losses = [float(engine.train_batch(mine(engine, step))) for step in steps]
    losses.append(float(engine.eval_batch(mine(engine, 9))))
    return losses, {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}


def cases(folder: str) -> dict[str, Any]:
    import deepspeed
    from deepspeed.moe.layer import MoE as Native

    import ds_moe_ep

    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {}
    for case in CASES:
        stage, k, interval = case
        moves = {} if k == 1 else {"node_size": 1, "two_level": "copies" if stage else "sums"}
        sides = ((Native, {}), (ds_moe_ep.MoE, {"moe_ep": moves}))
        layers = layers_in_one_tensor if interval else layers_of
        found[str(case)] = [
            trained(make_engine(make, deepspeed.initialize, ds_config(stage, **section), interval, layers, k=k))
            for make, section in sides
        ]
    engine = make_engine(ds_moe_ep.MoE, ds_moe_ep.initialize, ds_config(1), k=2)
    trained(engine)
    engine.save_checkpoint(folder)
    found["files"] = sorted(path.name for path in pathlib.Path(folder, "global_step2").iterdir())
    first = trained(engine, range(2, 4))
    other = make_engine(ds_moe_ep.MoE, ds_moe_ep.initialize, ds_config(1), k=2)
    other.load_checkpoint(folder)
    found["resumed"] = first, trained(other, range(2, 4))
    found["states"] = states_of_two_sizes(f"{folder}/adam", 1)
    found["names"] = [layer.dispatcher.name for layer in engine.moe_ep_layers.values()]
    found["stage without layers"] = refusal(uneven, ds_moe_ep.initialize)
    found["watch"] = refusal(None, ds_moe_ep.initialize, moe_ep={"watch": folder})
    found["fp16"] = refusal(None, ds_moe_ep.initialize, fp16={"enabled": True})
    return found


def states_of_two_sizes(folder: str, stage: int) -> list[dict[str, Tensor]]:
    """Master weights and moments where ep_size 2 saved, and where the same stages with ep_size 1 loaded them."""
    import ds_moe_ep

    sides = []
    adam = {"optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}}}
    for ep_size in (2, 1):
        engine = make_engine(ds_moe_ep.MoE, ds_moe_ep.initialize, ds_config(stage, **adam), k=2, ep_size=ep_size)
        if ep_size == 2:
            trained(engine)
            engine.save_checkpoint(folder)
        else:
            engine.load_checkpoint(folder)
        sides.append(states_of(engine, dist.get_rank() % 2 * 2 if ep_size == 2 else 0, stage))
    return sides


def states_of(engine: Any, first: int, stage: int) -> dict[str, Tensor]:
    """States of this rank's parameters by kind and name, experts counted from `first`. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
    from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state

    from ds_moe_ep.engine.checkpoint.reshard import cuts_of
    from ds_moe_ep.model.initialize import renumbered

    optimizer, found = engine.optimizer, {}
    for flat, parameters in zip(*cuts_of(optimizer), strict=True) if stage else ():
        lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)
    for name, parameter in engine.module.named_parameters():
        known = renumbered(name, lambda local: first + local)
        for kind in ("exp_avg", "exp_avg_sq"):
            value = safe_get_full_optimizer_state(parameter, kind) if stage else optimizer.state[parameter][kind]
            found[f"{kind} {known}"] = value.detach().clone()
        found[f"master {known}"] = (safe_get_full_fp32_param(parameter) if stage else parameter).detach().clone()
    return found


def uneven(make: Callable[..., nn.Module]) -> list[Any]:
    """Layers of which the second stage has none with experts."""
    from deepspeed.pipe import LayerSpec

    return [LayerSpec(Enter), LayerSpec(MoEBlock, make, ep_size=2), LayerSpec(DenseBlock), LayerSpec(DenseBlock)]


def refusal(layers: Any, door: Callable[..., Any], **config: Any) -> str:
    import ds_moe_ep

    chosen = {} if layers is None else {"layers": layers}
    try:
        make_engine(ds_moe_ep.MoE, door, ds_config(**config), **chosen)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@functools.cache
def found(pool: RankPool) -> list[dict[str, Any]]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return pool.run(4, cases, folder, timeout_s=150)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_weights_are_those_of_deepspeeds_layer_in_the_same_stages(
    pool: RankPool, case: tuple[int, int, int]
) -> None:
    for theirs in found(pool):
        (native_losses, native), (losses, weights) = theirs[str(case)]
        assert losses == pytest.approx(native_losses, rel=1e-6)
        assert losses[1] < losses[0], "it learns"
        assert weights.keys() == native.keys()
        for name, weight in native.items():
            assert float((weights[name] - weight).abs().max()) < 2e-6 * max(1.0, float(weight.abs().max())), name


def test_a_pipelines_checkpoint_has_deepspeeds_files_and_goes_on_bit_for_bit(pool: RankPool) -> None:
    for theirs in found(pool):
        experts = {name for name in theirs["files"] if "_expert_" in name}
        # each stage numbers its layers from 0, and has a model rank of its own
        of_stages = ((0, 0), (1, 0), (0, 1))
        assert experts == {
            f"layer_{layer}_expert_{expert}_mp_rank_{stage:02d}_model_states.pt"
            for layer, stage in of_stages
            for expert in range(4)
        }
        (losses, weights), (losses_again, weights_again) = theirs["resumed"]
        assert losses_again == losses
        assert all(torch.equal(weights_again[name], weight) for name, weight in weights.items())


def test_optimizer_states_in_stages_load_under_another_ep_size_bit_for_bit(pool: RankPool) -> None:
    assert_loaded([theirs["states"] for theirs in found(pool)])


@pytest.mark.slow
def test_optimizer_states_in_stages_without_zero_load_under_another_ep_size_bit_for_bit(
    pool: RankPool, tmp_path: pathlib.Path
) -> None:
    assert_loaded(pool.run(4, plain_states_of_two_sizes, str(tmp_path), timeout_s=150))


def plain_states_of_two_sizes(folder: str) -> list[dict[str, Tensor]]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    return states_of_two_sizes(folder, 0)


def assert_loaded(by_rank: list[list[dict[str, Tensor]]]) -> None:
    """Every rank of a stage has, of what it holds, the states that were saved."""
    for ranks in ((0, 1), (2, 3)):  # a stage's
        saved: dict[str, Tensor] = {}
        loaded: dict[str, Tensor] = {}
        for rank in ranks:
            for side, states in zip((saved, loaded), by_rank[rank], strict=True):
                for name, value in states.items():
                    assert torch.equal(side.setdefault(name, value), value), name
        assert saved.keys() == loaded.keys() and sum("experts.3." in name for name in saved) >= 3
        assert all(torch.equal(loaded[name], value) for name, value in saved.items())
        one, other = (next(value for name, value in saved.items() if f"experts.{e}." in name) for e in (0, 2))
        assert not torch.equal(one, other), "the control: moments of another expert"


def test_names_in_errors_and_records_tell_the_stage(pool: RankPool) -> None:
    assert [theirs["names"] for theirs in found(pool)] == [["stage 0, 1.moe", "stage 0, 2.moe"]] * 2 + [
        ["stage 1, 3.moe"]
    ] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stage without layers", "EngineError: model=PipelineModule: a stage has no ds_moe_ep.MoE layer"),
        ("watch", "in pipeline stages: a report would tell of the first stage's layers alone; leave it out"),
        ("fp16", "ConfigError: fp16.enabled=true without ZeRO in pipeline stages"),
    ],
)
def test_what_stages_do_not_have_is_refused_on_every_rank(pool: RankPool, name: str, message: str) -> None:
    for theirs in found(pool):
        assert message in theirs[name]


def of_plain_deepspeed() -> None:
    import deepspeed

    import ds_moe_ep

    ds_moe_ep.init_distributed()
    make_engine(ds_moe_ep.MoE, deepspeed.initialize, ds_config(moe_ep={"timeout_s": 2.0}), layers=uneven)


def test_a_stage_without_layers_ends_the_others_in_time_under_plain_deepspeed(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(4, of_plain_deepspeed, timeout_s=60)
    for rank in (0, 1):
        message = "pipeline stages [1]: ranks 2, 3 reached no ds_moe_ep.MoE layer within 2 s"
        assert message in caught.value.failures[rank].message


def dies_in_its_second_step() -> None:
    import ds_moe_ep

    ds_moe_ep.init_distributed()
    engine = make_engine(ds_moe_ep.MoE, ds_moe_ep.initialize, ds_config(1, moe_ep={"timeout_s": 20.0}))
    engine.train_batch(mine(engine, 0))
    if dist.get_rank() == 3:
        engine.moe_ep_layers["3.moe"].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    engine.train_batch(mine(engine, 1))


def test_a_rank_that_dies_in_one_stage_ends_those_of_all_stages_with_its_name(pool: RankPool) -> None:
    with pytest.raises(RankError) as caught:
        pool.run(4, dies_in_its_second_step, timeout_s=60)
    messages = {rank: failure.message for rank, failure in caught.value.failures.items()}
    assert messages[3].startswith("exit code -9")
    for rank in (0, 1, 2):
        assert "rank 3 (pid " in messages[rank] and "stage 1, 3.moe: " in messages[rank], messages[rank]
