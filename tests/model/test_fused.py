import logging
import sys
import types
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_moe_ep.config.knobs import ModelConfig
from ds_moe_ep.model import feed_forward, fused
from ds_moe_ep.model.feed_forward import FusedGeluMLP, make_shared_expert
from ds_moe_ep.model.norm import layer_norm
from ds_moe_ep.moe.experts import GeluMLP


def dense_gelu_dense(
    x_TD: torch.Tensor, weight1: torch.Tensor, bias1: torch.Tensor, weight2: torch.Tensor, bias2: torch.Tensor
) -> torch.Tensor:
    """The computation of apex's kernel, in torch."""
    return F.linear(F.gelu(F.linear(x_TD, weight1, bias1), approximate="tanh"), weight2, bias2)


class FakeFusedLayerNorm(nn.LayerNorm):
    pass


@pytest.fixture
def nvidia_apex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed apex and a CUDA device, as far as the search can tell."""
    parts = {
        "apex.normalization": types.SimpleNamespace(FusedLayerNorm=FakeFusedLayerNorm),
        "apex.fused_dense": types.SimpleNamespace(
            FusedDenseGeluDense=lambda *sizes: None, fused_dense_gelu_dense_function=dense_gelu_dense
        ),
    }
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fused.offered.cache_clear()
    yield
    fused.offered.cache_clear()


def test_without_a_cuda_device_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fused.offered.cache_clear()
    assert type(layer_norm(8)) is nn.LayerNorm
    assert type(make_shared_expert(ModelConfig(hidden_size=32, shared_expert_width=8))) is GeluMLP


def test_apex_serves_where_it_offers_the_operation(nvidia_apex: None) -> None:
    assert type(layer_norm(8)) is FakeFusedLayerNorm
    assert type(make_shared_expert(ModelConfig(hidden_size=32, shared_expert_width=8))) is FusedGeluMLP


def test_another_project_called_apex_is_not_taken(
    nvidia_apex: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "apex.normalization")
    with caplog.at_level(logging.INFO, logger=fused.__name__):
        norms = [layer_norm(8) for _ in range(3)]
    assert all(type(norm) is nn.LayerNorm for norm in norms)
    assert [m for m in caplog.messages if m.startswith("layer norm")] == [
        "layer norm runs as torch's: ModuleNotFoundError: No module named 'apex.normalization'; 'apex' is not a package"
    ]


def test_an_apex_whose_compiled_part_is_missing_is_not_taken(nvidia_apex: None) -> None:
    def broken(hidden_size: int) -> nn.Module:
        raise ImportError("fused_layer_norm_cuda")

    sys.modules["apex.normalization"].FusedLayerNorm = broken  # type: ignore[attr-defined]
    assert type(layer_norm(8)) is nn.LayerNorm


@pytest.mark.parametrize("bias", [False, True])
def test_fused_mlp_equals_its_torch_path_in_value_and_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    mlp = FusedGeluMLP(6, 10, bias=bias, kernel=dense_gelu_dense).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    variables = (x, *mlp.parameters())
    plain, by_kernel = mlp(x), mlp.fused(x)
    torch.testing.assert_close(by_kernel, plain)
    weight = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(by_kernel, variables, weight),
        torch.autograd.grad(plain, variables, weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert list(mlp.state_dict()) == list(GeluMLP(6, 10, bias=bias).state_dict())


def test_the_tanh_form_is_within_the_stated_distance_of_gelu() -> None:
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    assert (F.gelu(x, approximate="tanh") - F.gelu(x)).abs().max() < 5e-4
    assert feed_forward.FusedGeluMLP.__doc__ and "5e-4" in feed_forward.FusedGeluMLP.__doc__
