"""The layer where Megatron-DeepSpeed's pretrain_gpt makes it, with TP 2: the losses of DeepSpeed's own layer.

Its call, its marks on whole experts, its mpu, a MoE loss that is added to in place, steps with arguments for the
scheduler, and checkpoints that are trees.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.layouts.megatron_models import (
    BATCH,
    MOE_LOSS_COEFF,
    SEQUENCE,
    TENSOR_SIZE,
    VOCABULARY,
    CoreConfig,
    GPTModel,
    draw_weights,
    parallel_state,
)
from tests.engine.layouts.tensor_runs import planted
from tests.ranks import RankPool

WORLD, STEPS, BOUND = 4, 2, 2e-5  # of a loss, relative, in fp32


@dataclass(frozen=True, kw_only=True)
class Job:
    """A short training, as pretrain_gpt's arguments say it."""

    kind: str = "swapped"  # the import; or "native", or "hooked"; "attached": swapped, with `attach_overlap`
    stage: int = 1
    topk: int = 2
    moe_expert_parallel_size: int = 4
    moe_token_dropping: bool = False
    mlp_type: str = "standard"
    enable_expert_tensor_parallelism: bool = False
    sums_losses: bool = False  # as between stages: each layer adds to the loss of those before
    config: CoreConfig = field(default_factory=CoreConfig)
    folder: str = ""  # where a checkpoint is saved, and loaded by another engine
    fault: str = ""

    @property
    def args(self) -> argparse.Namespace:
        names = ("topk", "moe_expert_parallel_size", "moe_token_dropping", "mlp_type", "sums_losses")
        return argparse.Namespace(
            **{name: getattr(self, name) for name in names},
            enable_expert_tensor_parallelism=self.enable_expert_tensor_parallelism,
            num_experts=[4], moe_train_capacity_factor=1.0, moe_eval_capacity_factor=1.0, moe_min_capacity=4,
            use_tutel=False, moe_top2_2nd_expert_sampling=False, deepspeed_config=None, deepspeed=True,
        )  # fmt: skip

    @property
    def ds_config(self) -> dict[str, Any]:
        zero = {"stage": self.stage}
        return {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_clipping": 0.0,  # DeepSpeed's norm leaves out the experts of other tensor ranks
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }


class Scheduler:
    """Megatron's: its step takes the number of samples."""

    def __init__(self) -> None:
        self.num_samples = 0

    def step(self, increment: int) -> None:
        self.num_samples += increment

    def state_dict(self) -> dict[str, int]:
        return {"num_samples": self.num_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_samples = state["num_samples"]


def make_engine(job: Job) -> Any:
    """The engine, as training.py's `setup_model_and_optimizer` makes it. Collective."""
    import deepspeed
    from deepspeed.moe.layer import MoE as Native
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    import ds_moe_ep

    grid = parallel_state()
    own = job.kind in ("swapped", "attached")
    model = GPTModel(ds_moe_ep.MoE if own else Native, job.args, job.config, grid)
    draw_weights(model, job.moe_expert_parallel_size)
    for name, parameter in model.named_parameters():
        if name.endswith("self_attention.dense_4h_to_h.bias"):  # nobody sums it here where tokens come cut
            parameter.requires_grad_(False)
        for mark, default in (("tensor_model_parallel", False), ("partition_dim", -1), ("partition_stride", 1)):
            if not hasattr(parameter, mark):
                setattr(parameter, mark, default)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = ([p for p in trained if (p.dim() > 1) == is_matrix] for is_matrix in (True, False))
    groups = split(
        [
            {"name": "wd_no_scale_lr", "params": matrices, "wd_mult": 1.0, "lr_mult": 1.0},
            {"name": "no_wd_no_scale_lr", "params": vectors, "wd_mult": 0.0, "lr_mult": 1.0},
        ]
    )
    optimizer = torch.optim.SGD(groups, lr=0.5)
    words = {"model": model, "optimizer": optimizer, "args": job.args, "lr_scheduler": Scheduler(), "mpu": grid}
    engine, *_ = deepspeed.initialize(**words, config=job.ds_config)
    return engine


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of this rank's copy of the model, alike on its tensor ranks."""
    generator = torch.Generator().manual_seed(5)
    copy = dist.get_rank() // TENSOR_SIZE
    while True:
        drawn = torch.randint(VOCABULARY, (WORLD // TENSOR_SIZE, BATCH, SEQUENCE + 1), generator=generator)[copy]
        yield drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def train_step(engine: Any, batch: tuple[Tensor, Tensor]) -> list[float]:
    """One step; the language model's loss of this copy, and the MoE loss."""
    output, moe_losses = engine(*batch)
    moe_loss = sum(loss for loss in moe_losses if loss is not None) * MOE_LOSS_COEFF
    loss = output.mean()
    engine.backward(loss + moe_loss)
    engine.step(lr_kwargs={"increment": BATCH})
    return [float(loss.detach()), float(moe_loss.detach())]


def save(engine: Any, folder: str, args: argparse.Namespace) -> None:
    """As checkpointing.py saves: DeepSpeed finds the tree where it looks for the module's state."""
    module, original = engine.module, engine.module.state_dict

    def tree(destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        return module.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)

    module.state_dict = tree
    engine.save_checkpoint(folder, client_state={"args": args, "iteration": STEPS, "checkpoint_version": 3.0})
    module.state_dict = original


def attached(engine: Any, job: Job) -> Any:
    import ds_moe_ep

    if job.kind == "hooked":
        return ds_moe_ep.attach_overlap(engine, {"schedule": "peers"})
    return ds_moe_ep.attach_overlap(engine) if job.kind == "attached" else nullcontext()


def run_job(job: Job) -> tuple[list[list[float]], float] | str:
    """The losses of each step on this rank, those behind a checkpoint too, and the largest difference of a whole weight
    between tensor ranks; or the error that the package raised."""
    import ds_moe_ep
    from ds_moe_ep.engine.layouts import tensor
    from ds_moe_ep.engine.layouts.known_groups import forget_groups
    from ds_moe_ep.moe.tensor_parallel import ranks

    believed = [patch.object(module, "is_whole", lambda _: False) for module in (ranks, tensor)]
    try:
        with planted(""), ExitStack() as stack:  # gloo's gather in DeepSpeed's own layer
            for each in believed if job.fault else ():
                stack.enter_context(each)
            engine, data = make_engine(job), batches()
            with attached(engine, job):
                found = [train_step(engine, next(data)) for _ in range(STEPS)]
                if job.folder:
                    torch.serialization.add_safe_globals([argparse.Namespace])  # of Megatron's arguments
                    save(engine, job.folder, job.args)
                    forget_groups()
                    engine = make_engine(job)
                    with attached(engine, job):
                        path, client = engine.load_checkpoint(job.folder, load_module_strict=True)
                        assert path is not None and client["iteration"] == STEPS
                        assert engine.lr_scheduler.num_samples == STEPS * BATCH
                        found.append(train_step(engine, next(data)))
                else:
                    found.append(train_step(engine, next(data)))
        return found, parted(engine.module)
    except ds_moe_ep.MoEError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        forget_groups()


def parted(module: nn.Module) -> float:
    """The largest difference between this rank's and its tensor group's weights of gates and residual experts."""
    worst = 0.0
    first = dist.get_rank() // TENSOR_SIZE * TENSOR_SIZE
    groups = [dist.new_group(list(range(start, start + TENSOR_SIZE))) for start in range(0, WORLD, TENSOR_SIZE)]
    for name, parameter in module.named_parameters():
        if ".gate." in name or ".mlp.mlp." in name or ".coefficient." in name:
            theirs = parameter.detach().clone()
            dist.broadcast(theirs, first, group=groups[first // TENSOR_SIZE])
            worst = max(worst, float((theirs - parameter.detach()).abs().max()))
    return worst


def run_jobs(jobs: list[Job]) -> list[Any]:
    import ds_moe_ep

    ds_moe_ep.init_distributed()
    return [run_job(job) for job in jobs]


def on_ranks(pool: RankPool, jobs: list[Job]) -> list[list[Any]]:
    """By job, the results of all ranks."""
    by_rank = pool.run(WORLD, run_jobs, jobs, timeout_s=280)
    return [list(results) for results in zip(*by_rank, strict=True)]


def distance(mine: list[Any], theirs: list[Any]) -> float:
    """The largest relative difference of a loss."""
    for results in (mine, theirs):
        assert not any(isinstance(result, str) for result in results), results
    numbers = zip(_numbers(mine), _numbers(theirs), strict=True)
    return max(abs(a - b) / abs(b) for a, b in numbers)


def _numbers(results: list[Any]) -> list[float]:
    return list(itertools.chain.from_iterable(loss for found, _ in results for loss in found))


OF_STOCK: dict[str, Job] = {
    "one choice, no ZeRO": Job(topk=1, stage=0),
    "two choices, a capacity": Job(moe_token_dropping=True),
    "an expert group in each tensor group": Job(moe_expert_parallel_size=2),
    "gradients that linear layers add, ZeRO 1": Job(config=CoreConfig(adds_gradients=True)),
    "losses that are added in place": Job(sums_losses=True),
}
SEQUENCES = CoreConfig(sequence_parallel=True)
RESIDUAL = Job(mlp_type="residual")
REFUSED: dict[str, tuple[Job, str]] = {
    "experts that are cut": (
        Job(enable_expert_tensor_parallelism=True),
        "enable_expert_tensor_parallelism=True: experts are whole on their rank",
    ),
    "hooks, experts that are cut": (
        Job(kind="hooked", moe_expert_parallel_size=2, enable_expert_tensor_parallelism=True),
        "which is cut over it: an expert is whole on its rank",
    ),
    "hooks, tokens that come cut": (Job(kind="hooked", config=SEQUENCES), "use ds_moe_ep.MoE, which switches that off"),
    "hooks, a residual": (replace(RESIDUAL, kind="hooked"), "its dense expert: its weights differ"),
    "the control: marks of a whole expert are believed": (
        replace(RESIDUAL, fault="marks are believed"),
        "the ranks of a tensor-parallel group have different tokens",
    ),
}


def test_the_import_swapped_gives_the_losses_of_the_stock_layer(pool: RankPool) -> None:
    """Tokens that come cut are known by Megatron's marks; DeepSpeed's own layer has those wrong."""
    adding = replace(SEQUENCES, adds_gradients=True)
    jobs = [Job(kind="native", stage=0), Job(stage=0, config=adding), Job(stage=0, topk=1)]
    native, cut, other = on_ranks(pool, jobs)
    assert distance(cut, native) < BOUND
    assert distance(other, native) > 100 * BOUND, "the control: another number of choices"


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_STOCK)
def test_swapped_attached_and_hooked_train_and_resume_as_the_stock_layer(
    pool: RankPool, name: str, tmp_path: Path
) -> None:
    kinds = ("native", "swapped", "attached", "hooked")
    native, *others = on_ranks(
        pool, [replace(OF_STOCK[name], kind=kind, folder=str(tmp_path / kind)) for kind in kinds]
    )
    for kind, found in zip(kinds[1:], others, strict=True):
        assert distance(found, native) < BOUND, kind
    other = on_ranks(pool, [replace(OF_STOCK[name], topk=3 - OF_STOCK[name].topk)])[0]
    assert distance(other, native) > 100 * BOUND, "the control: another number of choices"


@pytest.mark.slow
def test_tokens_that_come_cut_and_residual_experts_give_the_losses_of_whole_tokens(pool: RankPool) -> None:
    """DeepSpeed's layer has neither right: its experts sum rows over tensor ranks, or differ between them."""
    jobs = [Job(), Job(config=SEQUENCES), RESIDUAL, replace(RESIDUAL, config=SEQUENCES)]
    whole, cut, residual, residual_cut = on_ranks(pool, jobs)
    assert distance(cut, whole) < BOUND and distance(residual_cut, residual) < BOUND
    assert distance(residual, whole) > 100 * BOUND
    assert all(parted == 0.0 for results in (whole, cut, residual, residual_cut) for _, parted in results)


@pytest.mark.slow
def test_what_cannot_be_right_is_refused_by_name(pool: RankPool) -> None:
    for (name, (_, words)), results in zip(
        REFUSED.items(), on_ranks(pool, [job for job, _ in REFUSED.values()]), strict=True
    ):
        assert all(isinstance(result, str) for result in results), (name, results)
        assert any(words in result for result in results), (name, results)
