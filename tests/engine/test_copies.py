"""Copies of connected layers: their own parameters, the same links; a pickled layer asks for its links again."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.engine.hooks import autoep_models
from tests.engine.hooks.hooked_layers import hooked
from tests.engine.small_model import Job, batches, make_engine
from tests.ranks import RankPool

OURS = Job(layer="ours", world_size=2, ep_size=2)
NATIVE = Job(layer="native", world_size=2, ep_size=2)


def marks(model: nn.Module) -> dict[str, Any]:
    return {n: (getattr(p, "allreduce", None), getattr(p, "group_name", None)) for n, p in model.named_parameters()}


def step(engine: Any, job: Job, index: int) -> Tensor:
    x, target = (each[dist.get_rank()] for each in batches(job)[index][0])
    loss = engine(x, target)
    engine.backward(loss)
    engine.step()
    return loss.detach()


def evaluated(model: nn.Module, job: Job) -> Tensor:
    x, target = (each[dist.get_rank()] for each in batches(job)[0][0])
    with torch.no_grad():
        return model(x, target)


def independent(engine: Any, job: Job) -> list[str]:
    """Faults of a copy of the engine's model, made after a step, while the original trains on."""
    step(engine, job, 0)
    before, twin = evaluated(engine.module, job), copy.deepcopy(engine.module)
    kept = [p.detach().clone() for p in twin.parameters()]
    wrong = [] if torch.equal(evaluated(twin, job), before) else ["the copy gives other results"]
    wrong += [] if marks(twin) == marks(engine.module) else ["marks of expert parameters are lost"]
    losses = [step(engine, job, index) for index in (1, 2)]
    same = all(torch.equal(a, b) for a, b in zip(kept, twin.parameters(), strict=True))
    wrong += [] if same else ["the copy's parameters moved with the original's"]
    wrong += [] if torch.equal(evaluated(twin, job), before) else ["the copy does not give its results again"]
    wrong += [] if not torch.equal(evaluated(engine.module, job), before) else ["the original did not train"]
    x, target = (each[dist.get_rank()] for each in batches(job)[0][0])
    twin(x, target).backward()  # a copy trains too
    wrong += [] if all(p.grad is not None for p in twin.parameters()) else ["the copy gets no gradients"]
    plain = make_engine(job)
    expected = [step(plain, job, index) for index in (0, 1, 2)][1:]
    distance = max(abs(float(a) - float(b)) for a, b in zip(losses, expected, strict=True))
    return wrong + ([] if distance <= 1e-6 else [f"the original trains otherwise beside a copy: {distance}"])


def own_copies() -> list[str]:
    return independent(make_engine(OURS), OURS)


def test_a_copied_layer_is_independent_and_leaves_the_original_alone(pool: RankPool) -> None:
    assert pool.run(2, own_copies) == [[]] * 2


def hooked_copies() -> list[str]:
    engine = make_engine(NATIVE)
    with hooked(engine, schedule="peers"):
        wrong = independent(engine, NATIVE)
        layer, twin = engine.module.layers[0].deepspeed_moe, copy.deepcopy(engine.module).layers[0].deepspeed_moe
        if twin.overlap is layer.overlap or twin.overlap._layer is not twin or twin.ep_group is not layer.ep_group:
            wrong.append("the copy is not hooked for itself")
        try:
            pickle.dumps(layer)
            wrong.append("pickled")
        except Exception as error:
            wrong += [] if "state_dict" in str(error) else [str(error)]
    return wrong


def test_a_copied_hooked_layer_is_hooked_for_itself(pool: RankPool) -> None:
    assert pool.run(2, hooked_copies) == [[]] * 2


def averaged() -> tuple[float, float]:
    """Distance of an EMA model's parameters from those computed by hand, and from the trained ones."""
    engine = make_engine(OURS)
    average = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    by_hand: list[Tensor] | None = None
    for index in range(3):
        step(engine, OURS, index)
        average.update_parameters(engine.module)
        now = [p.detach().clone() for p in engine.module.parameters()]
        by_hand = now if by_hand is None else [0.5 * old + 0.5 * new for old, new in zip(by_hand, now, strict=True)]
        evaluated(average, OURS)
    assert by_hand is not None
    pairs = list(zip(average.module.parameters(), by_hand, engine.module.parameters(), strict=True))
    return max(float((a - b).abs().max()) for a, b, _ in pairs), max(float((a - c).abs().max()) for a, _, c in pairs)


def test_an_averaged_model_evaluates_between_steps(pool: RankPool) -> None:
    for distance, moved in pool.run(2, averaged):
        assert distance <= 1e-6
        assert moved > 1e-3, "the average is not the trained model"


def pickled() -> list[str]:
    """Faults of a layer that was pickled, and of one that was saved whole."""
    engine = make_engine(OURS)
    step(engine, OURS, 0)
    layer, file, wrong = engine.module.layers[0], io.BytesIO(), []
    x = batches(OURS)[0][0][0][dist.get_rank()]
    torch.save(layer, file)
    file.seek(0)
    loaded = {"pickle": pickle.loads(pickle.dumps(layer)), "torch.save": torch.load(file, weights_only=False)}
    for way, twin in loaded.items():
        wrong += [] if marks(twin) == marks(layer) else [f"{way}: marks are lost"]
        try:
            twin(x)
            wrong.append(f"{way}: it needs no links")
        except Exception as error:
            ways_out = ("set_deepspeed_parallelism()", "connect(transport)", "deepspeed.initialize")
            wrong += [] if all(each in str(error) for each in ways_out) else [f"{way}: {error}"]
        twin.set_deepspeed_parallelism()
        wrong += [] if torch.equal(twin(x)[0], layer(x)[0]) else [f"{way}: other results"]
    return wrong


def test_a_pickled_layer_says_that_it_needs_its_links_and_takes_them(pool: RankPool) -> None:
    assert pool.run(2, pickled) == [[]] * 2


def crossed() -> str:
    """The error where one rank calls the copy and the other the original."""
    engine = make_engine(OURS)
    twin = copy.deepcopy(engine.module)
    try:
        evaluated(twin if dist.get_rank() else engine.module, OURS)
    except Exception as error:
        return str(error)
    return ""


def test_ranks_in_a_copy_and_in_the_original_are_told_apart(pool: RankPool) -> None:
    """The negative control of copies that share links: a copy is a layer of its own."""
    for error in pool.run(2, crossed):
        assert "copy 1 of layers.0" in error


def autoep_copies() -> list[str]:
    job = autoep_models.AutoEPJob(world_size=2, ep_size=2, num_layers=1)
    engine = autoep_models.make_engine(job)
    ids = autoep_models.batches(job)[0][0][dist.get_rank()]

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    with hooked(engine, schedule="peers"):
        before, twin = logits(engine.module), copy.deepcopy(engine.module)
        wrong = [] if torch.equal(logits(twin), before) else ["the copy gives other results"]
        wrong += [] if marks(twin) == marks(engine.module) else ["marks of expert parameters are lost"]
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        return wrong + ([] if torch.equal(logits(engine.module), before) else ["parameters are shared"])


def test_a_copied_autoep_model_is_hooked_for_itself(pool: RankPool) -> None:
    assert pool.run(2, autoep_copies, timeout_s=120) == [[]] * 2
