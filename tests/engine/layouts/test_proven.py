"""The support matrix of docs/layouts.md: each cell says what the named files train at a stage, and nothing more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests.engine import test_training
from tests.engine.hooks import test_autoep, test_folded_autoep, test_native
from tests.engine.layouts import test_layout_cover, test_sequence_parallel, test_tensor_cover, test_tensor_parallel
from tests.parallel import test_parity
from tests.ranks import REPOSITORY

PAGE = REPOSITORY / "ds_moe_ep" / "docs" / "layouts.md"
KINDS = {"ours": "`MoE`", "hooked": "DeepSpeed's, hooked", "autoep": "AutoEP's, hooked"}
LAYOUTS = {  # as rows begin
    "data": "data parallel",
    "tensor": "TP 2, mpu",
    "autotp": "TP 2, AutoTP",
    "cut": "TP 2, tokens that come cut",
    "stages": "stages",
    "folded": "folded over TP 2",
    "unit": "Ulysses 2, DeepSpeed's unit",
    "megatron": "Ulysses 2, Megatron-DeepSpeed's mpu",
}
NOT_TRIED, REFUSED = "not tried", "refused"
Cell = dict[str, tuple[int, ...]]  # of a precision the footnotes


def rounded(job: Any) -> str:
    return next((each for each in ("bf16", "fp16") if getattr(job, each, False)), "fp32")


def trained() -> Iterator[tuple[int, str, str, int, str]]:
    """(footnote, kind, layout, ZeRO stage, precision) of each job that a file trains beside its reference."""
    job: Any
    for job in (*test_training.IN_FP32, *test_training.IN_BF16):
        yield 1, "ours", "data", job.stage, rounded(job)
    for job in (*test_native.jobs(), *test_native.ROUNDED):
        yield 2, "hooked", "data", job.stage, rounded(job)
    for job in (*test_autoep.jobs(), *test_autoep.ROUNDED, *test_autoep.HALVES):
        yield 3, "autoep", "data", job.stage, rounded(job)
    of_tensor_ranks = (*test_tensor_parallel.JOBS.values(), *test_tensor_parallel.MORE_JOBS.values())
    for job in (*of_tensor_ranks, *map(test_tensor_cover.job_of, test_tensor_cover.covering())):
        yield 4, job.kind, "cut" if job.cuts_tokens else "tensor", job.stage, rounded(job)
    for job, _ in test_tensor_parallel.OF_AUTOTP.values():
        yield 4, job.kind, "autotp", job.stage, rounded(job)
    of_sequence_ranks = (test_sequence_parallel.JOB, *test_sequence_parallel.MORE_JOBS.values())
    for each in of_sequence_ranks:
        if each.kind != "native":
            yield 5, each.kind, "megatron" if each.by_megatron else "unit", each.stage, rounded(each)
    for run in (*test_parity.STAGED, *test_parity.MORE_STAGED, *test_parity.STAGED_ROUNDED):
        yield 6, "ours", "stages", run.stage, rounded(run)
    for folded in test_folded_autoep.JOBS:
        yield 7, "autoep", "folded", folded.stage, rounded(folded)
    for folded in test_folded_autoep.SEQUENCES:
        yield 7, "autoep", "megatron", folded.stage, rounded(folded)
    for pair in map(test_layout_cover.job_of, test_layout_cover.covering()):
        is_unit, is_tensor = pair.sp_size > 1, pair.tp_size > 1
        layout = "stages" if pair.pp_size > 1 else "unit" if is_unit else "tensor" if is_tensor else "data"
        yield 8, pair.kind, layout, pair.stage, pair.precision


@cache
def proven() -> dict[tuple[str, str, int], Cell]:
    """Precisions by kind, layout and stage, with the footnotes of the files that prove them."""
    found: dict[tuple[str, str, int], dict[str, set[int]]] = {}
    for note, kind, layout, stage, precision in trained():
        found.setdefault((kind, layout, stage), {}).setdefault(precision, set()).add(note)
    return {key: {each: tuple(sorted(notes)) for each, notes in cell.items()} for key, cell in found.items()}


def rows() -> list[list[str]]:
    """The cells of the matrix: kind, layout, and ZeRO 0 to 3."""
    text = PAGE.read_text(encoding="utf-8").partition("## Which combination was proven")[2]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def row_of(kind: str, layout: str) -> list[str]:
    found = [row for row in rows() if row[0] == KINDS[kind] and LAYOUTS[layout] in row[1]]
    assert len(found) == 1, (kind, layout, found)
    return found[0]


def told(cell: str) -> Cell:
    """The precisions that a cell claims, with their footnotes."""
    claims = re.findall(r"(fp32|bf16|fp16) \[([\d, ]+)\]", cell)
    return {precision: tuple(int(note) for note in notes.split(",")) for precision, notes in claims}


def as_text(cell: Cell) -> str:
    """A cell of the matrix for what is proven."""
    order = [each for each in ("fp32", "bf16", "fp16") if each in cell]
    claims = ", ".join(f"{each} [{', '.join(map(str, cell[each]))}]" for each in order)
    return f"yes: {claims}" if claims else NOT_TRIED


PROVEN_ROWS = sorted({(kind, layout) for kind, layout, _ in proven()})


@pytest.mark.parametrize(("kind", "layout"), PROVEN_ROWS, ids=" ".join)
def test_a_row_of_the_matrix_claims_what_its_files_train(kind: str, layout: str) -> None:
    row = row_of(kind, layout)
    for stage, cell in enumerate(row[2:]):
        found = proven().get((kind, layout, stage), {})
        assert told(cell) == found, f"{kind} {layout} ZeRO {stage}: {as_text(found)}"
        assert cell.startswith("yes: ") if found else cell.startswith((NOT_TRIED, REFUSED)), cell


def test_each_other_row_says_why_and_each_footnote_names_files_that_are_there() -> None:
    of_tests = {(KINDS[kind], LAYOUTS[layout]) for kind, layout in PROVEN_ROWS}
    others = [row for row in rows() if not any(row[0] == kind and layout in row[1] for kind, layout in of_tests)]
    assert others and all("yes" not in " ".join(row) and any(row[2:]) for row in others), others
    text = PAGE.read_text(encoding="utf-8")
    notes = dict(re.findall(r"^\[(\d)\] (.*)$", text, re.M))
    claimed = {note for row in rows() for cell in row for notes in told(cell).values() for note in notes}
    assert {int(note) for note in notes} == claimed
    for note, words in notes.items():
        files = re.findall(r"`(tests/[\w/]+\.py)`", words)
        files += [f"{folder}/{name}" for name, folder in re.findall(r"`(test_\w+\.py)` in `([\w/]+)`", words)]
        assert files and all((REPOSITORY / file).is_file() for file in files), (note, words)


def test_a_claim_that_no_file_trains_is_seen() -> None:
    """The control: a precision, or a footnote, that is not there."""
    found = proven()["ours", "data", 0]
    assert told(as_text(found)) == found and "fp16" not in proven()["ours", "autotp", 0]
    assert told(as_text(found).replace("fp32 [1", "fp32 [2")) != found
    assert told("yes: fp16 [4]") != proven()["ours", "autotp", 0]
