"""Looks at one library in a process of its own: `python -m ds_moe_ep.doctor.probe NAME` prints what it found.

An import that hangs, aborts or fills a GPU then ends with that process, and the doctor goes on.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MARK = "ds_moe_ep.probe "  # before the line of the result; libraries print lines of their own


def probe_torch() -> dict[str, Any]:
    """Fields of TorchFacts."""
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda or ""}
    if torch.distributed.is_available() and torch.distributed.is_nccl_available() and torch.version.cuda:
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    if torch.cuda.is_available():
        size = torch.cuda.device_count()
        facts = [torch.cuda.get_device_properties(index) for index in range(size)]
        found["devices"] = [(each.name, each.total_memory, (each.major, each.minor)) for each in facts]
        pairs = [(i, j) for i in range(size) for j in range(i + 1, size)]
        found["apart"] = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    return found


def probe_deepspeed() -> dict[str, Any]:
    """Fields of DeepSpeedFacts. The seams import deepspeed, and say what they miss."""
    from importlib import metadata

    from ds_moe_ep.engine import seams
    from ds_moe_ep.errors import EngineError

    found: dict[str, Any] = {"version": metadata.version("deepspeed"), "tested": seams.TESTED}
    try:
        seams.check_release()
    except EngineError as error:
        found["seams"] = str(error)
    try:
        importlib.import_module("deepspeed.module_inject.auto_ep_layer")
    except Exception as error:
        found["autoep"] = named(error)
    return found


def probe_triton() -> dict[str, Any]:
    """Fields of TritonFacts: a small kernel runs where there is a device."""
    triton = importlib.import_module("triton")
    found: dict[str, Any] = {"version": triton.__version__, "interpreted": os.environ.get("TRITON_INTERPRET") == "1"}
    import torch

    if not torch.cuda.is_available():
        return {**found, "reason": "there is no device to compile for"}
    try:
        from ds_moe_ep.doctor.triton_kernel import add_one

        counted = add_one(torch.arange(100, device="cuda"))
        found["compiled"] = bool((counted == torch.arange(1, 101, device="cuda")).all()) and not found["interpreted"]
    except Exception as error:
        found["reason"] = named(error)
    return found


def probe_apex() -> dict[str, Any]:
    """Fields of ApexFacts: what the model's own search finds, with or without a device."""
    from ds_moe_ep.model import fused

    with heard("ds_moe_ep.model.fused") as lines:
        found = {"layer norm": fused.find_layer_norm(), "dense-GELU-dense": fused.find_dense_gelu_dense()}
    offers = [name for name, operation in found.items() if operation is not None]
    return {"offers": offers, "reason": "; ".join(lines) if len(offers) < len(found) else ""}


@contextmanager
def heard(logger: str) -> Iterator[list[str]]:
    """The lines that `logger` writes while the block runs."""
    lines: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger(logger)
    log.addHandler(listener)
    log.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        log.removeHandler(listener)


def named(error: BaseException) -> str:
    """The error in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": probe_torch,
    "deepspeed": probe_deepspeed,
    "triton": probe_triton,
    "apex": probe_apex,
}


def main(arguments: list[str]) -> int:
    """Prints what the probe that is named found, or the error that it met."""
    try:
        found = PROBES[arguments[0]]()
    except BaseException as error:
        found = {"error": named(error)}
    print(f"\n{MARK}{json.dumps(found)}", flush=True)
    return 0


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # what a library does at its end is no part of the probe
