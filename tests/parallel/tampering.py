"""Small faults in the baseline, each of which a comparison must see: the negative controls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor, nn


def forgotten(region: Any, tensor: Tensor) -> Tensor:
    """An edge of a region without its all-reduce."""
    return tensor


def _copy_but_weights(enter: Any) -> Any:
    """The way in, that lets the router's weights [T, K] pass beside it."""
    return lambda region, whole: whole if whole.shape[-1] <= 2 else enter(region, whole)


def _wrong_share(of: Any) -> Any:
    """Every rank takes the first part of the attention's output matrix."""

    def first_of_out(share: Any, value: Tensor, name: str) -> Tensor:
        index = 0 if name.endswith("attention.out.weight") else share.index
        return of(type(share)(index, share.count), value, name)

    return first_of_out


def _without_column(pack: Any) -> Any:
    """Tokens go to the next stage, the losses so far do not."""
    return lambda carried: pack((carried[0], carried[1].new_zeros(())))


def _without_marks(connect: Any) -> Any:
    """The all-reduces without the marks that tell DeepSpeed which parameters are cut."""

    def connected(model: nn.Module, group: Any) -> nn.Module:
        connect(model, group)
        for parameter in model.parameters():
            del parameter.model_parallel, parameter.tensor_model_parallel
        return model

    return connected


@contextmanager
def tampered(fault: str) -> Iterator[None]:
    """Runs its block with the fault of this name; none where it is empty."""
    from ds_moe_ep.engine import pipeline
    from ds_moe_ep.parallel import stages
    from ds_moe_ep.parallel.tensor import Share, TensorRegion

    faults: dict[str, tuple[Any, str, Any]] = {
        "no all-reduce of the output": (TensorRegion, "reduce_from_tp", forgotten),
        "no all-reduce of the input's gradient": (TensorRegion, "copy_to_tp", forgotten),
        "no all-reduce of the router's gradient": (
            TensorRegion,
            "copy_to_tp",
            _copy_but_weights(TensorRegion.copy_to_tp),
        ),
        "one share twice": (Share, "of", _wrong_share(Share.of)),
        "no column of losses": (stages, "pack", _without_column(stages.pack)),
        "no marks of cut parameters": (pipeline, "connect", _without_marks(pipeline.connect)),
    }
    if not fault:
        yield
        return
    with mock.patch.object(*faults[fault]):
        yield
