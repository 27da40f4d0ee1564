"""Rows of the fullest rank over the mean that replicas make of the loads of a run, which its watch files hold.

    python -m tests.schedule.replay DIR [--replicas 1]

One expert per rank, windows of one pass. Placements alone are computed, and rows that they level: no rank runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from ds_moe_ep.config.knobs import SMALL, MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.copies.forecast import UNEVEN, Forecast
from ds_moe_ep.schedule.placement import CopyCosts, Placement, levelled_rows, place

RANGES = ((2, 5), (6, 20), (21, 50), (51, 80))


def fullest(rows_E: Sequence[int], placement: Placement) -> float:
    """Rows of the fullest rank over the mean."""
    return max(levelled_rows(rows_E, placement)) * placement.ranks / sum(rows_E)


def ratios(
    loads: Sequence[Sequence[int]], torus: Torus, costs: CopyCosts, slots: int = 1
) -> tuple[list[float], list[float]]:
    """The fullest rank of each pass from the second on, as the placement foretold it, and as the pass may mend it."""
    forecast, placement = Forecast(torus.size), Placement.without_guests(torus.size, 1, slots)
    foretold, mended = [], []
    for rows_E in loads:
        if forecast.has_passes:
            placement = place(forecast.rows_E, torus, slots, costs, placement, forecast.others_E)
        foretold.append(fullest(rows_E, placement))
        if foretold[-1] > UNEVEN:
            placement = place(rows_E, torus, slots, costs, placement, has_begun=True)
        mended.append(fullest(rows_E, placement))
        forecast.add(rows_E)
    return foretold[1:], mended[1:]


def recorded(folder: Path) -> list[list[list[int]]]:
    """Rows of each expert by layer and report, which a run wrote with `--report-every 1`."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    reports = [line["layers"] for line in lines if line["kind"] == "report"]
    return [[layers[number]["rows_E"] for layers in reports] for number in range(len(reports[0]))]


def costs_of_quickstart(ranks: int) -> CopyCosts:
    """Costs of the quickstart's experts, in fp32."""
    weight_bytes, config = 4 * 2 * SMALL.hidden_size * SMALL.expert_width, MoEConfig()
    both = {"traffic": config.replica_traffic, "pass_share": config.replica_pass_share}
    return CopyCosts.by_sizes(4 * SMALL.hidden_size, weight_bytes, weight_bytes, ranks, **both)


def main() -> None:
    """Prints medians, 95th percentiles and the worst by range of steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--replicas", type=int, default=1)
    options = parser.parse_args()
    layers = recorded(options.folder)
    ranks = len(layers[0][0])
    torus = Torus(4, ranks // 4)
    found = [ratios(loads, torus, costs_of_quickstart(ranks), options.replicas) for loads in layers]
    none = Placement.without_guests(ranks, 1)
    sides = {
        "without replicas": [[fullest(rows_E, none) for rows_E in loads[1:]] for loads in layers],
        "as foretold": [each[0] for each in found],
        "mended in the pass": [each[1] for each in found],
    }
    for name, by_layer in sides.items():
        print(name)
        for first, last in RANGES:
            values = sorted(value for passes in by_layer for value in passes[first - 2 : last - 1])
            if values:
                ninety_fifth, worst = values[int(0.95 * len(values))], values[-1]
                print(f"  steps {first}-{last}: median {median(values):.2f}, p95 {ninety_fifth:.2f}, worst {worst:.2f}")


if __name__ == "__main__":
    main()
