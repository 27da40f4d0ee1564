"""The command line: parses, calls, prints. Exit code 2 for a configuration that cannot work."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from ds_moe_ep import __version__
from ds_moe_ep.errors import MoEError


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `ds-moe-ep ARGUMENTS`: 0, or 2 with the error's text on stderr."""
    parsed = make_parser().parse_args(arguments)
    try:
        code: int = parsed.run(parsed)
        return code
    except MoEError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        sys.stderr.close()
        return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser; each command stores its function as `run`."""
    parser = argparse.ArgumentParser(
        prog="ds-moe-ep",
        description="Expert-parallel MoE layers for DeepSpeed. No command here starts a device or needs one.",
    )
    parser.add_argument("--version", action="version", version=f"ds-moe-ep {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_check_config(commands)
    knobs = commands.add_parser(
        "knobs",
        help="print every knob as a Markdown table",
        description="Prints every knob as a Markdown table.",
    )
    knobs.set_defaults(run=run_knobs)
    figures = commands.add_parser(
        "figures",
        help="print the specification's figures, stated and derived",
        description="Prints the specification's figures beside what its shapes and links imply.",
    )
    figures.set_defaults(run=run_figures)
    return parser


def _add_check_config(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    check = commands.add_parser(
        "check-config",
        help="tell what a ds_config would run, or why it cannot",
        description=(
            "Reads a ds_config and prints what it would run: parameters by kind, bytes of a GPU, tokens, "
            "traffic, arithmetic. All numbers are derived from shapes; none is measured. Exits with 2 where "
            "the configuration cannot work, with the reason and the way out."
        ),
        epilog="example: python -m ds_moe_ep check-config ds_configs/ep16.json --world-size 16 --gpu-gb 80",
    )
    check.add_argument("path", metavar="DS_CONFIG", help="a ds_config (JSON) with a section moe_ep")
    check.add_argument(
        "--world-size",
        type=int,
        metavar="RANKS",
        help="ranks of the job (default: what the batch sizes imply, else ep_size)",
    )
    check.add_argument(
        "--gpu-gb",
        type=float,
        default=80.0,
        metavar="GB",
        help="memory of one GPU in 1e9 bytes (default: 80)",
    )
    check.add_argument(
        "--reserve-gb",
        type=float,
        default=4.0,
        metavar="GB",
        help="part of it left to CUDA's context, NCCL and fragmentation (default: 4)",
    )
    check.add_argument(
        "--load",
        type=float,
        default=1.0,
        metavar="TIMES",
        help="rows of the fullest rank over the mean, for its activations (default: 1, even routing)",
    )
    check.add_argument("--json", action="store_true", help="print JSON instead of tables")
    check.set_defaults(run=run_check_config)


def run_check_config(parsed: argparse.Namespace) -> int:
    """Prints the check of `parsed.path`, as tables or JSON."""
    from ds_moe_ep.check import Budget, check_config

    budget = Budget(gpu_gb=parsed.gpu_gb, reserve_gb=parsed.reserve_gb, load=parsed.load)
    check = check_config(parsed.path, parsed.world_size, budget)
    if parsed.json:
        print(json.dumps(check.to_dict(), indent=2))
        return 0
    from ds_moe_ep.tables import print_check

    print_check(check)
    return 0


def run_knobs(parsed: argparse.Namespace) -> int:
    """Prints the Markdown tables of README."""
    from ds_moe_ep.config import ModelConfig, MoEConfig
    from ds_moe_ep.tables import knob_table

    print(knob_table(MoEConfig), knob_table(ModelConfig), sep="\n\n")
    return 0


def run_figures(parsed: argparse.Namespace) -> int:
    """Prints the specification's figures as a Markdown table."""
    from ds_moe_ep.figures import stated_and_derived
    from ds_moe_ep.tables import figure_table

    print(figure_table(stated_and_derived()))
    return 0
