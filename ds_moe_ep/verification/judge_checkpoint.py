"""Verdicts on a checkpoint: what is saved is whole, and what is loaded is what was saved.

1. Outputs in evaluation and digests of weights and optimizer states are taken, then the engine saves.
2. The files of experts are read one by one, as any ep_size would read them: each expert of each layer is there, and
   equal to that of the rank that has it.
3. Weights are spoilt, and the engine loads: outputs, weights and states must be what they were, bit for bit. Where a
   file is not there nothing is loaded: DeepSpeed's own load fails on the ranks that look for it, and the others wait.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine import seams, step_seams
from ds_moe_ep.engine.checkpoint.finish import wait_for_saves
from ds_moe_ep.engine.checkpoint.load import EXPERT_FILE
from ds_moe_ep.engine.state.optimizer_view import loss_scale, own_partition
from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.errors import EngineError
from ds_moe_ep.verification.judge_optimizer import digest, named_states, named_tensors
from ds_moe_ep.verification.steps import LastBatch
from ds_moe_ep.verification.verdicts import TrainingVerdict, problem

TAG, OUTPUT = "verify", "output "
_LOCAL = re.compile(r"(\.deepspeed_experts\.)\d+\.")


class CheckpointJudge:
    """The judge of one save and one load of an engine, with a batch for its outputs. Collective."""

    def __init__(self, engine: Any, layers: Sequence[ViewedLayer], batch: LastBatch) -> None:
        self._engine, self._layers, self._batch = engine, layers, batch

    def problems(self, folder: str | None) -> Iterator[TrainingVerdict]:
        """Problems of saving and loading; the checkpoint is removed again."""
        root = _agreed_folder(folder)
        try:
            before = self._digests()
            _together("save", lambda: self._save(root))
            is_whole = True
            if not self._engine.zero_optimization_partition_weights():  # else files hold ranks' partitions
                is_whole = yield from self._files(root / TAG)
            if all(seams.gather(is_whole)):
                self._spoil()
                _together("load what was saved", lambda: self._engine.load_checkpoint(str(root), tag=TAG))
                yield from self._differences(before, self._digests())
        finally:
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(root, ignore_errors=True)

    def _digests(self) -> dict[str, str]:
        """Digests of outputs, weights, optimizer states and counters."""
        engine = self._engine
        found = {f"{OUTPUT}{index}": digest(each) for index, each in enumerate(self._batch.outputs())}
        tensors = named_tensors(engine, self._layers) | named_states(engine, self._layers)
        tensors |= {name: each for name, each in engine.module.named_buffers() if _is_saved(engine.module, name)}
        found |= {name: digest(each) for name, each in tensors.items()}
        found |= {f"optimizer group {name}": value for name, value in _flat_states(engine).items()}
        found["the loss scale"] = str(loss_scale(engine))
        found["the step counter"] = str(engine.global_steps)
        return found

    def _save(self, root: Path) -> None:
        self._engine.save_checkpoint(str(root), tag=TAG)
        wait_for_saves(self._engine)

    @torch.no_grad()
    def _spoil(self) -> None:
        """Changes weights, masters and saved buffers: what is not loaded shows."""
        inner = step_seams.torch_optimizer(self._engine)
        masters = [each for group in step_seams.stepped_tensors(self._engine) for each in group]
        weights = list(self._engine.module.parameters())
        partitions = [each for weight in weights if (each := own_partition(weight)) is not None]
        for tensor in {id(each): each for each in (*weights, *partitions, *masters)}.values():
            tensor.data.mul_(-0.5)
        for name, buffer in self._engine.module.named_buffers():
            if _is_saved(self._engine.module, name) and buffer.dtype is not torch.bool:
                buffer.add_(1)
        for state in [] if inner is None else inner.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.mul_(0)

    def _differences(self, before: dict[str, str], after: dict[str, str]) -> Iterator[TrainingVerdict]:
        for name, value in before.items():
            if after.get(name) != value:
                told = "is another one" if name in after else "is not there"
                yield problem(
                    "checkpoint",
                    f"{told} after save and load",
                    "load with ds_moe_ep's engine (ds_moe_ep.initialize or attach_overlap), and do not resume from "
                    "checkpoints of this engine before that",
                    name,
                )

    def _files(self, folder: Path) -> Generator[TrainingVerdict, None, bool]:
        """Problems of the files of experts, told by rank 0; experts that are cut lie in those of their stages.

        Returns False, on rank 0, where a tensor is in no file at all.
        """
        in_files_of_stages = tuple(f"{each.name} " for each in self._layers if each.shares_width_with is not None)
        everyone = seams.gather(
            {
                name: digest(each)
                for name, each in named_tensors(self._engine, self._layers).items()
                if " expert " in name and not name.startswith(in_files_of_stages)
            }
        )
        named = dict(seams.gather((seams.pipeline_stage(), [layer.name for layer in self._layers])))
        if dist.get_rank():
            return True
        live = {name: value for theirs in everyone for name, value in theirs.items()}
        seen, there = set[str](), set[str]()
        for path in sorted(folder.glob("layer_*_expert_*_model_states.pt")):
            if match := EXPERT_FILE.fullmatch(path.name):
                layer = named[int(match[3]) // seams.tensor_parallel_size()][int(match[1])]  # by stage
                for key, tensor in torch.load(path, map_location="cpu", weights_only=True).items():
                    name = f"{layer} expert {match[2]} {_name_in_expert(key)}"
                    there.add(name)
                    if isinstance(tensor, Tensor) and live.get(name) == digest(tensor):
                        seen.add(name)
        for name in live.keys() - seen:
            yield problem(
                "checkpoint",
                "is not in the checkpoint's files as this run has it: no run, of whatever ep_size, would get it back",
                "save with engine.save_checkpoint on every rank, into a folder that all ranks share",
                name,
            )
        return live.keys() <= there


def _together(what: str, action: Callable[[], Any]) -> None:
    """Does it, and raises on every rank where one cannot: else the others would go on and wait for that one."""
    error: Exception | None = None
    try:
        action()
    except Exception as caught:
        error = caught
    told = seams.gather(error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, theirs in enumerate(told):
        if theirs:
            raise EngineError(f"rank {rank} could not {what} ({theirs})")


def _name_in_expert(key: str) -> str:
    """An expert's own name of a tensor in a file; AutoEP's keys end in the expert's index."""
    parts = _LOCAL.split(key)
    return parts[-1] if len(parts) > 1 else key.rstrip("0123456789").rstrip(".").rpartition(".")[2]


def _is_saved(module: torch.nn.Module, name: str) -> bool:
    owner, _, own = name.rpartition(".")
    return own not in module.get_submodule(owner)._non_persistent_buffers_set


def _flat_states(engine: Any) -> dict[str, str]:
    """Digests of the tensors that the torch optimizer steps, and of what it remembers of them."""
    inner, found = step_seams.torch_optimizer(engine), dict[str, str]()
    for index, group in enumerate(step_seams.stepped_tensors(engine)):
        for place, parameter in enumerate(group):
            found[f"{index}, tensor {place}"] = digest(parameter)
            for key, value in inner.state.get(parameter, {}).items() if inner is not None else ():
                if isinstance(value, Tensor):
                    found[f"{index}, tensor {place} ({key})"] = digest(value)
    return found


def _agreed_folder(folder: str | None) -> Path:
    """A fresh folder that rank 0 makes, below `folder` or the system's for temporary files."""
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        made = [tempfile.mkdtemp(prefix="ds_moe_ep_verify_", dir=folder)]
    dist.broadcast_object_list(made, src=0)
    return Path(made[0])
