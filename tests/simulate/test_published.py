"""The published runs are those that are told: their tokens per GPU, and about as many parameters."""

from __future__ import annotations

import pytest

from ds_moe_ep.config.knobs import ModelConfig
from ds_moe_ep.sizing.footprint import count_parameters
from tests.published import RUNS, PublishedRun

TOLD = {8: (12_040, 30.5e9), 256: (1_002, 671e9), 1024: (865, 671e9)}  # tokens per second and GPU, parameters, by GPUs


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_published_run_is_the_one_that_is_told(run: PublishedRun) -> None:
    tokens, parameters = TOLD[run.num_gpus]
    setup = run.setup(recompute=True)
    assert setup.batch_tokens / run.num_gpus / run.published_s == pytest.approx(tokens, rel=0.01)
    found = run.stages * count_parameters(setup.model, setup.moe).total
    assert found == pytest.approx(parameters, rel=0.05)
    assert setup.training.accumulation % run.accumulation == 0
    assert setup.cluster.num_ranks * run.stages == run.num_gpus


def test_a_pipeline_pays_its_bubble_and_the_error_is_of_what_is_published() -> None:
    qwen, deepseek, _ = RUNS
    assert (qwen.bubble, deepseek.bubble) == (1.0, 11 / 8)
    step = qwen.step_s(recompute=True)
    assert step.low < step.value < step.high
    assert qwen.error_percent(step.scaled(qwen.published_s / step.value)) == pytest.approx(0, abs=1e-9)
    assert abs(qwen.error_percent(step)) > 1


def test_attention_has_the_weights_that_the_models_cards_add_up_to() -> None:
    """By hand: Qwen3's 32 queries and 8 keys and values of 128 columns; DeepSeek's five matrices."""
    qwen, deepseek, _ = (run.setup(recompute=True).model.attention for run in RUNS)
    assert qwen.params == 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048
    down_and_up = 7168 * 1536 + 1536 * 128 * 192 + 7168 * (512 + 64) + 512 * 128 * (128 + 128)
    assert deepseek.params == down_and_up + 128 * 128 * 7168
    assert (qwen.scores_width, deepseek.scores_width) == (2 * 32 * 128, 128 * (192 + 128))
    assert ModelConfig().attention.params == 4 * 8192**2
