"""The job of a search: its own sizes need not fit the cluster, since others are looked for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from ds_moe_ep.config.section import SECTION, load_ds_config, read_section
from ds_moe_ep.config.training import BATCH_KEYS, WHOLE
from ds_moe_ep.errors import MoEError
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.job.job import Job, read_job
from ds_moe_ep.simulate.layouts.search import sizes_in


def read_searched_job(
    config: str | os.PathLike[str] | Mapping[str, Any],
    cluster: Cluster,
    *,
    mode: Literal["training", "forward"] = "training",
    tensor_ranks: int = 1,
) -> Job:
    """The job of a ds_config; where its own sizes do not fit the cluster's ranks, in sizes that do, with a note.

    Raises ConfigError or TopologyError, with what is wrong as the file has it, where no sizes fit.
    """
    try:
        return read_job(config, cluster, mode=mode, tensor_ranks=tensor_ranks)
    except MoEError as error:
        for other in _in_other_sizes(config, cluster):
            try:
                job = read_job(other, cluster, mode=mode, tensor_ranks=tensor_ranks)
            except MoEError:
                continue
            as_it_is = str(error).partition(";")[0].partition(": ")
            note = f"{as_it_is[0]} of the file does not fit here ({as_it_is[2]}): other sizes alone are listed"
            path = "ds_config" if isinstance(config, Mapping) else os.fspath(config)
            return replace(job, path=path, notes=(note, *job.notes))
        raise


def _in_other_sizes(config: str | os.PathLike[str] | Mapping[str, Any], cluster: Cluster) -> Iterator[dict[str, Any]]:
    """The ds_config in each layout that its model allows on the cluster, without one first, with the same batch."""
    try:
        given = load_ds_config(config)
        section = read_section(given)
    except MoEError:
        return
    if section.model is None:
        return
    world, num_experts = cluster.num_ranks, section.moe.num_experts
    kept = (
        {key: value for key, value in given.items() if key not in BATCH_KEYS[1:]} if BATCH_KEYS[0] in given else given
    )
    shared = (WHOLE, math.gcd(num_experts, world))
    for layout, ep_size in (shared, *sizes_in(section.model, num_experts, world)):
        own: dict[str, Any] = {key: value for key, value in dict(given[SECTION]).items() if key != "layout"}
        own["ep_size"] = ep_size
        if layout != WHOLE:
            own["layout"] = {"tp_size": layout.tp_size, "pp_size": layout.pp_size}
        yield kept | {BATCH_KEYS[1]: 1, SECTION: own}
