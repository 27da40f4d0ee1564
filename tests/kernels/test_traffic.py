"""Traffic of plain torch, counted on meta tensors, beside the bound that each kernel meets."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_moe_ep.kernels.activation import gelu_backward, swiglu, swiglu_backward
from ds_moe_ep.kernels.gate import gate_logits
from ds_moe_ep.kernels.permute import RowMaps, permute, unpermute
from ds_moe_ep.kernels.rotary import split_rotated
from ds_moe_ep.kernels.sort import sort_choices
from ds_moe_ep.kernels.traffic import TRAFFIC, OperationSizes, plain_traffic, traffic

T, D, F, E = 10_000, 8192, 32_768, 16
VIEWS = (
    "view",
    "unsqueeze",
    "transpose",
    "select",
    "slice",
    "expand",
    "split",
    "detach",
    "t",
    "alias",
    "unflatten",
    "empty",
)


class Count(TorchDispatchMode):
    """Adds up what operations read and write; views and empty tensors cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes, self.num_launches = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.strip("_")
        if not any(name == view or name.startswith((f"{view}_", f"new_{view}")) for view in VIEWS):
            self.num_launches += 1
            given = args[1:] if name == "copy" else args  # what is overwritten is not read, nor are `out` tensors
            read = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
            written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            read = written if name == "index_select" else read  # it reads what it picks
            self.num_bytes += sum(each.numel() * each.element_size() for each in [*read, *written])
        return result


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def maps(num_choices: int) -> RowMaps:
    return RowMaps(meta(T * num_choices, dtype=torch.int64), meta(T, num_choices, dtype=torch.int64))


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in tensors]


def forward_and_backward(function: Callable[..., Any], *tensors: Tensor) -> tuple[Count, Count]:
    given = leaves(*tensors)
    with Count() as forward:
        out = function(*given)
    outs = list(out) if isinstance(out, tuple) else [out]
    gradients = [torch.empty_like(each) for each in outs]
    with Count() as backward:
        torch.autograd.grad(outs, given, gradients)
    return forward, backward


def counted(operation: str, k: int) -> Count:
    """Traffic of plain torch for an operation at the sizes of the reference job."""
    name, *phases = re.split(" (?=forward|backward)", operation)
    phase = "".join(phases)
    is_backward = phase == "backward"
    hidden = [meta(T * k, F) for _ in range(6)]
    if name == "permute":
        return forward_and_backward(lambda x: permute(x, maps(k)), meta(T, D))[is_backward]
    if name == "weighted permute":
        weights = meta(T, k, dtype=torch.float32)
        return forward_and_backward(lambda x, w: permute(x, maps(k), None, w), meta(T, D), weights)[is_backward]
    if name == "unpermute":
        weights = meta(T, k, dtype=torch.float32)
        return forward_and_backward(lambda r, w: unpermute(r, w, maps(k)), meta(T * k, D), weights)[is_backward]
    if name == "gate":
        return forward_and_backward(gate_logits, meta(T, D), meta(E, D, dtype=torch.float32))[is_backward]
    if name == "rotation":
        angles = meta(T, 256, dtype=torch.float32), meta(T, 256, dtype=torch.float32)
        return forward_and_backward(lambda x: split_rotated(x, angles, 512), meta(1, T, 3 * D))[is_backward]
    with Count() as count:
        if name == "sort":
            sort_choices(meta(T, k, dtype=torch.int64), None, E)
        elif operation == "gelu":
            torch.ops.aten.gelu.out(hidden[0], out=hidden[1])
        elif operation == "swiglu":
            swiglu(*hidden[:3])
        elif name == "swiglu":
            swiglu_backward(*hidden[:5], None if phase.endswith("kept") else hidden[5])
        else:
            gelu_backward(*hidden[:3], None if phase.endswith("kept") else hidden[3], "none")
    return count


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("operation", TRAFFIC)
def test_the_bound_of_each_kernel_is_below_what_plain_torch_moves_and_both_are_counted(operation: str, k: int) -> None:
    sizes = OperationSizes(num_tokens=T, width=D, num_choices=k, num_experts=E, expert_width=F)
    bound = traffic(operation, sizes)
    plain = counted(operation, k)
    assert 0 < bound.num_bytes < plain.num_bytes * 1.001
    stepwise = plain_traffic(operation, sizes)
    assert stepwise.num_bytes == pytest.approx(plain.num_bytes, rel=0.1, abs=2e6)
    assert bound.num_bytes <= stepwise.num_bytes
    assert bound.num_launches <= max(plain.num_launches, 4)


# In units of all tokens, fp16 (164 MB): plain torch at most, the kernel exactly.
UNITS = [
    ("unpermute forward", 1, 5.1, 2), ("unpermute forward", 2, 15.1, 3),
    ("unpermute backward", 1, 15.1, 3), ("unpermute backward", 2, 30.1, 5),
    ("weighted permute forward", 1, 8.1, 2), ("weighted permute backward", 1, 17.1, 3),
    ("weighted permute backward", 2, 39.1, 4),
    ("permute forward", 1, 2.1, 2), ("permute backward", 1, 2.1, 2), ("permute backward", 2, 15.1, 3),
    ("rotation forward", 1, 33, 4), ("rotation backward", 1, 36, 6),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "k", "at_most", "least"), UNITS)
def test_passes_over_memory_are_those_of_the_table(operation: str, k: int, at_most: float, least: int) -> None:
    sizes = OperationSizes(num_tokens=T, width=D, num_choices=k)
    assert traffic(operation, sizes).num_bytes == least * sizes.token_bytes
    units = counted(operation, k).num_bytes / sizes.token_bytes
    assert least <= units <= at_most, units


def test_a_pass_more_would_be_counted() -> None:
    x = meta(T, D)
    with Count() as once:
        x.clone()
    with Count() as twice:
        x.clone().clone()
    assert once.num_bytes == 2 * x.numel() * 2 and twice.num_bytes == 2 * once.num_bytes
    assert (once.num_launches, twice.num_launches) == (1, 2)


def test_the_gate_keeps_no_fp32_tokens() -> None:
    x, weight = leaves(meta(T, D), meta(E, D, dtype=torch.float32))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gate_logits(x, weight)
    assert [(each.dtype, each.numel()) for each in kept] == [(torch.float16, T * D), (torch.float32, E * D)]
