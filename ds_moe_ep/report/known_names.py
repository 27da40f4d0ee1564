"""Names of Records that the report understands: those of records/names.py, as patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ds_moe_ep.records.names import DEVICES, KINDS, LAWS, MODES, PARTS, SIDES, SIMULATED, SOAK_VERDICTS, SYSTEMS, TOTALS


def _one_of(words: Iterable[str]) -> str:
    return "(?:" + "|".join(map(re.escape, words)) + ")"


_SIMULATED = rf"{SIMULATED}[a-z0-9_]+"
_BED = rf"(?:loopback|unshaped|cluster|traffic\d+|{_SIMULATED})"
_SYSTEM = _one_of(SYSTEMS)
_SHAPING = r"(?:[\d.e+]+ (?:mbit|of (?:forward|backward|step))|unshaped)"
_WHAT = "|".join(
    (
        "tps|tpot|step|busy|hidden",
        f"ratio_to_{_SYSTEM}",
        rf"breakdown\.{_one_of(PARTS)}",
        rf"memory\.{_one_of(KINDS)}",
    )
)
_KNOWN = (
    re.compile(rf"system\.{_BED}\.{_one_of(MODES)}\.{_SYSTEM}\.(?:{_WHAT})"),
    re.compile(rf"system\.{_BED}\.training\.{_SYSTEM}\.loss\.step\d+"),
    re.compile(rf"system\.{_BED}\.training\.{_SYSTEM}\.load\.step\d+\.layer\d+\.expert\d+"),
    re.compile(rf"system\.{_BED}\.traffic\.(?:ratio|compute|link)"),
    re.compile(rf"layouts\.{_SIMULATED}\.traffic\d+\.[a-z0-9_]+\.(?:tps|over_best)"),
    re.compile(rf"scaling\.{_one_of(TOTALS)}\.ep\d+\.{_one_of(LAWS)}"),
    re.compile(rf"scaling\.{_one_of(TOTALS)}\.fit\.{_one_of(LAWS)}\.(?:r2|coefficient)"),
    re.compile(rf"sweep\.{_SIMULATED}\.{_one_of(TOTALS)}\.ep\d+\.dp\d+\.(?:{_one_of(LAWS)}|mfu|hidden|memory)"),
    re.compile(rf"sweep\.{_SIMULATED}\.{_one_of(TOTALS)}\.fit\.{_one_of(LAWS)}\.(?:r2|coefficient)"),
    re.compile(
        rf"overlap\.{_one_of(DEVICES)}\.{_SHAPING}\.{_one_of(SIDES)}\.(?:forward|backward|step)\."
        r"(?:time|hidden|to_serial|to_native|traffic|traffic_ratio|over_limit)"
    ),
    re.compile(r"soak\.run\d+\.(?:memory\.step\d+|peak\.memory|growth\.(?:memory|allocated|tensors|objects))"),
    re.compile(r"soak\.run\d+\.(?:handles|sockets|threads)\.(?:start|steady|end|after)"),
    re.compile(r"soak\.(?:load|fullest|loss|hash)\.step\d+"),
    re.compile(
        rf"soak\.(?:weather\.(?:bursts|empty_batches|idle_ranks|experts_led)|verdict\.{_one_of(SOAK_VERDICTS)})"
    ),
)


def is_known(name: str) -> bool:
    """True where the report has a place for Records of this name."""
    return any(pattern.fullmatch(name) for pattern in _KNOWN)


def place_of(name: str) -> str:
    """Where a known Record was measured, in few words: environment, what was kept while EP grew, devices, soak."""
    first, second = name.split(".")[:2]
    if first == "soak":
        return "soak"
    if first == "overlap":
        return f"schedules, {DEVICES[second]}"
    return TOTALS[second] if first == "scaling" else short_environment(second)


def number_in(part: str, word: str) -> int:
    """The number behind `word` in one part of a name: 12 of "step12"."""
    return int(part.removeprefix(word))


def environment_order(environment: str) -> tuple[int, int, str]:
    """Sorts environments: loopback, unshaped, cluster, shaped links by traffic, then what is simulated by name."""
    fixed = ("loopback", "unshaped", "cluster")
    if environment.startswith(SIMULATED):
        return len(fixed) + 1, 0, environment
    return (
        (fixed.index(environment), 0, "")
        if environment in fixed
        else (len(fixed), number_in(environment, "traffic"), "")
    )


def shaping_order(shaping: str) -> tuple[bool, float]:
    """Sorts the overlap benchmark's links: growing ratios or rates, then those without a limit."""
    first = shaping.split(" ")[0]
    return (True, 0.0) if first == "unshaped" else (False, float(first))


def short_environment(environment: str) -> str:
    """An environment in few words, for panels and cells."""
    if environment.startswith(SIMULATED):
        return f"simulated {environment.removeprefix(SIMULATED)}"
    if environment.startswith("traffic"):
        return f"traffic {number_in(environment, 'traffic') / 100:g} \u00d7 compute"
    return {"loopback": "loopback", "unshaped": "unshaped", "cluster": "cluster's links"}[environment]
