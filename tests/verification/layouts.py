"""Tiny engines beside tensor ranks, sequence ranks and in pipeline stages, to be verified on 4 real ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tests.engine.hooks.autoep_models import batches as autoep_batches
from tests.engine.hooks.autoep_models import make_engine as make_autoep_engine
from tests.engine.hooks.test_folded_autoep import FoldedJob
from tests.engine.layouts import stage_models
from tests.engine.layouts.layout_runs import LayoutJob
from tests.engine.layouts.layout_runs import make_engine as make_layout_engine
from tests.engine.layouts.tensor_models import RATE, TENSOR_SIZE, D, TensorJob, TensorModel, mpu_of, sequence_mpu_of
from tests.engine.layouts.tensor_runs import AUTOTP, give_weights, make_layer, parameter_groups
from tests.parallel.training_runs import Run, make_experts, make_pipeline, of_this_copy


@dataclass(frozen=True, kw_only=True)
class RanksLayout:
    """An engine of a layout, and this rank's micro-batches without end."""

    name: str
    make: Callable[[], Any]
    endless: Callable[[Any], Iterator[Any]]
    accumulation: int = 1
    is_saved: bool = True  # a checkpoint of it would load

    def step(self, engine: Any, batches: Iterator[Any]) -> None:
        """One step of training."""
        if hasattr(engine, "train_batch"):
            engine.train_batch(batches)
            return
        for _ in range(self.accumulation):
            batch = next(batches)
            args = batch if isinstance(batch, tuple) else (batch,)
            output = engine(**batch) if isinstance(batch, dict) else engine(*args)
            engine.backward(getattr(output, "loss", output))
            engine.step()


def tensor_layout(name: str, by_autotp: bool = False, **settings: Any) -> RanksLayout:
    """A dense part cut over 2 tensor ranks, by an mpu or by AutoTP's section."""
    job = TensorJob(**{"clipping": 0.05, "top_k": 2, **settings})

    def make() -> Any:
        from ds_moe_ep.engine.layouts.known_groups import forget_groups

        forget_groups()
        grid = None if by_autotp else mpu_of(TENSOR_SIZE)
        model = TensorModel(job, lambda _: make_layer(job), grid)
        return _engine(model, job, grid, **(AUTOTP if by_autotp else {}))

    def batches(engine: Any) -> Iterator[Any]:
        copy = dist.get_rank() // TENSOR_SIZE
        return itertools.cycle([x[copy].to(job.dtype) for x in job.batches()])

    is_saved = job.ep_size % TENSOR_SIZE == 0
    return RanksLayout(name=name, make=make, endless=batches, accumulation=job.accumulation, is_saved=is_saved)


def sequence_layout(name: str, by_megatron: bool = False, **settings: Any) -> RanksLayout:
    """2 sequence ranks per copy of the model, by DeepSpeed's unit of groups, or by Megatron-DeepSpeed's mpu."""
    job = TensorJob(**{"clipping": 0.05, "top_k": 2, **settings})

    def make() -> Any:
        from deepspeed.runtime.sequence_parallel import parallel_state_sp as unit

        from ds_moe_ep.engine.layouts.known_groups import forget_groups

        forget_groups()
        if unit._SEQUENCE_PARALLEL_GROUP is None:
            unit.initialize_sequence_parallel(2)
        model = TensorModel(job, lambda _: make_layer(job))
        return _engine(model, job, sequence_mpu_of(2) if by_megatron else unit, sequence_parallel_size=2)

    def batches(engine: Any) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(5 + dist.get_rank())
        shape = (job.tokens, D)
        return itertools.cycle([torch.randn(shape, generator=generator).to(job.dtype) for _ in range(4)])

    return RanksLayout(name=name, make=make, endless=batches, accumulation=job.accumulation)


def folded_layout(name: str, **settings: Any) -> RanksLayout:
    """AutoEP's layers folded over 2 tensor ranks of AutoTP's."""
    job = FoldedJob(**{"clipping": 0.05, "ep_size": 2, **settings})

    def make() -> Any:
        import ds_moe_ep
        from ds_moe_ep.engine.layouts.known_groups import forget_groups

        forget_groups()
        engine = make_autoep_engine(job)
        if job.hooked:
            ds_moe_ep.attach_overlap(engine, {"schedule": "peers"})
        return engine

    def batches(engine: Any) -> Iterator[Any]:
        copy = dist.get_rank() // job.tensor_size
        ids = [each[copy] for step in autoep_batches(job) for each in step]
        return itertools.cycle([{"input_ids": each, "labels": each} for each in ids])

    is_saved = job.stage == 3 or job.ep_size % job.tensor_size == 0
    return RanksLayout(name=name, make=make, endless=batches, accumulation=job.accumulation, is_saved=is_saved)


def _engine(model: TensorModel, job: TensorJob, mpu: Any, **keys: Any) -> Any:
    import deepspeed

    import ds_moe_ep

    ds_moe_ep.init_distributed()
    give_weights(model, job)
    optimizer = torch.optim.SGD(parameter_groups(model), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, mpu=mpu, config=job.ds_config(keys))
    if job.kind != "native":
        ds_moe_ep.attach_overlap(engine, {"schedule": "peers"} if job.kind == "hooked" else None)
    return engine


def stages_layout(name: str, stage: int = 0, section: dict[str, Any] | None = None, **knobs: Any) -> RanksLayout:
    """Two stages of two ranks, of which the first has two layers of experts and the second one."""

    def make() -> Any:
        import ds_moe_ep

        ds_moe_ep.init_distributed()
        config = stage_models.ds_config(stage, gradient_clipping=0.05, **({"moe_ep": section} if section else {}))
        return stage_models.make_engine(ds_moe_ep.MoE, ds_moe_ep.initialize, config, k=2, **knobs)

    def batches(engine: Any) -> Iterator[Any]:
        return (pair for step in itertools.count() for pair in stage_models.mine(engine, step))

    return RanksLayout(name=name, make=make, endless=batches)


@dataclass(frozen=True, kw_only=True)
class CoverJob(LayoutJob):
    """A job of 8 ranks that takes plain steps in every precision."""

    clipping: float = 0.05

    @property
    def rate(self) -> float:
        return RATE


def cover_layout(**settings: Any) -> RanksLayout:
    """Settings of the covering design."""
    job = CoverJob(**settings)

    def make() -> Any:
        from ds_moe_ep.engine.layouts.known_groups import forget_groups

        forget_groups()
        return make_layout_engine(job)[0]

    def batches(engine: Any) -> Iterator[Any]:
        copy = engine.grid.get_data_parallel_rank() if job.pp_size > 1 else dist.get_rank() // job.tp_size
        own = [x[copy].to(job.dtype) for x in job.batches()]
        if job.pp_size > 1:
            return itertools.cycle([(torch.cat((x, x.new_zeros(len(x), 1)), dim=1), x) for x in own])
        return itertools.cycle(own)

    told = ", ".join(f"{key} {value}" for key, value in settings.items())
    is_saved = job.ep_size % job.tp_size == 0
    return RanksLayout(name=told, make=make, endless=batches, accumulation=job.accumulation, is_saved=is_saved)


def own_model_layout(name: str, **settings: Any) -> RanksLayout:
    """The package's own model in a plain engine."""
    run = Run(**{"top_k": 2, "ep_size": 2, "clipping": 0.05, "steps": 2, **settings})

    def batches(engine: Any) -> Iterator[Any]:
        group, place = divmod(dist.get_rank(), run.ep_size)
        num_groups = run.world_size // run.ep_size
        own = [each for step in run.batches() for each in step[group::num_groups]]
        return itertools.cycle([(ids.chunk(run.ep_size)[place], to.chunk(run.ep_size)[place]) for ids, to in own])

    def make() -> Any:
        from ds_moe_ep.engine.layouts.known_groups import forget_groups

        forget_groups()
        return make_experts(run)[0]

    accumulation = run.num_micro_batches * run.ep_size // run.world_size
    return RanksLayout(name=name, make=make, endless=batches, accumulation=accumulation)


def own_pipeline_layout(name: str, **settings: Any) -> RanksLayout:
    """The package's own model in stages of tensor ranks, whose experts ranks share, or which cut them."""
    run = Run(**{"top_k": 2, "num_micro_batches": 4, "clipping": 0.05, "steps": 2, "balance_scope": "rank", **settings})

    def batches(engine: Any) -> Iterator[Any]:
        num_sharing = max(1, run.ep_size // run.tp_size) if run.is_staged else 1
        return itertools.cycle(
            [each for step in run.batches() for each in of_this_copy(engine, step, num_sharing)],
        )

    return RanksLayout(name=name, make=lambda: make_pipeline(run), endless=batches)


SEQUENCE = sequence_layout("sequence ranks")
TENSOR = tensor_layout("tensor ranks, ZeRO 1", stage=1)
STAGES = stages_layout("stages")
AUTOTP_RANKS = tensor_layout("tensor ranks, AutoTP", by_autotp=True)
FOLDED = folded_layout("folded AutoEP")
CUT = own_pipeline_layout("own model, PP 2 x TP 2, experts cut")
FOLDED_3 = folded_layout("folded AutoEP, ZeRO 3", stage=3, preset="qwen3_moe", router_logits=True)
OF_EACH_LAYOUT = (SEQUENCE, TENSOR, STAGES, CUT, FOLDED_3)
MORE_OF_LAYOUTS = (
    sequence_layout("sequence ranks, ZeRO 2", stage=2, ep_size=4),
    sequence_layout("sequence ranks, bf16", bf16=True),
    sequence_layout("sequence ranks, Megatron's", by_megatron=True),
    sequence_layout("sequence ranks, hooked", kind="hooked", stage=1, ep_size=4),
    tensor_layout("tensor ranks, EP 4", ep_size=4, accumulation=2),
    tensor_layout("tensor ranks, bf16, ZeRO 2, residual", stage=2, bf16=True, residual=True),
    tensor_layout("tensor ranks, tokens that come cut", cuts_tokens=True, tokens=8, knobs={"sequence_parallel": True}),
    tensor_layout("tensor ranks, capacity", capacity_factor=1.0, ep_size=1),
    tensor_layout("tensor ranks, shared", shared=True, ep_size=4),
    tensor_layout("tensor ranks, hooked", kind="hooked", ep_size=4),
    AUTOTP_RANKS,
    FOLDED,
    folded_layout("folded AutoEP, ZeRO 1, EP 4", ep_size=4, stage=1, accumulation=2),
    folded_layout("folded AutoEP, ZeRO 2", stage=2),
    folded_layout("folded AutoEP, plain", hooked=False, clipping=0.0),
    folded_layout("folded AutoEP, plain, ZeRO 1", hooked=False, clipping=0.0, stage=1),
    folded_layout("folded AutoEP, ZeRO 3, EP 4", ep_size=4, stage=3),
    stages_layout("stages, ZeRO 1", stage=1),
    own_model_layout("own model"),
    own_pipeline_layout("own model, PP 2 x TP 2 x EP 2", ep_size=2, is_staged=True),
    own_pipeline_layout("own model, PP 2 x TP 2, experts cut, ZeRO 1, bf16", stage=1, bf16=True),
    stages_layout("stages, one tensor", layers=stage_models.layers_in_one_tensor, interval=1),
)
