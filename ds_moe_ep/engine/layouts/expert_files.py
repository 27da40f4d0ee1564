"""Experts' files in checkpoints beside tensor parallelism, which DeepSpeed names by the tensor rank that saved them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from deepspeed.utils import groups

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.extensions.callback import EngineCallback, SaveCall
from ds_moe_ep.engine.layouts.tensor import tensor_rank
from ds_moe_ep.errors import EngineError


class ExpertFiles(EngineCallback):
    """Refuses to save what would not load: experts of which some ranks would look for files of another tensor rank."""

    def __init__(self, ep_sizes: Iterable[int]) -> None:
        self._ep_sizes = sorted(set(ep_sizes))

    @staticmethod
    def is_needed() -> bool:
        """True beside tensor parallelism."""
        return seams.tensor_parallel_size() > 1

    def around_save(self, save: SaveCall, proceed: Callable[[SaveCall], Any]) -> Any:
        seams.settle(problem_of_files(self._ep_sizes))
        return proceed(save)


def problem_of_files(ep_sizes: Iterable[int]) -> EngineError | None:
    """Error of experts whose files some of their ranks would not find, or None. Collective over the world."""
    size, problem = seams.tensor_parallel_size(), None
    tensor_ranks = seams.gather(tensor_rank())
    for ep_size in ep_sizes if size > 1 else ():
        holders = groups._get_expert_data_parallel_group_ranks(f"ep_size_{ep_size}")
        if len({tensor_ranks[rank] for rank in holders}) > 1:
            problem = EngineError(
                f"ep_size={ep_size} with tensor parallel size={size}: DeepSpeed saves an expert under the tensor "
                "rank of its first holder, and other holders, of other tensor ranks, would not find it; the "
                f"checkpoint could not be loaded. Take an ep_size that is a multiple of {size}, of ranks in a row"
            )
    return problem
