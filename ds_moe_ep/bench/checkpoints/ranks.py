"""The life of a rank of the benchmark of checkpoints; rank 0 tells the parent what was found, as it is found.

Beside each action stands a plain side with the same bytes: those that it reads are read, as many as it writes are
written, by all ranks, each its share. Which comes first changes from round to round. Before each of both nothing waits
for the disk and no file lies in the page cache; behind each write every file is flushed, within the time.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_moe_ep.bench.harness.collective import slowest
from ds_moe_ep.bench.harness.processes import Finding, Tell, live_as_rank, loopback_environment
from ds_moe_ep.bench.meters.memory import HostMeter
from ds_moe_ep.engine.checkpoint.folders import flush

IMPORT, EXPORT, SAVE = "from_pretrained", "save_pretrained", "save_checkpoint"
LOAD, RELOAD = "load_checkpoint", "load_checkpoint, other ep_size"
ACTIONS = (IMPORT, EXPORT, SAVE, LOAD, RELOAD)
HIDDEN_SIZE, NUM_EXPERTS, BLOCK_BYTES = 512, 8, 1 << 24
BYTES_PER_LAYER = 64_000_000  # about, of the experts in fp32


@dataclass(frozen=True)
class CheckpointPlan:
    """A part of one round of the benchmark: its first actions, or the last one, by other ranks."""

    folder: str
    num_ranks: int
    model_mb: int
    number: int
    port: int
    reloads: bool = False

    @property
    def num_actions(self) -> int:
        return 1 if self.reloads else len(ACTIONS) - 1


def run_rank(rank: int, plan: CheckpointPlan, findings: Queue[Finding]) -> None:
    """The whole life of one rank."""
    os.environ.update(loopback_environment(rank, plan.num_ranks, plan.port))
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    live_as_rank(rank, findings, partial(_run, rank, plan))


def _run(rank: int, plan: CheckpointPlan, tell: Tell) -> None:
    import ds_moe_ep

    transformers: Any = importlib.import_module("transformers")

    ds_moe_ep.init_distributed(dist_backend="gloo", verbose=False)
    transformers.logging.disable_progress_bar()
    assert transformers.MixtralForCausalLM is not None  # its imports are no part of the first round
    folder = Path(plan.folder)
    if rank == 0 and not (folder / "source").exists():
        make_source(folder / "source", plan.model_mb * 10**6)
    dist.barrier()
    bench = _RankBench(rank, plan.num_ranks, plan.number, folder, tell)
    (bench.reload if plan.reloads else bench.round)()
    dist.destroy_process_group()


def make_source(folder: Path, num_bytes: int) -> None:
    """A Mixtral of about that many bytes in fp32, with random weights, as a Hugging Face folder."""
    transformers: Any = importlib.import_module("transformers")
    num_layers = max(1, num_bytes // BYTES_PER_LAYER)
    width = max(8, num_bytes // (num_layers * NUM_EXPERTS * 3 * HIDDEN_SIZE * 4))
    sizes: dict[str, Any] = {"hidden_size": HIDDEN_SIZE, "intermediate_size": width, "num_hidden_layers": num_layers}
    sizes |= {"num_local_experts": NUM_EXPERTS, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 256}
    transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes)).save_pretrained(folder)


@dataclass(frozen=True)
class _RankBench:
    rank: int
    num_ranks: int
    number: int
    folder: Path
    tell: Tell

    def round(self) -> None:
        """Every action but the last, once; leaves the checkpoint."""
        place, source = self.folder / str(self.number), self.folder / "source"
        model = self._read_beside(IMPORT, lambda: self._model(self.num_ranks), source)
        engine = self._stepped(self._engine(model))
        self._written_beside(EXPORT, lambda: self._export(engine, place / "exported"), place / "exported")
        self._removed(place / "exported")
        saved = place / "saved"
        self._written_beside(SAVE, lambda: engine.save_checkpoint(str(saved), tag="one"), saved)
        self._read_beside(LOAD, lambda: engine.load_checkpoint(str(saved)), saved)

    def reload(self) -> None:
        """The last action, by an engine that has not stepped: DeepSpeed's engines do not give all memory back."""
        place = self.folder / str(self.number)
        saved, other = place / "saved", self._engine(self._model(self.num_ranks // 2))
        self._read_beside(RELOAD, lambda: other.load_checkpoint(str(saved)), saved)
        self._removed(place)

    def _read_beside(self, action: str, act: Callable[[], Any], folder: Path) -> Any:
        """The result of an action that reads a folder, and a plain read of its bytes before or behind it."""

        def read() -> None:
            for path in sorted(folder.rglob("*")):
                if path.is_file():
                    self._read_share(path)

        return self._both(action, act, partial(self._told_plain, action, read), folder)

    def _written_beside(self, action: str, act: Callable[[], Any], folder: Path) -> None:
        """An action that writes a folder, and a plain write of as many bytes before or behind it."""
        known, plain = self.folder / f"{action}.bytes", self.folder / "plain"

        def write() -> None:
            self._write_share(plain / str(self.rank), int(known.read_text()) // self.num_ranks)
            self._flush(plain)

        def work() -> None:
            act()
            self._flush(folder)

        def told() -> None:
            plain.mkdir(exist_ok=True)
            if self.rank == 0 and folder.exists():  # else an earlier round has told it
                known.write_text(str(bytes_below(folder)))
            self._told_plain(action, write)
            self._removed(plain)

        self._both(action, work, told, folder)

    def _both(self, action: str, act: Callable[[], Any], plain: Callable[[], None], folder: Path) -> Any:
        """The action and its plain side; which comes first changes from round to round."""
        if self.number % 2 == 1:
            plain()
        meter = HostMeter()
        gc.collect()
        self._settle()
        meter.reset()
        before = meter.used()
        result, time_ms = self._timed(act)
        (peak,) = slowest([float(max(meter.peak() - before, 0))])
        size = float(bytes_below(folder))
        of = f"checkpoints.{action}"
        self.tell(Finding(samples={f"{of}.time": (time_ms,), f"{of}.peak": (peak,), f"{of}.bytes": (size,)}))
        if self.number % 2 == 0:
            plain()
        self.tell(Finding("phase", action, advance=1))
        return result

    def _told_plain(self, action: str, work: Callable[[], None]) -> None:
        self._settle()
        _, time_ms = self._timed(work)
        self.tell(Finding(samples={f"checkpoints.{action}.plain": (time_ms,)}))

    def _timed(self, work: Callable[[], Any]) -> tuple[Any, float]:
        """The result of work that all ranks begin together, and the milliseconds of the slowest."""
        dist.barrier()
        start = time.perf_counter()
        result = work()
        (time_ms,) = slowest([1e3 * (time.perf_counter() - start)])
        return result, time_ms

    def _settle(self) -> None:
        """Lets nothing wait for the disk, and no file of the benchmark lie in the page cache. Collective."""
        dist.barrier()
        if self.rank == 0:
            os.sync()
            for path in self.folder.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        dist.barrier()

    def _flush(self, folder: Path) -> None:
        """Has every file of a folder on disk. Collective."""
        dist.barrier()
        if self.rank == 0:
            for path in (*folder.rglob("*"), folder):
                flush(path)
        dist.barrier()

    def _read_share(self, path: Path) -> None:
        """Reads a rank's share of a file, block by block."""
        share = -(-path.stat().st_size // self.num_ranks)
        block = memoryview(bytearray(BLOCK_BYTES))
        with path.open("rb", buffering=0) as file:
            file.seek(self.rank * share)
            for start in range(0, share, BLOCK_BYTES):
                if not file.readinto(block[: share - start]):
                    return

    def _write_share(self, path: Path, num_bytes: int) -> None:
        """Writes so many bytes, block by block."""
        block = memoryview(random.Random(self.rank).randbytes(BLOCK_BYTES))
        with path.open("wb", buffering=0) as file:
            for start in range(0, num_bytes, BLOCK_BYTES):
                file.write(block[: num_bytes - start])

    def _removed(self, folder: Path) -> None:
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(folder)
        dist.barrier()

    def _model(self, ep_size: int) -> Any:
        import ds_moe_ep

        return ds_moe_ep.from_pretrained(self.folder / "source", ep_size, dtype=torch.float32)

    def _engine(self, model: Any) -> Any:
        import ds_moe_ep

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "torch_adam": True}},
            "steps_per_print": 10**9,
        }
        return ds_moe_ep.initialize(model=model, config=config)[0]

    def _stepped(self, engine: Any) -> Any:
        ids = torch.arange(8).view(1, 8)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        return engine

    def _export(self, engine: Any, folder: Path) -> None:
        import ds_moe_ep

        ds_moe_ep.save_pretrained(engine, folder)


def bytes_below(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
