"""`python -m tests.foretold_systems systems.jsonl`: what the simulator foretells of the measured systems, beside them.

Records of `bench systems --device emulated`, on the test bed whose host and links were fitted to other Records. Nothing
is fitted here: each rank gets a device that computes what the emulated one did, the links the rate that was shaped.
Without Records, `--traffic 0.3 0.6 1.2 --compute-s 6` foretells the run of such options, also with a host that costs
nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_moe_ep.bench.systems.plan import EMULATED_MODEL, SystemsPlan, link_mbit
from ds_moe_ep.config.training import WHOLE, read_training
from ds_moe_ep.records.names import SYSTEMS, environment_title
from ds_moe_ep.records.quantity import Quantity, convert, number
from ds_moe_ep.records.record import Record, read_records
from ds_moe_ep.records.render import to_markdown
from ds_moe_ep.records.table import Table, table
from ds_moe_ep.simulate.cluster.cluster import Cluster, Device, Host, load_cluster
from ds_moe_ep.simulate.job.choose import as_auto, with_knobs
from ds_moe_ep.simulate.step.predict import on, simulate_step
from ds_moe_ep.simulate.step.setup import Setup

FORETOLD = tuple(system for system in SYSTEMS if system not in ("native_ep16", "autoep_ep16"))


def main(words: Sequence[str] | None = None) -> int:
    """Prints a table per environment; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("records", type=Path, nargs="?")
    parser.add_argument("--cluster", default="testbed_4x4")
    parser.add_argument("--traffic", type=float, nargs="+", default=(0.3, 0.6, 1.2))
    parser.add_argument("--compute-s", type=float, default=6.0)
    options = parser.parse_args(words)
    if options.records is None:
        print(to_markdown(alone(options.traffic, options.compute_s, load_cluster(options.cluster))))
        return 0
    by_name = {record.name: record for record in read_records(options.records)}
    for environment in dict.fromkeys(name.split(".")[1] for name in by_name if name.endswith(".traffic.link")):
        print(to_markdown(beside(environment, by_name, load_cluster(options.cluster))), end="\n\n")
    return 0


def alone(ratios: Sequence[float], compute_s: float, bed: Cluster) -> Table:
    """Steps that are foretold of a run of the benchmark; behind each, with a host that costs nothing."""
    plan = SystemsPlan(device="emulated", model=EMULATED_MODEL, num_sequences=128, step_compute_s=compute_s)
    rows = []
    for system in FORETOLD:
        cells = []
        for ratio in ratios:
            beds = (bed, dataclasses.replace(bed, host=Host()))
            both = (foretold_ms(system, each, compute_s, link_mbit(plan, ratio)) for each in beds)
            cells.append(" / ".join(number(step_ms, 0) for step_ms in both))
        rows.append((SYSTEMS[system], *cells))
    return table("foretold steps, ms", ("system", *(f"traffic {ratio:g}" for ratio in ratios)), rows)


def beside(environment: str, by_name: dict[str, Record], bed: Cluster) -> Table:
    """Measured steps of an environment with those foretold."""
    compute_s = by_name[f"system.{environment}.traffic.compute"].value / 1e3
    link_mbit = by_name[f"system.{environment}.traffic.link"].value
    rows = []
    for system in FORETOLD:
        record = by_name.get(f"system.{environment}.training.{system}.step")
        if record is not None:
            measured, step_ms = convert(record, "ms"), foretold_ms(system, bed, compute_s, link_mbit)
            rows.append(_row(system, measured, step_ms))
    return table(environment_title(environment), ("step, ms", "measured", "foretold", "foretold / measured"), rows)


def _row(system: str, measured: Quantity, step_ms: float) -> tuple[str, ...]:
    return SYSTEMS[system], measured.text(0), number(step_ms, 0), number(step_ms / measured.value, 2)


def foretold_ms(system: str, bed: Cluster, compute_s: float, link_mbit: float) -> float:
    """The step of a system on the bed with emulated devices, simulated."""
    setup = setup_of(system, bed.with_far(bandwidth=link_mbit / 8))
    shared = setup_of("ep16_serial", bed)
    slow = dataclasses.replace(setup.cluster, device=dataclasses.replace(setup.cluster.device, peak_fp32=1.0))
    unit_us = simulate_step(on(shared, slow)).busy_us  # at one operation per microsecond
    device = dataclasses.replace(setup.cluster.device, peak_fp32=unit_us / (1e6 * compute_s))
    setup = on(setup, dataclasses.replace(setup.cluster, device=device))
    return simulate_step(as_auto(setup)).step_us / 1e3


def setup_of(system: str, bed: Cluster) -> Setup:
    """A system's job with a device per rank, of which products alone take time."""
    plan = SystemsPlan(device="emulated", model=EMULATED_MODEL, num_sequences=128)
    moe, layout = plan.moe(system), plan.cuts[system].layout if system in plan.cuts else WHOLE
    ds_config: dict[str, Any] = plan.ds_config(system)
    training = read_training(ds_config, moe.ep_size, plan.num_ranks, layout)
    device = Device(memory_bytes=1e12, peak_fp32=1.0)
    cluster = dataclasses.replace(bed, device=device, computes_on="device", ranges={})
    setup = Setup(model=plan.model, moe=moe, training=training, cluster=cluster)
    return setup if moe.ep_size > 1 else with_knobs(setup, {"schedule": "serial"})


if __name__ == "__main__":
    sys.exit(main())
