"""Who computes: plain torch or Triton, by device, type and installation, and by the knob `kernels`."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.kernels.choose import runs_triton, why_no_triton
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from tests.kernels.interpreter import needs_triton, under_interpreter


def test_the_cpu_takes_plain_torch() -> None:
    assert not runs_triton(None, torch.ones(2)) and not runs_triton(False, torch.ones(2))
    assert why_no_triton("cpu")


def test_the_kernels_are_refused_by_name_where_they_cannot_run() -> None:
    layer = ExpertParallel(8, GeluMLP(8, 16), MoEConfig(num_experts=2, kernels="triton"))
    with pytest.raises(ConfigError, match=r'moe_ep\.kernels="triton": .*; install it .*, or write "auto"'):
        layer(torch.randn(4, 8))
    with pytest.raises(ConfigError, match=r"moe_ep\.kernels='cuda'.*choose one of 'auto', 'triton', 'torch'"):
        MoEConfig(kernels="cuda")  # type: ignore[arg-type]


BROKEN = {  # what a triton.py does, and what is said of it
    "raise ModuleNotFoundError(name='triton')": "Triton is not installed",
    "raise OSError('no such library')": "Triton does not load: OSError: no such library",
}


def test_a_triton_that_does_not_load_is_said_once_and_leaves_plain_torch(tmp_path: Path) -> None:
    for number, body in enumerate(BROKEN):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "triton.py").write_text(body)
    script = f"""
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from ds_moe_ep.kernels import choose
for number in range({len(BROKEN)}):
    sys.path.insert(0, {str(tmp_path)!r} + f"/{{number}}")
    choose._installed.cache_clear()
    print([choose.why_no_triton("cuda"), choose.why_no_triton("cuda")])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    for said, reasons, expected in zip(lines[::2], lines[1::2], BROKEN.values(), strict=True):
        assert said == f"kernels run as plain torch: {expected}"
        assert reasons == str([expected, expected])


@needs_triton
def test_an_installed_triton_is_taken_on_cuda_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    from ds_moe_ep.kernels import choose

    choose._installed.cache_clear()
    with caplog.at_level(logging.INFO, logger=choose.__name__):
        assert [why_no_triton("cuda"), why_no_triton("cuda")] == ["", ""]
    assert [record.message.startswith("kernels run as Triton 3.") for record in caplog.records] == [True]


@needs_triton
def test_a_device_on_which_no_kernel_runs_keeps_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_moe_ep.kernels import choose

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    choose._installed.cache_clear()
    reason = why_no_triton("cuda")
    choose._installed.cache_clear()
    if torch.version.cuda is None:
        assert reason.startswith("Triton compiles no kernel: AssertionError: ")
    assert reason or torch.cuda.device_count()


@needs_triton
def test_a_device_that_is_too_old_keeps_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from ds_moe_ep.kernels import choose

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    choose._installed.cache_clear()
    reason = why_no_triton("cuda")
    choose._installed.cache_clear()
    assert reason == "the kernels are made for CUDA devices from compute capability 8.0 on"


@under_interpreter
def test_fp64_stays_with_plain_torch_whatever_is_wished() -> None:
    assert runs_triton(True, torch.ones(2)) and not runs_triton(True, torch.ones(2, dtype=torch.float64))
    assert not runs_triton(True, torch.ones(2), torch.ones(2, dtype=torch.float64))
    assert why_no_triton("cpu") == "" and "'xpu'" in why_no_triton("xpu")


@pytest.mark.parametrize(
    ("top_k", "is_partly_used", "capacity_factor", "dtype"),
    [  # any two of them together
        (1, False, None, torch.float32), (2, False, None, torch.bfloat16), (2, True, None, torch.float32),
        (1, False, 0.8, torch.bfloat16), (2, False, 0.8, torch.float32), (2, True, 0.8, torch.bfloat16),
    ],
)  # fmt: skip
@under_interpreter
def test_a_whole_layer_gives_the_same_by_the_kernels(
    top_k: int, is_partly_used: bool, capacity_factor: float | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    knobs: dict[str, Any] = {"num_experts": 4, "top_k": top_k, "capacity_factor": capacity_factor, "min_capacity": 1}
    plain = ExpertParallel(24, GeluMLP(24, 32), MoEConfig(**knobs, kernels="torch"), GeluMLP(24, 16)).to(dtype)
    ours = ExpertParallel(24, GeluMLP(24, 32), MoEConfig(**knobs, kernels="triton"), GeluMLP(24, 16)).to(dtype)
    ours.load_state_dict(plain.state_dict())
    x_TD = torch.randn(13, 24).to(dtype)
    results = []
    for layer in (plain, ours):
        x = x_TD.clone().requires_grad_()
        y_TD, loss, counts_E = layer(x, torch.arange(13) % 4 if is_partly_used else None)
        (y_TD.float().square().sum() + loss.float()).backward()
        assert x.grad is not None
        results.append([y_TD.detach(), loss.detach(), counts_E, x.grad, *(p.grad for p in layer.parameters())])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None
        scale = float(one.double().abs().max().clamp(min=1e-3))
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance * scale)
    assert float(results[0][0].abs().max()) > 0.05
