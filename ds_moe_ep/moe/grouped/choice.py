"""The choice whether a pass makes its products for all local experts at once, and why not; said in the log once."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.kernels.grouped import is_one_kernel, lie_together
from ds_moe_ep.kernels.traffic import LARGE_PRODUCT
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.moe.grouped.experts import PARTS, named_tensors
from ds_moe_ep.moe.match_expert import Form
from ds_moe_ep.moe.split_experts import Weights
from ds_moe_ep.schedule.build import Schedule

logger = logging.getLogger(__name__)


class KnowsWeights(Protocol):
    """Experts that may know their form."""

    def known(self) -> tuple[Form, Sequence[Weights]] | None:
        """The form and the weights; None where the mathematics is unknown."""


def grouped_experts(
    config: MoEConfig,
    experts: KnowsWeights,
    schedules: tuple[Schedule, Schedule],
    rows_ND: Tensor,
    plan: DispatchPlan,
) -> tuple[int, ...]:
    """Local experts of each product that a pass makes for several at once; none where each has its own. Local.

    All of the rank's own experts have one together, and so have the copies of others', whose weights lie elsewhere. Why
    there is none is said in the log, once.

    Raises ConfigError where the configuration demands it, and the experts are unknown.
    """
    num_own = config.num_local_experts
    if num_own == 1 or config.grouped_products == "off":
        return ()
    reason = _why_by_schedule(schedules) or _why_by_device(config, rows_ND, plan)
    known = None if reason else experts.known()
    if not reason and known is None:
        reason = "the experts are modules of unknown form"
        if config.grouped_products == "on":
            raise ConfigError(
                f'moe_ep.grouped_products="on": {reason}, which run one by one; write "auto", or make them an '
                "MLP of Linear, GELU and Linear, or a SwiGLU of three Linears"
            )
    if not reason and known is not None and config.grouped_products == "auto":
        reason = _why_by_weights(config, *known, len(schedules[0].pieces), plan.num_received)
    say_once(reason)
    num_copies = len(plan.recv_rows_PL[0]) - num_own
    return () if reason else (num_own, num_copies) if num_copies else (num_own,)


def _why_by_schedule(schedules: Sequence[Schedule]) -> str:
    if any(len(each.blocks) > 1 or each.is_bit_equal for each in schedules):
        return "weight gradients are sums over blocks of rows (weight_blocks, bit_equal)"
    return ""


def _why_by_device(config: MoEConfig, rows_ND: Tensor, plan: DispatchPlan) -> str:
    if config.grouped_products == "on":
        return ""
    if rows_ND.is_cpu:
        return "rows are on the CPU, whose library has no grouped product"
    has_equal_rows = plan.maps.is_padding_N is not None  # with a capacity: a batched product, in any type
    if not (has_equal_rows or is_one_kernel(rows_ND)):
        return f"torch has one kernel for bf16 on devices of compute capability 9 and 10, not for {rows_ND.dtype} here"
    return ""


def _why_by_weights(
    config: MoEConfig, form: Form, weights: Sequence[Weights], num_pieces: int, num_received: int
) -> str:
    groups = [group for group in (weights[: config.num_local_experts], weights[config.num_local_experts :]) if group]
    parts = [named_tensors(group, f"{part}.weight") for group in groups for part in (*PARTS[form.kind], "down")]
    if any(lie_together(matrices) is None for matrices in parts):
        return "the experts' weights do not lie at equal distances in one memory, as in an engine's flat buffer"
    numbers = num_received * len(parts[0][0]) / (len(weights) * num_pieces)
    if num_pieces > 1 and numbers > LARGE_PRODUCT:
        return "each expert's product fills the device by itself"
    return ""


@functools.cache
def say_once(reason: str) -> None:
    """Tells the log how products are made, once for each reason."""
    logger.info("products of experts: %s", f"one per expert, since {reason}" if reason else "one for all of a rank")
