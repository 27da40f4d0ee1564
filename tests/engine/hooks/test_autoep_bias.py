"""The routing bias of hooked AutoEP layers moves once per optimizer step, by the loads of all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.hooks import autoep_models
from tests.engine.hooks.autoep_models import AutoEPJob, autoep_layers
from tests.engine.hugging_face import tiny_models
from tests.ranks import RankPool

STEP, NUM_STEPS, ACCUMULATION = 0.01, 3, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model whose routing bias is AutoEP's own buffer, or came with the weights of DeepSeek-V3."""

    family: str = "deepseek_v3"
    section: bool = True
    stage: int = 1
    bf16: bool = False
    checkpointing: bool = False


CASES = [Case(), Case(section=False), Case(family="mixtral", stage=0, bf16=True, checkpointing=True)]


def make_engine(case: Case, seed: int = 3) -> Any:
    """An engine of the case, not hooked yet. Collective."""
    import deepspeed

    import ds_moe_ep

    ds_moe_ep.init_distributed(dist_backend="gloo", verbose=False)
    model = tiny_models.make_model(case.family, seed)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = tiny_models.ds_config(case.stage, {"autoep_size": 2, "preset_model": case.family})
    config |= {"gradient_accumulation_steps": ACCUMULATION, "bf16": {"enabled": case.bf16}}
    config |= {"moe_ep": {"balance": "bias", "bias_step": STEP}} if case.section else {}
    engine = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]
    if case.family == "mixtral":  # AutoEP has the place, and nothing makes one
        for layer in autoep_layers(engine).values():
            del layer.expert_bias  # None
            layer.register_buffer("expert_bias", torch.zeros(tiny_models.NUM_EXPERTS, dtype=torch.bfloat16))
    engine.train()
    return engine


def bias_of(layer: nn.Module) -> Tensor:
    found = layer.router.e_score_correction_bias if layer.expert_bias is None else layer.expert_bias
    return found.detach().clone()


def train(engine: Any, first: int, count: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Load of all ranks by AutoEP's own counter, and the bias behind it, for each step and layer. Collective."""
    layers, found = list(autoep_layers(engine).values()), []
    for step in range(first, first + count):
        before = [layer.tokens_per_expert.clone() for layer in layers]
        for micro_batch in range(ACCUMULATION):
            ids = tiny_models.token_ids(100 * dist.get_rank() + 10 * step + micro_batch)
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        loads = [layer.tokens_per_expert - count for layer, count in zip(layers, before, strict=True)]
        for load_E in loads:
            dist.all_reduce(load_E)
        found.append([(load_E, bias_of(layer)) for load_E, layer in zip(loads, layers, strict=True)])
    return found


def run(case: Case, folder: Path) -> dict[str, Any]:
    """The bias from before the first step to behind the last one, and through a checkpoint."""
    import ds_moe_ep

    engine = make_engine(case)
    start = [bias_of(layer).float() for layer in autoep_layers(engine).values()]
    with ds_moe_ep.attach_overlap(engine) as handle:
        moved = [layer.balance is not None for layer in handle.layers.values()]
        steps = train(engine, 0, NUM_STEPS)
        engine.save_checkpoint(str(folder))
        further = train(engine, NUM_STEPS, 1)
    other = make_engine(case, seed=4)
    with ds_moe_ep.attach_overlap(other):
        other.load_checkpoint(str(folder))
        loaded = [bias_of(layer) for layer in autoep_layers(other).values()]
        resumed = train(other, NUM_STEPS, 1)
    return {"start": start, "moved": moved, "steps": steps, "further": further, "loaded": loaded, "resumed": resumed}


def run_all(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every case, and what is refused."""
    import ds_moe_ep
    from tests.engine.test_doors import deepspeeds_layer, plain_engine, refusal

    found = [run(case, folder / str(index)) for index, case in enumerate(CASES)]
    without = autoep_models.make_engine(AutoEPJob(world_size=2, ep_size=2))
    without._config._param_dict["moe_ep"] = {"balance": "bias"}
    native = plain_engine(deepspeeds_layer(), moe_ep={"balance": "bias"})
    return found, [refusal(lambda engine=engine: ds_moe_ep.attach_overlap(engine)) for engine in (without, native)]


def test_the_bias_moves_by_the_loads_of_all_ranks_and_goes_through_checkpoints(pool: RankPool, tmp_path: Path) -> None:
    by_rank = pool.run(2, run_all, tmp_path, timeout_s=200)
    for found, refusals in by_rank:
        for case, result in zip(CASES, found, strict=True):
            assert result["moved"] == [case.section] * len(result["start"])
            expected = list(result["start"])
            for of_step in result["steps"]:
                for index, (load_E, bias_E) in enumerate(of_step):
                    assert load_E.sum() > 0 and bias_E.dtype == torch.float32
                    if case.section:
                        expected[index] = expected[index] + STEP * torch.sign(load_E.mean() - load_E)
                    torch.testing.assert_close(bias_E, expected[index], rtol=0, atol=1e-6)
            assert case.section == any(
                (e - s).abs().max() > STEP / 2 for e, s in zip(expected, result["start"], strict=True)
            )
            assert all(
                torch.equal(*pair) for pair in zip(result["loaded"], [b for _, b in result["steps"][-1]], strict=True)
            )
            for (_, bias_E), (_, again_E) in zip(result["further"][0], result["resumed"][0], strict=True):
                assert torch.equal(bias_E, again_E)
        assert "model.layers.0.mlp (AutoEPMoELayer) cannot be balanced by a bias: it has no bias to move" in refusals[0]
        assert "DeepSpeed's TopKGate chooses without a bias" in refusals[1]
    first, second = (found for found, _ in by_rank)
    assert all(torch.equal(a[1], b[1]) for x, y in zip(first, second, strict=True)
               for p, q in zip(x["steps"], y["steps"], strict=True) for a, b in zip(p, q, strict=True))  # fmt: skip
