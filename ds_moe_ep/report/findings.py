"""`Findings`: what files of Records and spans hold, asked for by the parts of a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import MODES, SYSTEMS
from ds_moe_ep.records.record import Record, read_records
from ds_moe_ep.report.known_names import environment_order, is_known
from ds_moe_ep.schedule.spans import Span, read_spans

OTHERS = {  # what Records of other names are, by the first part
    "layer": "`bench layer`'s, which prints its tables itself",
    "probe": "`bench probe`'s, for `calibrate`",
    "audit": "`audit`'s, which prints its table itself",
}
WAY_OUT = "measure first and name the files that a benchmark wrote: python -m ds_moe_ep report runs/*.jsonl -o out"


@dataclass(frozen=True)
class Source:
    """One file of Records, and the spans beside it where there are some."""

    path: Path
    records: tuple[Record, ...]
    spans: tuple[Span, ...] = ()

    @cached_property
    def known(self) -> tuple[Record, ...]:
        """The Records that the report has a place for."""
        return tuple(record for record in self.records if is_known(record.name))


@dataclass(frozen=True)
class Findings:
    """The Records of all sources by name. Where two have one name, the later one counts."""

    sources: tuple[Source, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Record]:
        """The Records that the report has a place for."""
        return {record.name: record for source in self.sources for record in source.known}

    @property
    def num_others(self) -> int:
        """Records that the report has no place for."""
        return sum(len(source.records) - len(source.known) for source in self.sources)

    @property
    def num_replaced(self) -> int:
        """Records whose name a later one has too."""
        return sum(len(source.known) for source in self.sources) - len(self.by_name)

    def get(self, *parts: str) -> Record | None:
        """The Record with this name, given in parts."""
        return self.by_name.get(".".join(parts))

    def below(self, *parts: str) -> dict[str, Record]:
        """The Records whose names begin with these parts, by the rest of their names."""
        start = ".".join(parts) + "."
        return {name.removeprefix(start): record for name, record in self.by_name.items() if name.startswith(start)}

    @cached_property
    def environments(self) -> tuple[str, ...]:
        """The environments in the order of a page."""
        return tuple(sorted({environment for environment, *_ in self._system_names}, key=environment_order))

    @cached_property
    def swept(self) -> tuple[str, ...]:
        """The environments on which a sweep was simulated."""
        return tuple(
            sorted({name.split(".")[1] for name in self.by_name if name.startswith("sweep.")}, key=environment_order)
        )

    def places(self, *whats: str) -> list[tuple[str, str]]:
        """(environment, mode) wherever a system has a Record `what` or below `what`, in the order of a page."""
        found = {(environment, mode) for environment, mode, _, what in self._system_names if what in whats}
        return [
            (environment, mode) for environment in self.environments for mode in MODES if (environment, mode) in found
        ]

    def systems(self, *whats: str, environment: str = "", mode: str = "") -> tuple[str, ...]:
        """Systems with a Record `what` or below `what`, of one environment and mode where they are given."""
        found = {
            name
            for its_bed, its_mode, name, what in self._system_names
            if what in whats and environment in ("", its_bed) and mode in ("", its_mode)
        }
        return tuple(system for system in SYSTEMS if system in found)

    @cached_property
    def _system_names(self) -> Sequence[tuple[str, str, str, str]]:
        """(environment, mode, system, the first part of what) of every Record; traffic is of an environment alone."""
        parts = [name.split(".") for name in self.by_name if name.startswith("system.")]
        return [(environment, mode, system, (*rest, "")[0]) for _, environment, mode, system, *rest in parts]


def read_findings(paths: Sequence[Path]) -> Findings:
    """Findings of the files; a file of spans may be named with its Records, as `*.jsonl` does.

    Raises ConfigError for a file that cannot be read or where there is no Record at all.
    """
    beside = set(map(spans_path, paths))
    sources = tuple(_read_source(path) for path in paths if path not in beside)
    if not any(source.records for source in sources):
        names = ", ".join(map(str, paths)) or "nothing"
        raise ConfigError(f"records={names}: no Record in there; {WAY_OUT}")
    repeated = [str(path) for path, times in Counter(path.resolve() for path in paths).items() if times > 1]
    if repeated:
        raise ConfigError(f"records={', '.join(repeated)}: given twice; name each file once")
    return Findings(sources)


def undrawn(findings: Findings) -> str:
    """Kinds of Records of which nothing can be drawn, as an error's text."""
    paths = ", ".join(str(source.path) for source in findings.sources)
    kinds = Counter(record.name.split(".")[0] for source in findings.sources for record in source.records)
    listed = [f"{times:,} {kind}.*" + (f" ({OTHERS[kind]})" if kind in OTHERS else "") for kind, times in kinds.items()]
    return f"records={paths}: the report draws none of {', '.join(listed)}; {WAY_OUT}"


def spans_path(path: Path) -> Path:
    """Where the spans of a file of Records lie: x.spans.jsonl beside x.jsonl."""
    return path.with_name(path.name.removesuffix(".jsonl") + ".spans.jsonl")


def _read_source(path: Path) -> Source:
    if path.name.endswith(".spans.jsonl"):
        raise ConfigError(f"records={path}: a file of spans; name the Records beside it, the spans are found by name")
    beside = spans_path(path)
    try:
        records = tuple(read_records(path))
        return Source(path, records, tuple(_spans(beside)))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"records={path}: cannot be read ({error}); {WAY_OUT}") from error


def _spans(path: Path) -> Iterator[Span]:
    if path.exists():
        yield from read_spans(path)
