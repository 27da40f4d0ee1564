"""A search over layouts for a terminal, and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ds_moe_ep.records.names import title_of
from ds_moe_ep.records.quantity import NONE, Quantity, bar_below, number
from ds_moe_ep.records.render import print_lines, print_tables
from ds_moe_ep.records.table import Table, table
from ds_moe_ep.simulate.layouts.by_traffic import AtRatio
from ds_moe_ep.simulate.layouts.search import FoundLayout, LayoutSearch
from ds_moe_ep.simulate.plan.bounds import FAR, NEAR

DIGITS = 3  # that a bar leaves a number
LONG = 10_000_000  # tokens per second with whose bars a row has more than NARROW columns
NARROW = 100  # columns of a console below which cells are shortened, so that none is cut
NARROW_HEAD = ("layout", "micro", "1,000 tokens/s", "of the best", "hidden", "GB", "bound")
NARROW_BY_TRAFFIC = ("traffic", "GB/s", "best layout", "1,000 tokens/s", "over the next", "bound")
SHORT = {  # names of resources there
    "matrix products and attention": "products",
    "memory bandwidth": "memory",
    NEAR: "near links",
    FAR: "far links",
    "launches and host": "host",
}
FOOT = "Simulated, not measured; in brackets: all of the cluster's ranges at both ends."
BY_TRAFFIC = ("traffic", "link GB/s", "best layout", "tokens/s", "next", "best over next", "best is bounded by")
HEAD = ("layout", "micro-batch", "tokens/s", "of the best", "hidden", "spare GB", "bounded by")


def print_search(search: LayoutSearch, console: Console) -> None:
    """Prints the layouts that fit, the best first, and those that are left out."""
    setup = search.job.setup
    if not search.found:
        print_lines([f"{search.job.path} on {setup.cluster.name}: no layout fits"], console, style="bold red")
    else:
        best = f"{search.job.path} on {setup.cluster.name}: best in {search.found[0].title}"
        print_lines([best], console, style="bold green")
    notes = [f"note: {note}" for note in search.job.notes]
    print_lines(notes, console, style="yellow")
    if search.found:
        print_tables([_layouts(search, is_narrow=is_narrow(search, console))], console)
    print_lines(list(_others(search)), console)
    print_lines([FOOT], console, style="dim")


def is_narrow(search: LayoutSearch, console: Console) -> bool:
    """True where cells are to be shortened: on a narrow console, or for numbers that fill their cells."""
    return console.width < NARROW or max(each.prediction.tps.value for each in search.found) >= LONG


def search_values(search: LayoutSearch) -> dict[str, Any]:
    """The search as plain values, for JSON."""
    return {
        "job": search.job.path,
        "cluster": search.job.setup.cluster.name,
        "batch": search.job.setup.training.batch,
        "layouts": [_values(search, each) for each in search.found],
        "slower": list(search.slower),
        "too_large": {each.system: each.reason for each in search.too_large},
        "impossible": {each.system: each.reason for each in search.impossible},
    }


def print_by_traffic(found: Sequence[AtRatio], console: Console) -> None:
    """Prints the best layout at each ratio of traffic to compute, and how far the next one is behind."""
    job, setup = found[0].search.job, found[0].search.job.setup
    winners = dict.fromkeys(title_of(at.search.found[0].system) for at in found if at.search.found)
    head = f"{job.path} on {setup.cluster.name}, by links between nodes: {', then '.join(winners) or 'nothing fits'}"
    print_lines([head], console, style="bold green" if winners else "bold red")
    print_lines([f"note: {note}" for note in job.notes], console, style="yellow")
    title = f"best of the layouts of {setup.training.batch:,} sequences per batch on {setup.training.world_size} ranks"
    basis = (
        "Traffic: of the experts' rows where all ranks share the experts and nothing is hidden, over the compute of a "
        "step. Best over next: both at the same end of the cluster's ranges."
    )
    is_narrow = console.width < NARROW
    rows = [_winner(at, is_narrow=is_narrow) for at in found]
    print_tables([table(title, NARROW_BY_TRAFFIC if is_narrow else BY_TRAFFIC, rows, basis)], console)
    print_lines([FOOT], console, style="dim")


def _winner(at: AtRatio, *, is_narrow: bool) -> tuple[str, ...]:
    ratio, link = number(at.ratio, significant=3), number(at.cluster.far.bandwidth / 1e3)
    if not at.search.found:
        return (ratio, link, *[NONE] * (4 if is_narrow else 5))
    best, lead = at.search.found[0], at.lead
    behind = NONE if lead is None else _title(at.search.found[1], is_narrow)
    by = NONE if lead is None else lead.text(2) + ("" if at.is_told_apart else ", not at both ends")
    second = (f"{behind}\n{bar_below(by)}",) if is_narrow else (behind, by)
    return ratio, link, _title(best, is_narrow), _tokens(best, is_narrow), *second, _bound(best, is_narrow)


def _title(layout: FoundLayout, is_narrow: bool) -> str:
    return layout.title.removesuffix(" overlapped") if is_narrow else layout.title


def _tokens(layout: FoundLayout, is_narrow: bool) -> str:
    tps = layout.prediction.tps
    return bar_below(_text(tps.scaled(1e-3))) if is_narrow else _text(tps)


def _bound(layout: FoundLayout, is_narrow: bool) -> str:
    saved = layout.bound["saved_ratio"].percent(bar=False)
    return f"{SHORT[layout.bound.title]}:\n{saved}" if is_narrow else f"{layout.bound.title}: {saved}"


def _layouts(search: LayoutSearch, *, is_narrow: bool) -> Table:
    rows = []
    for each in search.found:
        hidden = each.prediction.hidden
        rows.append(
            (
                _title(each, is_narrow),
                f"{each.training.micro_batch} x {each.training.accumulation}",
                _tokens(each, is_narrow),
                bar_below(_text(search.over_best(each))) if is_narrow else _text(search.over_best(each)),
                NONE if hidden is None else hidden.percent(bar=False),
                number(each.fit.spare_bytes / 1e9, 1),
                _bound(each, is_narrow),
            )
        )
    batch = search.job.setup.training.batch
    title = f"layouts of {batch:,} sequences per batch on {search.job.setup.training.world_size} ranks"
    basis = "Bounded by what would save most if it took no time, with the share of a step that it would save."
    return table(title, NARROW_HEAD if is_narrow else HEAD, rows, basis)


def _others(search: LayoutSearch) -> list[str]:
    lines = []
    if search.slower:
        lines.append(f"slower: {', '.join(title_of(system) for system in search.slower)}")
    if search.too_large:
        lines.append(f"do not fit: {', '.join(title_of(each.system) for each in search.too_large)}")
    if search.impossible:
        lines.append(f"cannot work (--json says why): {', '.join(title_of(each.system) for each in search.impossible)}")
    return lines


def _values(search: LayoutSearch, layout: FoundLayout) -> dict[str, Any]:
    training, tps, hidden = layout.training, layout.prediction.tps, layout.prediction.hidden
    return {
        "system": layout.system,
        "tp_size": training.layout.tp_size,
        "pp_size": training.layout.pp_size,
        "ep_size": training.ep_size,
        "micro_batch": training.micro_batch,
        "accumulation": training.accumulation,
        "tokens_per_s": [tps.value, tps.low, tps.high],
        "over_best": search.over_best(layout).value,
        "hidden": None if hidden is None else hidden.value,
        "spare_bytes": layout.fit.spare_bytes,
        "bound": {"resource": layout.bound.title, "saved": layout.bound["saved_ratio"].value},
        "schedule": layout.prediction.step.setup.moe.schedule,
    }


def _text(quantity: Quantity) -> str:
    return quantity.text(digits=DIGITS)
