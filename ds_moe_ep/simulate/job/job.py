"""From a ds_config and a cluster to the job that is simulated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ds_moe_ep.check.config import sharing_notes
from ds_moe_ep.config.knobs import Layout, MoEConfig
from ds_moe_ep.config.section import load_ds_config, read_section
from ds_moe_ep.config.training import BATCH_KEYS, WHOLE, Training, read_training
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.job.fit import fit_memory, with_micro_batch
from ds_moe_ep.simulate.job.replicas import with_load
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.simulate.step.shares import check_shares

Mode = Literal["training", "forward"]
ACCUMULATION = "gradient_accumulation_steps"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A ds_config on a cluster. Notes say where it is not as its file has it, and what is not simulated."""

    path: str
    setup: Setup
    notes: tuple[str, ...] = ()

    @property
    def system(self) -> str:
        """Name in Records: `ep16`, `ep16_serial`, `tp8_pp2`, `tp2_pp2_ep4`, `sp2_ep8`, and alike for other sizes."""
        training = self.setup.training
        return system_of(training.layout, self.setup.moe, training.dense_cut.size, training.sequence_ranks)


def system_of(layout: Layout, moe: MoEConfig, tensor_ranks: int = 1, sequence_ranks: int = 1) -> str:
    """Name in Records of a system of these sizes; tensor ranks of an mpu or AutoTP are named as a layout's."""
    experts = f"ep{moe.ep_size}_serial" if moe.is_serial else f"ep{moe.ep_size}"
    sizes = {"tp": layout.tp_size * tensor_ranks, "pp": layout.pp_size, "sp": sequence_ranks}
    if all(size == 1 for size in sizes.values()):
        return experts
    if moe.ep_size == 1 and layout != WHOLE:
        return f"tp{layout.tp_size}_pp{layout.pp_size}"
    return "_".join([*(f"{name}{size}" for name, size in sizes.items() if size > 1), experts])


def read_job(
    source: str | os.PathLike[str] | Mapping[str, Any],
    cluster: Cluster,
    *,
    micro_batch: int | Literal["largest"] | None = None,
    load: str = "even",
    mode: Mode = "training",
    replicas: int | Literal["auto"] | None = None,
    tensor_ranks: int = 1,
) -> Job:
    """The job of a ds_config with a rank on every device of the cluster.

    `replicas` stands for the section's; `tensor_ranks` are those of an mpu, which no ds_config names. Another
    micro-batch, or more ranks than the file was written for, keep train_batch_size: accumulation adapts.
    Raises ConfigError or TopologyError for what cannot work.
    """
    path = "ds_config" if isinstance(source, Mapping) else os.fspath(source)
    ds_config = load_ds_config(source)
    section = read_section(ds_config)
    if section.model is None:
        raise ConfigError(
            'moe_ep.model=null: time, traffic and memory follow from the model\'s shapes; add "model": "specification" '
            "or an object of its knobs"
        )
    moe = section.moe if replicas is None else replace(section.moe, replicas=replicas)
    section.layout.check(section.model, moe)
    has_all = all(ds_config.get(key) is not None for key in BATCH_KEYS)
    given = {key: value for key, value in ds_config.items() if key != ACCUMULATION or not has_all}
    training = read_training(given, moe.ep_size, cluster.num_ranks, section.layout, tensor_ranks)
    check_shares(training, section.model, sequence_parallel=moe.sequence_parallel)
    setup = Setup(model=section.model, moe=moe, training=training, cluster=cluster, mode=mode)
    if section.layout == WHOLE:
        setup = with_load(setup, load)
    if micro_batch == "largest":
        micro_batch = fit_memory(setup).largest_of_batch or None
    if micro_batch is not None:
        setup = replace(setup, training=with_micro_batch(training, micro_batch))
        setup = with_load(setup, load) if section.layout == WHOLE else setup  # a longer window pays for more copies
    notes = [*_notes(ds_config, setup.training, load), *sharing_notes(section.model, moe, training)]
    if training.sequence_ranks > 1:
        notes.append("attention exchanges heads for parts of sequences, as DeepSpeed's DistributedAttention does")
    return Job(path=path, setup=setup, notes=tuple(notes))


def _notes(ds_config: Mapping[str, Any], training: Training, load: str) -> list[str]:
    """Where the job is not as its file has it, or its simulation leaves something out."""
    values = {BATCH_KEYS[1]: training.micro_batch, ACCUMULATION: training.accumulation}
    changed = [
        f"{key} is {value}, not {ds_config[key]}" for key, value in values.items() if ds_config.get(key, value) != value
    ]
    notes = [f"{' and '.join(changed)}: the batch stays {training.batch:,} sequences"] if changed else []
    is_cut = training.ep_size == 1
    if load != "even" and training.layout != WHOLE:
        why = "each rank computes its share of every expert" if is_cut else "a layout is simulated with even loads"
        notes.append(f"load {load!r} changes nothing here: {why}")
    if training.offload:
        notes.append("offload_optimizer is simulated without the host: its memory and bus make a step longer")
    if ds_config.get("use_data_before_expert_parallelism") and training.num_replicas > 1:
        notes.append("use_data_before_expert_parallelism is not simulated: an expert group has consecutive ranks here")
    if ds_config["moe_ep"].get("capacity_factor") is not None:
        notes.append("capacity_factor drops nothing here: with unequal loads a step may be shorter than simulated")
    return notes
