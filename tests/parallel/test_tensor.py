"""Which parameters are cut and how, and that two ranks with half of each compute what one computes with all."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.model.initialize import init_weights
from ds_moe_ep.model.transformer import build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.parallel.tensor import Share, cut, cut_dimension, tensor_parallel
from tests.ranks import RankPool

KNOBS: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "expert_width": 8, "sequence_length": 6}
KINDS = [{"expert": "gelu"}, {"expert": "swiglu"}, {"expert": "gelu", "expert_bias": True}]
# What every kind of parameter is cut by, without the part of the name that counts layers and experts.
EXPECTED = {
    "embedding.weight": None,
    "attention_norm.weight": None,
    "attention_norm.bias": None,
    "attention.qkv.weight": 0,
    "attention.out.weight": 1,
    "feed_forward_norm.weight": None,
    "feed_forward_norm.bias": None,
    "feed_forward.gate.wg.weight": None,
    **{f"feed_forward.{of}.{name}.weight": 0 for of in ("experts", "shared") for name in ("fc1", "gate", "up")},
    **{f"feed_forward.{of}.{name}.weight": 1 for of in ("experts", "shared") for name in ("fc2", "down")},
    **{f"feed_forward.{of}.{name}.bias": None for of in ("experts", "shared") for name in ("fc1", "fc2")},
    "final_norm.weight": None,
    "final_norm.bias": None,
    "head.weight": None,
}  # fmt: skip


def whole_model(**knobs: Any) -> nn.Module:
    """A model of one layer with a shared expert and its first weights, in float64."""
    model = ModelConfig(**KNOBS | {"shared_expert_width": 4} | knobs)
    net = build_transformer(model, MoEConfig(num_experts=4, top_k=2), ExpertParallel)
    init_weights(net, seed=2)
    return net.double()


def test_every_kind_of_parameter_is_cut_as_the_table_says_and_no_other_exists() -> None:
    seen = set()
    for kind in KINDS:
        for name, _ in whole_model(**kind).named_parameters():
            plain = re.sub(r"layers\.\d+\.|deepspeed_experts\.\d+\.", "", name)
            assert cut_dimension(name) == EXPECTED[plain], name
            seen.add(plain)
    assert seen == EXPECTED.keys()


def test_a_layer_that_shares_its_experts_is_cut_nowhere_and_all_else_as_ever() -> None:
    shared = [
        name.replace("feed_forward.", "feed_forward.deepspeed_moe.") for name, _ in whole_model().named_parameters()
    ]
    names = [name for name, _ in whole_model().named_parameters()]
    assert any(cut_dimension(name) is not None for name in names if "feed_forward." in name), "the control"
    for name, of_shared in zip(names, shared, strict=True):
        assert cut_dimension(of_shared) == (None if "feed_forward." in name else cut_dimension(name))


@pytest.mark.parametrize("kind", KINDS[:2])
def test_shares_in_their_order_make_the_whole(kind: dict[str, Any]) -> None:
    whole = dict(whole_model(**kind).named_parameters())
    parts = [dict(cut(whole_model(**kind), Share(index, 2)).named_parameters()) for index in range(2)]
    for name, value in whole.items():
        dimension, of_ranks = cut_dimension(name), [part[name] for part in parts]
        joined = of_ranks[0] if dimension is None else torch.cat(of_ranks, dimension)
        assert torch.equal(joined, value), name
        assert Share(0, 2).whole_shape(of_ranks[0].shape, name) == value.shape


def test_cutting_needs_no_memory_and_keeps_what_is_frozen_frozen() -> None:
    with torch.device("meta"):
        net = build_transformer(ModelConfig(), MoEConfig(), ExpertParallel)
    net.layers[0].attention.qkv.weight.requires_grad_(False)
    cut(net, Share(3, 8))
    assert net.layers[0].attention.qkv.weight.shape == (3 * 8192 // 8, 8192)
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["layers.0.attention.qkv.weight"]
    assert all(parameter.is_meta for parameter in net.parameters())


Passed = tuple[Tensor, Tensor, dict[str, Tensor]]


def passed(net: nn.Module) -> Passed:
    """Logits, routing loss, and the gradients of a loss that looks at both."""
    token_ids = torch.arange(12).view(2, 6)
    output = net(token_ids)
    (output.logits_BSV.square().mean() + output.l_aux).backward()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    return output.logits_BSV.detach(), output.l_aux.detach(), gradients


def on_two_ranks(kind: dict[str, Any]) -> Passed:
    return passed(tensor_parallel(whole_model(**kind), dist.group.WORLD))


@pytest.mark.parametrize("kind", [*KINDS[:2], {"recompute": False}])
def test_two_ranks_with_halves_pass_forward_and_backward_as_one_with_all(pool: RankPool, kind: dict[str, Any]) -> None:
    """1e-12 of the largest value, in float64; the routing loss is reported in fp32."""
    logits, l_aux, gradients = passed(whole_model(**kind))
    for rank, (logits_there, l_aux_there, parts) in enumerate(pool.run(2, on_two_ranks, kind)):
        assert float((logits_there - logits).abs().max() / logits.abs().max()) <= 1e-12
        assert float(l_aux_there) == pytest.approx(float(l_aux), rel=1e-6)
        for name, whole in gradients.items():
            off = (parts[name] - Share(rank, 2).of(whole, name)).abs().max() / whole.abs().max().clamp(min=1e-5)
            assert float(off) <= 1e-12, name
