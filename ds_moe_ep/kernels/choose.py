"""The choice between an operation's plain-torch form and its Triton kernel, made anew with every call.

`use_triton` is None everywhere for "where it can run": on CUDA, with Triton installed, for the types that the kernels
know. False is plain torch. True insists on the kernel: on a device without Triton the caller has refused it before, by
`why_no_triton`.
"""

from __future__ import annotations

import functools
import importlib
import logging

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

OLDEST = (8, 0)  # compute capability: the gate's product takes three of TF32
TYPES = (torch.float16, torch.bfloat16, torch.float32)  # fp64 is for tests, which want all of its digits


def runs_triton(use_triton: bool | None, *tensors: Tensor) -> bool:
    """True where the kernel computes these tensors; all of them lie on the first one's device."""
    if use_triton is False or (use_triton is None and not tensors[0].is_cuda):
        return False
    if not all(tensor.dtype in TYPES for tensor in tensors):
        return False
    return use_triton or not why_no_triton("cuda")


def why_no_triton(device_type: str) -> str:
    """Why kernels cannot run on such a device; empty where they can. Triton's interpreter runs them on the CPU too."""
    reason, is_interpreted = _installed()
    if reason or device_type == "cuda" or (device_type == "cpu" and is_interpreted):
        return reason
    return f"Triton compiles for CUDA, and the tensors are on {device_type!r}"


@functools.cache
def _installed() -> tuple[str, bool]:
    """Why Triton does not load (empty where it does), and whether it interprets; said once in the log."""
    try:
        triton = importlib.import_module("triton")
    except ModuleNotFoundError:
        reason = "Triton is not installed"
    except Exception as error:
        reason = f"Triton does not load: {type(error).__name__}: {error}"
    else:
        reason = "" if triton.knobs.runtime.interpret else _why_nothing_compiles()
    if not reason:
        logger.info("kernels run as Triton %s compiles them", triton.__version__)
        return "", bool(triton.knobs.runtime.interpret)
    logger.info("kernels run as plain torch: %s", reason)
    return reason, False


def _why_nothing_compiles() -> str:
    """Error of a first small kernel, as where there is no C compiler; empty where it gives what it should."""
    if not torch.cuda.is_available():
        return ""
    try:
        if torch.version.hip or torch.cuda.get_device_capability() < OLDEST:
            return "the kernels are made for CUDA devices from compute capability 8.0 on"
        from ds_moe_ep.kernels.compiled import permute

        rows_ND = torch.ones(1, 16, device="cuda")
        permute.clear_padding(rows_ND, torch.ones(1, dtype=torch.bool, device="cuda"))
        return "a kernel gave a wrong result" if rows_ND.any() else ""
    except Exception as error:
        return f"Triton compiles no kernel: {type(error).__name__}: {error}"
