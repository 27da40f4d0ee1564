"""Checks as tables for a terminal, knobs and figures as Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Literal, get_args, get_origin, get_type_hints

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ds_moe_ep.check.config import Check, ModelCheck
from ds_moe_ep.check.pipeline import PipelineCheck
from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.sizing.footprint import Memory, Parameters
from ds_moe_ep.sizing.pipeline import bubble
from ds_moe_ep.specification.derived import Figure

ROWS_OF_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "master weights and optimizer states",
    "activations": "activations of a micro-batch (backward)",
    "buffers": "DeepSpeed's gradient buckets (backward)",
    "step": "fp32 gradients of a step (not beside the two above)",
}


def print_check(check: Check, console: Console | None = None) -> None:
    """Prints `check` for people."""
    console = console or Console()
    console.print(Text(f"{check.path}: can run", style="bold green"))
    tables = [_job(check)]
    if isinstance(check.details, PipelineCheck):
        tables += _pipeline_tables(check, check.details)
    elif check.details is not None:
        tables.append(_parameters(check.details.parameters, check.details.rank_parameters))
        tables.append(_memory(check.details.memory, check))
        tables.append(_work(check, check.details))
    if check.figures:
        tables.append(_figures(check.figures))
    for table in tables:
        console.print("", table, sep="\n")
    console.print()
    for note in check.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    if check.details is not None:
        console.print(Text("All numbers are derived from shapes; none of them was measured.", style="dim"))


def knob_table(config: type[MoEConfig] | type[ModelConfig] | type[Layout]) -> str:
    """The knobs of `config` as a Markdown table: name, values, default, help."""
    hints = get_type_hints(config)
    rows = [
        (f"`{f.name}`", _kinds(hints[f.name]), f"`{json.dumps(f.default)}`", f.metadata["help"])
        for f in dataclasses.fields(config)
    ]
    return markdown(("knob", "values", "default", "meaning"), rows)


def figure_table(figures: Iterable[Figure]) -> str:
    """The figures as a Markdown table."""
    rows = [(f.name, f.stated, f.derived, f.verdict) for f in figures]
    return markdown(("figure", "stated", "derived", "verdict"), rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _kinds(hint: object) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in get_args(hint))
    kinds = get_args(hint) or (hint,)
    return " or ".join("null" if kind is type(None) else str(getattr(kind, "__name__", kind)) for kind in kinds)


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD if any(columns) else None,
        show_header=any(columns),
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _job(check: Check) -> Table:
    moe, training = check.moe, check.training
    capacity = "dropless" if moe.capacity_factor is None else f"capacity factor {moe.capacity_factor:g}"
    ranks, place, schedule, copies = (_cut_model if training.layout.size > 1 else _whole_model)(check)
    table = _table("job", "", "")
    table.add_row("ranks", ranks)
    table.add_row("experts of a layer", f"{moe.num_experts}, {place}")
    table.add_row("routing", f"top-{moe.top_k}, {moe.score}, {capacity}, balance {moe.balance}")
    table.add_row("schedule", schedule)
    summed = "" if training.gradient_precision == training.precision else f", summed in {training.gradient_precision}"
    table.add_row("precision", training.precision + summed)
    table.add_row("optimizer", f"{training.optimizer}, ZeRO stage {training.zero_stage}")
    cut = f"{training.micro_batch} x {training.accumulation} micro-batches x {copies}"
    table.add_row("batch in sequences", f"{training.batch:,} = {cut}")
    return table


def _whole_model(check: Check) -> tuple[str, str, str, str]:
    """What the job's table says of ranks, a rank's experts, schedule and batch, where experts are whole."""
    moe, training = check.moe, check.training
    return (
        f"{training.world_size} = {training.num_replicas} groups x {moe.ep_size} ranks",
        f"{moe.num_local_experts} on a rank",
        f"{moe.schedule}, depth {moe.depth}, {moe.transport}",
        f"{training.world_size} ranks",
    )


def _cut_model(check: Check) -> tuple[str, str, str, str]:
    """The same where a layout cuts the model."""
    training, layout = check.training, check.training.layout
    shape = f"{training.num_copies} copies x {layout.pp_size} stages x {layout.tp_size} tensor ranks"
    return (
        f"{training.world_size} = {shape}",
        f"1/{layout.tp_size} of each on a rank of the layer's stage",
        f"1F1B of {training.accumulation} micro-batches, bubble {100 * bubble(training):.1f} %",
        f"{training.num_copies} copies",
    )


def _parameters(whole: Parameters, rank: Parameters, place: str = "one rank") -> Table:
    table = _table("parameters", "kind", "model", place)
    for kind, count in vars(whole).items():
        if count:
            table.add_row(kind.replace("_", " "), f"{count:,}", f"{getattr(rank, kind):,}")
    table.add_row("total", f"{whole.total:,}", f"{rank.total:,}", style="bold")
    return table


def _memory(memory: Memory, check: Check, title: str = "memory of one GPU", **labels: str) -> Table:
    table = _table(title, "kind", "size")
    for kind, label in {**ROWS_OF_MEMORY, **labels}.items():
        table.add_row(label, size(getattr(memory, kind)))
    if memory.host_optimizer:
        table.add_row("in the host's memory instead", size(memory.host_optimizer))
    table.add_row("largest sum at once", size(memory.peak), style="bold")
    budget = check.budget
    table.add_row("budget", f"{budget.gpu_gb:g} GB - {budget.reserve_gb:g} GB reserve")
    return table


def _work(check: Check, details: ModelCheck) -> Table:
    layers, moe = details.model.num_layers, check.moe
    capacity = "no limit" if details.capacity_rows is None else f"{details.capacity_rows:,}"
    again = " + 1/3 to recompute" if details.model.recompute else ""
    table = _table("work", "", "")
    table.add_row("tokens of a rank's micro-batch", f"{details.micro_batch_tokens:,}")
    table.add_row("tokens of a batch", f"{details.batch_tokens:,}")
    table.add_row("mean rows of a rank from its group", f"{details.micro_batch_tokens * moe.top_k:,}")
    table.add_row("rows an expert takes from a rank", capacity)
    table.add_row("fits while the fullest rank gets", f"{details.load_that_fits:.1f} x the mean rows")
    table.add_row("dispatch of a rank, layer and micro-batch", size(details.dispatch_bytes))
    table.add_row(f"  x 4 (combine, backward) x {layers} layers", size(4 * layers * details.dispatch_bytes))
    table.add_row("arithmetic of a token, forward", f"{details.forward_flops / 1e9:.3g} GFLOP")
    table.add_row("arithmetic of a token, training", f"{details.training_flops / 1e9:.3g} GFLOP{again}")
    return table


def _pipeline_tables(check: Check, details: PipelineCheck) -> list[Table]:
    stage, num_stages = details.stage, check.training.layout.pp_size
    title = f"memory of one GPU of stage {stage.index}, the fullest of {num_stages}"
    activations = "activations of the micro-batches in flight (backward)"
    return [
        _parameters(details.parameters, stage.parameters, f"one rank of stage {stage.index}"),
        _memory(stage.memory, check, title, activations=activations),
        _pipeline_work(check, details),
    ]


def _pipeline_work(check: Check, details: PipelineCheck) -> Table:
    work, training = details.work, check.training
    layers = details.model.num_layers // training.layout.pp_size
    again = " + 1/3 to recompute" if details.model.recompute else ""
    passes = f"2 forward, {work.all_reduces - 2} backward"
    table = _table("work", "", "")
    table.add_row("tokens of a micro-batch, all on each rank", f"{work.micro_batch_tokens:,}")
    table.add_row("tokens of a batch", f"{work.batch_tokens:,}")
    table.add_row("fits with micro-batches of up to", f"{details.largest_micro_batch:,} sequences")
    table.add_row("all-reduce of a rank, layer and micro-batch", size(work.all_reduce_bytes))
    times = f"  x {work.all_reduces} ({passes}) x {layers} layers x {training.accumulation}"
    table.add_row(times, size(work.step_all_reduce_bytes))
    table.add_row("message of a rank to the next stage, and back", size(work.send_bytes))
    table.add_row("  gathered behind it in the tensor group", size(work.gather_bytes))
    table.add_row("bubble of a step", f"{100 * work.bubble:.1f} %")
    table.add_row("arithmetic of a token, forward", f"{work.forward_flops / 1e9:.3g} GFLOP")
    table.add_row("arithmetic of a token, training", f"{work.training_flops / 1e9:.3g} GFLOP{again}")
    return table


def _figures(figures: Iterable[Figure]) -> Table:
    table = _table("the specification's figures (verdicts: ds-moe-ep figures)", "figure", "stated", "derived")
    for figure in figures:
        table.add_row(figure.name, figure.stated, figure.derived)
    return table


def size(num_bytes: int) -> str:
    """Bytes in the unit that reads well (1 GB = 1e9 bytes)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:,.2f} {unit}"
    return f"{num_bytes} B"
