"""The tested releases of DeepSpeed that are not installed, each in an environment of its own (tests/venvs.py).

Each trains as one device does in float64 (tests/engine/test_training.py tells the tolerances), and as the others.
"""

from __future__ import annotations

import functools
import os
import pathlib
import tempfile
from dataclasses import replace
from typing import Any

import deepspeed
import pytest
import torch

from ds_moe_ep.config.deepspeed_keys import TESTED, number_of
from tests.engine.release_job import ACCUMULATING, JOBS, RESUMED, go_on
from tests.engine.small_model import distance, merged, reference_job
from tests.engine.test_training import LOSS, WEIGHTS, loss_distance
from tests.ranks import run_ranks
from tests.venvs import python_with, run_python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TORCH = "DS_MOE_EP_TEST_TORCH"
OTHERS = [release for release in TESTED if release != deepspeed.__version__]
# Without the package ZeRO of 0.18.9 does not step on torch 2.13: hooked training is compared with one device alone.
SUITES = {
    "test_releases": "",
    "test_seams": "",
    "test_native_parity": "",
    "test_initialize": "",
    "hooks/test_native": "hooked_layers or seen_through or leave_nothing",
    "extensions/test_nonfinite": "fp16-1",
}


@functools.cache
def folder_of(release: str) -> pathlib.Path:
    return pathlib.Path(tempfile.mkdtemp(prefix=f"deepspeed-{release}-"))


@functools.cache
def results_of(release: str) -> dict[str, Any]:
    """Results of the runs on a release; trained once."""
    python, folder = python_with(f"deepspeed=={release}"), folder_of(release)
    run_python(python, "-m", "tests.engine.release_job", str(folder / "results.pt"), str(folder), timeout_s=800)
    found: dict[str, Any] = torch.load(folder / "results.pt", weights_only=False)
    assert found["release"] == release
    return found


@pytest.mark.parametrize("release", TESTED)
def test_a_release_trains_as_one_device_does_or_says_why_not(release: str) -> None:
    results = results_of(release)
    refused = [name for name in JOBS if isinstance(results[name], str)]
    assert refused == ([ACCUMULATING] if number_of(release) < (0, 18) else [])
    assert all("keeps the last micro-batch's gradients alone; use stage 1" in results[name] for name in refused)
    for name, job in JOBS.items():
        if not job.clipping and name not in refused:
            expected = reference_job(job)
            assert distance(results[name][1], expected[1]) <= WEIGHTS, name
            assert loss_distance(results[name], expected) <= LOSS, name
    straight = reference_job(RESUMED)
    for layer in ("ours", "native"):
        losses, weights = results[f"resumed, {layer}"]
        assert distance(weights, straight[1]) <= WEIGHTS, f"resumed, {layer}"
        assert losses == pytest.approx(straight[0][2:], abs=LOSS)


@pytest.mark.parametrize("release", OTHERS)
def test_a_release_trains_as_the_installed_one(release: str) -> None:
    theirs, ours = results_of(release), results_of(deepspeed.__version__)
    for name, job in JOBS.items():
        if isinstance(theirs[name], str):
            continue
        assert distance(theirs[name][1], ours[name][1]) <= 2 * WEIGHTS, name
        assert loss_distance(theirs[name], ours[name]) <= 2 * LOSS, name
        if job.clipping:
            free = reference_job(replace(job, clipping=0.0))
            assert distance(theirs[name][1], free[1]) > 100 * WEIGHTS, "the limit must be felt"


@pytest.mark.parametrize("release", OTHERS)
@pytest.mark.parametrize("layer", ["ours", "native"])
def test_a_checkpoint_of_another_release_goes_on_here(release: str, layer: str) -> None:
    theirs = results_of(release)
    found = run_ranks(2, go_on, replace(RESUMED, layer=layer), str(folder_of(release) / layer), timeout_s=120)
    assert distance(merged([weights for _, weights in found]), theirs[f"resumed, {layer}"][1]) <= 2 * WEIGHTS


@pytest.mark.parametrize("release", TESTED)
def test_states_that_were_saved_without_zero_load_or_are_refused_by_name(release: str) -> None:
    said = results_of(release)["without ZeRO"]
    if number_of(release) >= (0, 19):
        assert said == ""
    else:
        assert said.startswith("EngineError: ")
        assert f"DeepSpeed {release} does not load optimizer states of MoE layers without ZeRO" in said
        assert "load_module_only=True" in said and "zero_optimization.stage=1" in said


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("release", OTHERS)
def test_a_release_passes_the_tests_of_layers_hooks_and_doors(release: str, suite: str) -> None:
    python = python_with(f"deepspeed=={release}")
    test = [f"tests/engine/{suite}.py", "-m", "not slow and not gpu", "-k", SUITES[suite]]
    assert " passed" in run_python(python, "-m", "pytest", "-q", *test, timeout_s=600)


@pytest.mark.parametrize("release", os.environ.get(TORCH, "").split() or ["none"])
def test_another_torch_trains_as_one_device_does(release: str) -> None:
    """Releases of torch that the variable names: each is a download of several gigabytes, CUDA's libraries included."""
    if release == "none":
        pytest.skip(f"{TORCH} names no releases of torch to download, such as '2.11.0 2.12.1'")
    folder = folder_of(f"torch-{release}")
    python = python_with(f"torch=={release}", with_dependencies=True)
    run_python(python, "-m", "tests.engine.release_job", str(folder / "results.pt"), str(folder), timeout_s=800)
    results = torch.load(folder / "results.pt", weights_only=False)
    assert number_of(results["torch"]) == number_of(release)
    for name, job in JOBS.items():
        if not job.clipping:
            assert distance(results[name][1], reference_job(job)[1]) <= WEIGHTS, name
