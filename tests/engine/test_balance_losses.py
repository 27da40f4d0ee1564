"""Balance losses of each sequence and of the whole batch, against plain loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError
from tests.ranks import RankPool

WIDTH, NUM_EXPERTS, TOP_K, NUM_TOKENS, NUM_MICRO_BATCHES = 8, 4, 2, 10, 2


def gate_weight() -> Tensor:
    return torch.randn(NUM_EXPERTS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scores_of(x_TD: Tensor, gate_ED: Tensor, kind: str) -> Tensor:
    """Scores that sum to one for each token."""
    logits_TE = x_TD.double() @ gate_ED.T
    scores_TE = torch.exp(logits_TE) if kind == "softmax" else 1 / (1 + torch.exp(-logits_TE))
    return scores_TE / scores_TE.sum(1, keepdim=True)


def counts_of(scores_TE: Tensor) -> Tensor:
    """The choices of each expert, token by token."""
    counts_E = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
    for scores_E in scores_TE.tolist():
        for expert in sorted(range(NUM_EXPERTS), key=lambda e: -scores_E[e])[:TOP_K]:
            counts_E[expert] += 1
    return counts_E


def loss_of(scores_TE: Tensor, counts_E: Tensor) -> Tensor:
    """E * sum over experts of mean score and share of the choices."""
    total: Tensor = sum(scores_TE[:, e].mean() * counts_E[e] / counts_E.sum() for e in range(NUM_EXPERTS))
    return NUM_EXPERTS * total


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_loss_of_sequences_is_the_mean_of_their_own_losses(score: Any) -> None:
    from ds_moe_ep import ExpertParallel, GeluMLP
    from ds_moe_ep.comm.transport import Loopback

    x_BSD = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    used_BS = torch.ones(3, 5)
    used_BS[0, 3:], used_BS[2] = 0, 0  # padding, and a sequence of padding alone
    gate_ED = gate_weight().requires_grad_()
    parts = [scores_of(x_SD[used_S > 0], gate_ED, score) for x_SD, used_S in zip(x_BSD[:2], used_BS, strict=False)]
    expected = torch.stack([loss_of(scores, counts_of(scores)) for scores in parts]).mean()
    expected.backward()

    def found(x: Tensor, used: Tensor, **knobs: Any) -> tuple[Tensor, Tensor]:
        config = MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, score=score, **knobs)
        layer = ExpertParallel(WIDTH, GeluMLP(WIDTH, 8), config).double()
        layer.connect(Loopback())
        layer.gate.wg.weight.data = gate_weight()
        loss = layer(x, used)[1]
        loss.backward()
        assert layer.gate.wg.weight.grad is not None
        return loss.detach(), layer.gate.wg.weight.grad

    assert gate_ED.grad is not None
    swapped = x_BSD.transpose(0, 1).contiguous(), used_BS.T.contiguous()
    for given in (found(x_BSD, used_BS, balance_scope="sequence"),
                  found(*swapped, balance_scope="sequence", sequence_first=True)):  # fmt: skip
        torch.testing.assert_close(given, (expected.detach(), gate_ED.grad), rtol=1e-12, atol=1e-14)
    if score == "softmax":  # of one sequence Hugging Face's counts choices per token, and so is k times as much
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        theirs = load_balancing_loss_func((x_BSD[1].float() @ gate_weight().float().T,), NUM_EXPERTS, TOP_K) / TOP_K
        ours, _ = found(x_BSD[1:2], used_BS[1:2], balance_scope="sequence")
        assert float(ours) == pytest.approx(float(theirs), rel=1e-6)
    for control in (found(x_BSD, used_BS), found(*swapped, balance_scope="sequence")):
        assert abs(control[0] - expected) > 1e-3
    with pytest.raises(ConfigError, match=r"input\.shape=\(15, 8\): with moe_ep.balance_scope='sequence'"):
        found(x_BSD.flatten(0, 1), used_BS.flatten(), balance_scope="sequence")
    with pytest.raises(ConfigError, match=r"balance_scope='batch': nobody said which ranks"):
        found(x_BSD, used_BS, balance_scope="batch")


def tokens(rank: int, step: int, micro_batch: int) -> Tensor:
    seed = 100 * rank + 10 * step + micro_batch
    return torch.randn(NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


class BalanceAlone(nn.Module):
    """A model whose loss is the layer's balance loss; it may recompute the layer."""

    def __init__(self, recompute: str, scope: Any) -> None:
        from ds_moe_ep import GeluMLP, MoE

        super().__init__()
        knobs: dict[str, Any] = {"balance": "bias_and_aux_loss", "bias_step": 0.0} if recompute else {}
        config = MoEConfig(num_experts=NUM_EXPERTS, ep_size=2, top_k=TOP_K, balance_scope=scope, **knobs)
        self.moe = MoE(WIDTH, GeluMLP(WIDTH, 8), config=config)
        self.moe.deepspeed_moe.gate.wg.weight.data = gate_weight().float()
        self.recompute = recompute

    def forward(self, x_TD: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        if not self.recompute:
            return self._loss(x_TD)
        loss: Tensor = checkpoint(self._loss, x_TD, use_reentrant=self.recompute == "reentrant")
        return loss

    def _loss(self, x_TD: Tensor) -> Tensor:
        output, l_aux, _ = self.moe(x_TD)
        return l_aux + 0 * output.sum()


def trained(recompute: str, scope: str = "batch") -> tuple[list[float], Tensor]:
    """The losses of this rank over two optimizer steps, and the gate's weight after them."""
    import ds_moe_ep

    config = {
        "train_micro_batch_size_per_gpu": NUM_TOKENS,
        "gradient_accumulation_steps": NUM_MICRO_BATCHES,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "steps_per_print": 10**9,
    }
    engine, *_ = ds_moe_ep.initialize(model=BalanceAlone(recompute, scope), config=config)
    losses, rank = [], torch.distributed.get_rank()
    for step in range(2):
        for micro_batch in range(NUM_MICRO_BATCHES):
            loss = engine(tokens(rank, step, micro_batch).requires_grad_())
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses, engine.module.moe.deepspeed_moe.gate.wg.weight.detach().clone()


def train_all() -> list[tuple[list[float], Tensor]]:
    return [*map(trained, ("", "reentrant", "non-reentrant")), trained("", "rank")]


def expected_run(num_ranks: int) -> tuple[list[list[float]], Tensor]:
    """The losses by rank, and the gate's weight, of the two steps in float64."""
    gate_ED, losses = gate_weight().float().double(), [list[float]() for _ in range(num_ranks)]
    for step in range(2):
        gate_ED = gate_ED.detach().requires_grad_()
        counts_E, total = torch.zeros(NUM_EXPERTS, dtype=torch.float64), gate_ED.sum() * 0
        for micro_batch in range(NUM_MICRO_BATCHES):
            scores = [scores_of(tokens(rank, step, micro_batch), gate_ED, "softmax") for rank in range(num_ranks)]
            counts_E = counts_E + sum(counts_of(each) for each in scores)
            for rank, each in enumerate(scores):
                losses[rank].append(loss_of(each, counts_E).item())
                total = total + loss_of(each, counts_E) / (num_ranks * NUM_MICRO_BATCHES)
        (gradient_ED,) = torch.autograd.grad(total, gate_ED)
        gate_ED = gate_ED - 0.5 * gradient_ED
    return losses, gate_ED.detach()


def test_the_loss_of_the_batch_sees_all_ranks_and_micro_batches_since_the_last_step_also_when_recomputed(
    pool: RankPool,
) -> None:
    by_rank = pool.run(2, train_all)
    losses, gate_ED = expected_run(2)
    for rank, (*runs, control) in enumerate(by_rank):
        for found, weight_ED in runs:
            assert found == pytest.approx(losses[rank], rel=2e-6)
            torch.testing.assert_close(weight_ED.double(), gate_ED, rtol=2e-6, atol=2e-6)
        assert control[0] != pytest.approx(losses[rank], rel=1e-3)
