"""Mutants of the core, and whether a test sees them. Needs the extra "mutation"; not part of the suite.

    python -m tests.mutation --part moe --number 40             forty places of moe/, one mutant each
    python -m tests.mutation ds_moe_ep/moe/layout.py --number 0  every place of one file
    python -m tests.mutation --part comm --json mutants.json     keeps the record, and goes on with one
    python -m tests.mutation --again mutants.json                the survivors of a record once more
    python -m tests.mutation --part engine --list                how many there are

1. Places are drawn by `--seed`, and at each one of its mutants. Annotations, asserts and texts of errors have none.
2. A mutant lives in a temporary copy. The tests of its file are those that `tests.txt` gives it, one step after
   the other, each within three times its own time on the unchanged copy (and 20 s).
3. Each step is a fork of this process, in which torch and DeepSpeed are loaded, and its ranks are forks of that. A
   step that begins with `!` is a process of its own, as its tests look at processes or their memory.
4. A survivor gets a test, or in `equal.txt` the reason why nothing can tell it from the original.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from tests.mutation.mutants import drawn, equal_ones, survivors_of
from tests.mutation.runs import copy_of_the_tree, judge, load_the_heavy_modules
from tests.ranks import REPOSITORY

PARTS = ("moe", "kernels", "comm", "health", "engine")


def outcomes_in(record: Path | None) -> dict[tuple[str, str, str], tuple[str, str, float]]:
    """Outcomes of a run that was cut off: (file, line, mutated line) to what became of it."""
    kept = json.loads(record.read_text(encoding="utf-8")) if record is not None and record.exists() else []
    return {(m["path"], m["before"], m["after"]): (m["outcome"], m["because"], m["seconds"]) for m in kept}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("files", nargs="*", help="files of the package")
    parser.add_argument("--part", choices=PARTS, help="all files of this folder instead")
    parser.add_argument("--number", type=int, default=20, help="places to draw (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, metavar="JSON", help="the survivors of this record instead")
    parser.add_argument("--json", type=Path, help="where the record goes")
    parser.add_argument("--list", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    folder = REPOSITORY / "ds_moe_ep" / (options.part or "moe")
    paths = options.files or [str(path.relative_to(REPOSITORY)) for path in sorted(folder.rglob("*.py"))]
    mutants = survivors_of(options.again) if options.again else drawn(paths, options.number, options.seed)
    if options.list:
        return 0
    load_the_heavy_modules()
    known, times_s = equal_ones(), dict[str, float]()
    judged = outcomes_in(options.json)
    with copy_of_the_tree() as copy:
        for mutant, text in mutants:
            key = mutant.path, mutant.before, mutant.after
            if key in judged and judged[key][0] != "not judged":
                mutant.outcome, mutant.because, mutant.seconds = judged[key]
                continue
            if why := known.get(key):
                mutant.outcome, mutant.because = "equal", why
            else:
                judge(mutant, text, copy, times_s)
            print(
                f"{mutant.path}:{mutant.line}: {mutant.outcome} in {mutant.seconds:.0f} s: {mutant.because}", flush=True
            )
            if mutant.outcome == "survived":
                print(f"    - {mutant.before}\n    + {mutant.after}", flush=True)
            if options.json:
                options.json.write_text(json.dumps([asdict(m) for m, _ in mutants if m.outcome], indent=1))
    counts = Counter((m.path, m.outcome) for m, _ in mutants)
    for (path, outcome), count in sorted(counts.items()):
        print(f"{path}: {count} {outcome}")
    print(dict(Counter(m.outcome for m, _ in mutants)))
    return int(any(m.outcome == "survived" for m, _ in mutants))


if __name__ == "__main__":
    sys.exit(main())
