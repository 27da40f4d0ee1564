"""Copies of hot experts in the stages of a user's pipeline: DeepSpeed's layer there has the same losses and weights.

The first stage's routing losses go backward by themselves: its first layer has two backward passes per micro-batch.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from ds_moe_ep.errors import EngineError
from tests.engine.layouts.stage_models import NUM_MICRO_BATCHES, ds_config, layers_in_one_tensor, make_engine, mine
from tests.engine.layouts.test_stages import trained
from tests.moe.replica_cases import copies_in, forgetting_copies, let_rows_count_alone
from tests.ranks import RankPool

BOUND = 2e-6  # of `test_stages.py`


def pipeline(make: Any, interval: int = 0, **section: Any) -> Any:
    import deepspeed

    chosen = {"layers": layers_in_one_tensor} if interval else {}
    engine = make_engine(make, deepspeed.initialize, ds_config(moe_ep=section), interval, k=1, **chosen)
    let_rows_count_alone(engine.module)
    return engine


def runs() -> dict[str, Any]:
    """DeepSpeed's layer, and the package's with copies; with recomputation; and what faults come to."""
    import deepspeed
    from deepspeed.moe.layer import MoE as Native

    from ds_moe_ep import MoE
    from ds_moe_ep.engine.extensions.replica_windows import ReplicaWindows
    from ds_moe_ep.moe.replicas import gradients

    deepspeed.init_distributed("gloo")
    passes: list[int] = []
    start = gradients.Returning.__init__

    def started(self: Any, sums: Any, *rest: Any) -> None:
        passes.append(sums.passes)
        start(self, sums, *rest)

    found = {"native": trained(pipeline(Native)), "native, recomputed": trained(pipeline(Native, 1))}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gradients.Returning, "__init__", started)
        engine = pipeline(MoE, replicas=1)
        found |= {"mine": trained(engine), "copies": copies_in(engine.module), "passes": passes[:]}
        engine = pipeline(MoE, 1, replicas=1)
        found |= {"mine, recomputed": trained(engine)}
    with forgetting_copies():
        found["forgetful"] = trained(pipeline(MoE, replicas=1))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ReplicaWindows, "micro_batches", NUM_MICRO_BATCHES + 1)
        try:
            engine.train_batch(mine(engine, 3))
        except EngineError as error:
            found["unsent"] = str(error)
    return found


def farthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[n] - w).abs().max()) / max(1.0, float(w.abs().max())) for n, w in expected.items())


def test_copies_in_stages_train_as_deepspeeds_layer_and_send_their_sums_home_in_the_last_micro_batch(
    pool: RankPool,
) -> None:
    by_rank = pool.run(4, runs, timeout_s=150)
    for rank, its in enumerate(by_rank):
        assert its["copies"] > 0
        for name in ("", ", recomputed"):
            (losses, weights), (expected, native) = its[f"mine{name}"], its[f"native{name}"]
            assert losses == pytest.approx(expected, rel=1e-6) and farthest(weights, native) < BOUND, name
        of_step = [2, 3, 1] if rank < 2 else [2]  # the last layer's; the first one's, which goes backward twice
        assert its["passes"] == of_step * 2, "none before the last micro-batch"
        assert "did not go home before the optimizer's step" in its["unsent"]
    off = [farthest(its["forgetful"][1], its["native"][1]) for its in by_rank]
    assert max(off) > 100 * BOUND, "the control"
