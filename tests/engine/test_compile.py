"""A compiled model or engine leaves the MoE layers out: none of their frames is traced, and gradients stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from tests.engine.hooks.hooked_layers import hooked
from tests.engine.native_layers import PlainGelu
from tests.engine.small_model import BATCH, Job, make_layer
from tests.moe.layer_cases import D
from tests.ranks import RankPool

GRADIENTS = 1e-6  # of the largest: what a compiled sum may round otherwise


def job_of(name: str, num_ranks: int = 2) -> Job:
    return Job(layer=name, world_size=num_ranks, ep_size=num_ranks)


class Model(nn.Module):
    """Two MoE layers between operations that a compiler takes; no loop, which would keep it off the whole frame."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.enter = nn.Linear(D, D)
        self.first, self.second = make_layer(job), make_layer(job)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x).cos()
        hidden = hidden + self.first(hidden)[0].sin()
        return (hidden + self.second(hidden)[0]).square().mean()


class Seen:
    """A compiler that counts its graphs, and the frames of the package that were traced for it."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.num_graphs += 1
        return graph

    def frames(self) -> set[str]:
        from torch._dynamo.utils import get_compilation_metrics

        names = {f"{each.co_filename}:{each.co_name}" for each in get_compilation_metrics()}
        inside = ("ds_moe_ep/moe/", "ds_moe_ep/kernels/", "ds_moe_ep/comm/", "ds_moe_ep/engine/hook")
        return {name for name in names if any(folder in name for folder in inside)}


def started(model: nn.Module, door: str) -> Any:
    import deepspeed

    import ds_moe_ep

    config = {"train_micro_batch_size_per_gpu": BATCH, "optimizer": {"type": "SGD", "params": {"lr": 0.0}}}
    start = ds_moe_ep.initialize if door == "ds_moe_ep" else deepspeed.initialize
    return start(model=model, config=config)[0]


def gradients(engine: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    engine.module.zero_grad()
    run(x).backward()
    return [p.grad.clone() for p in engine.module.parameters() if p.grad is not None]


@contextmanager
def traced(backend: Seen) -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    yield
    torch._dynamo.reset()


def doors(engine: Any, backend: Seen) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """Every way to compile: the module apart, a step with its backward pass, and in place, which stays."""
    yield "torch.compile(engine.module)", torch.compile(engine.module, backend=backend)

    @torch.compile(backend=backend)
    def step(x: Tensor) -> Tensor:
        loss = engine.module(x)
        loss.backward()
        return loss * 0.0 + loss.detach()

    yield "a compiled step", lambda x: step(x).detach().requires_grad_()
    engine.compile(backend=backend)
    yield "engine.compile()", engine.module


def wrong_doors(name: str) -> list[str]:
    """Faults of each door, for the package's layer or the hooked one."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    engine = started(Model(job_of(name)), "ds_moe_ep" if name == "ours" else "deepspeed")
    x = torch.randn(BATCH, D, generator=torch.Generator().manual_seed(dist.get_rank()))
    wrong: list[str] = []

    def check() -> None:
        plain, backend = gradients(engine, engine.module, x), Seen()
        for door, run in doors(engine, backend):
            with traced(backend):
                backend.num_graphs = 0
                found = gradients(engine, run, x)
                wrong.extend(f"{name}, {door}: {frame} is compiled" for frame in backend.frames())
                wrong.extend([] if backend.num_graphs else [f"{name}, {door}: nothing is compiled"])
            if len(found) != len(plain) or any(
                float((a - b).abs().max()) > GRADIENTS * float(b.abs().max()) for a, b in zip(found, plain, strict=True)
            ):
                wrong.append(f"{name}, {door}: other gradients")

    if name == "ours":
        check()
    else:
        with hooked(engine, schedule="peers"):
            check()
    return wrong


def all_doors() -> list[str]:
    return wrong_doors("ours") + wrong_doors("native")


def test_compiled_engines_leave_the_layers_out_and_keep_their_gradients(pool: RankPool) -> None:
    assert pool.run(2, all_doors, timeout_s=240) == [[]] * 2


def before_the_engine(door: str, autograd: bool) -> tuple[set[str], float]:
    """Frames traced, and the distance of gradients, where the model is compiled before its engine is made."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model, backend = Model(job_of("ours", dist.get_world_size())), Seen()
    engine = started(torch.compile(model, backend=backend), door)
    x = torch.randn(BATCH, D, generator=torch.Generator().manual_seed(dist.get_rank()))
    plain = gradients(engine, model, x)
    with traced(backend), torch._dynamo.config.patch(compiled_autograd=autograd):
        backward = torch.compile(Tensor.backward, backend=backend) if autograd else Tensor.backward
        model.zero_grad()
        backward(engine.module(x))
        found = [p.grad for p in model.parameters() if p.grad is not None]
        distance = max(float((a - b).abs().max()) for a, b in zip(found, plain, strict=True))
        return backend.frames(), distance


def other_doors() -> list[tuple[set[str], float]]:
    return [before_the_engine(*each) for each in (("ds_moe_ep", False), ("deepspeed", True))]


class EndsAtOnce(Seen):
    """The same for the first graph alone: to trace a whole layer takes ten seconds."""

    def __call__(self, graph: Any, inputs: Any) -> Any:
        raise InterruptedError("the first graph is all that is asked for")


def not_left_out() -> set[str]:
    """The first frame of a layer that is not left out, on one rank."""
    from ds_moe_ep.moe.layer import ExpertParallel

    ExpertParallel.forward = ExpertParallel.forward.__wrapped__
    layer, backend = ExpertParallel(D, PlainGelu(bias=True), MoEConfig(num_experts=2, schedule="serial")), EndsAtOnce()
    with traced(backend):
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="the first graph"):
            torch.compile(layer, backend=backend)(torch.randn(BATCH, D))
        return backend.frames()


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_model_compiled_before_its_engine_is_made_leaves_the_layers_out_and_so_does_compiled_autograd(
    pool: RankPool,
    num_ranks: int,
) -> None:
    for found in pool.run(num_ranks, other_doors, timeout_s=240):
        for frames, distance in found:
            assert frames == set()
            assert distance <= GRADIENTS
    [control] = pool.run(1, not_left_out, timeout_s=240)
    assert any(frame.endswith("ds_moe_ep/moe/layer.py:forward") for frame in control), control
