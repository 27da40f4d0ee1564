"""Checkpoint folders: a kill at any line leaves `latest` with a complete one; what lacks files is refused at load."""

from __future__ import annotations

import os
import pathlib
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch.distributed as dist

from ds_moe_ep.engine.checkpoint import folders
from ds_moe_ep.engine.checkpoint.convert.read import OLD, SAVING
from ds_moe_ep.engine.checkpoint.folders import complete_tags, missing_files, publish, write_latest
from tests.engine.small_model import Job, batches, make_engine, train_steps
from tests.ranks import RankPool

EXPERTS = {(0, 0), (0, 1)}


def no_states(folder: pathlib.Path) -> int:
    return 0


FILES = ("mp_rank_00_model_states.pt", *(f"layer_{i}_expert_{j}_mp_rank_00_model_states.pt" for i, j in EXPERTS))


def write_checkpoint(folder: pathlib.Path, text: str) -> None:
    folder.mkdir()
    for name in FILES:
        (folder / name).write_text(text)


def killed_after(num_lines: int, act: Callable[[], None]) -> bool:
    """Runs `act` in a child that is killed after so many lines of folders.py; whether it was."""
    pid = os.fork()
    if pid == 0:
        left = num_lines

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename != folders.__file__:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        act()
        sys.settrace(None)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_line_of_a_save_over_the_same_tag_leaves_a_complete_checkpoint(
    can_exchange: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`latest` names a complete one at every moment; where folders cannot be exchanged, that or the one in `.old`."""
    if not can_exchange:
        monkeypatch.setattr(folders.ctypes, "CDLL", lambda *args, **kwargs: object())
    seen = set()
    for num_lines in range(200):
        place = tmp_path / str(num_lines)
        place.mkdir()
        write_checkpoint(place / "kept", "old")
        (place / "latest").write_text("kept")
        write_checkpoint(place / f"kept{SAVING}", "new")

        def save(place: pathlib.Path = place) -> None:
            publish(place / f"kept{SAVING}", place / "kept")
            write_latest(place, "kept")

        was_killed = killed_after(num_lines, save)
        assert (place / "latest").read_text() == "kept"
        folder = place / "kept"
        if not can_exchange and not folder.exists():
            folder = place / f"kept{OLD}"
            seen.add("none")
        assert missing_files(folder, EXPERTS, 0) == ""
        texts = {(folder / name).read_text() for name in FILES}
        assert len(texts) == 1, "a mixture of two checkpoints"
        seen |= texts
        if not was_killed:
            break
    assert not was_killed
    assert seen == ({"old", "new"} if can_exchange else {"old", "new", "none"})


def test_a_new_tag_appears_whole_and_before_latest_names_it(tmp_path: pathlib.Path) -> None:
    for num_lines in range(200):
        place = tmp_path / str(num_lines)
        place.mkdir()
        write_checkpoint(place / "one", "one")
        (place / "latest").write_text("one")
        write_checkpoint(place / f"two{SAVING}", "two")

        def save(place: pathlib.Path = place) -> None:
            publish(place / f"two{SAVING}", place / "two")
            write_latest(place, "two")

        was_killed = killed_after(num_lines, save)
        latest = place / (place / "latest").read_text()
        assert missing_files(latest, EXPERTS, 0) == ""
        assert (latest / FILES[0]).read_text() == latest.name
        if not was_killed:
            break
    assert latest.name == "two"


def test_what_is_missing_is_named_and_the_complete_ones_are_listed_newest_first(tmp_path: pathlib.Path) -> None:
    for age, name in enumerate(("new", "old", "partial", f"three{SAVING}", f"four{OLD}")):
        write_checkpoint(tmp_path / name, name)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "partial" / FILES[2]).unlink()
    assert list(complete_tags(tmp_path, EXPERTS, no_states)) == ["new", "old"]
    assert "1 experts' files are missing, layer_0_expert_" in missing_files(tmp_path / "partial", EXPERTS, 0)
    assert missing_files(tmp_path / "absent", EXPERTS, 0) == "the folder does not exist"
    (tmp_path / "old" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_text("")
    assert missing_files(tmp_path / "old", EXPERTS, 1) == ""
    assert "no optimizer states of data-parallel rank 1 of 2" in missing_files(tmp_path / "old", EXPERTS, 2)


def test_a_flipped_bit_of_latest_is_refused_or_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another folder may bear the name that it gives: that one is loaded, and the log has the newer one's."""
    told: list[str] = []
    monkeypatch.setattr(folders.seams, "log_rank0", lambda words, *_: told.append(words))
    for age, name in enumerate(("global_step3", "global_step2")):
        write_checkpoint(tmp_path / name, name)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    looks, others = folders.IncompleteCheckpoints(None, [2]), 0
    for bit in range(-1, 8 * len("global_step3")):
        text = bytearray(b"global_step3")
        text[bit // 8] ^= 1 << bit % 8 if bit >= 0 else 0
        (tmp_path / "latest").write_bytes(text)
        told.clear()
        _, problem = folders.found_by_rank(tmp_path, None, EXPERTS, no_states)
        if not problem:
            looks._tell_newer(tmp_path, no_states)
        is_told = told == [f"{tmp_path}/latest: names global_step2, which is loaded; global_step3 was saved later"]
        assert is_told if not problem and bit >= 0 else not told
        assert problem == "" or "latest: names no tag" in problem or "does not exist" in problem, problem
        others += is_told
    assert others == 1, "the control: one bit lies between the two names"


def test_checkpoints_that_nothing_names_are_refused_and_a_folder_without_any_is_a_first_start(
    tmp_path: pathlib.Path,
) -> None:
    """The control: with `latest`, or a tag, the same folder has no problem."""

    def found(folder: pathlib.Path, tag: str | None = None) -> tuple[str | None, str]:
        return folders.found_by_rank(folder, tag, EXPERTS, no_states)

    for empty in (tmp_path / "nowhere", tmp_path):
        assert found(empty) == (None, "")
    write_checkpoint(tmp_path / f"one{SAVING}", "one")
    (tmp_path / "logs").mkdir()
    assert found(tmp_path) == (None, ""), "a kill in the first save"
    write_checkpoint(tmp_path / "one", "one")
    unnamed = f"{tmp_path}: has no file `latest`, and holds checkpoints; load the newest one with tag='one'"
    assert found(tmp_path)[1] == unnamed
    way_out = f"load_checkpoint({str(tmp_path)!r}, tag='one')"
    assert found(tmp_path / "one")[1] == f"{tmp_path}/one: is one checkpoint, not a folder of them; {way_out}"
    assert found(tmp_path, "one") == ("one", "")
    assert found(tmp_path / "nowhere", "one")[1].endswith("name the folder that was given to engine.save_checkpoint")
    (tmp_path / "latest").write_text("")
    assert "tag='one'" in found(tmp_path)[1], "a file of no bytes, as after a loss of power"
    write_latest(tmp_path, "one")
    assert found(tmp_path) == ("one", "")
    (tmp_path / "latest").unlink()
    (tmp_path / "one" / FILES[1]).unlink()
    assert "no complete checkpoint (one: 1 experts' files are missing" in found(tmp_path)[1]


def load_what_was_damaged(folder: str) -> list[str]:
    """The errors of loads: a file lacks, `latest` names what a kill has left or nothing that is there; by message."""
    job, root = Job(ep_size=4, stage=1), pathlib.Path(folder)
    engine = make_engine(job)
    train_steps(engine, job, batches(job)[:1])
    for tag in ("whole", "damaged", f"killed{SAVING}"):
        engine.save_checkpoint(folder, tag=tag)
    errors = []
    for remove, latest, options in DAMAGE:
        if dist.get_rank() == 0:
            for path in (root / "damaged").glob(remove):
                path.unlink()
            (root / "latest").write_text(latest)
            if not latest:
                (root / "latest").unlink()
        dist.barrier()
        place = root / (NOWHERE if options.get("apart") == dist.get_rank() else options.get("below", "."))
        given = {name: value for name, value in options.items() if name in ("tag", "load_module_only")}
        try:
            path, _ = engine.load_checkpoint(str(place), **given)
            errors.append("" if path else "nothing was loaded")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        dist.barrier()
    return errors


NOWHERE = "nowhere"
DAMAGE: list[tuple[str, str, dict[str, Any]]] = [
    ("none", "damaged", {}),
    ("zero_pp_rank_3_*", "damaged", {}),
    ("none", "damaged", {"load_module_only": True}),
    ("layer_1_expert_5_*", "damaged", {"load_module_only": True}),
    ("none", f"killed{SAVING}", {}),
    ("none", "gone", {}),
    ("none", "gone", {"tag": "whole"}),
    ("none", "whole", {"tag": "gone"}),
    ("none", "", {}),
    ("none", "", {"below": NOWHERE}),
    ("none", "whole", {"apart": 2}),
]


def test_a_checkpoint_that_lacks_files_is_refused_on_every_rank_and_a_complete_one_is_named(
    pool: RankPool,
    tmp_path: pathlib.Path,
) -> None:
    for errors in pool.run(4, load_what_was_damaged, str(tmp_path), timeout_s=60):
        good, no_states, weights, no_expert, killed, gone, named, no_tag, no_latest, nowhere, apart = errors
        assert (good, weights, named) == ("", "", "")
        assert no_states.startswith(f"EngineError: {tmp_path}/damaged: cannot be loaded, it has no optimizer states of")
        assert "1 experts' files are missing, layer_1_expert_5_*" in no_expert
        assert "it was not saved to the end" in killed
        assert "the folder does not exist" in gone and "the folder does not exist" in no_tag
        assert no_latest.startswith(f"EngineError: {tmp_path}: has no file `latest`, and holds checkpoints")
        assert all("tag='whole'" in error for error in (no_states, no_expert, killed, gone, no_tag, no_latest))
        assert nowhere == "nothing was loaded", "a first start, as DeepSpeed tells it"
        assert "rank 2 would load nothing, rank 0 whole; give all ranks one tag" in apart
