"""Stages, run one after the other as a pipeline runs them, are the model: bit for bit, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model.initialize import init_weights
from ds_moe_ep.model.transformer import Transformer, build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.parallel.stages import Block, name_on_one_device, pack, stage_modules, unpack

TOKEN_IDS = torch.arange(14).view(2, 7)
KNOBS: dict[str, Any] = {"hidden_size": 16, "num_heads": 2, "expert_width": 8, "vocab_size": 20, "sequence_length": 7}


def whole_model(**knobs: Any) -> Transformer:
    net = build_transformer(ModelConfig(**KNOBS | knobs), MoEConfig(num_experts=4, z_loss_weight=0.1), ExpertParallel)
    init_weights(net, seed=4)
    return net


def run_stage(stage: list[nn.Module], received: Any) -> Any:
    for module in stage:
        received = module(received)
    return received


def backward_of(logits: Tensor, losses: Tensor) -> None:
    (logits.square().mean() + losses).backward()


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_stages_with_a_cut_between_them_give_the_models_logits_losses_and_gradients(
    num_stages: int, recompute: bool
) -> None:
    """As in a pipeline, one tensor goes from stage to stage, and one gradient comes back for it."""
    model, again = whole_model(recompute=recompute), whole_model(recompute=recompute)
    output = model(TOKEN_IDS)
    backward_of(output.logits_BSV, output.l_aux)
    received, crossings = TOKEN_IDS, []
    for index, stage in enumerate(stage_modules(again, num_stages)):
        if index:
            sent, received = received, received.detach().requires_grad_()
            crossings.append((sent, received))
        received = run_stage(stage, received)
    logits, losses = received
    backward_of(logits, losses)
    for sent, arrived in reversed(crossings):
        sent.backward(arrived.grad)
    assert torch.equal(logits, output.logits_BSV)
    assert losses.item() == pytest.approx(output.l_aux.item(), rel=1e-6)  # summed one by one, there stacked
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_comes_out_again(dtype: torch.dtype) -> None:
    tokens, losses = torch.randn(3, 5, 4).to(dtype), torch.tensor(1.2345678)
    packed = pack((tokens, losses))
    assert packed.shape == (3, 5 * 4 + 1)
    assert packed.dtype == dtype
    x, again = unpack(packed, 4)
    assert torch.equal(x, tokens)
    assert x.is_contiguous()
    assert torch.equal(again, losses.to(dtype).float()), "the losses lose what the tokens' type cannot hold"


def test_the_packed_losses_hand_their_gradient_back_whole() -> None:
    tokens, losses = torch.randn(3, 5, 4, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    x, again = unpack(pack((tokens, losses)), 4)
    (x.sum() * 2 + again * 7).backward()
    assert float(losses.grad) == 7.0
    assert torch.equal(tokens.grad, torch.full_like(tokens, 2.0))


def test_stages_hold_every_parameter_of_the_model_once_under_its_name() -> None:
    model = whole_model()
    modules = [module for stage in stage_modules(model, 2) for module in stage]
    named = [(name_on_one_device(m, name), p) for m in modules for name, p in m.named_parameters()]
    assert [name for name, _ in named] == [name for name, _ in model.named_parameters()]
    assert all(p is model.get_parameter(name) for name, p in named)


def test_layers_that_cannot_be_shared_equally_are_refused() -> None:
    with pytest.raises(ConfigError, match="pipeline stages=3 cannot share 4 layers equally; change one of them"):
        stage_modules(whole_model(), 3)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_blocks_counts_are_those_of_the_passes_since_they_were_taken(recompute: bool) -> None:
    """A pass that is recomputed counts once."""
    model = whole_model(recompute=recompute)
    (modules,) = stage_modules(model, 1)
    for _ in range(2):
        backward_of(*run_stage(modules, TOKEN_IDS))
    expected = 2 * model(TOKEN_IDS).exp_counts_LE
    for index, block in enumerate(module for module in modules if isinstance(module, Block)):
        counts = block.take_counts()
        assert torch.equal(counts, expected[index])
        assert int(counts.sum()) == 2 * TOKEN_IDS.numel()
        assert block.counts_E is None
