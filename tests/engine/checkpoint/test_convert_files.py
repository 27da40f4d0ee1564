"""Files of a conversion: what it keeps and writes, and that nothing half-written is ever left."""

from __future__ import annotations

import pathlib
import shutil
import sys
from typing import Any

import pytest
import torch

from ds_moe_ep.cli.main import main
from ds_moe_ep.engine.checkpoint.convert.prepare import prepare
from ds_moe_ep.errors import EngineError
from tests.engine.checkpoint.checkpoints import TAG, converted, target_config, weights_in, write_config, write_experts
from tests.parallel.training_runs import Run

RUN = Run(top_k=2, model={"num_layers": 2, "shared_expert_width": 8})
Folder = pathlib.Path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("knobs", [{"expert": "gelu"}, {"expert": "swiglu", "recompute": True}])
def test_there_and_back_keeps_every_type_and_bit(tmp_path: Folder, dtype: torch.dtype, knobs: dict[str, Any]) -> None:
    run = Run(model=knobs | {"num_layers": 2, "shared_expert_width": 8})
    folder = converted(tmp_path, run, dtype)
    prepare(folder, tmp_path / "back", target_config(run, pipeline=False)).write()
    before, after = weights_in(tmp_path / "experts", run), weights_in(tmp_path / "back", run)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], weight), name


def test_files_are_those_that_the_pipeline_engine_writes_and_hold_no_more_than_their_shares(tmp_path: Folder) -> None:
    folder = converted(tmp_path, RUN)
    layers = [f"layer_{index:02d}-model_{rank:02d}-model_states.pt" for index in range(4) for rank in range(2)]
    states = [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(4)]
    assert sorted(path.name for path in (folder / TAG).iterdir()) == sorted(layers + states)
    for name in layers:
        weights = torch.load(folder / TAG / name, weights_only=True)
        of_shares = sum(weight.nbytes for weight in weights.values())
        assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights.values())
        assert (folder / TAG / name).stat().st_size < of_shares + 10_000


def test_an_interrupted_or_failed_write_leaves_nothing_behind(
    tmp_path: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_experts(tmp_path / "experts", RUN)
    conversion = prepare(tmp_path / "experts", tmp_path / "target", target_config(RUN, pipeline=True))
    before, written = sorted(tmp_path.rglob("*")), []

    def interrupt(num_bytes: int) -> None:
        written.append((tmp_path / "target.part").exists() and not (tmp_path / "target").exists())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversion.write(interrupt)
    assert written == [True], "it writes beside the target"
    assert sorted(tmp_path.rglob("*")) == before
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("disk full")))
        with pytest.raises(EngineError, match=r"target: cannot be written \(disk full\); name another folder"):
            conversion.write()
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
        with pytest.raises(EngineError, match=r"needs 0\.0 GB, and .* has 0\.0 GB left; name a folder on another disk"):
            conversion.write()
    assert sorted(tmp_path.rglob("*")) == before
    conversion.write()
    assert (tmp_path / "target" / "latest").read_text() == TAG


def private_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("pipeline", [True, False])
def test_a_conversion_holds_one_file_at_a_time(tmp_path: Folder, pipeline: bool) -> None:
    """64 MiB of weights in files of 2 to 8: less than a third of that is held after each file."""
    run = Run(model={"expert_width": 4096, "hidden_size": 128, "vocab_size": 32}, num_experts=4)
    write_experts(tmp_path / "experts", run)
    source = tmp_path / "experts"
    if not pipeline:
        prepare(source, tmp_path / "pipeline", target_config(run, pipeline=True)).write()
        source = tmp_path / "pipeline"
    at_start, most = private_bytes(), 0

    def look(num_bytes: int) -> None:
        nonlocal most
        most = max(most, private_bytes() - at_start)

    conversion = prepare(source, tmp_path / "target", target_config(run, pipeline=pipeline))
    conversion.write(look)
    assert conversion.num_bytes > 64 * 2**20
    assert most < conversion.num_bytes / 3


def test_the_command_converts_says_how_to_load_and_refuses_a_second_time(
    tmp_path: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_experts(tmp_path / "experts", RUN)
    config, back = (write_config(tmp_path / f"{p}.json", RUN, pipeline=p) for p in (True, False))
    command = ["convert", str(tmp_path / "experts"), str(tmp_path / "pipeline"), "--config", config, "--tag", TAG]
    assert main(command) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{len(whole)} weights from expert parallelism with 4 experts to a pipeline of tp_size=2")
    assert line.endswith(f"engine.load_checkpoint({str(tmp_path / 'pipeline')!r}, load_module_only=True)")
    assert main(["convert", str(tmp_path / "pipeline"), str(tmp_path / "back"), "--config", back]) == 0
    assert "weights from a pipeline of tp_size=2 and pp_size=2 to expert parallelism" in capsys.readouterr().out
    assert all(torch.equal(weight, whole[name]) for name, weight in weights_in(tmp_path / "back", RUN).items())
    assert main(command) == 2
    assert "pipeline: exists, and a conversion overwrites nothing; remove it or name" in capsys.readouterr().err
