"""Reader of a folder of run logs, while they grow and after.

It remembers of each report its place in its file and the few numbers that curves are drawn from; the load of the layers
is read again when somebody asks for it. The half line of a run that was killed is left out; a whole line that is
none of a log, or of another schema, is skipped and counted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.live.lines import RunHead, RunReport, head_of, report_of
from ds_moe_ep.live.run_log import NAME


@dataclass(frozen=True)
class ReportPlace:
    """One report: where it lies, and its numbers for curves."""

    path: Path
    offset: int
    num_bytes: int
    figures: Mapping[str, float | None]

    def read(self) -> RunReport | None:
        """The whole report; None where its file has gone."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                return report_of(json.loads(file.read(self.num_bytes)))
        except (OSError, ValueError, TypeError, KeyError):
            return None


@dataclass
class SeenRun:
    """All that was read of one run."""

    head: RunHead
    entries: list[ReportPlace] = field(default_factory=list)
    is_ended: bool = False
    last_s: float = 0.0  # the time of its last line


class RunFolder:
    """Reader of a folder. Raises ConfigError where there is none."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            problem = "is a file" if path.exists() else "there is no such folder"
            raise ConfigError(
                f"watch={path}: {problem}; name the folder that the run writes: that of --watch, or of moe_ep.watch in "
                "its ds_config"
            )
        self.path = path
        self.runs: dict[str, SeenRun] = {}
        self.num_skipped = 0
        self._read_bytes: dict[Path, int] = {}

    def refresh(self) -> None:
        """Reads what was written since the last call."""
        found = sorted(path for path in self.path.glob("*.jsonl") if NAME.fullmatch(path.name))
        gone = self._read_bytes.keys() - set(found)
        for path in gone:
            self._forget(path)
        for path in found:
            try:
                if path.stat().st_size < self._read_bytes.get(path, 0):  # copied anew, by somebody
                    self._forget(path)
                self._read_on(path)
            except FileNotFoundError:  # the run has removed it meanwhile
                self._forget(path)

    def _forget(self, path: Path) -> None:
        self._read_bytes.pop(path, None)
        for run in self.runs.values():
            run.entries = [entry for entry in run.entries if entry.path != path]

    def _read_on(self, path: Path) -> None:
        """Reads the whole lines behind what was read of a file."""
        offset = self._read_bytes.get(path, 0)
        with path.open("rb") as file:
            file.seek(offset)
            read = file.read()
        for text in read.split(b"\n")[:-1]:  # the last one is not whole yet
            if text.strip():
                self._take(path, offset, text)
            offset += len(text) + 1
        self._read_bytes[path] = offset

    def _take(self, path: Path, offset: int, text: bytes) -> None:
        name = path.name.split(".")[0]
        try:
            line = json.loads(text)
            if line["kind"] == "run":
                head = head_of(line)
                self.runs.setdefault(name, SeenRun(head)).last_s = head.time_s
                return
            run = self.runs[name]
            if line["kind"] == "end":
                run.is_ended, run.last_s = True, float(line["time_s"])
                return
            report = report_of(line)
            run.entries.append(ReportPlace(path, offset, len(text), figures_of(report)))
            run.last_s = report.time_s
        except (ValueError, TypeError, KeyError):
            self.num_skipped += 1


def figures_of(report: RunReport) -> dict[str, float | None]:
    """A report's numbers that curves are drawn from."""
    layers = report.layers
    num_rows = sum(layer.num_rows for layer in layers)
    return {
        "step": report.step,
        "time_s": report.time_s,
        "loss": report.loss,
        "tokens_per_s": report.tokens_per_s,
        "step_ms": report.step_ms,
        "hidden_percent": report.hidden_percent,
        "control_percent": report.control_percent,
        "p50": report.p50,
        "p95": report.p95,
        "dropped_percent": 100 * sum(sum(layer.dropped_E) for layer in layers) / max(num_rows, 1),
        "dead_experts": sum(len(layer.dead_experts) for layer in layers),
    }
