"""Every kernel compiled ahead of time for two generations of devices: registers, spills, and the width of its loads."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from tests.kernels.ahead import compile_ahead, narrow_products
from tests.kernels.interpreter import needs_triton

HOPPER, AMPERE = 90, 80
HALF, FULL, INDEX, MASK, NUMBER = "*fp16", "*fp32", "*i64", "*i1", "i32"
TOKENS = {"num_tokens": NUMBER, "width": NUMBER, "num_experts": NUMBER}
MAPS = {"row_of_choice": INDEX, "is_dropped": MASK, "width": NUMBER}
ROWS = {"BLOCK": 1024}
SHAPE = {"TILE": 16, "BLOCK_TOKENS": 32, "BLOCK_WIDTH": 64}
ROUTES = {
    **{
        "x": HALF,
        "weight": FULL,
        "bias": FULL,
        "is_used": MASK,
        "noise": FULL,
        "logits": FULL,
        "scores": FULL,
        "weights": FULL,
    },
    **{"ids": INDEX, "counts": "*i32", **TOKENS},
}
RULE = {"K": 2, "K_TILE": 2, "IS_SOFTMAX": True, "RENORMALIZES": True, "HAS_BIAS": True, "HAS_USED": True}
RULE |= {"HAS_NOISE": False, "NOISE_FROM": 0}
GIVEN = dict.fromkeys(("HAS_LOGITS", "HAS_SCORES", "HAS_WEIGHTS"), True)


def of(kind: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, kind)


# kernel: arguments, constants, warps, most registers, loads of 128 bits (one per tensor that is as wide as a token)
KERNELS: dict[str, tuple[dict[str, str], dict[str, Any], int, int, int]] = {
    "activation.swiglu": ({**of(HALF, "gate", "up", "active"), "size": "i64"}, ROWS, 4, 32, 2),
    "activation.gelu_backward": (
        {**of(HALF, "d_active", "hidden", "d_hidden", "active"), "size": "i64"},
        {**ROWS, "IS_TANH": False, "WRITES_ACTIVE": True}, 4, 40, 2,
    ),
    "activation.swiglu_backward": (
        {**of(HALF, "d_active", "gate", "up", "d_gate", "d_up", "active"), "size": "i64"},
        {**ROWS, "WRITES_ACTIVE": True}, 4, 40, 3,
    ),
    "permute.spread": ({**of(HALF, "x", "rows"), **MAPS}, {**ROWS, "K": 2, "HAS_DROPPED": True}, 4, 32, 1),
    "permute.weighted_spread": (
        {**of(HALF, "dy", "rows", "d_rows"), **of(FULL, "weights", "d_weights"), **MAPS},
        {**ROWS, "K": 2, "HAS_DROPPED": True, "WRITES_DOTS": True}, 4, 64, 4,
    ),
    "permute.weighted_collect": (
        {**of(HALF, "d_rows", "x", "dx"), **of(FULL, "weights", "d_weights"), **MAPS},
        {**ROWS, "K": 2, "K_TILE": 2, "HAS_DROPPED": True, "WRITES_DOTS": True}, 4, 64, 3,
    ),
    "permute.collect": (
        {**of(HALF, "rows", "first", "second", "y"), "weights": FULL, **MAPS},
        {**ROWS, "K": 2, "IS_WEIGHTED": True, "HAS_DROPPED": True, "NUM_ADDED": 2}, 4, 40, 4,
    ),
    "permute.clear_padding": ({"rows": HALF, "is_padding": MASK, "width": NUMBER}, ROWS, 4, 32, 0),
    "sort.count": (
        {"ids": INDEX, "is_used": MASK, "counts": "*i32", **of(NUMBER, "size", "num_experts")},
        {"HAS_USED": True, "TILE": 32, "BLOCK": 256}, 8, 64, 0,
    ),
    "sort.place": (
        {
            **of(INDEX, "ids", "choice_of_row", "row_of_choice", "count_of_expert"), "is_used": MASK, "counts": "*i32",
            **of(NUMBER, "size", "num_experts", "num_blocks"),
        },
        {"HAS_USED": True, "TILE": 32, "BLOCK": 256}, 8, 168, 0,
    ),
    "gate.logits": ({"x": HALF, **of(FULL, "weight", "logits"), **TOKENS}, SHAPE, 4, 168, 12),
    "gate.routes": (ROUTES, {**RULE, **SHAPE}, 4, 168, 12),
    "gate.logit_gradients": (
        {**of(FULL, "scores", "d_logits", "d_scores", "d_weights", "whole"), "ids": INDEX, **TOKENS},
        {"K": 2, "IS_SOFTMAX": True, "RENORMALIZES": True, **GIVEN, "TILE": 16, "BLOCK_TOKENS": 32}, 4, 40, 3,
    ),
    "gate.token_gradients": ({**of(FULL, "d_logits", "weight"), "dx": HALF, **TOKENS}, SHAPE, 4, 128, 9),
    "gate.weight_gradients": (
        {**of(FULL, "d_logits", "parts"), "x": HALF, "per_split": NUMBER, **TOKENS}, SHAPE, 4, 128, 6,
    ),
    "rotary.rotate": (
        {
            **of(HALF, "packed", "query", "key", "value"), **of(FULL, "cos", "sin"),
            **of(NUMBER, *(f"{part}_{axis}" for part in ("query", "key", "value") for axis in "bhs")),
            **of(NUMBER, "num_tokens", "num_heads", "half"),
        },
        {"IS_BACKWARD": True, "HEADS": 4, "TILE": 256}, 4, 96, 6,
    ),
}  # fmt: skip


def kernel_of(name: str) -> Any:
    module, function = name.split(".")
    return getattr(import_module(f"ds_moe_ep.kernels.compiled.{module}"), f"{function}_kernel")


def check(name: str, capability: int) -> None:
    arguments, constants, num_warps, most_registers, num_wide = KERNELS[name]
    kernel = kernel_of(name)
    known = {key: kind for key, kind in arguments.items() if key in kernel.arg_names}
    code = compile_ahead(kernel, known, constants, capability, num_warps)
    assert code.num_local_bytes == 0, f"{name} spills: {code}"
    assert code.num_registers <= most_registers, code
    assert code.num_wide_loads >= num_wide, code
    if not name.startswith("sort."):  # whose largest product is that of blocks and experts
        assert code.narrow_products == (), f"{name}: an offset past 2^31 would overflow"


@needs_triton
def test_every_kernel_stands_in_the_table() -> None:
    found = {
        f"{module}.{name.removesuffix('_kernel')}"
        for module in ("activation", "permute", "sort", "gate", "rotary")
        for name in vars(import_module(f"ds_moe_ep.kernels.compiled.{module}"))
        if name.endswith("_kernel")
    }
    assert found == set(KERNELS)


@needs_triton
@pytest.mark.parametrize("name", ["permute.collect", "activation.swiglu"])
def test_a_kernel_compiles_for_a_device_that_is_not_there(name: str) -> None:
    check(name, HOPPER)


@needs_triton
def test_arguments_of_unknown_divisibility_would_cost_narrow_loads() -> None:
    arguments, constants, num_warps, *_ = KERNELS["permute.collect"]
    code = compile_ahead(kernel_of("permute.collect"), arguments, constants, HOPPER, num_warps, divisor=1)
    assert code.num_wide_loads == 0 and code.num_global_loads > 20


@needs_triton
def test_an_offset_in_32_bits_would_be_found() -> None:
    constants = {"HAS_USED": True, "TILE": 32, "BLOCK": 256}
    arguments, *_ = KERNELS["sort.count"]
    code = compile_ahead(kernel_of("sort.count"), arguments, constants, HOPPER)
    assert len(code.narrow_products) == 1  # block * (num_experts + 1)
    wide = "%1 = tt.get_program_id x : i32\n %2 = arith.extsi %1 : i32 to i64\n %3 = arith.muli %2, %arg : i64"
    assert narrow_products(wide) == []
    assert narrow_products(wide.replace(": i64", ": i32").replace("i64", "i32")) == ["%2 * %arg"]
    assert (
        narrow_products("%c = arith.constant dense<8> : tensor<4xi32>\n %3 = arith.muli %2, %c : tensor<4xi32>") == []
    )


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_fits_its_registers_and_loads_128_bits_at_once(name: str, capability: int) -> None:
    check(name, capability)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
@pytest.mark.parametrize("num_experts", [16, 256, 384, 512])
@pytest.mark.parametrize("has_noise", [False, True])
def test_many_experts_and_noise_fit_one_pass(num_experts: int, has_noise: bool, capability: int) -> None:
    gate = import_module("ds_moe_ep.kernels.compiled.gate")
    shape = dict(gate.choice_shape(num_experts))
    warps = shape.pop("num_warps")
    rule = {**RULE, "K": 8, "K_TILE": 8, "HAS_NOISE": has_noise, "HAS_BIAS": not has_noise}
    code = compile_ahead(kernel_of("gate.routes"), ROUTES, {**rule, **shape}, capability, warps)
    assert code.num_local_bytes == 0 and code.narrow_products == (), code
    arguments, constants, *_ = KERNELS["gate.logit_gradients"]
    shape = dict(gate.gradient_shape(num_experts))
    warps = shape.pop("num_warps")
    known = {key: kind for key, kind in arguments.items() if key in kernel_of("gate.logit_gradients").arg_names}
    code = compile_ahead(kernel_of("gate.logit_gradients"), known, {**constants, **shape, "K": 8}, capability, warps)
    assert code.num_local_bytes == 0 and code.narrow_products == (), code


@needs_triton
@pytest.mark.slow
def test_the_doctors_kernel_compiles() -> None:
    kernel = import_module("ds_moe_ep.doctor.triton_kernel")._add_one_kernel
    names = [name for name in kernel.arg_names if name != "BLOCK_SIZE"]
    arguments = {name: INDEX if name.endswith("pointer") else NUMBER for name in names}
    assert compile_ahead(kernel, arguments, {"BLOCK_SIZE": 128}, HOPPER).num_local_bytes == 0
