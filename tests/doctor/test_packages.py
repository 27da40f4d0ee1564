"""Verdicts on what is installed, for machines that the tests do not run on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_moe_ep.doctor import gather
from ds_moe_ep.doctor.facts import ApexFacts, DeepSpeedFacts, Facts, Gpu, TorchFacts, TritonFacts
from ds_moe_ep.doctor.packages import judge_hugging_face, judge_packages, judge_python
from ds_moe_ep.doctor.verdicts import worst
from tests.doctor.machines import CPU, GPUS, H100, named, on_host

OLD = Gpu("Tesla V100", 32_000_000_000, (7, 0))
OTHER_APEX = ApexFacts(place="/env/apex", version="0.9.10.dev0", reason="ModuleNotFoundError: apex.normalization")


@pytest.mark.parametrize("facts", [CPU, GPUS])
def test_a_machine_that_has_everything_is_well(facts: Facts) -> None:
    assert worst(judge_packages(facts)) == "ok"


@pytest.mark.parametrize(
    ("facts", "name", "status", "found"),
    [
        (replace(CPU, torch=TorchFacts(error="ImportError: libcudart")), "torch", "problem", "libcudart"),
        (on_host(CPU, num_gpu_files=8), "devices", "warning", "none of the 8 GPUs"),
        (replace(GPUS, torch=replace(GPUS.torch, nccl="")), "NCCL", "problem", "has none"),
        (replace(GPUS, torch=replace(GPUS.torch, devices=(H100, OLD))), "devices", "warning", "2 x "),
        (replace(GPUS, torch=replace(GPUS.torch, devices=(OLD,))), "devices", "note", "no bf16"),
        (replace(GPUS, torch=replace(GPUS.torch, apart=((0, 2),))), "peer access", "note", "GPUs 0-2 cannot"),
        (replace(CPU, deepspeed=DeepSpeedFacts(error="it is not installed")), "DeepSpeed", "problem", "not installed"),
        (
            replace(CPU, deepspeed=replace(CPU.deepspeed, version="0.20.0")),
            "DeepSpeed",
            "warning",
            "not tested (tested: 0.19.8)",
        ),
        (replace(CPU, deepspeed=replace(CPU.deepspeed, seams="groups has no mpu")), "DeepSpeed", "problem", "no mpu"),
        (replace(CPU, deepspeed=replace(CPU.deepspeed, autoep="ImportError: x")), "AutoEP", "note", "ImportError"),
        (replace(GPUS, triton=TritonFacts(version="3", interpreted=True)), "Triton", "warning", "TRITON_INTERPRET"),
        (replace(CPU, triton=TritonFacts(version="3", interpreted=True)), "Triton", "note", "no proof for a device"),
        (replace(GPUS, triton=TritonFacts(version="3", reason="no gcc")), "Triton", "note", "no gcc"),
        (replace(GPUS, apex=OTHER_APEX), "apex", "warning", "another project, not NVIDIA's"),
        (replace(CPU, apex=OTHER_APEX), "apex", "warning", "another project, not NVIDIA's"),
        (replace(GPUS, apex=replace(GPUS.apex, offers=(), reason="no kernel")), "apex", "note", "offers nothing"),
        (replace(GPUS, apex=replace(GPUS.apex, offers=("layer norm",), reason="no GELU")), "apex", "note", "no GELU"),
        (replace(GPUS, versions={**GPUS.versions, "nvidia-ml-py": None}), "others", "warning", "busy fraction"),
        (replace(CPU, versions={**CPU.versions, "nvidia-ml-py": None}), "others", "ok", "busy fraction"),
    ],
)
def test_what_is_wrong_is_named(facts: Facts, name: str, status: str, found: str) -> None:
    verdict = named(judge_packages(facts), name)
    assert verdict.status == status
    assert found in verdict.found
    assert verdict.fix or status in ("ok", "note")


def test_an_old_python_is_a_problem() -> None:
    assert judge_python((3, 9, 18)).status == "problem"
    assert judge_python((3, 10, 0)).status == "ok"


@pytest.mark.parametrize(
    ("version", "status"), [(None, "ok"), ("5.22.2", "ok"), ("5.21.0", "warning"), ("4.57.6", "warning")]
)
def test_transformers_is_held_against_the_tested_releases(version: str | None, status: str) -> None:
    tested = {"transformers": ("5.0.0", "5.22.2")}
    (verdict,) = judge_hugging_face({"transformers": version}, tested)
    assert verdict.status == status
    if status == "warning":
        assert verdict.fix == "pip install transformers==5.22.2"


@pytest.mark.parametrize("version", ["5.23.0", "5.23.1", "5.24.0"])
def test_a_transformers_that_breaks_autoep_is_a_problem_with_the_fix(version: str) -> None:
    facts = replace(CPU, versions={**CPU.versions, "transformers": version})
    verdict = named(judge_packages(facts), "transformers")
    assert verdict.status == "problem"
    assert "breaks AutoEP" in verdict.found
    assert "ds_moe_ep.initialize" in verdict.fix and "pip install transformers==5.22.2" in verdict.fix
    without = replace(facts, deepspeed=replace(CPU.deepspeed, version="0.18.9", autoep="ImportError: x"))
    assert named(judge_packages(without), "transformers").status == "warning", "nothing is there to break"


@pytest.mark.parametrize(("parts", "is_nvidias"), [((), False), (("normalization",), True)])
def test_another_project_called_apex_is_told_apart_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: tuple[str, ...], is_nvidias: bool
) -> None:
    for folder in ("", *parts):
        (tmp_path / "apex" / folder).mkdir()
        (tmp_path / "apex" / folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    facts = gather.apex_facts(gather.run_probes(["apex"], 100)["apex"])
    assert facts.place == str(tmp_path / "apex")
    assert facts.has_normalization is is_nvidias
    assert facts.offers == ()
    verdict = named(judge_packages(replace(CPU, apex=facts)), "apex")
    assert verdict.status == ("ok" if is_nvidias else "warning")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("import time; time.sleep(100)", "did not end within 5 s"),
        ("import os; os.abort()", "ended the process with -6"),
        ("raise ImportError('libmpi.so is missing')", "ImportError: libmpi.so is missing"),
        ("print('loaded'); __version__ = '1'", None),
    ],
)
def test_an_import_that_hangs_or_aborts_is_told_and_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, error: str | None
) -> None:
    (tmp_path / "triton.py").write_text(body)
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found: dict[str, Any] = gather.run_probes(["triton"], 5)["triton"]
    assert error is None or error in found["error"]
    assert ("error" in found) is (error is not None)
