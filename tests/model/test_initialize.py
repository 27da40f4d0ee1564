import math

import pytest
import torch

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model.initialize import EMBEDDING_STD, expert_index_of, global_name, init_weights
from ds_moe_ep.model.transformer import Transformer, build_transformer
from tests.model.slots import TINY, ShapesOfLayer, tiny_transformer


def model_of_rank(ep_size: int, ep_rank: int, seed: int = 0) -> Transformer:
    moe = MoEConfig(num_experts=8, ep_size=ep_size)
    model = build_transformer(TINY, moe, ShapesOfLayer)
    init_weights(model, seed, expert_index_of(ep_rank, moe.num_local_experts))
    return model


@pytest.mark.parametrize("ep_size", [2, 4, 8])
def test_every_rank_starts_with_the_values_of_a_single_device(ep_size: int) -> None:
    whole = dict(model_of_rank(1, 0).named_parameters())
    seen = set()
    for ep_rank in range(ep_size):
        first = ep_rank * 8 // ep_size
        for name, value in model_of_rank(ep_size, ep_rank).named_parameters():
            before, found, after = name.partition("deepspeed_experts.")
            if found:
                local, _, rest = after.partition(".")
                name = f"{before}{found}{first + int(local)}.{rest}"
            assert torch.equal(value, whole[name]), name
            seen.add(name)
    assert seen == set(whole)


def test_experts_layers_and_seeds_differ() -> None:
    model, other = model_of_rank(1, 0), model_of_rank(1, 0, seed=1)
    values = [p for p in (*model.parameters(), *other.parameters()) if p.ndim > 1]
    prints = {(tuple(p.shape), p.flatten()[:4].sum().item()) for p in values}
    assert len(prints) == len(values)


def test_the_engines_layer_and_the_plain_one_start_equal() -> None:
    assert (
        global_name("layers.1.feed_forward.deepspeed_moe.experts.deepspeed_experts.2.fc1.weight", lambda i: i + 4)
        == "layers.1.feed_forward.experts.deepspeed_experts.6.fc1.weight"
    )


def test_values_do_not_depend_on_the_type_or_the_random_state() -> None:
    torch.manual_seed(5)
    double = tiny_transformer()
    half = build_transformer(TINY, double.layers[0].feed_forward.config, type(double.layers[0].feed_forward))
    init_weights(half.bfloat16(), 0)
    for p, q in zip(double.parameters(), half.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q)


def test_scales_are_those_of_the_papers() -> None:
    model = tiny_transformer()
    layer = model.layers[0]
    expected = {
        model.embedding.weight: EMBEDDING_STD,
        layer.attention.qkv.weight: math.sqrt(2 / (5 * 32)),
        layer.attention.out.weight: math.sqrt(2 / (5 * 32)) / math.sqrt(2 * 2),
        layer.feed_forward.experts.deepspeed_experts[0].fc2.weight: math.sqrt(2 / (5 * 48)) / math.sqrt(2 * 2),
    }
    for weight, std in expected.items():
        assert weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * weight.numel()))  # four sigma
    assert torch.equal(layer.attention_norm.weight, torch.ones(32, dtype=torch.float64))
    assert not layer.attention_norm.bias.any()


def test_a_parameter_without_memory_is_refused() -> None:
    with torch.device("meta"):
        model = build_transformer(TINY, MoEConfig(num_experts=2), ShapesOfLayer)
    with pytest.raises(ConfigError, match=r"embedding\.weight is on the device 'meta'.*to_empty"):
        init_weights(model, 0)
