"""Checks in a few lines or as tables for a terminal, knobs and claims as Markdown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Literal, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.text import Text

from ds_moe_ep.check.config import Check, ModelCheck
from ds_moe_ep.check.pipeline import PipelineCheck
from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.config.training import WHOLE
from ds_moe_ep.kernels.attention_path import PATHS, attention_path
from ds_moe_ep.records.quantity import counted, number, percent, size
from ds_moe_ep.records.render import print_lines, print_tables, to_markdown
from ds_moe_ep.records.table import Table, table
from ds_moe_ep.sizing.footprint import Memory, Parameters
from ds_moe_ep.sizing.pipeline import bubble
from ds_moe_ep.specification.claim import Figure

ROWS_OF_MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "master weights and optimizer states",
    "activations": "activations of a micro-batch (backward)",
    "buffers": "DeepSpeed's gradient buckets (backward)",
    "step": "fp32 gradients of a step (not beside the two above)",
}
BESIDE_THE_POINT = {"schedule", "attention on GPUs", "precision"}  # of the few lines
MANY_TIMES = 100  # the mean rows: from there on nobody asks for a tenth
FEW_NOTES = 1  # beside the few lines; keys that DeepSpeed ignores come first
DERIVED = "All numbers are derived from shapes; none of them was measured."


def print_check(check: Check, console: Console | None = None, *, verbose: bool = False) -> None:
    """Prints `check` for people: what it would run in a few lines, or every table."""
    console = console or Console()
    console.print(Text(f"{check.path}: can run", style="bold green"), soft_wrap=True)  # one line, however long the path
    if verbose:
        print_tables(_tables(check), console)
        console.print()
    else:
        job = {name: text for name, text in _job(check).items() if name not in BESIDE_THE_POINT}
        print_lines(job | _memory_told(check), console)
    told = check.notes if verbose else check.notes[:FEW_NOTES]
    notes = [f"note: {note}" for note in told]
    print_lines(notes if verbose else [one_line(note, console.width) for note in notes], console, style="yellow")
    if not verbose:
        left = len(check.notes) - len(told)
        more = f"All tables, {counted(left, 'more note')}" if left else "All tables"
        print_lines([f"Derived from shapes, not measured. {more}: --verbose"], console, style="dim")
    elif check.details is not None:
        print_lines([DERIVED], console, style="dim")


def one_line(text: str, width: int) -> str:
    """The text, or its first clauses that a line has room for; of a clause that is longer, its first words."""
    if len(text) <= width:
        return text
    room = text[: width - 1]
    clauses = max(room.rfind("; "), room.rfind(", "))
    end = clauses if clauses > width // 3 else room.rfind(" ")
    return f"{room[:end]} …"


def knob_table(config: type[MoEConfig] | type[ModelConfig] | type[Layout]) -> str:
    """The knobs of `config` as a Markdown table: name, help, default, values."""
    hints = get_type_hints(config)
    rows = [
        (f"`{f.name}`", f.metadata["help"], f"`{json.dumps(f.default)}`", _kinds(hints[f.name]))
        for f in dataclasses.fields(config)
    ]
    return to_markdown(table("", ("knob", "meaning", "default", "values"), rows, text_columns=4))


def figure_table(claims: Iterable[Figure]) -> str:
    """The claims as a Markdown table."""
    rows = [(claim.name, claim.stated, claim.derived, claim.verdict) for claim in claims]
    return to_markdown(table("", ("figure", "stated", "derived", "verdict"), rows, text_columns=4))


def _kinds(hint: object) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in get_args(hint))
    if get_args(hint):
        return " or ".join(_kinds(kind) for kind in get_args(hint))
    return "null" if hint is type(None) else str(getattr(hint, "__name__", hint))


def _tables(check: Check) -> list[Table]:
    job = _job(check) | {"optimizer": f"{check.training.optimizer}, ZeRO stage {check.training.zero_stage}"}
    tables = [table("job", ("", ""), job.items(), text_columns=2)]
    if isinstance(check.details, PipelineCheck):
        tables += _pipeline_tables(check, check.details)
    elif check.details is not None:
        tables.append(_parameters(check.details.parameters, check.details.rank_parameters))
        tables.append(_memory(check.details.memory, check))
        tables.append(_plain("work", _work(check, check.details)))
    if check.figures:
        rows = [(claim.name, claim.stated, claim.derived) for claim in check.figures]
        title = "the specification's figures (verdicts: python -m ds_moe_ep figures)"
        tables.append(table(title, ("figure", "stated", "derived"), rows, text_columns=3))
    return tables


def _plain(title: str, rows: dict[str, str]) -> Table:
    return table(title, ("", ""), rows.items())


def _choice(moe: MoEConfig) -> str:
    """The choice of experts, in words."""
    groups = f" in {moe.topk_group} of {moe.n_group} groups" if moe.n_group > 1 else ""
    return "forced even routing" if moe.force_even else f"top-{moe.top_k}{groups}"


def _job(check: Check) -> dict[str, str]:
    """Ranks, experts, routing, schedule, precision and batch, each by its name."""
    moe, training, layout = check.moe, check.training, check.training.layout
    micro_batches = counted(training.accumulation, "micro-batch", "micro-batches")
    capacity = "dropless" if moe.capacity_factor is None else f"capacity factor {moe.capacity_factor:g}"
    if layout == WHOLE:
        ranks = f"{counted(training.num_replicas, 'group')} x {counted(moe.ep_size, 'rank')}"
        place, copies = f"{moe.num_local_experts} on a rank", counted(training.num_copies, "rank")
        if training.sharing_ranks > 1:
            copies = f"{counted(training.num_copies, 'copy', 'copies')} of {training.sharing_ranks} ranks"
        schedule = f"{moe.schedule}, depth {moe.depth}, {moe.transport}"
    else:
        copies = counted(training.num_copies, "copy", "copies")
        stages, tensor_ranks = counted(layout.pp_size, "stage"), counted(layout.tp_size, "tensor rank")
        ranks = f"{copies} x {stages} x {tensor_ranks}"
        share = f"1/{layout.tp_size} of each" if moe.ep_size == 1 else f"{moe.num_local_experts}"
        place = f"{share} on a rank of the layer's stage"
        schedule = f"1F1B of {micro_batches}, bubble {percent(bubble(training))}"
    attention = {}
    if check.details is not None:
        path = attention_path(check.details.model.head_size, "cuda")
        attention = {"attention on GPUs": f"{PATHS[path]}, heads of {check.details.model.head_size}"}
    summed = "" if training.gradient_precision == training.precision else f", summed in {training.gradient_precision}"
    return {
        "ranks": f"{training.world_size} = {ranks}",
        "experts": f"{moe.num_experts} per layer, {place}{_slots(check)}",
        "routing": f"{_choice(moe)}, {moe.score}, {capacity}, balance {moe.balance}",
        "schedule": schedule,
        **attention,
        "precision": training.precision + summed,
        "batch": f"{counted(training.batch, 'sequence')} = {training.micro_batch} x {micro_batches} x {copies}",
    }


def _memory_told(check: Check) -> dict[str, str]:
    """The largest sum of a GPU's memory, and for how much more there is room."""
    details, budget = check.details, check.budget
    if details is None:
        return {}
    if isinstance(details, PipelineCheck):
        room = f"micro-batches of up to {details.largest_micro_batch:,} fit"
    else:
        times = number(details.load_that_fits, 1 if details.load_that_fits < MANY_TIMES else 0)
        room = f"up to {times} x the mean rows fit"
    of = f"{budget.gpu_gb - budget.reserve_gb:g} GB ({budget.reserve_gb:g} in reserve)"
    return {"per GPU": f"{size(details.memory.peak)} of {of}; {room}"}


def _slots(check: Check) -> str:
    """Words on the slots for copies of other ranks' experts, with their memory on a GPU; none where there are none."""
    memory = None if check.details is None else check.details.memory
    if memory is None or not memory.replicas:
        return ""
    return f", and slots for {check.moe.replicas} replicas ({size(memory.replicas)})"


def _parameters(whole: Parameters, rank: Parameters, place: str = "one rank") -> Table:
    rows = [
        (kind.replace("_", " "), f"{count:,}", f"{getattr(rank, kind):,}")
        for kind, count in vars(whole).items()
        if count
    ]
    rows.append(("total", f"{whole.total:,}", f"{rank.total:,}"))
    return Table("parameters", ("kind", "model", place), tuple(rows), strong_rows=frozenset((len(rows) - 1,)))


def _memory(memory: Memory, check: Check, title: str = "memory of one GPU", **labels: str) -> Table:
    rows = [(label, size(getattr(memory, kind))) for kind, label in {**ROWS_OF_MEMORY, **labels}.items()]
    if memory.replicas:
        rows.insert(
            3, (f"replicas ({check.moe.replicas} per rank and layer) and their gradients", size(memory.replicas))
        )
    if memory.host_optimizer:
        rows.append(("in the host's memory instead", size(memory.host_optimizer)))
    rows.append(("largest sum at once", size(memory.peak)))
    budget = check.budget
    rows.append(("budget", f"{budget.gpu_gb:g} GB - {budget.reserve_gb:g} GB reserve"))
    return Table(title, ("kind", "size"), tuple(rows), strong_rows=frozenset((len(rows) - 2,)))


def _work(check: Check, details: ModelCheck) -> dict[str, str]:
    layers, moe = details.model.num_layers, check.moe
    return {
        "tokens of a rank's micro-batch": f"{details.micro_batch_tokens:,}",
        "tokens of a batch": f"{details.batch_tokens:,}",
        "mean rows of a rank from its group": f"{details.micro_batch_tokens * moe.top_k:,}",
        "rows that an expert takes from a rank": (
            "no limit" if details.capacity_rows is None else f"{details.capacity_rows:,}"
        ),
        "fits while the fullest rank gets": f"{number(details.load_that_fits, 1)} x the mean rows",
        "dispatch per rank, layer and micro-batch": size(details.dispatch_bytes),
        f"  x 4 (combine, backward) x {layers} layers": size(4 * layers * details.dispatch_bytes),
        **_arithmetic(details.forward_flops, details.training_flops, details.model),
    }


def _arithmetic(forward: int, training: int, model: ModelConfig) -> dict[str, str]:
    again = " + 1/3 to recompute" if model.recompute else ""
    return {
        "arithmetic per token, forward": f"{number(forward / 1e9)} GFLOP",
        "arithmetic per token, training": f"{number(training / 1e9)} GFLOP{again}",
    }


def _pipeline_tables(check: Check, details: PipelineCheck) -> list[Table]:
    stage, num_stages = details.stage, check.training.layout.pp_size
    title = f"memory of one GPU of stage {stage.index}, the fullest of {num_stages}"
    activations = "activations of the micro-batches in flight (backward)"
    return [
        _parameters(details.parameters, stage.parameters, f"one rank of stage {stage.index}"),
        _memory(stage.memory, check, title, activations=activations),
        _plain("work", _pipeline_work(check, details)),
    ]


def _pipeline_work(check: Check, details: PipelineCheck) -> dict[str, str]:
    work, training = details.work, check.training
    layers = details.model.num_layers // training.layout.pp_size
    forward = 2 if check.moe.ep_size == 1 else 1
    passes = f"{forward} forward, {work.all_reduces - forward} backward"
    experts = {}
    if check.moe.ep_size > 1:
        experts["dispatch per rank, layer and micro-batch"] = size(work.dispatch_bytes)
        moved = 4 * layers * work.dispatch_bytes
        experts[f"  x 4 (combine, backward) x {layers} layers of a stage"] = size(moved)
    return {
        "tokens of a micro-batch, all on each rank": f"{work.micro_batch_tokens:,}",
        "tokens of a batch": f"{work.batch_tokens:,}",
        "fits with micro-batches of up to": f"{details.largest_micro_batch:,} sequences",
        "all-reduce per rank, layer and micro-batch": size(work.all_reduce_bytes),
        f"  x {work.all_reduces} ({passes}) x {layers} layers x {training.accumulation}": size(
            work.step_all_reduce_bytes
        ),
        **experts,
        "message of a rank to the next stage, and back": size(work.send_bytes),
        "  gathered behind it in the tensor group": size(work.gather_bytes),
        "bubble of a step": percent(work.bubble),
        **_arithmetic(work.forward_flops, work.training_flops, details.model),
    }
