"""The command `audit`: the table that it prints, and the Records that it writes."""

from __future__ import annotations

import json

from rich.console import Console

from ds_moe_ep.records.render import print_lines, print_tables, to_markdown
from ds_moe_ep.records.table import Table
from ds_moe_ep.simulate.audit.audit import HEAD, AuditRow, audit
from ds_moe_ep.simulate.audit.records import audit_records, audit_values
from ds_moe_ep.simulate.cluster.cluster import load_cluster
from ds_moe_ep.simulate.options import AuditOptions
from ds_moe_ep.simulate.step.source import source_of, write_out
from ds_moe_ep.specification.claims import NOT_STATED


def run(options: AuditOptions, console: Console) -> int:
    """Prints the audit, and writes its Records where asked; 0."""
    cluster = load_cluster(options.cluster)
    rows = audit(cluster)
    if options.out is not None:
        write_out(audit_records(rows, source_of(cluster, options.cluster, options.given)), options.out)
    if options.json:
        print(json.dumps(audit_values(rows), indent=2, ensure_ascii=False, allow_nan=False))
    elif options.markdown:
        print(to_markdown(Table("", HEAD, tuple(row.cells for row in rows), text_columns=len(HEAD))))
    else:
        print_tables([_table(rows, cluster.name)], console)
        print_lines(
            ["Simulated, not measured; in brackets: all of the cluster's ranges at both ends."], console, style="dim"
        )
    return 0


def _table(rows: tuple[AuditRow, ...], cluster_name: str) -> Table:
    """The audit for a terminal: the section of the document stands behind what it states."""
    cells = []
    for row in rows:
        name, section, stated, *others = row.cells
        cells.append((name, stated if stated == NOT_STATED else f"{stated} ({section})", *others))
    head = ("figure", "stated (section)", "derived", "simulated", "verdict")
    rules = frozenset(range(len(cells)))
    title = f"The specification's figures on {cluster_name}"
    return Table(title, head, tuple(cells), text_columns=len(head), ruled_rows=rules)
