"""Checkpoints that survive: a save that fails or is killed leaves the last good checkpoint as it was.

1. All ranks make sure that they save the same tag and that the disk has room for what the last save wrote.
2. DeepSpeed saves into the folder `<tag>.saving`. A rank that fails still meets the others at DeepSpeed's last barrier,
   where they would wait for it.
3. All ranks tell how it went. Only where all succeeded does the folder take the place of `<tag>`, in one exchange, and
   then `latest` moves, by a rename.

So a folder that bears a tag is complete and one that ends in `.saving` is not; files and their names are DeepSpeed's.
With `"async_save"` the ranks leave after the copy to host memory, and the rest happens behind them (`background`). The
next save, and a load, begin where it has ended, and raise its error.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed import comm

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.background import BackgroundSave, StagedFile, leave_mark, refuse_background, stage
from ds_moe_ep.engine.checkpoint.convert.read import SAVING
from ds_moe_ep.engine.checkpoint.folders import flush, publish, remove, write_latest
from ds_moe_ep.engine.checkpoint.recovery_script import replace_script
from ds_moe_ep.engine.explain_errors import cause, first_line, is_collective
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall, SaveCall
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.health.watch import Watch


@dataclass(frozen=True)
class CheckpointPlace:
    """Where a checkpoint will lie."""

    save_dir: Path
    tag: str

    @property
    def folder(self) -> Path:
        return self.save_dir / self.tag

    @property
    def partial(self) -> Path:
        return self.save_dir / (self.tag + SAVING)


@dataclass(frozen=True)
class Report:
    """Report of one rank to the others: `problem` is empty where all went well."""

    place: CheckpointPlace
    host: str
    problem: str
    needed_bytes: int = 0
    free_bytes: int = 0


class Written:
    """Files that this rank writes: the one at hand, and the bytes of a save. Each is on disk before the next begins.

    While `stages` is true they are made in host memory instead, and lie in `staged`. A file that DeepSpeed lets several
    ranks write at once (experts that AutoEP folds over tensor ranks, the model beside Megatron's sequence ranks) is
    written by the first that comes: their bytes differ, and would mix.
    """

    def __init__(self, checkpoint_engine: Any) -> None:
        self.path = ""
        self.num_bytes = 0
        self._claimed: set[str] | None = None  # of the save that goes on
        self.stages = False
        self.staged: list[StagedFile] = []
        self._engine, self._before = checkpoint_engine, vars(checkpoint_engine).get("save")
        write = checkpoint_engine.save

        @functools.wraps(write)
        def save(state_dict: Any, path: str) -> Any:
            self.path = str(path)
            if not self._claims(self.path):
                self.path = ""
                return None
            if self.stages:
                self.staged.append(stage(checkpoint_engine, state_dict, self.path))
                self.path = ""
                return None
            result = write(state_dict, path)
            if os.path.isfile(path):  # some engines write elsewhere, or not on this rank
                self.num_bytes += flush(self.path)
            self.path = ""
            return result

        checkpoint_engine.save = save

    def _claims(self, path: str) -> bool:
        """True where no other rank of a save has begun to write this file."""
        if self._claimed is None or path in self._claimed:
            return True
        with suppress(FileNotFoundError):  # an engine makes folders of its own
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o666))
            except FileExistsError:
                return False
        self._claimed.add(path)
        return True

    def end(self) -> None:
        """Takes the wrapper off the checkpoint engine."""
        vars(self._engine).pop("save", None)
        if self._before is not None:
            self._engine.save = self._before

    def restart(self) -> None:
        """Begins a save."""
        self.path, self.num_bytes, self.staged = "", 0, []

    @contextmanager
    def in_new_folder(self, stages: bool) -> Iterator[None]:
        """A scope in which all ranks save into a folder that was empty."""
        self.stages, self._claimed = stages, set()
        try:
            yield
        finally:
            self.stages, self._claimed = False, None


class SafeSaver(EngineCallback):
    """Saves an engine's checkpoints by the steps above: no failure of a rank damages one that was complete.

    The arguments are DeepSpeed's. It raises EngineError on every rank, naming path, rank and reason; the watch says
    what is known of ranks that do not answer. With `in_background` a save returns once its files are in host memory;
    `finish` waits for it.
    """

    def __init__(self, engine: Any, watch: Watch, in_background: bool = False) -> None:
        if in_background:
            refuse_background(engine)
        self._in_background = in_background
        self._going_on: BackgroundSave | None = None
        self._engine = engine
        self._watch = watch
        self._written = Written(engine.checkpoint_engine)
        self._last_bytes = 0
        self._place = CheckpointPlace(Path(), "")

    def close(self) -> None:
        if self._going_on is not None:
            self._going_on.wait()
        self._written.end()  # the checkpoint engine has its own method again

    def finish(self) -> None:
        """Waits for the save in the background, if there is one. Collective over the world.

        Raises EngineError on every rank where a rank's part failed: the folder of that save does not exist then.
        """
        going_on, self._going_on = self._going_on, None
        if going_on is not None:  # alike on all ranks
            problem = going_on.wait()
            self._last_bytes = going_on.num_bytes
            self._agree(_report(self._place, problem))

    def around_save(self, save: SaveCall, proceed: Callable[[SaveCall], Any]) -> bool:
        """Saves, or raises EngineError on every rank. Collective over the world."""
        if not save.save_dir:
            raise ConfigError(f"save_dir={save.save_dir!r}: a checkpoint needs a folder; name one")
        tag = f"global_step{self._engine.global_steps}" if save.tag is None else str(save.tag)
        with self._watch.among_others("a checkpoint"):
            self.finish()
            self._save(CheckpointPlace(Path(save.save_dir), tag), save, proceed)
        return True

    def _save(self, place: CheckpointPlace, save: SaveCall, proceed: Callable[[SaveCall], Any]) -> None:
        self._place = place
        self._written.restart()
        self._agree(self._prepare(place))
        partly = replace(save, save_dir=str(place.save_dir), tag=place.tag + SAVING, save_latest=False)
        with self._written.in_new_folder(stages=self._in_background):
            problem = self._attempt(lambda: proceed(partly))
        if problem:  # the others go on to DeepSpeed's last collectives
            if self._engine._optimizer_has_ckpt_event_epilogue():
                self._attempt(self._engine.optimizer.checkpoint_event_epilogue)
            self._attempt(comm.barrier)
        elif self._in_background:
            problem = self._attempt(lambda: leave_mark(place.partial, dist.get_rank()))
        try:
            self._agree(_report(place, problem))
        except EngineError:
            if self._leads:
                remove(place.partial)
            raise
        if self._in_background:
            self._going_on = self._go_on(place, save.save_latest)
            return
        self._last_bytes = self._written.num_bytes
        problem = self._attempt(lambda: self._publish(place, save.save_latest)) if self._leads else ""
        self._agree(_report(place, problem))

    def _go_on(self, place: CheckpointPlace, save_latest: bool) -> BackgroundSave:
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        publishes = (lambda: self._publish(place, save_latest)) if self._leads else None
        files = self._written.staged
        self._written.restart()
        return BackgroundSave(place.partial, files, rank, num_ranks, publishes, self._watch.knows_failure)

    @property
    def _leads(self) -> bool:
        """True for the rank that arranges the folders of its storage: one in all, or one per node that has its own."""
        engine = self._engine
        rank: int = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
        return rank == 0

    def _prepare(self, place: CheckpointPlace) -> Report:
        """A folder that exists, without what a killed save has left, and what this rank needs and finds free there."""

        free_bytes = 0

        def make_room() -> None:
            nonlocal free_bytes
            place.save_dir.mkdir(parents=True, exist_ok=True)
            if self._leads:
                remove(place.partial)
            free_bytes = shutil.disk_usage(place.save_dir).free

        return _report(place, self._attempt(make_room), self._last_bytes, free_bytes)

    def _publish(self, place: CheckpointPlace, save_latest: bool) -> None:
        publish(place.partial, place.folder)
        replace_script(self._engine, place.save_dir)
        if save_latest and self._engine.global_rank == 0:
            write_latest(place.save_dir, place.tag)

    def _attempt(self, action: Callable[[], Any]) -> str:
        """The problem of this rank in words, or an empty string.

        Raises EngineError where another rank broke a collective off: nobody is left then to agree with.
        """
        try:
            action()
        except Exception as error:
            if is_collective(error):
                raise self._left_alone(error) from error
            reason = f"{type(error).__name__}: {first_line(error)}"
            path = self._written.path
            return f"{path}: {refusal_of(path)}({reason})" if path else reason
        return ""

    def _agree(self, report: Report) -> None:
        """Raises EngineError on every rank where one has a problem. Collective over the world."""
        try:
            reports: list[Report] = seams.gather(report)
        except RuntimeError as error:
            raise self._left_alone(error) from error
        problem = disagreement(reports) or failures(reports) or shortage(reports)
        if problem:
            raise EngineError(f"{report.place.folder}: not saved, {problem}. {_still_good(report.place)}")

    def _left_alone(self, error: Exception) -> EngineError:
        words = f"not saved, a rank ended or stalled meanwhile ({first_line(error)}): {cause(self._watch)}"
        return EngineError(f"{self._place.folder}: {words}. {_still_good(self._place)}")


class FinishedSaves(EngineCallback):
    """Lets a save in the background end before anything is loaded."""

    def __init__(self, saver: SafeSaver) -> None:
        self._saver = saver

    def before_load(self, load: LoadCall) -> None:
        self._saver.finish()


def saves_safely(engine: Any) -> bool:
    """True for an engine whose checkpoints can be saved by the steps above; logs where they cannot.

    A decoupled checkpoint engine writes after the call has returned: its saves stay as they are. ZeRO-3 without an
    optimizer saves nothing.
    """
    if engine.checkpoint_engine is None:
        return False
    if engine.checkpoint_engine.is_decoupled():
        seams.log_rank0("checkpoints: the decoupled engine saves in place; give every save a tag of its own")
        return False
    return True


def disagreement(reports: Sequence[Report]) -> str:
    """Which rank saves another tag or folder than rank 0, or an empty string."""
    for rank, report in enumerate(reports):
        if report.place != reports[0].place:
            return f"rank {rank} saves {report.place.folder}, rank 0 {reports[0].place.folder}: give all the same tag"
    return ""


def failures(reports: Sequence[Report]) -> str:
    """The ranks that failed and why; equal reasons together. An empty string where none did."""
    reasons: dict[str, list[str]] = {}
    for rank, report in enumerate(reports):
        if report.problem:
            reasons.setdefault(report.problem, []).append(str(rank))
    return "; ".join(
        f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} failed: {reason}" for reason, ranks in reasons.items()
    )


def shortage(reports: Sequence[Report]) -> str:
    """The host whose ranks need more bytes than it has free, or an empty string.

    Ranks of other hosts may write to the same disk: what does not fit one host's ranks cannot fit at all.
    """
    for host in {report.host: None for report in reports}:
        here = [report for report in reports if report.host == host]
        needed, free = sum(report.needed_bytes for report in here), max(report.free_bytes for report in here)
        if needed > free:
            return f"{host} has {free:,} bytes free there, and its {len(here)} ranks wrote {needed:,} the last time"
    return ""


def _report(place: CheckpointPlace, problem: str, needed_bytes: int = 0, free_bytes: int = 0) -> Report:
    return Report(place, socket.gethostname(), problem, needed_bytes, free_bytes)


def _still_good(place: CheckpointPlace) -> str:
    """The checkpoint that is left to load, and the way out."""
    latest = place.save_dir / "latest"
    kept = f"'latest' still names {latest.read_text().strip()}" if latest.is_file() else "there is no earlier one"
    return f"What was complete still is ({kept}); remove the cause and save again"


def refusal_of(path: str) -> str:
    """Why the disk under a file takes no more, by a small write beside it; an empty string where it does.

    torch tells that a write failed and not why.
    """
    probe = Path(f"{path}.probe")
    try:
        with probe.open("wb") as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{error.strerror} "
    finally:
        with suppress(OSError):  # of a disk that is ill
            probe.unlink(missing_ok=True)
    return ""
