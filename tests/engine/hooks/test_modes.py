"""The hooks under recomputation, accumulation, evaluation, torch.compile, autocast; what they refuse; the section."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_moe_ep.comm.callbacks import TransferMessage
from tests.comm.test_callbacks import HalfTheBytes
from tests.engine.hooks.hooked_layers import KNOBS, hooked, rank
from tests.engine.small_model import BATCH, Job, batches, make_engine, make_model
from tests.moe.layer_cases import D, OddExpert
from tests.ranks import RankPool

GRADIENTS = 2e-6


def gradients(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    """The parameters' gradients of the sum of losses, each of them differentiated by itself, the last one first."""
    model.zero_grad(set_to_none=True)
    for loss in reversed(losses):
        loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def off(mine: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """The largest difference over the largest value of its tensor."""
    return max(float((mine[n] - g).abs().max() / g.abs().max().clamp(min=1e-6)) for n, g in plain.items())


def native_model() -> tuple[Any, nn.Module, list[tuple[Tensor, Tensor]]]:
    """An engine, its model with DeepSpeed's layers, and this rank's two micro-batches."""
    job = Job(layer="native", accumulation=2, steps=1)
    engine = make_engine(job)
    return engine, engine.module, [(x[rank()], target[rank()]) for x, target in batches(job)[0]]


def recomputed() -> list[float]:
    """Distances of a hooked, recomputed pass from a plain one: reentrant and not; two passes in flight; twice over."""
    engine, model, pairs = native_model()
    (x, target), other = pairs
    plain, both = gradients(model, [model(x, target)]), gradients(model, [model(x, target), model(*other)])
    found = []
    with hooked(engine, **KNOBS[0]):
        for reentrant in (True, False):
            leaf = x.clone().requires_grad_()
            loss = checkpoint(model, leaf, target, use_reentrant=reentrant)
            found.append(off(gradients(model, [loss]), plain))
        found.append(off(gradients(model, [model(x, target), model(*other)]), both))
        loss = model(x, target)
        loss.backward(retain_graph=True)
        found.append(off(gradients(model, [loss]), plain))
    return found


def test_recomputation_accumulation_and_retained_graphs_give_the_plain_gradients(pool: RankPool) -> None:
    for found in pool.run(4, recomputed):
        assert max(found) <= GRADIENTS, found


def without_gradients() -> list[bool]:
    """True where hooked outputs without gradients are the plain ones', in training and evaluation."""
    engine, model, ((x, target), _) = native_model()

    def outputs() -> list[Tensor]:
        found = []
        for mode in (model.train, model.eval):
            mode()
            for scope in (torch.no_grad, torch.inference_mode):
                with scope():
                    found.append(model(x, target).clone())
        return found

    plain = outputs()
    with hooked(engine, **KNOBS[0]):
        mine = outputs()
    return [abs(float(a) - float(b)) <= 1e-6 * abs(float(b)) for a, b in zip(mine, plain, strict=True)]


def test_evaluation_and_no_grad_give_the_plain_outputs(pool: RankPool) -> None:
    assert pool.run(4, without_gradients) == [[True] * 4] * 4


def compiled() -> float:
    """The distance of a compiled model's gradients through the hooks from a plain model's."""
    job = Job(layer="native", world_size=2, ep_size=2, steps=1)
    engine = make_engine(job)
    x, target = (each[rank()] for each in batches(job)[0][0])
    plain = gradients(engine.module, [engine.module(x, target)])
    with hooked(engine, **KNOBS[0]):
        around = torch.compile(engine.module, backend="aot_eager")
        return off(gradients(engine.module, [around(x, target)]), plain)


def test_the_rest_of_the_model_can_be_compiled(pool: RankPool) -> None:
    assert max(pool.run(2, compiled, timeout_s=120)) <= GRADIENTS


def under_autocast() -> list[tuple[float, torch.dtype, torch.dtype]]:
    """Each kind of expert under bf16 autocast: distance of outputs, and both types."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    from ds_moe_ep import GeluMLP

    deepspeed.init_distributed("gloo")
    found = []
    for expert in (GeluMLP(D, 2 * D), OddExpert()):
        torch.manual_seed(0)
        layer = MoE(D, expert, num_experts=4, ep_size=4, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)
        layer.set_deepspeed_parallelism()
        x = torch.randn(BATCH, D)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            plain = layer(x)[0]
            with hooked(layer, **KNOBS[0]):
                mine = layer(x)[0]
                mine.float().sum().backward()
        found.append((float((mine - plain).abs().max() / plain.abs().max()), mine.dtype, plain.dtype))
    return found


def test_autocast_reaches_the_experts(pool: RankPool) -> None:
    for found in pool.run(4, under_autocast):
        for distance, mine, plain in found:
            assert mine == plain
            assert distance <= 2**-7  # a rounding of the output
        assert [mine for _, mine, _ in found] == [torch.bfloat16, torch.float32]  # the odd one ends in fp32


class TupleExpert(nn.Module):
    """An expert that insists on DeepSpeed's four dimensions and returns a bias beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        groups, _, _, width = x.shape
        assert groups * width
        return self.linear(x).tanh(), self.linear.bias


def any_expert() -> float:
    import deepspeed
    from deepspeed.moe.layer import MoE

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    layer = MoE(D, TupleExpert(), num_experts=8, ep_size=4, k=1, use_rts=False)
    layer.set_deepspeed_parallelism()
    x = torch.randn(BATCH, D)
    plain = gradients(layer, [layer(x)[0].square().sum()])
    with hooked(layer, **KNOBS[0]):
        return off(gradients(layer, [layer(x)[0].square().sum()]), plain)


def test_experts_that_want_four_dimensions_and_return_a_bias_are_called_as_deepspeed_calls_them(pool: RankPool) -> None:
    assert max(pool.run(4, any_expert)) <= GRADIENTS


def refusals() -> list[str]:
    """The errors of what cannot be hooked."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    import ds_moe_ep
    from ds_moe_ep import GeluMLP

    deepspeed.init_distributed("gloo")

    def error_of(model: nn.Module, config: Any = None) -> str:
        try:
            ds_moe_ep.attach_overlap(model, config)
        except ds_moe_ep.MoEError as error:
            return str(error)
        return "hooked"

    def layer(connected: bool = True) -> nn.Module:
        made = MoE(D, GeluMLP(D, 2 * D), num_experts=2, ep_size=2)
        if connected:
            made.set_deepspeed_parallelism()
        return made

    tutel, own, twice = layer(), layer(), layer()
    tutel.deepspeed_moe.use_tutel = True
    own.deepspeed_moe.forward = lambda *x: x[0]
    with hooked(nn.ModuleList([twice])):
        errors = [error_of(nn.ModuleDict({"moe": twice}))]
    errors += [error_of(nn.ModuleDict({"moe": m})) for m in (tutel, own, layer(connected=False))]
    errors += [error_of(nn.Linear(D, D)), error_of(layer(), {"top_k": 2}), error_of(layer(), {"shedule": "peers"})]
    differing = nn.ModuleDict({"moe": layer()})
    errors.append(error_of(differing, {"depth": 1 + rank()}))
    sole = MoE(D, GeluMLP(D, 2 * D), num_experts=2, ep_size=1)
    sole.set_deepspeed_parallelism()
    return [*errors, error_of(sole)]


def test_what_cannot_be_hooked_is_refused_by_name_on_every_rank(pool: RankPool) -> None:
    wanted = [
        ("moe (MoE) cannot be hooked", "hooked already"),
        ("moe (MoE)", "use_tutel=False"),
        ("moe (MoE)", "forward"),
        ("moe (MoE)", "deepspeed.initialize"),
        ("model=Linear", "deepspeed.moe.layer.MoE"),
        ("config.top_k=2", "not a knob of the traffic"),
        ("config.shedule", "did you mean 'schedule'"),
        ("ranks [1]", "same model and configuration"),
        ("hooked",),  # ep_size 1: nothing to hide, nothing to refuse
    ]
    for errors in pool.run(2, refusals):
        for error, words in zip(errors, wanted, strict=True):
            assert all(word in error for word in words), error


class Halved(HalfTheBytes):
    """Counts the bytes besides; spoils what goes to one rank where it is told to."""

    def __init__(self, spoils: bool = False) -> None:
        self.num_bytes, self.spoils = 0, spoils

    def before_send(self, message: TransferMessage) -> Tensor:
        self.num_bytes += message.rows.nbytes
        wire = super().before_send(message)
        return wire * 2 if self.spoils and message.peer == 2 and message.phase == "forward" else wire


def through_callbacks() -> list[float]:
    """Distances of outputs: compressed, with one message spoilt, and after the callback was taken away."""
    engine, model, ((x, _), _) = native_model()
    plain = model.layers[0](x)[0]
    found, halved = [], Halved()
    with hooked(engine, **KNOBS[0]) as handle:
        for callback in (halved, Halved(spoils=True)):
            handle.add_callback(callback)
            found.append(float((model.layers[0](x)[0] - plain).abs().max() / plain.abs().max()))
            handle.remove_callback(callback)
        found.append(float((model.layers[0](x)[0] - plain).abs().max() / plain.abs().max()))
    assert halved.num_bytes > 0
    return found


def test_callbacks_compress_what_the_hooks_send(pool: RankPool) -> None:
    """bf16 keeps 8 bits of a row on its way there and back; a spoilt message is the negative control."""
    by_rank = pool.run(4, through_callbacks)
    assert max(compressed for compressed, _, _ in by_rank) <= 2**-6
    assert min(compressed for compressed, _, _ in by_rank) > 0
    assert max(spoilt for _, spoilt, _ in by_rank) > 2**-4
    assert max(without for *_, without in by_rank) <= 2e-7


def attached_by_section(section: dict[str, Any]) -> tuple[list[str], bool, str]:
    """Layers that `initialize` hooks, whether the meter measured them, and the error."""
    import ds_moe_ep

    job = Job(layer="native", steps=4)
    model = make_model(job)
    config = {**job.ds_config, "moe_ep": {"attach": True, "node_size": 2, **section}}
    try:
        engine, *_ = ds_moe_ep.initialize(model=model, config=config)
    except ds_moe_ep.MoEError as error:
        return [], False, str(error)
    for ((x, target),) in batches(job):
        engine.backward(engine(x[rank()], target[rank()]))
        engine.step()
    dist.barrier()
    return list(engine.moe_ep_layers), engine.moe_ep_meter.hidden_percent() is not None, ""


def test_the_section_attaches_hooks_and_their_meter(pool: RankPool) -> None:
    expected = (["layers.0", "layers.1"], True, "")
    assert pool.run(4, attached_by_section, {"schedule": "peers", "meter_every": 2}) == [expected] * 4


@pytest.mark.parametrize("section", [{"top_k": 1}, {"num_experts": 16}])
def test_a_section_that_contradicts_the_hooked_layers_is_refused(pool: RankPool, section: dict[str, Any]) -> None:
    for _, _, error in pool.run(4, attached_by_section, section):
        assert next(iter(section)) in error
        assert "layers.0" in error


class Raising(nn.Module):
    """An expert that fails on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        if rank() == 1:
            raise ArithmeticError("the expert is ill")
        return self.linear(x).tanh()


def errors_of_a_bad_rank(expert: str) -> tuple[str, str]:
    """Type and text of this rank's error, where rank 1 has too few tokens for its gate, or an expert that fails."""
    import deepspeed
    from deepspeed.moe.layer import MoE

    from ds_moe_ep import GeluMLP

    deepspeed.init_distributed("gloo")
    template = GeluMLP(D, 2 * D) if expert == "known" else Raising()
    model = nn.ModuleDict({"moe": MoE(D, template, num_experts=3, ep_size=3, k=1)})
    model["moe"].set_deepspeed_parallelism()
    with hooked(model, schedule="peers", timeout_s=20.0):
        try:
            model["moe"](torch.randn(2 if expert == "known" and rank() == 1 else BATCH, D))
        except Exception as error:
            return type(error).__name__, str(error)
    return "", ""


def test_a_gate_that_fails_on_one_rank_is_told_to_the_others(pool: RankPool) -> None:
    first, second, third = pool.run(3, errors_of_a_bad_rank, "known")
    assert second[0] == "AssertionError"
    for kind, text in (first, third):
        assert kind == "EngineError"
        assert "moe: rank 1 refused its input" in text


def test_an_expert_that_fails_on_one_rank_is_named_on_the_others(pool: RankPool) -> None:
    first, second, third = pool.run(3, errors_of_a_bad_rank, "raising", timeout_s=60)
    assert second == ("ArithmeticError", "the expert is ill")
    for kind, text in (first, third):
        assert kind == "PeerError"
        assert "rank 1: ArithmeticError: the expert is ill" in text
        assert text.startswith("moe: forward")
