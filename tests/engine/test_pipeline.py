"""The baseline under DeepSpeed's pipeline engine: first values, evaluation, checkpoints, and what it refuses."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ds_moe_ep.config.knobs import SMALL, Layout, MoEConfig
from ds_moe_ep.model.initialize import init_weights
from ds_moe_ep.model.transformer import Transformer, build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.parallel.tensor import Share
from tests.parallel.training_runs import Run, copies, make_pipeline, of_this_copy, stage_parameters
from tests.ranks import RankPool

RUN = Run(steps=2, top_k=2, model={"num_layers": 2, "shared_expert_width": 16})
Weights = dict[str, Tensor]


def one_device(run: Run, seed: int = 1) -> Transformer:
    net = build_transformer(run.model_config, run.moe_config(), ExpertParallel)
    init_weights(net, seed)
    return net


def first_values(runs: Sequence[Run]) -> list[tuple[int, Weights]]:
    engines = [make_pipeline(run) for run in runs]
    return [(engine.grid.get_slice_parallel_rank(), copies(stage_parameters(engine))) for engine in engines]


def test_first_values_are_those_of_one_device(pool: RankPool) -> None:
    sizes = ((2, 2), (4, 1), (1, 2))
    runs = [Run(tp_size=tp, pp_size=pp, model={"num_layers": 2, "expert": "swiglu"}) for tp, pp in sizes]
    expected = dict(one_device(runs[0]).named_parameters())
    for (tp_size, _), by_rank in zip(sizes, zip(*pool.run(4, first_values, runs), strict=True), strict=True):
        assert {name for _, named in by_rank for name in named} == expected.keys()
        for tp_rank, named in by_rank:
            for name, value in named.items():
                assert torch.equal(value, Share(tp_rank, tp_size).of(expected[name], name)), name


def evaluated(run: Run) -> tuple[float, Tensor | None, bool]:
    """The loss of a batch, the last micro-batch's logits on the last stage, and whether training still works."""
    engine = make_pipeline(run)
    batches = run.batches()[0]
    loss, outputs = engine.eval_batch(of_this_copy(engine, batches), return_logits=True)
    trained = engine.train_batch(of_this_copy(engine, batches))
    return float(loss), None if outputs is None else outputs[0], bool(trained > loss)


def test_evaluation_gives_cross_entropy_and_logits_of_one_device(pool: RankPool) -> None:
    """5e-7 of the loss, 2e-6 of the largest logit: two layers of fp32 sums in another order."""
    net, batches = one_device(RUN).eval(), RUN.batches()[0]
    with torch.no_grad():
        logits = [net(token_ids).logits_BSV for token_ids, _ in batches]
    pairs = zip(logits, batches, strict=True)
    losses = [F.cross_entropy(found.flatten(0, 1), target_ids.flatten()) for found, (_, target_ids) in pairs]
    expected = float(torch.stack(losses).mean())
    by_rank = pool.run(4, evaluated, RUN)
    for rank, (loss, found, has_routing_losses) in enumerate(by_rank):
        assert loss == pytest.approx(expected, rel=5e-7)
        assert has_routing_losses, "the loss of training has more parts"
        assert (found is None) == (rank < 2), "ranks 2 and 3 are the last stage"
        if found is not None:
            assert float((found - logits[-1]).abs().max() / logits[-1].abs().max()) <= 2e-6


def trained(engine: Any, steps: Sequence[Sequence[Any]]) -> list[float]:
    return [float(engine.train_batch(of_this_copy(engine, micro_batches))) for micro_batches in steps]


def save_go_on_and_resume(runs: Sequence[Run], folder: str) -> list[list[tuple[Weights, Weights, list[float]]]]:
    """Of each run twice the weights after 2 steps and after 4, and the losses between: once through a checkpoint."""
    return [resumed_and_not(run, f"{folder}/{index}") for index, run in enumerate(runs)]


def resumed_and_not(run: Run, folder: str) -> list[tuple[Weights, Weights, list[float]]]:
    steps, sides = run.batches(), []
    engine = make_pipeline(run)
    trained(engine, steps[:2])
    engine.save_checkpoint(folder, client_state={"note": "kept"})
    for seed in (1, 2):
        if seed == 2:  # the other side starts from other weights
            engine = make_pipeline(run, seed)
            path, client_state = engine.load_checkpoint(folder)
            assert path is not None
            assert client_state["note"] == "kept"
            assert engine.global_steps == 2
        before = copies(stage_parameters(engine))
        losses = trained(engine, steps[2:])
        sides.append((before, copies(stage_parameters(engine)), losses))
    return sides


RESUMED: tuple[dict[str, Any], ...] = (
    {}, {"stage": 1}, {"stage": 1, "pp_size": 1}, {"stage": 1, "tp_size": 1}, {"stage": 1, "bf16": True},
)  # fmt: skip


def test_a_resumed_run_goes_on_bit_for_bit(pool: RankPool, tmp_path: pathlib.Path) -> None:
    """ZeRO 0 and 1; one copy of 2 x 2, two copies of two shares, two copies of two stages."""
    sizes: dict[str, Any] = {"model": {"num_layers": 2}, "num_micro_batches": 2}
    runs = [Run(steps=4, clipping=0.5, top_k=2, **sizes, **knobs) for knobs in RESUMED]
    for of_rank in pool.run(4, save_go_on_and_resume, runs, str(tmp_path), timeout_s=200):
        for run, ((saved, last, losses), (loaded, last_again, losses_again)) in zip(runs, of_rank, strict=True):
            assert losses_again == losses, run
            for name, weight in saved.items():
                assert torch.equal(loaded[name], weight), (run, name)
                assert torch.equal(last_again[name], last[name]), (run, name)
            changed = any(not torch.equal(last[name], weight) for name, weight in saved.items())
            assert changed, f"{run}: the steps changed something"


def refusal(layout: Layout, moe: MoEConfig) -> tuple[str, str]:
    import ds_moe_ep

    try:
        ds_moe_ep.build_pipeline(SMALL, moe, layout)
    except Exception as error:
        return type(error).__name__, str(error)
    return f"rank {dist.get_rank()} built it", ""


@pytest.mark.parametrize(
    ("layout", "moe", "name", "message"),
    [
        (Layout(tp_size=2, pp_size=2), MoEConfig(), "TopologyError", "the world of 2 ranks is no multiple of 4"),
        (Layout(pp_size=2), MoEConfig(ep_size=2), "TopologyError", "ep_size=2 does not divide the 1 ranks of a"),
        (Layout(pp_size=3), MoEConfig(), "ConfigError", "pp_size=3 does not divide moe_ep.model.num_layers=4"),
    ],
)  # fmt: skip
def test_every_rank_refuses_what_cannot_be_built(
    pool: RankPool, layout: Layout, moe: MoEConfig, name: str, message: str
) -> None:
    for found, text in pool.run(2, refusal, layout, moe):
        assert found == name
        assert message in text
