"""Plans and comparisons for a terminal. In brackets is what the simulation gives at both ends of the ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from ds_moe_ep.config.training import WHOLE
from ds_moe_ep.kernels.attention_path import PATHS
from ds_moe_ep.records.names import KINDS
from ds_moe_ep.records.quantity import NONE, Quantity, bar_below, counted, number, percent
from ds_moe_ep.records.render import print_lines, print_tables, to_terminal
from ds_moe_ep.records.table import Table, quantity_table, table
from ds_moe_ep.simulate.job.fit import MemoryFit
from ds_moe_ep.simulate.job.replicas import ReplicaGain
from ds_moe_ep.simulate.plan.plan import PARTS, Comparison, Plan, group_of
from ds_moe_ep.specification.verdicts import place_in_range

DIGITS = 3  # that a bar leaves a number
MORE = "Simulated, not measured; brackets: the cluster's ranges. All tables: --verbose"
IN_A_FEW_WORDS = {"torch": "torch's kernel", "flash": "a flash kernel", "blocks": "blocks of queries"}  # of attention
FOOT = (
    "Simulated from the cluster's stated numbers; nothing was measured. In brackets: all of its ranges at their slower "
    "ends, and all at their faster ones. The simulation's own error, on measured runs, is what calibrate tells."
)
ENDS = ("slower", "faster")
MODES = {"training": "training", "forward": "forward passes alone"}


def print_plan(plan: Plan, console: Console) -> None:
    """Prints the answers of one job's plan in a few lines."""
    head = f"{plan.job.path} on {plan.job.setup.cluster.name}: fits, {_spare(plan.fit)} GB free"
    print_lines([head], console, style="bold green")
    _print_notes([plan], console)
    print_lines(answers(plan), console)
    print_lines([MORE], console, style="dim")


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints two plans side by side in a few lines: the batches first where they differ, and the ratio."""
    plans = comparison.ours, comparison.theirs
    jobs = " and ".join(plan.job.path for plan in plans)
    print_lines([f"{jobs} on {plans[0].job.setup.cluster.name}: both fit"], console, style="bold green")
    _print_notes(plans, console)
    warning, ratio = ratio_told(comparison)
    print_lines(warning, console, style="yellow")
    both = [answers(plan, in_brief=True) for plan in plans]
    cells = [(name, *(its.get(name, NONE) for its in both)) for name in both[0] | both[1]]  # replicas: of one, or none
    grid = table("", ("", *(plan.title for plan in plans)), cells, text_columns=3)
    console.print(to_terminal(grid))
    print_lines(ratio, console, style="bold")
    print_lines([MORE], console, style="dim")


def answers(plan: Plan, *, in_brief: bool = False) -> dict[str, str]:
    """Throughput, traffic hidden, utilization, the bound and the fastest change, each by its name."""
    named = {quantity.name: quantity for quantity in plan.quantities}
    hidden, bound = named.get("hidden"), plan.bounds[0]
    faster = [other for other in plan.others if other["tps_ratio"].value > 1]
    fastest = f"{_text(faster[0]['tps_ratio'])} times with {faster[0].title}" if faster else ""
    gain = attention = ""
    if not in_brief:
        attention = f"; attention: {IN_A_FEW_WORDS[plan.attention]}"
        gain = f"; {_text(plan.gain)} times as fast as serial" if plan.gain is not None else ""
    replicas = {"replicas": _replicas_in_brief(plan.replicas)} if plan.replicas is not None else {}
    return {
        "tokens per second": _text(named["tps"]),
        "traffic hidden": f"{_text(hidden)} %{gain}" if hidden is not None else "none: no experts' traffic",
        **replicas,
        "utilization": f"{_text(named['mfu'])} % of the peak{attention}",
        "bounded by": f"{bound.title}: {bound['saved_ratio'].percent()} of a step",
        "faster": fastest or "no change of the file that fits",
        "largest": f"micro-batches of up to {_largest(plan.fit)}",
    }


def _replicas_in_brief(gain: ReplicaGain) -> str:
    """Gain by replicas, in one line."""
    return f"{_text(gain.over_none)} times as fast as without them: {gain.num_copies} copies"


def replicas_told(gain: ReplicaGain) -> str:
    """Replicas in use and what they bring."""
    return (
        f"{_text(gain.over_none)} times without them, {_text(gain.over_even)} of an even load's: {gain.num_copies} "
        f"copies; the fullest rank {number(gain.fullest, 2)} times the mean rows, not {number(gain.fullest_without, 2)}"
    )


def print_all(plans: Sequence[Plan], comparison: Comparison | None, console: Console) -> None:
    """Prints every table of one plan, or of two side by side; what concerns one of two stands below the other's."""
    for plan in plans:
        _print_head(plan, console)
    warning, ratio = ratio_told(comparison) if comparison is not None else ([], [])
    print_lines(warning, console, style="yellow")
    tables = [_memory(plans), _step(plans), _parts(plans)]
    for make in (_choices, _bounds, _others):
        tables += [found for plan in plans for found in make(plan)]
    print_tables(tables, console)
    console.print()
    print_lines([line for plan in plans for line in told(plan)], console)
    print_lines(ratio, console, style="bold")
    print_lines([FOOT], console, style="dim")


def told(plan: Plan) -> Iterator[str]:
    """The bound of the job, what its schedule hides, and the specification's throughput beside it, as sentences."""
    first = plan.bounds[0]
    yield (
        f"{plan.title} is bounded by {first.title}: if they took no time, a step would be "
        f"{first['saved_ratio'].percent()} shorter."
    )
    if plan.gain is not None:
        yield f"{plan.title} has {_text(plan.gain)} times the throughput of the same job where nothing is hidden."
    if plan.replicas is not None:
        yield f"Replicas: {replicas_told(plan.replicas)}."
    if plan.stated is not None:
        yield _stated(plan)


def _stated(plan: Plan) -> str:
    """The specification's throughput: the utilization that it needs, and the verdict by the plan's bar."""
    assert plan.stated is not None
    stated, tps, setup = plan.stated, plan.prediction.tps, plan.job.setup
    (mfu,) = (quantity for quantity in plan.quantities if quantity.name == "mfu")
    needed = stated.repeated if setup.mode == "training" else stated.forward
    if needed > 1:
        verdict = "beyond the peak"
    else:
        place = place_in_range(stated.tps, tps.low, tps.high)
        verdict = {
            "above": "more than is predicted",
            "below": "less than is predicted",
            "within": "within the bar of what is predicted",
        }[place]
    repeated = f" ({percent(stated.repeated, 0)} with recomputation)" if stated.repeated > stated.training else ""
    return (
        f"The specification states {number(stated.tps)} tokens/s for {plan.title}: {percent(stated.training, 0)} of "
        f"the peak of {setup.training.world_size} devices when training{repeated}, {percent(stated.forward, 0)} "
        "forward. "
        f"Predicted for {MODES[setup.mode]}: {_text(tps)} tokens/s, {mfu.text(1)} % of the peak. "
        f"What is stated is {verdict}. All of its figures: the command audit."
    )


def ratio_told(comparison: Comparison) -> tuple[list[str], list[str]]:
    """The warning where the batches differ; and the ratio of the throughputs, at equal batches first."""
    ours, theirs = comparison.ours, comparison.theirs
    batches = [plan.job.setup.training.batch for plan in (ours, theirs)]
    names, ratio = f"{ours.title} over {theirs.title}", _text(comparison.ratio)
    ends = "both at the same end of the cluster's ranges"
    if batches[0] == batches[1]:
        return [], [f"{names}: {ratio} times the tokens per second, {ends}."]
    warning = f"warning: the batches differ ({batches[0]:,} and {batches[1]:,} sequences)"
    if comparison.same_batch is None:
        return [f"{warning}: compare tokens, not steps"], [f"{names}: {ratio} times the tokens per second, {ends}."]
    equal = f"With {batches[0]:,} in both, {names}: {_text(comparison.same_batch)} times the tokens per second"
    return [f"{warning}; the columns are as the files say"], [f"{equal} ({ratio} as the files say), {ends}."]


def _print_head(plan: Plan, console: Console) -> None:
    setup = plan.job.setup
    training, cluster = setup.training, setup.cluster
    print_lines([f"{plan.job.path} on {cluster.name}: fits"], console, style="bold green")
    batch = f"{training.batch:,} sequences per batch = {training.micro_batch} x {training.accumulation} micro-batches"
    ranks = f"{training.world_size} ranks on {cluster.num_nodes} nodes"
    lines = [f"{plan.title}, {MODES[setup.mode]}, {ranks}; {batch} x {training.num_copies}"]
    lines.append(f"attention by {PATHS[plan.attention]}, heads of {setup.model.head_size}")
    if setup.loads:
        lines.append(f"load: the fullest rank receives {number(max(setup.loads), 2)} times the mean rows")
    print_lines(lines, console)
    _print_notes([plan], console)


def _print_notes(plans: Sequence[Plan], console: Console) -> None:
    print_lines([f"note: {note}" for plan in plans for note in plan.job.notes], console, style="yellow")


def _memory(plans: Sequence[Plan]) -> Table:
    kinds = {**KINDS, "step": "fp32 gradients of a step (not beside activations and buffers)"}
    rows = [(title, *(_gb(getattr(plan.fit.memory, kind)) for plan in plans)) for kind, title in kinds.items()]
    if any(plan.fit.memory.replicas for plan in plans):
        rows.append(("replicas and their gradients", *(_gb(plan.fit.memory.replicas) for plan in plans)))
    if any(plan.fit.memory.host_optimizer for plan in plans):
        rows.append(("in the host's memory instead", *(_gb(plan.fit.memory.host_optimizer) for plan in plans)))
    device = plans[0].fit
    room = f"{_gb(device.device_bytes)} - {_gb(device.reserve_bytes)} reserve"
    rows += [
        ("largest sum at once", *(_gb(plan.fit.memory.peak) for plan in plans)),
        ("there is (reserve: driver, NCCL, fragmentation)", *[room] * len(plans)),
        ("to spare", *(_spare(plan.fit) for plan in plans)),
        ("largest micro-batch that fits", *(_largest(plan.fit) for plan in plans)),
    ]
    strong = frozenset((len(rows) - 4, len(rows) - 2))
    return Table("memory of one device, GB", ("kind", *(plan.title for plan in plans)), tuple(rows), strong_rows=strong)


def _largest(fit: MemoryFit) -> str:
    divides = "" if fit.largest == fit.largest_of_batch else f"; {fit.largest_of_batch:,} divides the batch"
    return f"{counted(fit.largest, 'sequence')}{divides}"


def _spare(fit: MemoryFit) -> str:
    return _text(Quantity.of(fit.spare_bytes, *fit.spare_range, unit="bytes").into("GB"))


def _step(plans: Sequence[Plan]) -> Table:
    return quantity_table("a step", {plan.title: group_of(plan.quantities) for plan in plans}, digits=DIGITS)


def _parts(plans: Sequence[Plan]) -> Table:
    columns = {plan.title: group_of(plan.quantities, PARTS) for plan in plans}
    return quantity_table("where a step's time goes", columns, digits=DIGITS)


def _choices(plan: Plan) -> Iterator[Table]:
    if plan.choices:
        best, rows = plan.choices[0], []
        for choice in plan.choices:
            knobs, layer_ms = choice.labels, choice["layer_ms"]
            ends = [name for name, its in zip(ENDS, plan.at_ends, strict=True) if its == knobs]
            over_best = number(layer_ms.value / best["layer_ms"].value, 2)
            where = ["here", *ends] if choice is best else ends
            rows.append((_knobs(knobs), _text(layer_ms), over_best, ", ".join(where)))
        basis = "The rows of one layer through the experts and back; best here, and at the ends of the ranges."
        title = f'schedules that "auto" of {plan.title} would choose among'
        yield table(title, ("schedule", "per layer, ms", "over the best", "best"), rows, basis)


def _knobs(knobs: Mapping[str, Any]) -> str:
    return ", ".join(str(value) if name == "schedule" else f"{name} {value}" for name, value in knobs.items())


def _bounds(plan: Plan) -> Iterator[Table]:
    rows = [(b.title, _text(b["step_ms"]), b["saved_ratio"].percent()) for b in plan.bounds]
    is_cut = plan.job.setup.training.layout != WHOLE
    basis = ["The pipeline's bubble is a share of whatever is left."] if is_cut else []
    head = ("if this took no time", "a step would take, ms", "shorter by")
    yield table(f"bounds of {plan.title}", head, rows, *basis)


def _others(plan: Plan) -> Iterator[Table]:
    if plan.others:
        rows = []
        for other in plan.others:
            thousands, ratio = other["throughput_tokens_per_s"].scaled(1e-3), other["tps_ratio"]
            numbers = (bar_below(_text(quantity)) for quantity in (thousands, ratio))
            rows.append((other.title.replace(" and ", " and\n"), _gb(other["spare_bytes"].value), *numbers))
        head = ("change of the ds_config", "spare GB", "1,000 tokens/s", "times as many")
        yield table(f"changes that fit, instead of {plan.title} as above", head, rows)


def _text(quantity: Quantity) -> str:
    return quantity.text(digits=DIGITS)


def _gb(num_bytes: float) -> str:
    return number(num_bytes / 1e9, 2)
