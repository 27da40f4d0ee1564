"""The command `calibrate`: prints what it fitted, and writes it."""

from __future__ import annotations

from rich.console import Console

from ds_moe_ep.simulate.calibrate.calibrate import calibrate_files
from ds_moe_ep.simulate.calibrate.tables import print_calibration
from ds_moe_ep.simulate.options import CalibrateOptions


def run(options: CalibrateOptions, console: Console) -> int:
    """Prints the calibration, and writes its cluster where that is asked for; 0."""
    found = calibrate_files(
        options.records, options.cluster, options.out, hold_out=options.hold_out, precision=options.precision
    )
    print_calibration(found, console)
    if options.out:
        print(f"cluster in {options.out}; plan on it: python -m ds_moe_ep plan --config ... --cluster {options.out}")
    return 0
