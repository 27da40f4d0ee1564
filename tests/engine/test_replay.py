"""Training from a record is bit-equal to the training that was recorded: own layers, hooked ones of both kinds."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.hooks import autoep_models
from tests.engine.hooks.autoep_models import AutoEPJob
from tests.ranks import RankPool

STEPS, ACCUMULATION, WIDTH, NUM_EXPERTS = 2, 2, 16, 4
KINDS = ("own", "own, recomputed", "native, k=1", "native, k=2", "native, k=3", "autoep", "autoep, recomputed")


class Net(nn.Module):
    """An MoE layer with a skip between two Linears, which may recompute it."""

    def __init__(self, layer: nn.Module, recomputes: bool) -> None:
        super().__init__()
        self.enter, self.layer, self.leave = nn.Linear(WIDTH, WIDTH), layer, nn.Linear(WIDTH, WIDTH)
        self.recomputes = recomputes

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        hidden = self.enter(x)
        output, l_aux, _ = checkpoint(self.layer, hidden, use_reentrant=True) if self.recomputes else self.layer(hidden)
        return self.leave(hidden + output).square().mean() + 0.1 * l_aux


def make_engine(kind: str) -> Any:
    """An engine with hooks where DeepSpeed made the layers. Collective."""
    import deepspeed
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    import ds_moe_ep

    ds_moe_ep.init_distributed(dist_backend="gloo", verbose=False)
    if kind.startswith("autoep"):
        recompute = "non-reentrant" if "recomputed" in kind else ""
        return autoep_models.make_engine(AutoEPJob(world_size=2, ep_size=2, accumulation=2, checkpointing=recompute))
    torch.manual_seed(5)
    expert = ds_moe_ep.GeluMLP(WIDTH, 32)
    if kind.startswith("own"):
        # "auto" chooses by what it measures in each training: sums in another order are other bits
        knobs = ds_moe_ep.MoEConfig(num_experts=NUM_EXPERTS, ep_size=2, top_k=2, schedule="peers")
        layer: nn.Module = ds_moe_ep.MoE(WIDTH, expert, config=knobs)
    else:
        layer = DeepSpeedMoE(WIDTH, expert, NUM_EXPERTS, ep_size=2, k=int(kind[-1]), drop_tokens=False)
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=Net(layer, "recomputed" in kind), config=config)[0]


def train(engine: Any, is_autoep: bool) -> tuple[list[float], list[Tensor]]:
    """Losses of this rank, and its weights behind the last step. Collective."""
    losses = []
    for index in range(STEPS * ACCUMULATION):
        generator = torch.Generator().manual_seed(10 * index + dist.get_rank())
        if is_autoep:
            ids = torch.randint(autoep_models.VOCABULARY, (2, 12), generator=generator)
            loss = engine(input_ids=ids, labels=ids).loss
        else:
            loss = engine(torch.randn(6, WIDTH, generator=generator))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, [parameter.detach().clone() for parameter in engine.module.parameters()]


def run(kind: str, file: Path) -> tuple[bool, bool, bool]:
    """Whether the replay is bit-equal, another's routes are seen, and every layer was recorded. Collective."""
    import ds_moe_ep

    def trained(scope: Any) -> tuple[list[float], list[Tensor]]:
        engine = make_engine(kind)
        with ExitStack() as stack:
            if not kind.startswith("own"):
                stack.enter_context(ds_moe_ep.attach_overlap(engine, {"schedule": "peers"}))
            record = stack.enter_context(scope(engine))
            outcome = train(engine, kind.startswith("autoep"))
        if record is not None:
            record.save(file)
        return outcome

    losses, weights = trained(ds_moe_ep.record_routes)
    record = ds_moe_ep.RouteRecord.load(file)
    is_whole = all(len(layer.passes) == STEPS * ACCUMULATION for layer in record.layers.values())
    again, same_weights = trained(lambda engine: ds_moe_ep.replay_routes(engine, record))
    is_equal = again == losses and all(map(torch.equal, same_weights, weights))
    for layer in record.layers.values():
        layer.passes[:] = [(coded_TK + 1) % layer.num_experts for coded_TK in layer.passes]
    other, _ = trained(lambda engine: ds_moe_ep.replay_routes(engine, record))
    return is_equal, other != losses, is_whole


def run_all(folder: Path) -> tuple[list[tuple[bool, bool, bool]], list[str]]:
    """Every kind, and what cannot be recorded."""
    import ds_moe_ep
    from tests.engine.test_doors import refusal

    found = [run(kind, folder / f"{index}.{dist.get_rank()}") for index, kind in enumerate(KINDS)]
    engine = make_engine("native, k=1")
    refusals = [refusal(lambda: ds_moe_ep.record_routes(engine).__enter__())]
    with ds_moe_ep.attach_overlap(engine):
        engine.module.layer.deepspeed_moe.gate.drop_tokens = True
        refusals.append(refusal(lambda: ds_moe_ep.record_routes(engine).__enter__()))
        engine.module.layer.deepspeed_moe.gate.drop_tokens = False
        with ds_moe_ep.record_routes(engine) as record:
            train(engine, False)
        if dist.get_rank() == 1:
            record.layers["other"] = record.layers.pop("layer")
        refusals.append(refusal(lambda: ds_moe_ep.replay_routes(engine, record).__enter__()))
    return found, refusals


def test_training_from_ones_own_record_is_the_training_that_was_recorded(pool: RankPool, tmp_path: Path) -> None:
    for found, (not_hooked, dropping, of_another_rank) in pool.run(2, run_all, tmp_path, timeout_s=250):
        assert dict(zip(KINDS, found, strict=True)) == dict.fromkeys(KINDS, (True, True, True))
        assert "layer (MoE) is not hooked; call attach_overlap first" in not_hooked
        assert "does not say which expert a dropped choice was for" in dropping
        assert "record has no routes of the layer 'layer'" in of_another_rank, "on the rank whose record fits, too"
