"""Equal loads where experts have several hosts: whole numbers, no clock, the same result from the same input.

Each expert in turn pours its rows into its hosts as water into a vessel, over what the others have left there, until
no rows move: block coordinate descent on the sum of squares, whose minimum also has the smallest maximum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MAX_SWEEPS = 16  # experts that share hosts in a chain level slowly; the rest of the way is a few rows


def level(
    rows_E: Sequence[int], hosts_E: Mapping[int, Sequence[int]], base_R: Sequence[int], parts: int = 0
) -> dict[int, list[int]]:
    """Rows of each expert of `hosts_E` at each of its hosts, so that the ranks' totals are as equal as hosts allow.

    `base_R`: rows of the ranks that have no other host. The sum over an expert's hosts is its rows. `parts`: the
    fullest rank may have more than the mean by one part of so many, and sweeps that hardly lower it are left out; 0 for
    exact levels.
    """
    load_R = list(base_R)
    quotas: dict[int, list[int]] = {expert: [0] * len(hosts) for expert, hosts in hosts_E.items()}
    order = sorted(hosts_E, key=lambda expert: (-rows_E[expert], expert))
    mean = (sum(base_R) + sum(rows_E[expert] for expert in order)) // max(len(load_R), 1)
    enough, step, top = (mean + mean // parts, mean // (4 * parts), 0) if parts else (-1, 0, 0)
    for sweep in range(MAX_SWEEPS):
        is_changed = False
        for expert in order:
            hosts, before = hosts_E[expert], quotas[expert]
            for host, rows in zip(hosts, before, strict=True):
                load_R[host] -= rows
            after = pour(rows_E[expert], [load_R[host] for host in hosts])
            for host, rows in zip(hosts, after, strict=True):
                load_R[host] += rows
            quotas[expert] = after
            is_changed = is_changed or after != before
        before_top, top = top, max(load_R)
        is_slow = step > 0 and sweep > 1 and before_top - top <= step
        if not is_changed or len(order) == 1 or top <= enough or is_slow:
            break
    return quotas


def pour(rows: int, load_H: Sequence[int]) -> list[int]:
    """Rows for each vessel that already holds `load_H`, so that the fullest of those that get some is lowest.

    What is left over after equal levels goes to the first vessels, one row each.
    """
    order = sorted(range(len(load_H)), key=lambda index: (load_H[index], index))
    held = num = 0
    for index in order:
        if num and load_H[index] * num - held >= rows:  # full before the water reaches this one
            break
        held, num = held + load_H[index], num + 1
    surface, left = divmod(rows + held, num)
    poured = [0] * len(load_H)
    for index in sorted(order[:num]):
        poured[index] = surface - load_H[index] + (left > 0)
        left -= left > 0
    return poured
