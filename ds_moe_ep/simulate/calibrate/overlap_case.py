"""The overlap benchmark's cases, simulated: one layer, forward and backward, on the links and devices of a Record.

A Record `overlap.<device>.<shaping>.<side>.<phase>.time` says by its shaping and its command which links, rows and
device it was measured with (bench/overlap/). Emulated devices take `--compute-s` seconds for a rank's rows, forward;
real ones are the cluster's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.config.training import Training
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.record import Record
from ds_moe_ep.schedule.program import START, Event, Program
from ds_moe_ep.schedule.shaping import EXCHANGES, SCHEDULES, WIRE, link_rate
from ds_moe_ep.schedule.spans import Span, Tags
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.step.ep_step import EpJob
from ds_moe_ep.simulate.step.setup import Setup

PHASES = ("forward", "backward")
NUM_EXPERTS, TOKENS, WIDTH, EXPERT_WIDTH = 16, 1024, 256, 1024  # of the benchmark's cases, on every rank


@dataclass(frozen=True)
class OverlapCase:
    """One side on one shaping: what was measured, and all that is needed to simulate it."""

    device: str
    shaping: str
    side: str
    top_k: int
    compute_us: float  # of an emulated device's forward pass
    bandwidth: float | None  # of a node's link in bytes per microsecond; None is no limit
    num_nodes: int
    node_size: int
    measured: Mapping[str, Record]  # by phase: forward, backward, step

    @property
    def name(self) -> str:
        return f"{self.device} {self.shaping} {self.side}"

    @cached_property
    def moe(self) -> MoEConfig:
        knobs = dict(SCHEDULES.get(self.side, SCHEDULES["serial"]))
        size = self.num_nodes * self.node_size
        return MoEConfig(num_experts=NUM_EXPERTS, ep_size=size, node_size=self.node_size, top_k=self.top_k, **knobs)

    def on(self, cluster: Cluster) -> Setup:
        """The case as a job of one layer on its links and devices."""
        cluster = dataclasses.replace(cluster, num_nodes=self.num_nodes, node_size=self.node_size)
        if self.bandwidth is not None:
            cluster = cluster.with_far(bandwidth=self.bandwidth)
        else:
            cluster = cluster.with_far(bandwidth=float("inf"))
        if self.device == "emulated" or self.side == WIRE:
            flops = TOKENS * self.top_k * 2 * self.model.expert_params
            peak = float("inf") if self.side == WIRE else flops / self.compute_us
            device = dataclasses.replace(cluster.device, peak_fp32=peak, matmul_efficiency=1.0, half_rows=0.0)
            cluster = dataclasses.replace(cluster, device=device, computes_on="device")
        return Setup(model=self.model, moe=self.moe, training=self.training, cluster=cluster)

    @cached_property
    def model(self) -> ModelConfig:
        return ModelConfig(
            num_layers=1,
            hidden_size=WIDTH,
            num_heads=8,
            expert_width=EXPERT_WIDTH,
            sequence_length=TOKENS,
            recompute=False,
        )

    @cached_property
    def training(self) -> Training:
        size = self.num_nodes * self.node_size
        return Training(
            world_size=size,
            ep_size=size,
            micro_batch=1,
            accumulation=1,
            precision="fp32",
            gradient_precision="fp32",
            zero_stage=0,
            optimizer="none",
            optimizer_states=0,
            offload=False,
            bucket_elements=0,
        )

    @cached_property
    def measured_us(self) -> Mapping[str, float]:
        """Microseconds of forward, backward and step.

        A pass is measured on its slowest rank, and that is another one forward than backward: both are scaled so that
        they sum to the step.
        """
        step_us = 1e3 * self.measured["step"].value
        both = {phase: self.measured[phase].value for phase in PHASES}
        return {**{phase: step_us * value / sum(both.values()) for phase, value in both.items()}, "step": step_us}


def simulate_case(case: OverlapCase, cluster: Cluster) -> dict[str, float]:
    """Microseconds of forward, backward and step."""
    found = {phase: simulate_pass(case, cluster, phase)[0] for phase in PHASES}
    return {**found, "step": sum(found.values())}


def simulate_pass(case: OverlapCase, cluster: Cluster, phase: str) -> tuple[float, list[Span]]:
    """Microseconds of one pass, and its spans as the benchmark's recorder would have them."""
    job = EpJob(case.on(cluster))
    program, host = Program(), job.setup.cluster.host
    tags = Tags("layer", phase)
    event: Event = job.host(program, host.forward_us if phase == "forward" else host.backward_us, START, tags)
    if phase == "forward":
        event = job.layer.forward(program, job.counts(program, event, tags), "layer")
    else:
        event = job.layer.backward(program, event, "layer")
    outcome = program.run(job.machine.capacities)
    return outcome.makespan_us, outcome.spans()


def overlap_cases(records: Iterable[Record]) -> list[OverlapCase]:
    """The cases of even routing in Records of the overlap benchmark. Raises ConfigError for a command of another."""
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        if not record.name.startswith("overlap.") or not record.name.endswith(".time"):
            continue
        _, device, rest = record.name.split(".", 2)
        shaping, side, phase, _ = rest.rsplit(".", 3)
        if side in SCHEDULES or side == WIRE:
            found.setdefault((device, shaping, side), {})[phase] = record
    return [_case(*key, measured) for key, measured in found.items() if {*PHASES, "step"} <= set(measured)]


def _case(device: str, shaping: str, side: str, measured: Mapping[str, Record]) -> OverlapCase:
    options = _options(measured["step"].command)
    top_k = int(options.case[1])
    compute_us = 1e6 * options.compute_s
    return OverlapCase(
        device=device,
        shaping=shaping,
        side=side,
        top_k=top_k,
        compute_us=compute_us,
        bandwidth=_bandwidth(shaping, options, top_k, compute_us),
        num_nodes=1 if options.no_testbed else options.nodes,
        node_size=options.nodes * options.ranks if options.no_testbed else options.ranks,
        measured=measured,
    )


def _options(command: str) -> argparse.Namespace:
    """The options of the benchmark's command that a simulation depends on."""
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False, allow_abbrev=False)
    parser.add_argument("--case", default="k1_even")
    parser.add_argument("--compute-s", type=float, default=1.0)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--no-testbed", action="store_true")
    try:
        options, _ = parser.parse_known_args(shlex.split(command))
    except (argparse.ArgumentError, ValueError) as error:
        raise ConfigError(
            f"record.command={command!r}: not the overlap benchmark's ({error}); measure again"
        ) from error
    if not options.case.endswith("_even"):
        raise ConfigError(f"record.command={command!r}: only even routing is simulated; measure with --case k1_even")
    return options


def _bandwidth(shaping: str, options: argparse.Namespace, top_k: int, compute_us: float) -> float | None:
    """Bytes per microsecond of a node's link: `unshaped`, `<rate> mbit`, or `<ratio> of <phase>`."""
    if shaping == "unshaped":
        return None
    number, _, rest = shaping.partition(" ")
    if rest == "mbit":
        return float(number) * 0.125
    phase = rest.removeprefix("of ")
    if phase not in EXCHANGES:
        raise ConfigError(f"record.name: shaping {shaping!r} is none of the overlap benchmark's; measure again")
    far_share = (options.nodes - 1) / options.nodes
    exchange_bytes = TOKENS * top_k * options.ranks * far_share * WIDTH * 4
    return link_rate(float(number), phase, exchange_bytes, compute_us)
