"""Faults of public bug reports, planted in a running engine: each a scope, and what must be told of it.

Those of 2026 that were silent: experts frozen while the loss falls, a routing bias dropped, optimizer states of the
wrong expert, packed experts not loaded, a double softmax in the balance loss, a converter that drops experts, a loss
scale that drifts; and of all years: gradients twice too large where ranks share tokens, a balancing bias that nobody
moves, a clipping norm of a rank's own experts. Beside them: replicas apart, rows that change on the wire.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from ds_moe_ep.engine.views.layers import viewed_layers
from ds_moe_ep.engine.views.parts import StoredTensor
from tests.verification.engines import AUX, BIAS


@dataclass(frozen=True)
class Mutant:
    """A fault, the engine it is planted in, and the verdict that must name it."""

    name: str
    layout: Any  # Layout, or RanksLayout
    plant: Callable[[Any], Any]  # a context manager
    check: str
    words: str
    parameter: str = ""
    rank: int | None = None
    checkpoint: bool = False


def expert(engine: Any, local: int = 1) -> Any:
    return first_layer(engine).deepspeed_moe.experts.deepspeed_experts[local]


def first_layer(engine: Any) -> Any:
    """The first layer of experts that this rank has."""
    return viewed_layers(engine.module)[0].layer


def stored(engine: Any, local: int = 1) -> StoredTensor:
    """The first tensor of an expert of the first layer, whoever made the layer."""
    return next(iter(viewed_layers(engine.module)[0].expert_tensors(local).values()))


@contextmanager
def frozen(engine: Any) -> Iterator[None]:
    """The optimizer forgot a parameter of experts: nobody trains it."""
    lost = stored(engine).parameter
    group = next(g for g in engine.optimizer.param_groups if any(p is lost for p in g["params"]))
    before = list(group["params"])
    group["params"] = [parameter for parameter in before if parameter is not lost]
    yield
    group["params"] = before


@contextmanager
def stale(engine: Any) -> Iterator[None]:
    """The layer computes with a copy of a weight that the optimizer does not have: experts stand while losses fall."""
    step = engine.optimizer.step

    def step_and_undo(*args: Any, **kwargs: Any) -> Any:
        weight = expert(engine).fc2.weight
        before = weight.detach().clone()
        result = step(*args, **kwargs)
        weight.data.copy_(before)
        return result

    with patch.object(engine.optimizer, "step", step_and_undo):
        yield


@contextmanager
def fast(engine: Any) -> Iterator[None]:
    """Experts' learning rate is not the config's."""
    group = next(g for g in engine.optimizer.param_groups if g.get("moe"))
    before, group["lr"] = group["lr"], 10 * group["lr"]
    yield
    group["lr"] = before


@contextmanager
def without_bias(engine: Any) -> Iterator[None]:
    """The routing bias is there and nobody adds it."""
    from ds_moe_ep.moe.balance import BiasBalance

    for layer in engine.module.layers:
        layer.deepspeed_moe.gate.balance.steps_E.copy_(torch.tensor([0, 300, -300, 100]))
    with patch.object(BiasBalance, "bias_E", property(lambda balance: torch.zeros(4))):
        yield
    for layer in engine.module.layers:
        layer.deepspeed_moe.gate.balance.steps_E.zero_()


@contextmanager
def unmoved_bias(engine: Any) -> Iterator[None]:
    from ds_moe_ep.engine.extensions.balance_steps import BalanceSteps

    with patch.object(BalanceSteps, "after_model_step", lambda steps, is_applied: None):
        yield


@contextmanager
def after_load(engine: Any, spoil: Callable[[Any], None]) -> Iterator[None]:
    load = engine.load_checkpoint

    def load_and_spoil(*args: Any, **kwargs: Any) -> Any:
        answer = load(*args, **kwargs)
        with torch.no_grad():
            spoil(engine)
        return answer

    with patch.object(engine, "load_checkpoint", load_and_spoil):
        yield


def swap_momentum(engine: Any) -> None:
    """Moments of one expert come back on another."""
    places = [stored(engine, local) for local in range(2)]
    first, second = (each.of(engine.optimizer.state[each.parameter]["exp_avg"]) for each in places)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)


def leave_packed(engine: Any) -> None:
    """An expert stays what it was before the load: here, spoilt."""
    tensor = stored(engine)
    tensor.of(tensor.parameter.data).mul_(-0.5)


@contextmanager
def dropping(engine: Any, file: str = "layer_0_expert_3_mp_rank_00_model_states.pt") -> Iterator[None]:
    """The last expert of the first layer is not written."""
    save = engine.save_checkpoint

    def save_without(save_dir: str, tag: Any = None, **kwargs: Any) -> Any:
        answer = save(save_dir, tag=tag, **kwargs)
        dist.barrier()
        if dist.get_rank() == 0:
            (Path(save_dir) / tag / file).unlink()
        dist.barrier()
        return answer

    with patch.object(engine, "save_checkpoint", save_without):
        yield


@contextmanager
def double_softmax(engine: Any) -> Iterator[None]:
    from dataclasses import replace

    from ds_moe_ep.moe import balance

    def twice(loss: Any) -> Any:
        return lambda routing, *others: loss(replace(routing, scores_TE=routing.scores_TE.softmax(1)), *others)

    names = ("auxiliary_loss", "losses_of_rank")
    with patch.multiple(balance, **{name: twice(getattr(balance, name)) for name in names}):
        yield


@contextmanager
def uneven_weight(engine: Any) -> Iterator[None]:
    """One rank leaves the balance loss out of the last micro-batch of a step."""
    calls = [0]

    def detach(module: Any, args: Any, output: Any) -> Any:
        calls[0] += 1
        y, loss, counts = output
        return (y, loss * (2.0 if dist.get_rank() == 1 and calls[0] % 2 == 0 else 1.0), counts)

    handle = first_layer(engine).register_forward_hook(detach)
    yield
    handle.remove()


@contextmanager
def drifting_scale(engine: Any) -> Iterator[None]:
    scaler = engine.optimizer.loss_scaler
    before = scaler.cur_scale
    if dist.get_rank() == 1:
        scaler.cur_scale = before / 2
    yield
    scaler.cur_scale = before


@contextmanager
def doubled(engine: Any) -> Iterator[None]:
    """The gradient of one expert is twice too large."""
    tensor = stored(engine)

    def twice(gradient: torch.Tensor) -> torch.Tensor:
        more = gradient.clone()
        tensor.of(more).mul_(2)
        return more

    handle = tensor.parameter.register_hook(twice)
    yield
    handle.remove()


@contextmanager
def own_norm(engine: Any) -> Iterator[None]:
    """DeepSpeed's own clipping: a rank's norm has its own experts alone."""
    from ds_moe_ep.engine.extensions.clipping import GradientClipping
    from ds_moe_ep.engine.extensions.engine_extensions import EngineExtensions

    extensions = EngineExtensions.of(engine)
    found = [callback for callback in extensions.callbacks if type(callback) is GradientClipping]
    extensions.uninstall(found)
    yield
    extensions.install(found)


@contextmanager
def apart(engine: Any) -> Iterator[None]:
    weight = expert(engine).fc1.weight
    before = weight.detach().clone()
    if dist.get_rank() == 2:
        weight.data[0, 0] += 1e-3
    yield
    weight.data.copy_(before)


@contextmanager
def on_the_wire(engine: Any) -> Iterator[None]:
    """Rows that come back from experts are another token's on rank 1."""
    from ds_moe_ep.kernels.permute import unpermute
    from ds_moe_ep.moe import dispatcher

    def wrong(rows: Any, *others: Any) -> Any:
        return unpermute(rows.flip(0) if dist.get_rank() == 1 else rows, *others)

    with patch.object(dispatcher, "unpermute", wrong):
        yield


def of_each_maker(layout: Any, layer: str, stored_name: str, tensor: str) -> tuple[Mutant, ...]:
    """The faults that are planted alike whoever made the layer; `tensor` is the name of an expert's first one."""

    def at_load(spoil: Callable[[Any], None]) -> Callable[[Any], Any]:
        return lambda engine: after_load(engine, spoil)

    loaded, again = "checkpoint", "is another one after save and load"
    momentum, packed = f"{layer} expert 0 {tensor} (exp_avg)", f"{layer} expert 1 {tensor}"
    lost = "is not in the checkpoint's files"
    return (
        Mutant("frozen", layout, frozen, "groups", "in no group of the optimizer", f"{layer}.{stored_name}"),
        Mutant("momentum", layout, at_load(swap_momentum), loaded, again, momentum, checkpoint=True),
        Mutant("dropping", layout, dropping, loaded, lost, f"{layer} expert 3 {tensor[0]}", 0, checkpoint=True),
        Mutant("doubled", layout, doubled, "gradients", "2 times as large", f"{layer} expert 1 {tensor}"),
        Mutant("packed", layout, at_load(leave_packed), loaded, again, packed, checkpoint=True),
    )


LAYER = "layers.0"
MUTANTS = (  # of the public reports
    *of_each_maker(AUX, LAYER, "deepspeed_moe.experts", "fc1.weight"),
    Mutant("own norm", AUX, own_norm, "norm", "all experts counted once"),
    Mutant("without bias", BIAS, without_bias, "routing", "went to other experts than the scores and its bias", LAYER),
    Mutant("unmoved bias", BIAS, unmoved_bias, "balance", "the balancing bias of expert", LAYER),
    Mutant("drifting scale", BIAS, drifting_scale, "loss scale", "the loss scale is 32 and on rank 0 64", "", 1),
)
MORE_MUTANTS = (
    Mutant("double softmax", AUX, double_softmax, "balance", "its formula gives", LAYER),
    Mutant("stale", AUX, stale, "movement", "no step moved it", f"{LAYER} expert 1 fc2.weight"),
    Mutant("uneven weight", AUX, uneven_weight, "balance", "has a weight of 0.1 in a micro-batch", LAYER, 1),
    Mutant("apart", AUX, apart, "replicas", "differs from the copy on rank 0", f"{LAYER} expert 1 fc1.weight", 2),
    Mutant("on the wire", AUX, on_the_wire, "gradients", "output is not the dense model's", LAYER, 1),
    Mutant("fast", BIAS, fast, "groups", "is stepped with lr=0.3; the ds_config says 0.03", LAYER),
)
