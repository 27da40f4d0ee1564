"""Plans and comparisons for a terminal. In brackets is what the simulation gives at both ends of the ranges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_moe_ep.config.training import WHOLE
from ds_moe_ep.records.names import KINDS
from ds_moe_ep.simulate.audit.audit import AuditRow
from ds_moe_ep.simulate.job.fit import MemoryFit
from ds_moe_ep.simulate.plan.plan import Comparison, Plan
from ds_moe_ep.simulate.step.measures import Measure, measures, parts
from ds_moe_ep.simulate.step.predict import Estimate

FOOT = (
    "Simulated from the cluster's stated numbers; nothing was measured. In brackets: all of its ranges at their slower "
    "ends, and all at their faster ones. The simulation's own error, on measured runs, is what calibrate tells."
)


def print_plan(plan: Plan, figures: Sequence[AuditRow] = (), console: Console | None = None) -> None:
    """Prints the plan of one job for people, and what of the specification's figures can hold where they are given."""
    _print((plan,), figures, [], console or Console())


def print_comparison(comparison: Comparison, figures: Sequence[AuditRow] = (), console: Console | None = None) -> None:
    """Prints two plans side by side, and what concerns one of them below each other."""
    _print((comparison.ours, comparison.theirs), figures, ratio_told(comparison), console or Console())


def _print(plans: Sequence[Plan], figures: Sequence[AuditRow], last: Sequence[str], console: Console) -> None:
    for plan in plans:
        _head(plan, console)
    tables = [_memory(plans), _step(plans), _parts(plans)]
    for make in (_choices, _bounds, _others):
        tables += [table for plan in plans for table in make(plan)]
    for table in [*tables, *_figures(figures)]:
        console.print("", table, sep="\n")
    console.print()
    for line in [line for plan in plans for line in told(plan)]:
        console.print(Text(line))
    for line in last:
        console.print(Text(line, style="bold"))
    console.print(Text(FOOT, style="dim"))


def told(plan: Plan) -> list[str]:
    """What bounds the job, what its schedule hides, and the specification's throughput beside it, as sentences."""
    first, lines = plan.bounds[0], []
    lines.append(
        f"{plan.title} is bounded by {first.resource}: if they took no time, a step would be "
        f"{_percent(first.saved)} shorter."
    )
    if plan.serial is not None:
        gain = plan.prediction.over(plan.serial)
        lines.append(f"{plan.title} has {with_bar(gain)} times the throughput of the same job where nothing is hidden.")
    if plan.stated is not None:
        lines.append(_stated(plan))
    return lines


def _stated(plan: Plan) -> str:
    """The specification's throughput: the utilization that it needs, and whether the plan's bar reaches it."""
    assert plan.stated is not None
    stated, tps, setup = plan.stated, plan.prediction.tps, plan.job.setup
    mfu = plan.prediction.estimate(lambda step: step.mfu)
    needed = stated.repeated if setup.mode == "training" else stated.forward
    if needed > 1:
        verdict = "beyond the peak"
    elif stated.tps > tps.high:
        verdict = "more than is predicted"
    elif stated.tps < tps.low:
        verdict = "less than is predicted"
    else:
        verdict = "within the bar of what is predicted"
    repeated = f" ({100 * stated.repeated:.0f} % with recomputation)" if stated.repeated > stated.training else ""
    return (
        f"The specification states {stated.tps:,.0f} tokens/s for {plan.title}: {100 * stated.training:.0f} % of the "
        f"peak of {setup.training.world_size} devices when training{repeated}, {100 * stated.forward:.0f} % forward. "
        f"Predicted for {MODES[setup.mode]}: {with_bar(tps)} tokens/s, {_percent(mfu)} of the peak. "
        f"What is stated is {verdict}."
    )


ENDS = ("slower", "faster")
MODES = {"training": "training", "forward": "forward passes alone"}


def ratio_told(comparison: Comparison) -> list[str]:
    """The ratio of the throughputs as sentences."""
    ours, theirs = comparison.ours, comparison.theirs
    lines = [
        f"{ours.title} over {theirs.title}: {with_bar(comparison.ratio)} times the tokens a second, both at the same "
        "end of the cluster's ranges."
    ]
    batches = [plan.job.setup.training.batch for plan in (ours, theirs)]
    if comparison.same_batch is not None:
        lines.append(
            f"The batches differ ({batches[0]:,} and {batches[1]:,} sequences). With {batches[0]:,} in both: "
            f"{with_bar(comparison.same_batch)} times."
        )
    elif batches[0] != batches[1]:
        lines.append(f"The batches differ ({batches[0]:,} and {batches[1]:,} sequences): compare tokens, not steps.")
    return lines


def _head(plan: Plan, console: Console) -> None:
    setup = plan.job.setup
    training, cluster = setup.training, setup.cluster
    console.print(Text(f"{plan.job.path} on {cluster.name}: fits", style="bold green"))
    console.print(
        Text(
            f"{plan.title}, {MODES[setup.mode]}, {training.world_size} ranks on {cluster.num_nodes} nodes; "
            f"{training.batch:,} sequences a batch = {training.micro_batch} x {training.accumulation} micro-batches x "
            f"{training.num_copies}"
        )
    )
    if setup.loads:
        console.print(Text(f"load: the fullest rank receives {max(setup.loads):.2f} times the mean rows"))
    for note in plan.job.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _memory(plans: Sequence[Plan]) -> Table:
    table = _table("memory of one device, GB", ["kind", *(plan.title for plan in plans)])
    kinds = {**KINDS, "step": "fp32 gradients of a step (not beside activations and buffers)"}
    for kind, title in kinds.items():
        table.add_row(title, *(_gb(getattr(plan.fit.memory, kind)) for plan in plans))
    if any(plan.fit.memory.host_optimizer for plan in plans):
        table.add_row("in the host's memory instead", *(_gb(plan.fit.memory.host_optimizer) for plan in plans))
    table.add_row("largest sum at once", *(_gb(plan.fit.memory.peak) for plan in plans), style="bold")
    device = plans[0].fit
    room = f"{_gb(device.device_bytes)} - {_gb(device.reserve_bytes)} reserve"
    table.add_row("there is (reserve: driver, NCCL, fragmentation)", *[room] * len(plans))
    table.add_row("to spare", *(_spare(plan.fit) for plan in plans), style="bold")
    table.add_row("largest micro-batch that fits, sequences", *(_largest(plan.fit) for plan in plans))
    return table


def _largest(fit: MemoryFit) -> str:
    whole = "" if fit.largest == fit.largest_of_batch else f" ({fit.largest_of_batch} cuts the batch)"
    return f"{fit.largest}{whole}"


def _spare(fit: MemoryFit) -> str:
    return with_bar(Estimate(fit.spare_bytes, *fit.spare_range).scaled(1e-9))


def _step(plans: Sequence[Plan]) -> Table:
    named = [{measure.name: measure for measure in measures(plan.prediction)} for plan in plans]
    return _measured("a step", plans, named)


def _parts(plans: Sequence[Plan]) -> Table:
    named = [{measure.name: measure for measure in parts(plan.prediction)} for plan in plans]
    return _measured("where a step's time goes", plans, named)


def _measured(title: str, plans: Sequence[Plan], named: Sequence[Mapping[str, Measure]]) -> Table:
    table = _table(title, ["", "unit", *(plan.title for plan in plans)])
    rows = {name: measure for its in named for name, measure in its.items()}
    for name, measure in rows.items():
        cells = [with_bar(its[name].estimate) if name in its else "-" for its in named]
        table.add_row(measure.title, measure.unit, *cells)
    return table


def _choices(plan: Plan) -> list[Table]:
    if not plan.choices:
        return []
    title = f'what the schedule "auto" of {plan.title} would choose'
    table = _table(title, ["schedule", "a layer, ms", "over the best", "best"])
    best_us = plan.choices[0][0]
    for layer_us, knobs in plan.choices:
        ends = [name for name, best in zip(ENDS, plan.at_ends, strict=True) if best == knobs]
        where = ["here", *ends] if knobs == plan.choices[0][1] else ends
        table.add_row(_knobs(knobs), digits(layer_us / 1e3), f"{layer_us / best_us:.2f}", ", ".join(where))
    table.caption = "The rows of one layer through the experts and back; best here, and at the ends of the ranges."
    table.caption_justify = "left"
    return [table]


def _knobs(knobs: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if name == "schedule" else f"{name} {value}" for name, value in knobs.items())


def _bounds(plan: Plan) -> list[Table]:
    table = _table(f"what bounds {plan.title}", ["if this took no time", "a step would take, ms", "shorter by"])
    for bound in plan.bounds:
        table.add_row(bound.resource, digits(bound.step_us / 1e3), _percent(bound.saved))
    if plan.job.setup.training.layout != WHOLE:
        table.caption = "The pipeline's bubble is a share of whatever is left."
        table.caption_justify = "left"
    return [table]


def _others(plan: Plan) -> list[Table]:
    if not plan.others:
        return []
    title = f"what else fits, instead of {plan.title} as above"
    table = _table(title, ["change of the ds_config", "to spare, GB", "tokens a second", "times as many"])
    for other in plan.others:
        tps, ratio = with_bar(other.prediction.tps), with_bar(other.ratio)
        table.add_row(other.change, _gb(other.spare_bytes), tps, ratio)
    return [table]


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 or column == "unit" else "right")
    return table


def _figures(rows: Sequence[AuditRow]) -> list[Table]:
    if not rows:
        return []
    table = Table(title="what of the specification's figures can hold here", box=SIMPLE_HEAD, pad_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    for column in ("figure", "stated", "verdict (all columns: the command audit)"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.figure.name, row.figure.stated, row.verdict)
    return [table]


def digits(value: float) -> str:
    """A number with the three digits that a bar leaves it: 412,000, 45.3, 0.0123."""
    size = abs(value)
    if size >= 999.5:
        scale = 10 ** (len(f"{size:.0f}") - 3)
        return f"{scale * round(value / scale):,}"
    decimals = next((count for bound, count in ((99.95, 0), (9.995, 1), (0.9995, 2), (0.09995, 3)) if size >= bound), 4)
    return f"{value:.{decimals}f}" if size else "0"


def with_bar(estimate: Estimate, decimals: int | None = None) -> str:
    """The value, and its bar in brackets where it has one; with so many decimals, or three digits."""
    value, low, high = (
        digits(number) if decimals is None else f"{round(number, decimals) + 0.0:,.{decimals}f}"
        for number in (estimate.value, estimate.low, estimate.high)
    )
    return value + (f" ({low}\u2013{high})" if low != high else "")


def _percent(estimate: Estimate) -> str:
    """A share of 1 in percent."""
    return f"{with_bar(estimate.scaled(100), 1)} %"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"
