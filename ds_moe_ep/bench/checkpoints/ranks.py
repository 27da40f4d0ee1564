"""The life of a rank of the benchmark of checkpoints; rank 0 tells the parent what was found, as it is found."""

from __future__ import annotations

import gc
import importlib
import os
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

WRITE, IMPORT, EXPORT, SAVE = "plain write", "from_pretrained", "save_pretrained", "save_checkpoint"
LOAD, RELOAD = "load_checkpoint", "load_checkpoint, other ep_size"
ACTIONS = (WRITE, IMPORT, EXPORT, SAVE, LOAD, RELOAD)
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
    bench = _RankBench(rank, folder, tell)
    (bench.reload if plan.reloads else bench.round)(plan.number, plan.num_ranks)
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
    folder: Path
    tell: Tell

    def round(self, number: int, num_ranks: int) -> None:
        """Every action but the last, once; leaves the checkpoint."""
        place = self.folder / str(number)
        source = bytes_below(self.folder / "source")
        self._timed(WRITE, lambda: self._write(place / "plain", source // num_ranks), lambda: source)
        model = self._timed(IMPORT, lambda: self._model(num_ranks), lambda: source)
        self._out_and_in(self._stepped(self._engine(model)), place)

    def reload(self, number: int, num_ranks: int) -> None:
        """The last action, by an engine that has not stepped: DeepSpeed's engines do not give all memory back."""
        place = self.folder / str(number)
        saved, other = place / "saved", self._engine(self._model(num_ranks // 2))
        self._timed(RELOAD, lambda: other.load_checkpoint(str(saved)), lambda: bytes_below(saved))
        dist.barrier()
        if self.rank == 0:
            shutil.rmtree(place)

    def _out_and_in(self, engine: Any, place: Path) -> None:
        saved = place / "saved"
        self._timed(EXPORT, lambda: self._export(engine, place), lambda: bytes_below(place / "exported"))
        self._timed(SAVE, lambda: engine.save_checkpoint(str(saved), tag="one"), lambda: bytes_below(saved))
        self._timed(LOAD, lambda: engine.load_checkpoint(str(saved)), lambda: bytes_below(saved))

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

    def _write(self, path: Path, num_bytes: int) -> None:
        """Writes a rank's share of the bytes, block by block, and has them on disk."""
        path.mkdir(parents=True, exist_ok=True)
        block = bytes(BLOCK_BYTES)
        with (path / str(self.rank)).open("wb") as file:
            for start in range(0, num_bytes, BLOCK_BYTES):
                file.write(block[: num_bytes - start])
            file.flush()
            os.fsync(file.fileno())

    def _export(self, engine: Any, place: Path) -> None:
        import ds_moe_ep

        ds_moe_ep.save_pretrained(engine, place / "exported")
        if self.rank == 0:
            os.sync()  # the others' files too: they wait for the slowest rank

    def _timed(self, action: str, act: Callable[[], Any], size: Callable[[], int]) -> Any:
        """Gives the result of an action; tells its time, its memory, and the bytes of its files."""
        meter = HostMeter()
        gc.collect()
        meter.reset()
        before = meter.used()
        dist.barrier()
        start = time.perf_counter()
        result = act()
        seconds = time.perf_counter() - start
        time_ms, peak = slowest([1e3 * seconds, float(max(meter.peak() - before, 0))], torch.device("cpu"))
        of = f"checkpoints.{action}"
        samples = {f"{of}.time": (time_ms,), f"{of}.peak": (peak,), f"{of}.bytes": (float(size()),)}
        self.tell(Finding(samples=samples))
        self.tell(Finding("phase", action, advance=1))
        return result


def bytes_below(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
