"""The public reports' faults in layers that DeepSpeed and AutoEP made, wherever they can exist there.

DeepSpeed's gate has no routing bias, so none can be dropped or stand still. AutoEP's routing that a converter leaves
behind is in `converted.py` too, for the judge alone. The norm that counts a rank's own experts needs no planting:
DeepSpeed's own clipping has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from ds_moe_ep.engine.views.layers import viewed_layers
from tests.engine.hooks import test_autoep_bias as biased
from tests.engine.hooks.autoep_models import AutoEPJob
from tests.engine.hugging_face.tiny_models import ds_config, make_model, token_ids, train_one_step
from tests.engine.small_model import Job
from tests.verification.engines import FEW, Layout
from tests.verification.layout_mutants import stale_master
from tests.verification.layouts import RanksLayout
from tests.verification.mutants import Mutant, drifting_scale, of_each_maker, uneven_weight, unmoved_bias


@dataclass(frozen=True, kw_only=True)
class ScaledJob(AutoEPJob):
    """A job in fp16."""

    fp16: bool = True
    grouped_mm: bool = False

    @property
    def ds_config(self) -> dict[str, Any]:
        return super().ds_config | {"fp16": {"enabled": True, "initial_scale_power": 8}}


def biased_layout(name: str) -> RanksLayout:
    """DeepSeek-V3 behind AutoEP, hooked, whose routing bias moves."""

    def make() -> Any:
        import ds_moe_ep
        from ds_moe_ep.engine.layouts.known_groups import forget_groups

        forget_groups()
        engine = biased.make_engine(biased.CASES[0])
        ds_moe_ep.attach_overlap(engine)
        return engine

    def batches(engine: Any) -> Iterator[Any]:
        ids = [token_ids(100 * dist.get_rank() + number) for number in range(4)]
        return itertools.cycle([{"input_ids": each, "labels": each} for each in ids])

    return RanksLayout(name=name, make=make, endless=batches, accumulation=biased.ACCUMULATION)


def routed_layout(name: str) -> RanksLayout:
    """DeepSeek-V3 behind AutoEP: its router has a bias, a scale and groups."""

    def make() -> Any:
        from ds_moe_ep.engine.layouts.known_groups import forget_groups

        forget_groups()
        return train_one_step(
            make_model("deepseek_v3"), ds_config(1, {"autoep_size": 2, "preset_model": "deepseek_v3"})
        )

    def batches(engine: Any) -> Iterator[Any]:
        ids = [token_ids(100 * dist.get_rank() + number) for number in range(4)]
        return itertools.cycle([{"input_ids": each, "labels": each} for each in ids])

    return RanksLayout(name=name, make=make, endless=batches)


NATIVE = Layout("native", Job(**FEW, layer="native", accumulation=2))
NATIVE_CLIPPED = Layout("native, clipped by DeepSpeed", Job(**FEW, layer="native", clipping=0.01))
NATIVE_FP16 = Layout("native, fp16", Job(**FEW, layer="native", fp16=True, stage=1))
AUTOEP = Layout("AutoEP", AutoEPJob(ep_size=2, preset="qwen3_moe", router_logits=True, accumulation=2))
AUTOEP_CLIPPED = Layout("AutoEP, clipped by DeepSpeed", AutoEPJob(ep_size=2, clipping=0.01))
AUTOEP_FP16 = Layout("AutoEP, fp16", ScaledJob(ep_size=2, stage=1, num_layers=1))
AUTOEP_BIAS = biased_layout("AutoEP, hooked, a bias that moves")
AUTOEP_ROUTED = routed_layout("AutoEP, DeepSeek-V3")


@contextmanager
def native_double_softmax(engine: Any) -> Iterator[None]:
    from deepspeed.moe import sharded_moe

    right = sharded_moe.top2gating

    def twice(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = right(logits, *args, **kwargs)
        return right(logits.softmax(1), *args, **kwargs)[0], *answer[1:]

    with patch.object(sharded_moe, "top2gating", twice):
        yield


@contextmanager
def model_double_softmax(engine: Any) -> Iterator[None]:
    from transformers.models.qwen3_moe import modeling_qwen3_moe as model

    right = model.load_balancing_loss_func

    def twice(logits: Any, *args: Any, **kwargs: Any) -> Any:
        return right(tuple(each.softmax(-1) for each in logits), *args, **kwargs)

    with patch.object(model, "load_balancing_loss_func", twice):
        yield


@contextmanager
def uneven_model_weight(engine: Any) -> Iterator[None]:
    """One rank adds the model's balance loss with another weight."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as model

    right = model.load_balancing_loss_func

    def heavier(*args: Any, **kwargs: Any) -> Any:
        return right(*args, **kwargs) * (2.0 if dist.get_rank() == 1 else 1.0)

    with patch.object(model, "load_balancing_loss_func", heavier):
        yield


def leaving(attribute: str, value: Any) -> Callable[[Any], Any]:
    """The converter leaves a part of the source's routing behind."""

    @contextmanager
    def left(engine: Any) -> Iterator[None]:
        router = viewed_layers(engine.module)[0].gate
        before = getattr(router, attribute)
        setattr(router, attribute, value)
        yield
        setattr(router, attribute, before)

    return left


LAYER, BLOCK, ROUTED = "layers.0", "model.layers.0.mlp", "model.layers.1.mlp"
BIAS, OTHERWISE = "e_score_correction_bias", "routed otherwise than by the block that it replaced"
DRIFT = "and on rank 0 256"
OF_DEEPSPEED = (
    *of_each_maker(NATIVE, LAYER, "deepspeed_moe.experts", "fc1.weight"),
    Mutant("stale", NATIVE, stale_master, "movement", "no step moved it", f"{LAYER} expert"),
    Mutant("double softmax", NATIVE, native_double_softmax, "balance", "its formula gives", LAYER),
    Mutant("uneven weight", NATIVE, uneven_weight, "balance", "has a weight of 0.1 in a micro-batch", LAYER, 1),
    Mutant("own norm", NATIVE_CLIPPED, lambda engine: nullcontext(), "norm", "all experts counted once"),
    Mutant("drifting scale", NATIVE_FP16, drifting_scale, "loss scale", DRIFT, "", 1),
)
OF_AUTOEP = (
    *of_each_maker(AUTOEP, BLOCK, "experts", "w1"),
    Mutant("stale", AUTOEP, stale_master, "movement", "no step moved it", f"{BLOCK} expert"),
    Mutant("double softmax", AUTOEP, model_double_softmax, "balance", "is not that of the routing weights", BLOCK),
    Mutant("uneven weight", AUTOEP, uneven_model_weight, "balance", "is not that of the routing weights", BLOCK, 1),
)
OF_AUTOEP_BESIDE = (
    Mutant("own norm", AUTOEP_CLIPPED, lambda engine: nullcontext(), "norm", "all experts counted once"),
    Mutant("drifting scale", AUTOEP_FP16, drifting_scale, "loss scale", DRIFT, "", 1),
    Mutant("unmoved bias", AUTOEP_BIAS, unmoved_bias, "balance", "the balancing bias of expert", ROUTED),
    Mutant(
        "without bias", AUTOEP_ROUTED, leaving(BIAS, None), "routing", f"has {BIAS}, and the layer has none", ROUTED
    ),
    Mutant("without scale", AUTOEP_ROUTED, leaving("route_scale", 1.0), "routing", OTHERWISE, ROUTED),
    Mutant("without groups", AUTOEP_ROUTED, leaving("num_expert_groups", None), "routing", OTHERWISE, ROUTED),
)
