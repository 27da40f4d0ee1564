"""A universal checkpoint is read as tensors and plain values alone, file by file, whenever a file came there."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.loading import mapped
from ds_moe_ep.engine.checkpoint.preflight import Preflight
from tests.engine.checkpoint.test_damaged import JOB, MAIN, Crafted
from tests.engine.small_model import make_engine
from tests.ranks import RankPool

TAG, KINDS = "two", ("fp32", "exp_avg", "exp_avg_sq")
SWAPPED = {"of the optimizer": "zero/optimizer_state.pt", "of parameters": "zero/*/fp32.pt"}


def write_universal(engine: Any, folder: Path) -> None:
    """A universal checkpoint of the engine's model, all zeros."""
    (folder / TAG).mkdir(parents=True)
    names = {"module": engine.module.state_dict(), "mp_world_size": 1, "dp_world_size": dist.get_world_size()}
    torch.save(names | {"global_steps": 1, "skipped_steps": 0}, folder / TAG / MAIN)
    for name, parameter in engine.module.named_parameters():
        place = folder / TAG / "zero" / name
        place.mkdir(parents=True)
        for kind in KINDS:
            torch.save({"param": torch.zeros(parameter.shape)}, place / f"{kind}.pt")
        torch.save(torch.tensor(1.0), place / "step.pt")
    groups = [{"params": []} for _ in engine.optimizer.optimizer.param_groups]
    state = {"ds_version": deepspeed.__version__, "param_groups": groups}
    torch.save(state, folder / TAG / "zero" / "optimizer_state.pt")


def swapped_loads(folder: Path, marker: Path) -> tuple[dict[str, str], float, dict[str, str]]:
    """What a load says of files that are swapped behind the first look; the largest weight behind a load without; and
    what it says where DeepSpeed reads by itself.
    """
    engine = make_engine(replace(JOB, ep_size=1, seed=9))
    engine._config.load_universal_checkpoint = True
    before_load = Preflight.before_load

    def load(name: str, kind: str) -> str:
        place, is_first = folder / f"{name} {kind}", dist.get_rank() == 0
        if is_first:
            write_universal(engine, place)

        def swap(self: Preflight, call: Any) -> None:
            before_load(self, call)
            for path in (place / TAG).glob(SWAPPED[kind]) if is_first and kind else ():
                torch.save({"param": Crafted(marker)}, path)
            dist.barrier()

        dist.barrier()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Preflight, "before_load", swap)
            try:
                engine.load_checkpoint(str(place), tag=TAG, load_lr_scheduler_states=False)
            except Exception as error:
                return f"{type(error).__name__}: {error}"
        return ""

    told = {kind: load("ours", kind) for kind in SWAPPED}
    assert not marker.exists(), told
    assert load("ours", "") == ""
    largest = max(float(parameter.detach().abs().max()) for parameter in engine.module.parameters())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mapped, "load_as_asked", lambda path, *_: torch.load(path, weights_only=False))
        control = {kind: load("control", kind) for kind in SWAPPED}
    return told, largest, control


def test_a_file_that_is_swapped_behind_the_first_look_runs_nothing(pool: RankPool, tmp_path: Path) -> None:
    marker = tmp_path / "it ran"
    for told, largest, control in pool.run(2, swapped_loads, tmp_path, marker, timeout_s=120):
        for kind, words in told.items():
            assert words.startswith("EngineError") and "could run code of the file's" in words, (kind, words)
        assert largest == 0.0, "a whole one loads"
        assert all(words and "EngineError" not in words for words in control.values()), control
    assert marker.exists(), "the control: unpickled as DeepSpeed does, it runs"


def test_each_module_of_deepspeeds_that_unpickles_while_an_engine_loads_is_known() -> None:
    root = Path(inspect.getfile(deepspeed)).parent
    homes = [root / "checkpoint/universal_checkpoint.py", root / "utils/zero_to_fp32.py"]
    unpickling = {
        "deepspeed." + ".".join(path.relative_to(root).with_suffix("").parts)
        for path in (*(root / "runtime").rglob("*.py"), *homes)
        if re.search(r"torch\.load\(.*weights_only=False", path.read_text(encoding="utf-8"))
    }
    assert unpickling - {"deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine"} == seams.UNPICKLING
