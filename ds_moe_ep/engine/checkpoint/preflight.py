"""A checkpoint is looked through before anything of it is loaded: what would be refused later is refused here.

DeepSpeed loads weights first, then states, then the scheduler: an error in between leaves a model of two runs. So all
files are opened beforehand, as tensors and plain values alone: a file that would run code, which DeepSpeed itself
unpickles, ends the load here. The checksums that torch keeps in a file are compared with its bytes, those of files that
are loaded. The ranks share the files; what is found is told to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.convert.read import check_undamaged, is_zip, load_file
from ds_moe_ep.engine.checkpoint.load import (
    MAIN_FILE,
    folder_to_load,
    reshards,
    saved_ep_size,
    saved_ranks,
    states_found,
)
from ds_moe_ep.engine.checkpoint.loading.experts import check_experts
from ds_moe_ep.engine.checkpoint.loading.scheduler import check_scheduler
from ds_moe_ep.engine.checkpoint.own_experts import take_own_experts
from ds_moe_ep.engine.checkpoint.reshard import can_reshard, cuts_of, is_cut_plainly, states_in
from ds_moe_ep.engine.checkpoint.reshard_plain import can_reshard_plain
from ds_moe_ep.engine.checkpoint.state_pieces import MASTER, is_vector
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall
from ds_moe_ep.errors import EngineError, MoEError
from ds_moe_ep.moe.balance import BiasBalance

STEPS, START = "balance.steps_E", "balance.start_bits_E"  # of a balancing bias
COUNTERS = ("global_steps", "skipped_steps", "mp_world_size", "dp_world_size")
_CONVERT = "`python -m ds_moe_ep convert {} NEW_FOLDER --tag {} --config DS_CONFIG` carries the weights over"
_WEIGHTS = "load the weights alone (load_checkpoint(..., load_module_only=True))"


class Preflight(EngineCallback):
    """Refuses, on every rank, a checkpoint that could be loaded in part alone. Collective over the world.

    `ep_sizes` are those of the layers. With `checks_crc` each file is read once more, by one of the ranks, for the
    checksums of its parts. It raises EngineError before anything is loaded. Of a universal checkpoint, whose files have
    other contents, it looks for code alone; those of another checkpoint engine than torch's have files of other forms
    and are left to DeepSpeed.
    """

    def __init__(self, engine: Any, ep_sizes: Iterable[int], checks_crc: bool = True) -> None:
        self._engine, self._ep_sizes, self._checks_crc = engine, set(ep_sizes), checks_crc

    def before_load(self, load: LoadCall) -> None:
        engine = self._engine
        is_universal = engine.load_universal_checkpoint()
        folder = folder_to_load(Path(load.load_dir), load.tag, "latest_universal" if is_universal else "latest")
        if folder is None or type(engine.checkpoint_engine).__name__ != "TorchCheckpointEngine":
            return
        checks = (self._check_files, self._check_contents)  # what is damaged is not told as another model's
        for check in (self._check_universal,) if is_universal else checks:
            seams.settle(problem_of(check, folder, load))

    def _check_universal(self, folder: Path, load: LoadCall) -> None:
        """This rank's share of a universal checkpoint, which has a file per parameter and kind of state."""
        for path in self._share(sorted(folder.rglob("*.pt"))):
            load_file(path)

    def _check_files(self, folder: Path, load: LoadCall) -> None:
        """This rank's share of the files."""
        has_states = load.wants_states
        for path in self._share(paths_in(folder)):
            is_loaded = has_states or not path.name.endswith("optim_states.pt")
            if self._checks_crc and is_loaded and is_zip(path):
                check_undamaged(path)
            load_file(path)

    def _check_contents(self, folder: Path, load: LoadCall) -> None:
        """The contents that this rank loads, against what the engine has."""
        names = [path.name for path in paths_in(folder)]
        options = load.options
        if (folder / MAIN_FILE).is_file():
            main = load_file(folder / MAIN_FILE)
            check_layout(folder, main, names, hasattr(self._engine, "train_batch"))
            check_main(self._engine, folder / MAIN_FILE, main, options)
        is_one_part = seams.num_pipeline_stages() == seams.tensor_parallel_size() == 1
        if is_one_part and options.get("custom_load_fn") is None:
            check_experts(self._engine, folder, bool(options.get("load_module_strict", True)))
        if load.wants_states and self._engine.optimizer is not None:
            self._check_states(folder, load)

    def _share(self, paths: Sequence[Path]) -> Sequence[Path]:
        """The files that this rank looks at, the largest ones first, in turns; all where each node has others."""
        if self._engine.use_node_local_storage():
            return paths
        by_size = sorted(paths, key=lambda path: (-path.stat().st_size, path.name))
        return by_size[dist.get_rank() :: dist.get_world_size()]

    def _check_states(self, folder: Path, load: LoadCall) -> None:
        """The states under their own ep_size and number of ranks, which DeepSpeed loads."""
        engine = self._engine
        saved = saved_ep_size(load.load_dir, load.tag)
        if len(self._ep_sizes) != 1 or saved not in (None, *self._ep_sizes):
            return  # cut anew, and checked there
        is_plain = seams.num_pipeline_stages() == seams.tensor_parallel_size() == 1
        if can_reshard_plain(engine.optimizer) and is_plain and seams.release() not in seams.TESTED[:-1]:
            states_found(engine, saved or 1, folder, saved or 1)
        elif engine.zero_optimization() and not engine.zero_nvme_offload_optimizer():
            self._check_zero_states(folder, load)

    def _check_zero_states(self, folder: Path, load: LoadCall) -> None:
        engine = self._engine
        if not any("zero_pp_rank_" in path.name for path in folder.glob("*optim_states.pt")):
            raise EngineError(f"{folder}: holds no optimizer states of ZeRO's; {_WEIGHTS}")
        there = saved_ranks(folder)
        here = dist.get_world_size(seams.data_parallel_group())
        if there not in (0, here):
            if not reshards(engine):
                raise EngineError(
                    f"{folder}: saved by {there} data-parallel ranks, this run has {here}, and its optimizer's states "
                    f"are not cut anew; {_WEIGHTS}"
                )
            return
        path = Path(engine._get_zero_ckpt_name(load.load_dir, folder.name))
        if can_reshard(engine.optimizer) and path.is_file():
            check_own_cut(engine.optimizer, path)


def problem_of(check: Callable[[Path, LoadCall], None], folder: Path, load: LoadCall) -> MoEError | None:
    """Error that a check raises, or None. Local."""
    try:
        check(folder, load)
    except MoEError as error:
        return error
    except (OSError, RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        return EngineError(f"{folder}: cannot be read ({type(error).__name__}: {error}); take another copy")
    return None


def paths_in(folder: Path) -> list[Path]:
    """The files of a checkpoint with weights and states."""
    return sorted(path for path in folder.iterdir() if path.name.endswith("_states.pt"))


def check_own_cut(optimizer: Any, path: Path) -> None:
    """Raises EngineError where a rank's file of states does not hold what this rank keeps."""
    states = states_in(path)
    masters, base = states["single_partition_of_fp32_groups"], states["base_optimizer_state"]
    if not is_cut_plainly(states):
        return  # elastic or aligned: DeepSpeed lays these out itself
    cuts = cuts_of(optimizer)[0]
    if len(masters) != len(cuts):
        raise EngineError(f"{path}: has {len(masters)} parameter groups, this run {len(cuts)}; give the saved model")
    for group, (own, spans) in enumerate(zip(cuts, states["param_slice_mappings"], strict=True)):
        found, expected = (
            {name: (int(span.start), int(span.numel)) for name, span in each.items()}
            for each in (spans, optimizer._param_slice_mappings[group])
        )
        needed = max((start + size for start, size in found.values()), default=0)
        beside = base["state"].get(group, {})
        for kind, value in {**beside, MASTER: masters[group]}.items():
            if is_vector(value) and (found != expected or not needed <= value.numel() <= own.numel()):
                raise EngineError(
                    f"{path}: its {kind.removeprefix('the ')} of parameter group {group} has {value.numel():,} values, "
                    f"and this run keeps {own.numel():,}, or of other parameters; take another copy, or {_WEIGHTS}"
                )


def check_layout(folder: Path, main: Mapping[str, Any], names: Iterable[str], is_pipeline: bool) -> None:
    """Raises EngineError where the weights lie in files of pipeline modules, which a plain engine does not read."""
    has_stages = any("-model_" in name for name in names)
    if has_stages and not is_pipeline and main.get("module") is None:
        raise EngineError(f"{folder}: was saved by pipeline stages, and this engine has none; {_convert(folder)}")


def _convert(folder: Path) -> str:
    return _CONVERT.format(folder.parent, folder.name)


def check_main(engine: Any, path: Path, main: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raises EngineError where the weights, counters or scheduler of a run are not what this engine loads."""
    is_whole_run = not options.get("load_module_only", False)
    lacking = [name for name in (COUNTERS if is_whole_run else COUNTERS[-1:]) if name not in main]
    if lacking:
        raise EngineError(f"{path}: lacks {', '.join(lacking)}; take another copy of it, or an earlier tag")
    takes_scheduler = is_whole_run and options.get("load_lr_scheduler_states", True)
    if takes_scheduler and engine.lr_scheduler is not None:
        check_scheduler(path, engine.lr_scheduler, main.get("lr_scheduler"))
    is_pipeline = hasattr(engine, "train_batch")  # a stage has some of the layers
    saved, here = main.get("num_experts"), list(getattr(engine, "num_experts", []))
    if isinstance(saved, list) and saved != here and not is_pipeline:
        raise EngineError(
            f"{path}: its layers have {saved} experts, this model's {here}; give the model that was saved"
        )
    if not is_pipeline and seams.tensor_parallel_size() == 1 and options.get("custom_load_fn") is None:
        check_weights(engine.module, path, main.get("module"), bool(options.get("load_module_strict", True)))


def check_weights(model: nn.Module, path: Path, saved: Any, is_strict: bool) -> None:
    """Raises EngineError where torch would not load the dense weights of the file.

    Modules that change what they load (a `_load_from_state_dict` or a hook of their own) are left to themselves.
    """
    if not isinstance(saved, Mapping):
        raise EngineError(f"{path}: holds no weights; take another copy of it, or an earlier tag")
    changing = tuple(f"{name}." if name else "" for name, module in model.named_modules() if _changes_states(module))
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    compared = {name: value for name, value in own.items() if not name.startswith(changing)}
    for name, value in compared.items():
        there = saved.get(name)
        if isinstance(there, Tensor) and value.numel() and there.shape != value.shape:
            raise EngineError(
                f"{path}: {name} is {tuple(there.shape)} there and {tuple(value.shape)} here; give the saved model"
            )
    missing = [name for name in compared if "expert" not in name and name not in saved]
    taken = {f"{name.removesuffix(STEPS)}{START}" for name in own if name.endswith(STEPS)}  # a bias takes its start too
    more = [name for name in saved if "expert" not in name and name not in {*own, *taken}]
    more = [name for name in more if not name.startswith(changing)]
    for wrong, what in ((missing, "lacks"), (more, "has left over")):
        if wrong and is_strict and not any("random_ltd" in name for name in saved):
            raise EngineError(
                f"{path}: {what} {len(wrong)} weights, {wrong[0]} first; give the model that was saved, or "
                "load_checkpoint(..., load_module_strict=False)"
            )


def _changes_states(module: nn.Module) -> bool:
    is_own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    is_own = is_own and not isinstance(module, BiasBalance)
    # The package's own hook takes experts of a whole model's state, and leaves others as they are.
    hooks = [getattr(hook, "hook", hook) for hook in module._load_state_dict_pre_hooks.values()]
    return is_own or any(hook is not take_own_experts for hook in hooks)
