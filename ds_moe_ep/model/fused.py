"""Operations of NVIDIA's apex that can be used here. None is required: each has a torch path beside it.

Other projects are called apex too, so it is known by what it offers and not by its name.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fused:
    """The fused operations of an installed apex; None where one is not offered."""

    layer_norm: Callable[..., nn.Module] | None = None
    dense_gelu_dense: Callable[..., torch.Tensor] | None = None  # (x_TD, weight1, bias1, weight2, bias2) -> y_TD


@functools.cache
def offered() -> Fused:
    """The fused operations that can run in this process; the search and its log line happen once.

    Without a CUDA device nothing is offered: apex's kernels exist for CUDA alone.
    """
    if not torch.cuda.is_available():
        return Fused()
    return Fused(layer_norm=find_layer_norm(), dense_gelu_dense=find_dense_gelu_dense())


def find_layer_norm() -> Callable[..., nn.Module] | None:
    """apex.normalization.FusedLayerNorm where its compiled part loads, else None."""
    try:
        layer_norm: Callable[..., nn.Module] = importlib.import_module("apex.normalization").FusedLayerNorm
        layer_norm(8)  # the compiled part is loaded here
    except Exception as error:
        logger.info("layer norm runs as torch's: %s: %s", type(error).__name__, error)
        return None
    logger.info("layer norm runs as apex's fused one")
    return layer_norm


def find_dense_gelu_dense() -> Callable[..., torch.Tensor] | None:
    """The function behind apex.fused_dense.FusedDenseGeluDense, else None."""
    try:
        apex = importlib.import_module("apex.fused_dense")
        apex.FusedDenseGeluDense(8, 8, 8)
        kernel: Callable[..., torch.Tensor] = apex.fused_dense_gelu_dense_function
    except Exception as error:
        logger.info("dense-GELU-dense runs as torch's two products: %s: %s", type(error).__name__, error)
        return None
    logger.info("dense-GELU-dense runs as apex's fused one")
    return kernel
