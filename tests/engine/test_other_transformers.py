"""transformers 5.23 and 5.24, whose registry of outputs AutoEP of DeepSpeed 0.19.8 cannot read by itself."""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import pytest

from ds_moe_ep.engine import recorders, seams
from tests.engine.hooks.autoep_models import AutoEPJob, run_job
from tests.ranks import run_ranks
from tests.venvs import python_with, run_python

needs_autoep = pytest.mark.skipif(not seams.has("AutoEP"), reason="this release of DeepSpeed has no AutoEP")
FAMILIES = ("mixtral", "qwen3_moe")


class Registry(dict[str, Any]):
    """As transformers 5.23 has it: by models, and their classes' names inside."""

    def __setitem__(self, model: Any, outputs: Any) -> None:
        super().__setitem__(str(model.__class__), outputs)

    def get(self, model: Any) -> Any:  # type: ignore[override]
        return super().get(str(model.__class__)) or {}


class Model:
    pass


def installed(monkeypatch: pytest.MonkeyPatch, registry: Any) -> None:
    module = ModuleType(recorders.HOME)
    module._CAN_RECORD_REGISTRY = registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, recorders.HOME, module)


def test_a_registry_that_takes_models_alone_takes_names_too_once_it_is_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fresh(Registry):
        pass

    registry = Fresh()
    registry[Model()] = {"hidden_states": 1}
    installed(monkeypatch, registry)
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        registry.get(str(Model), None)  # type: ignore[call-arg]
    assert recorders.mend_registry()
    name, absent = str(Model), object()
    assert registry.get(name) == registry.get(Model()) == {"hidden_states": 1}
    assert registry.get("no class", absent) is absent  # type: ignore[call-arg]
    assert registry.get(3) == {}, "a model without an entry has what it had"
    registry[name] = {"router_logits": 2}  # AutoEP puts back by name what it found
    assert registry.get(Model()) == {"router_logits": 2}
    assert list(registry) == [name]
    assert not recorders.mend_registry(), "there is nothing left to mend"


def test_a_registry_that_takes_names_is_left_alone_and_so_is_an_absent_one(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, {})
    assert not recorders.mend_registry()
    monkeypatch.setitem(sys.modules, recorders.HOME, None)
    assert not recorders.mend_registry()


def train(families: tuple[str, ...]) -> list[list[float]]:
    """Losses of a tiny model of each family, whose loss contains its recorded router logits."""
    return [run_job(AutoEPJob(preset=name, world_size=2, ep_size=2, router_logits=True))[0] for name in families]


def unmended() -> str:
    """How DeepSpeed's own start ends without the mending."""
    recorders.mend_registry = lambda: False  # type: ignore[assignment]
    try:
        train(FAMILIES[:1])
    except TypeError as error:
        return str(error)
    return "it starts"


def outcomes() -> dict[str, Any]:
    """The losses of both families, and what happens without the mending, in this interpreter's environment."""
    import transformers

    losses = run_ranks(2, train, FAMILIES, timeout_s=200)[0]
    return {"release": transformers.__version__, "losses": losses, "unmended": run_ranks(2, unmended, timeout_s=100)[0]}


@needs_autoep
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("release", ["5.23.0", "5.24.0"])
def test_autoep_trains_with_that_transformers_as_with_the_installed_one(release: str) -> None:
    python = python_with(f"transformers=={release}")
    code = "import json; from tests.engine.test_other_transformers import outcomes; print(json.dumps(outcomes()))"
    found = json.loads(run_python(python, "-c", code).splitlines()[-1])
    assert found["release"] == release
    assert found["losses"] == run_ranks(2, train, FAMILIES, timeout_s=200)[0]
    assert "takes 2 positional arguments but 3 were given" in found["unmended"], "the control"
