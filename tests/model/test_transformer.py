import dataclasses

import pytest
import torch
import torch.nn.functional as F

from ds_moe_ep.config.knobs import SMALL, SPECIFICATION, ModelConfig, MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model.transformer import Transformer, build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.sizing.footprint import count_parameters
from tests.model.slots import FOUR_EXPERTS, TINY, tiny_transformer, token_ids


def test_loss_is_the_mean_cross_entropy_plus_the_layers_routing_losses() -> None:
    model = tiny_transformer()
    tokens, targets = token_ids(3, 10, seed=1), token_ids(3, 10, seed=2)
    trained, free = model(tokens, targets), model(tokens)
    expected = F.cross_entropy(free.logits_BSV.float().reshape(-1, TINY.vocab_size), targets.reshape(-1))
    torch.testing.assert_close(trained.cross_entropy, expected.detach())
    torch.testing.assert_close(trained.loss, expected + free.l_aux)
    assert free.l_aux > 0
    assert free.loss is None


def test_with_targets_only_the_loss_carries_gradients() -> None:
    model = tiny_transformer()
    output = model(token_ids(2, 8), token_ids(2, 8))
    assert [name for name, value in output._asdict().items() if value.requires_grad] == ["loss"]
    assert model(token_ids(2, 8)).logits_BSV.requires_grad


def test_every_parameter_learns() -> None:
    model = tiny_transformer(dataclasses.replace(TINY, shared_expert_width=16))
    model(token_ids(4, 24, seed=1), token_ids(4, 24, seed=2)).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_later_token_changes_no_earlier_logit() -> None:
    model = tiny_transformer()
    tokens = token_ids(2, 12)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % TINY.vocab_size
    before, after = model(tokens).logits_BSV, model(changed).logits_BSV
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7], before[:, 7])


def test_equal_tokens_at_other_places_have_other_logits() -> None:
    logits_SV = tiny_transformer()(torch.tensor([[3, 5, 3, 5]])).logits_BSV[0]
    assert not torch.allclose(logits_SV[1], logits_SV[3])


def test_exp_counts_hold_every_choice_of_every_layer() -> None:
    counts_LE = tiny_transformer()(token_ids(3, 10)).exp_counts_LE
    assert counts_LE.shape == (TINY.num_layers, FOUR_EXPERTS.num_experts)
    assert counts_LE.sum(1).tolist() == [3 * 10 * FOUR_EXPERTS.top_k] * TINY.num_layers


@pytest.mark.parametrize("expert", ["gelu", "swiglu"])
def test_recompute_gives_the_same_loss_and_gradients(expert: str) -> None:
    kept = tiny_transformer(dataclasses.replace(TINY, expert=expert))
    recomputed = tiny_transformer(dataclasses.replace(TINY, expert=expert, recompute=True))
    tokens, targets = token_ids(3, 10, seed=1), token_ids(3, 10, seed=2)
    losses = [model(tokens, targets).loss for model in (kept, recomputed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    for (name, p), q in zip(kept.named_parameters(), recomputed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_recompute_runs_each_layer_again_in_backward_and_not_in_evaluation() -> None:
    model = tiny_transformer(dataclasses.replace(TINY, recompute=True))
    runs: list[int] = []
    for index, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    model(token_ids(1, 4), token_ids(1, 4)).loss.backward()
    assert runs == [0, 1, 1, 0]
    model.eval()
    model(token_ids(1, 4), token_ids(1, 4)).loss.backward()
    assert runs == [0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("model", "moe"),
    [
        (SPECIFICATION, MoEConfig(num_experts=16)),
        (SMALL, MoEConfig(num_experts=16)),
        (dataclasses.replace(TINY, expert="swiglu", expert_bias=True), MoEConfig(num_experts=4)),
        (dataclasses.replace(TINY, expert_bias=True, shared_expert_width=24), MoEConfig(num_experts=8)),
    ],
)
def test_built_on_the_meta_device_it_has_the_parameters_that_the_configuration_foretells(
    model: ModelConfig, moe: MoEConfig
) -> None:
    with torch.device("meta"):
        transformer = build_transformer(model, moe, ExpertParallel)
    assert all(p.is_meta for p in transformer.parameters())
    assert sum(p.numel() for p in transformer.parameters()) == count_parameters(model, moe).total
    expert = transformer.layers[0].feed_forward.experts.deepspeed_experts[0]
    assert sum(p.numel() for p in expert.parameters()) == model.expert_params


def test_the_specification_has_35_billion_parameters() -> None:
    with torch.device("meta"):
        transformer = build_transformer(SPECIFICATION, MoEConfig(num_experts=16), ExpertParallel)
    experts, attention = 4 * 16 * 2 * 8192 * 32768, 4 * 4 * 8192**2
    rest = sum(p.numel() for p in transformer.parameters()) - experts - attention
    assert rest == 2 * 256 * 8192 + 4 * 16 * 8192 + 9 * 2 * 8192  # embedding and head, gates, norms


def test_a_sequence_that_is_too_long_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"moe_ep\.model\.sequence_length=24: a sequence of 25"):
        tiny_transformer()(token_ids(1, 25))


def test_heads_of_odd_width_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"moe_ep\.model\.num_heads=4 gives heads of width 3"):
        Transformer(dataclasses.replace(TINY, hidden_size=12), lambda _: torch.nn.Identity())
