"""Stand-ins for names that older releases of DeepSpeed lack, held against the installed release's own."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate
from deepspeed.runtime import compiler
from torch import Tensor

from ds_moe_ep.config.deepspeed_keys import TESTED, installed_release, number_of
from ds_moe_ep.doctor import packages
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.older_engines import refuse_lost_micro_batches
from ds_moe_ep.engine.releases import LATER, Later, dense_routes
from ds_moe_ep.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
TOKENS, WIDTH, EXPERTS = 24, 8, 6
needs_sparse_routes = pytest.mark.skipif(
    not seams.has("sparse routes"), reason=f"the gate of DeepSpeed {deepspeed.__version__} gives dense routes alone"
)


@pytest.mark.parametrize("name", LATER)
def test_the_installed_release_has_what_the_table_says(name: str) -> None:
    is_new_enough = number_of(deepspeed.__version__) >= number_of(LATER[name].since)
    assert seams.has(name) is is_new_enough
    assert LATER[name].since in TESTED
    assert installed_release() == deepspeed.__version__


def test_a_name_that_is_gone_has_its_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "lazy_disable", torch.compiler.disable, raising=False)
    there = Later("there", "deepspeed.runtime.compiler", "lazy_disable", stand_in=str)
    assert there.get() is torch.compiler.disable
    monkeypatch.delattr(compiler, "lazy_disable")
    gone = Later("gone", "deepspeed.runtime.compiler", "lazy_disable", stand_in=str)
    assert gone.find() is None
    assert gone.get() is str


def test_a_module_or_an_argument_that_is_gone_is_not_found() -> None:
    assert Later("0", "deepspeed.no_such_module", "x").find() is None
    assert Later("0", "deepspeed.moe.sharded_moe", "TopKGate.forward", "no_such_argument").find() is None
    assert Later("0", "deepspeed.moe.sharded_moe", "TopKGate.forward", "used_token").find() is TopKGate.forward


def test_autoep_has_no_stand_in_and_a_release_without_it_has_no_presets() -> None:
    assert LATER["AutoEP"].stand_in is None
    assert LATER["AutoEP"].find() or seams.autoep_presets() == []


GATES: list[dict[str, Any]] = [
    {"k": 1, "use_rts": False, "capacity_factor": 0.6},
    {"k": 1, "use_rts": True, "capacity_factor": 1.0},
    {"k": 1, "use_rts": True, "drop_tokens": False},
    {"k": 2, "capacity_factor": 0.6, "top2_2nd_expert_sampling": True},
    {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False},
    {"k": 4, "capacity_factor": 0.5},
    {"k": 4, "drop_tokens": False},
]


def passed(knobs: dict[str, Any], is_masked: bool, is_dense: bool) -> tuple[Tensor, Tensor, Tensor, Any, Any, Tensor]:
    """Weights [T, E] and places [T, E] of a gate's routes, its losses and counts, and the gradient of its matrix."""
    torch.manual_seed(5)
    gate = TopKGate(WIDTH, EXPERTS, min_capacity=2, **knobs)
    x_TD, out_TE = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, EXPERTS)
    used = torch.arange(TOKENS) % 3 > 0 if is_masked else None
    torch.manual_seed(7)  # what is drawn is the same both times
    answer = dense_routes(gate, x_TD, used) if is_dense else gate(x_TD, used, sparse_routes=True)
    l_aux, capacity, _, experts_KT, places_KT, weights_KT, counts = answer
    there_KT = experts_KT >= 0
    ids_TK = experts_KT.long().clamp(min=0).t()
    weights_TE = torch.zeros(TOKENS, EXPERTS).scatter_add(1, ids_TK, (weights_KT * there_KT).t())
    places_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.long)
    places_TE.scatter_add_(1, ids_TK, ((places_KT + 1) * there_KT).t().long())
    ((weights_TE * out_TE).sum() + l_aux).backward()
    gradient = gate.wg.weight.grad
    assert gradient is not None
    return weights_TE.detach(), places_TE, l_aux.detach(), int(capacity), counts.tolist(), gradient


@needs_sparse_routes
@pytest.mark.parametrize(
    ("knobs", "is_masked"), [*((knobs, False) for knobs in GATES), *((knobs, True) for knobs in GATES[:3])], ids=str
)
def test_routes_read_from_dense_weights_are_the_sparse_ones(knobs: dict[str, Any], is_masked: bool) -> None:
    dense, sparse = passed(knobs, is_masked, is_dense=True), passed(knobs, is_masked, is_dense=False)
    assert torch.equal(dense[1], sparse[1]), "places"
    assert torch.equal(dense[0], sparse[0]), "weights"
    assert torch.equal(dense[2], sparse[2]), "l_aux"
    assert dense[3:5] == sparse[3:5], "capacity and counts"
    assert torch.allclose(dense[5], sparse[5], atol=1e-6, rtol=0)
    assert (sparse[0] > 0).any()


@needs_sparse_routes
def test_a_wrong_place_in_the_dense_weights_is_seen() -> None:
    knobs = {"k": 2, "capacity_factor": 0.6, "top2_2nd_expert_sampling": False}
    other = {**knobs, "capacity_factor": 2.0}
    assert not torch.equal(passed(knobs, False, is_dense=True)[1], passed(other, False, is_dense=False)[1])


@pytest.mark.parametrize(
    ("release", "stage", "steps", "offload", "is_refused"),
    [
        ("0.17.6", 2, 2, False, True),
        ("0.17.6", 2, 1, False, False),
        ("0.17.6", 1, 2, False, False),
        ("0.17.6", 2, 2, True, False),
        ("0.18.9", 2, 2, False, False),
    ],
)
def test_zero_2_of_0_17_is_refused_where_it_would_lose_micro_batches(
    release: str, stage: int, steps: int, offload: bool, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an engine three numbers are asked; the real one trains wrong (test_other_releases.py)."""
    monkeypatch.setattr(seams, "release", lambda: release)
    engine = SimpleNamespace(
        gradient_accumulation_steps=lambda: steps,
        zero_optimization_stage=lambda: stage,
        optimizer=SimpleNamespace(cpu_offload=offload),
    )
    if is_refused:
        with pytest.raises(EngineError, match="keeps the last micro-batch's gradients alone; use stage 1"):
            refuse_lost_micro_batches(engine)
    else:
        refuse_lost_micro_batches(engine)


def test_the_package_asks_for_releases_from_the_first_tested_one_on() -> None:
    wished = re.search(r'"(deepspeed>=[^"]*)"', (ROOT / "setup.py").read_text())
    assert wished and wished[1] == packages.DEEPSPEED
    oldest, above = re.findall(r"[\d.]+", wished[1])
    assert oldest == TESTED[0]
    assert all(number_of(oldest) <= number_of(tested) < number_of(above) for tested in TESTED)


def test_seams_takes_every_private_name_from_the_deepspeed_that_is_installed() -> None:
    """A name that only the newest release has must stand in LATER: importing the seams uses no other."""
    tree = ast.parse(Path(seams.__file__).read_text())
    imported = {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    assert not {name for name in imported if "auto_ep" in name}
