"""Search over the layouts of a job on a cluster: tensor ranks, stages and expert-parallel ranks, of one batch.

1. Every layout that the cluster's ranks, the model's sizes and the number of experts allow, and that the package runs.
2. In each the micro-batches that cut the batch and fit, by doubling, and the largest one; the fastest of them counts.
   "auto" takes the schedule that it would choose there.
3. What fits is ordered by the tokens per second of the cluster as its file says; the best get bars and bounds.

Ranks that share sequences by the ds_config or an mpu (AutoTP, Ulysses) stay as they are: the search is over the sizes
of expert parallelism beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ds_moe_ep.config.knobs import Layout, ModelConfig
from ds_moe_ep.config.section import load_ds_config
from ds_moe_ep.config.training import BATCH_KEYS, WHOLE, Training, read_training
from ds_moe_ep.errors import MoEError
from ds_moe_ep.records.names import title_of
from ds_moe_ep.records.quantity import Quantity, Row
from ds_moe_ep.simulate.job.choose import as_auto, with_knobs
from ds_moe_ep.simulate.job.fit import MemoryFit, cuts_of_batch, fit_memory
from ds_moe_ep.simulate.job.job import Job, system_of
from ds_moe_ep.simulate.plan.bounds import bounds
from ds_moe_ep.simulate.step.predict import Prediction, predict, simulate_step
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.sizing.fit import memory_fix

MOST_TOLD = 8  # layouts that get a bar and a bound

See = Callable[[int, int], object]


@dataclass(frozen=True, kw_only=True)
class FoundLayout:
    """A layout that fits, with its fastest micro-batch. `bound` has the resource and `saved_ratio`."""

    system: str
    fit: MemoryFit
    prediction: Prediction
    bound: Row

    @property
    def title(self) -> str:
        """Name for a reader."""
        return title_of(self.system)

    @property
    def training(self) -> Training:
        """Batch and sizes of the layout."""
        return self.prediction.step.setup.training


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A layout that does not fit, with what would help, or that cannot work."""

    system: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class LayoutSearch:
    """The layouts of a job, the fastest first: those told in full, the slower ones, and those that are left out."""

    job: Job
    found: tuple[FoundLayout, ...]
    slower: tuple[str, ...]
    too_large: tuple[LeftOut, ...]
    impossible: tuple[LeftOut, ...]

    def over_best(self, layout: FoundLayout) -> Quantity:
        """A layout's tokens per second over those of the best one, both at the same end."""
        return layout.prediction.over(self.found[0].prediction)


def search_layouts(job: Job, most: int = MOST_TOLD, see: See = lambda done, total: None) -> LayoutSearch:
    """The layouts of the job that fit its cluster. `see` hears how many of how many were simulated."""
    sizes = list(sizes_of(job.setup))
    fitting: list[tuple[float, str, Setup]] = []
    too_large, impossible = [], []
    for done, (layout, ep_size) in enumerate(sizes):
        see(done, len(sizes))
        training, moe = job.setup.training, replace(job.setup.moe, ep_size=ep_size, schedule="auto")
        system = system_of(layout, moe, training.dense_cut.size, training.sequence_ranks).removesuffix("_serial")
        try:
            setups = list(setups_of(job, layout, ep_size))
        except MoEError as error:
            impossible.append(LeftOut(system=system, reason=str(error)))
            continue
        fits = [setup for setup in setups if fit_memory(setup).fits]
        if not fits:
            too_large.append(LeftOut(system=system, reason=_fix(setups[0])))
            continue
        _, best = max(((simulate_step(setup).tps, setup) for setup in fits), key=lambda priced: priced[0])
        best = as_auto(best) if ep_size > 1 else with_knobs(best, {"schedule": "serial"})
        fitting.append((simulate_step(best).tps, system, best))
    fitting.sort(key=lambda priced: -priced[0])
    return LayoutSearch(
        job=job,
        found=tuple(sorted((_told(*each[1:]) for each in fitting[:most]), key=lambda its: -its.prediction.step.tps)),
        slower=tuple(system for _, system, _ in fitting[most:]),
        too_large=tuple(too_large),
        impossible=tuple(impossible),
    )


def sizes_of(setup: Setup) -> Iterator[tuple[Layout, int]]:
    """Every (tensor ranks x stages, expert-parallel ranks) that divides ranks, layers, experts and widths."""
    model, world = setup.model, setup.training.world_size
    if setup.training.sharing_ranks > 1:
        yield from ((WHOLE, size) for size in _divisors(world) if setup.moe.num_experts % size == 0)
        return
    yield from sizes_in(model, setup.moe.num_experts, world)


def sizes_in(model: ModelConfig, num_experts: int, world: int) -> Iterator[tuple[Layout, int]]:
    """Those of a model on so many ranks, none of which share sequences."""
    for pp_size in _divisors(world):
        for tp_size in _divisors(world // pp_size):
            whole = (model.num_heads, model.expert_width, model.shared_expert_width)
            if model.num_layers % pp_size or any(size % tp_size for size in whole):
                continue
            for ep_size in _divisors(world // pp_size):
                if num_experts % ep_size == 0:
                    yield Layout(tp_size=tp_size, pp_size=pp_size), ep_size


def setups_of(job: Job, layout: Layout, ep_size: int) -> Iterator[Setup]:
    """The job in a layout with each micro-batch worth a look, the smallest first. Raises where it cannot work."""
    setup = job.setup
    moe = replace(setup.moe, ep_size=ep_size)
    layout.check(setup.model, moe)
    training = _in_layout(job, layout, ep_size)
    cuts = cuts_of_batch(training)
    largest = max(
        (cut.micro_batch for cut in cuts if fit_memory(replace(setup, moe=moe, training=cut)).fits), default=1
    )
    for cut in cuts:
        is_power = cut.micro_batch & (cut.micro_batch - 1) == 0
        if cut.micro_batch <= largest and (is_power or cut.micro_batch == largest):
            yield replace(setup, moe=moe, training=cut)


def _in_layout(job: Job, layout: Layout, ep_size: int) -> Training:
    """The job's training in a layout, with micro-batches of one sequence."""
    training = job.setup.training
    if training.sharing_ranks > 1:
        sequences = training.micro_batch * training.accumulation
        return replace(training, ep_size=ep_size, micro_batch=1, accumulation=sequences)
    given = {key: value for key, value in load_ds_config(job.path).items() if key not in BATCH_KEYS}
    given |= {BATCH_KEYS[0]: training.batch, BATCH_KEYS[1]: 1}
    return read_training(given, ep_size, training.world_size, layout)


def _told(system: str, setup: Setup) -> FoundLayout:
    prediction = predict(setup)
    return FoundLayout(system=system, fit=fit_memory(setup), prediction=prediction, bound=bounds(prediction)[0])


def _fix(setup: Setup) -> str:
    free_bytes = setup.cluster.device.memory_bytes - setup.cluster.device.reserve_bytes
    return memory_fix(setup.model, setup.moe, setup.training, free_bytes)


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
