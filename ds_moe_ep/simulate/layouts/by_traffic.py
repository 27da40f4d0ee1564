"""`plan --search --traffic`: which layout of a job wins at which ratio of traffic to compute.

1. The ratio is that of the benchmark of systems: the time of the experts' rows over the compute of a step, where all
   ranks share the experts, no layout cuts the model and nothing is hidden. It stands for a link whatever the layout.
2. For each ratio the links between nodes get the bandwidth at which a simulated step has it; all else stays.
3. On each such cluster the layouts are searched as ever.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd, sqrt

from ds_moe_ep.config.training import WHOLE
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import Quantity, number
from ds_moe_ep.records.record import Record
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.job.choose import with_knobs
from ds_moe_ep.simulate.job.job import Job
from ds_moe_ep.simulate.layouts.search import LayoutSearch, search_layouts, setups_of
from ds_moe_ep.simulate.step.predict import on, simulate_step
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.simulate.step.source import PredictionSource

FAR = "far.bandwidth"
SLOWEST, FASTEST = 1e-6, 1e6  # of the bandwidth in the cluster's file, where a ratio is looked for
MOST_AT_RATIO = 5  # layouts that get a bar
EXACT = 1 + 1e-4  # between the two bandwidths between which one is found

See = Callable[[int, int], object]


@dataclass(frozen=True, kw_only=True)
class AtRatio:
    """The layouts of a job on links of one ratio of traffic to compute."""

    ratio: float
    cluster: Cluster
    search: LayoutSearch

    @property
    def lead(self) -> Quantity | None:
        """The best layout's tokens per second over the next one's, both at the same end; None where it is alone."""
        found = self.search.found
        return found[0].prediction.over(found[1].prediction) if len(found) > 1 else None

    @property
    def is_told_apart(self) -> bool:
        """True where the best layout is faster than the next one at both ends of the cluster's ranges."""
        return self.lead is None or self.lead.low > 1


def search_by_traffic(job: Job, ratios: Sequence[float], see: See = lambda done, total: None) -> list[AtRatio]:
    """The layouts of the job at each ratio, the smallest ratio first. Raises ConfigError for one that no link has."""
    ordered, found = sorted(set(ratios)), []
    for index, ratio in enumerate(ordered):
        cluster = cluster_of_ratio(job, ratio)
        its_job = dataclasses.replace(job, setup=on(job.setup, cluster))

        def see_of_all(done: int, total: int, before: int = index) -> None:
            see(before * total + done, len(ordered) * total)

        found.append(AtRatio(ratio=ratio, cluster=cluster, search=search_layouts(its_job, MOST_AT_RATIO, see_of_all)))
    return found


def cluster_of_ratio(job: Job, ratio: float) -> Cluster:
    """The job's cluster with links between nodes of the ratio of traffic to compute. Raises ConfigError for no such."""
    given, setup = job.setup.cluster, shared_by_all(job)
    if given.num_nodes == 1:
        raise ConfigError(f"cluster.num_nodes=1 with traffic={ratio:g}: there is no link between nodes to change")
    slow, fast = (given.far.bandwidth * factor for factor in (SLOWEST, FASTEST))
    least = traffic_ratio(on(setup, _with_bandwidth(given, fast)))
    if not least < ratio <= traffic_ratio(on(setup, _with_bandwidth(given, slow))):
        raise ConfigError(
            f"traffic={ratio:g}: on {given.name} the experts' traffic takes at least {number(least, significant=2)} of "
            "the compute, however fast the links between nodes; give a larger ratio"
        )
    while fast / slow > EXACT:
        middle = sqrt(slow * fast)
        if traffic_ratio(on(setup, _with_bandwidth(given, middle))) > ratio:
            slow = middle
        else:
            fast = middle
    return _with_bandwidth(given, fast)


def shared_by_all(job: Job) -> Setup:
    """The job without a layout, its experts shared by as many ranks as there can be, and with nothing hidden."""
    ep_size = gcd(job.setup.moe.num_experts, job.setup.training.world_size)
    return with_knobs(next(setups_of(job, WHOLE, ep_size)), {"schedule": "serial"})


def traffic_ratio(setup: Setup) -> float:
    """Time of the experts' rows on the wire over the compute of a simulated step."""
    step = simulate_step(setup)
    return step.traffic_us / step.busy_us


def layout_records(found: Sequence[AtRatio], source: PredictionSource) -> Iterator[Record]:
    """Tokens per second of the layouts told at each ratio, and over the best one's there."""
    for at in found:
        for layout in at.search.found:
            start = f"layouts.{source.environment}.traffic{round(100 * at.ratio)}.{layout.system}"
            quantities = (layout.prediction.tps.named("tps"), at.search.over_best(layout).named("over_best"))
            yield from source.records(start, quantities)


def ratio_values(found: Sequence[AtRatio]) -> list[Mapping[str, object]]:
    """The best layout at each ratio as plain values, for JSON."""
    return [
        {
            "traffic": at.ratio,
            "far_bandwidth_gb_per_s": at.cluster.far.bandwidth / 1e3,
            "best": at.search.found[0].system if at.search.found else None,
            "over_next": None if at.lead is None else at.lead.bar,
            "told_apart": at.is_told_apart,
            "layouts": {each.system: each.prediction.tps.bar for each in at.search.found},
        }
        for at in found
    ]


def _with_bandwidth(cluster: Cluster, bandwidth: float) -> Cluster:
    """The cluster with an exact bandwidth between nodes."""
    ranges = {name: ends for name, ends in cluster.ranges.items() if name != FAR}
    return dataclasses.replace(cluster.with_far(bandwidth=bandwidth), ranges=ranges)
