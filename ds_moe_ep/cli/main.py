"""The command line: parses, calls, prints. Exit code 2 for a configuration that cannot work."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence

from ds_moe_ep import __version__
from ds_moe_ep.bench.demo.options import add_demo
from ds_moe_ep.cli.simulate import add_audit, add_calibrate, add_plan
from ds_moe_ep.config.command_line import INTERRUPTED, Parser, number, refused, whole
from ds_moe_ep.config.options import Command
from ds_moe_ep.config.shipped import shipped_ds_configs
from ds_moe_ep.doctor.options import DoctorOptions
from ds_moe_ep.errors import EngineError, MoEError
from ds_moe_ep.report.options import ReportOptions

BENCHMARKS = {
    "systems": "EP16 overlapped and serial, TP8/PP2, DeepSpeed's MoE and AutoEP, training one model",
    "scaling": "EP = 1, 2, 4, 8, 16, and the specification's scaling laws",
    "layer": "one layer against DeepSpeed's own and the matmuls alone",
    "overlap": "schedules of one layer on shaped links",
    "probe": "a device and its links, in two minutes, for calibrate",
    "soak": "many steps whose routing drifts and bursts: memory, handles, determinism",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of `ds-moe-ep ARGUMENTS`: 0, or 2 with the error's text on stderr; with --json it is an object
    on stdout. 130 after Ctrl-C."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        parsed = make_parser().parse_args(given, argparse.Namespace(given=given))
        code: int = parsed.run(parsed)
        return code
    except MoEError as error:
        return refused(error, as_json="--json" in given)
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:
        where = error.filename if error.filename is not None else "the system"
        return refused(EngineError(f"{where}: {error.strerror}; see to it and try again"), as_json="--json" in given)
    except KeyboardInterrupt:
        return INTERRUPTED


def make_parser() -> Parser:
    """The parser; each command stores its function as `run`."""
    parser = Parser(
        prog="ds-moe-ep",
        description="Expert-parallel MoE layers for DeepSpeed. No command here needs a device.",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("--version", action="version", version=f"ds-moe-ep {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_demo(commands)
    _add_check_config(commands)
    DOCTOR.add_to(commands)
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
    add_audit(commands)
    add_plan(commands)
    add_calibrate(commands)
    REPORT.add_to(commands)
    _add_convert(commands)
    _add_bench(commands)
    return parser


def _add_check_config(commands: argparse._SubParsersAction[Parser]) -> None:
    check = commands.add_parser(
        "check-config",
        help="tell what a ds_config would run, or why it cannot",
        description=(
            "Reads a ds_config and prints what it would run: parameters by kind, bytes of a GPU, tokens, "
            "traffic, arithmetic. All numbers are derived from shapes; none is measured. Exits with 2 where "
            "the configuration cannot work, with the reason and the way out."
        ),
        epilog="example: python -m ds_moe_ep check-config ep16 --world-size 16 --gpu-gb 80",
    )
    shipped = f"a ds_config (JSON) with a section moe_ep; these ship: {', '.join(shipped_ds_configs())}"
    check.add_argument("path", metavar="DS_CONFIG", help=shipped)
    check.add_argument(
        "--world-size",
        type=whole(1),
        metavar="RANKS",
        help="ranks of the job (default: what the batch sizes imply, else ep_size)",
    )
    check.add_argument(
        "--gpu-gb",
        type=number(above=0),
        default=80.0,
        metavar="GB",
        help="memory of one GPU in 1e9 bytes (default: 80)",
    )
    check.add_argument(
        "--reserve-gb",
        type=number(0),
        default=4.0,
        metavar="GB",
        help="part of it left to CUDA's context, NCCL and fragmentation (default: 4)",
    )
    check.add_argument(
        "--load",
        type=number(1),
        default=1.0,
        metavar="TIMES",
        help="rows of the fullest rank over the mean, for its activations (default: 1, even routing)",
    )
    check.add_argument("--json", action="store_true", help="print JSON instead of tables")
    check.set_defaults(run=run_check_config)


def _add_convert(commands: argparse._SubParsersAction[Parser]) -> None:
    convert = commands.add_parser(
        "convert",
        help="carry a checkpoint's weights to another layout",
        description=(
            "Carries the weights of a DeepSpeed checkpoint between expert parallelism and tensor x pipeline "
            "parallelism, for any sizes on both sides. Which of the two the checkpoint has is read from its files; the "
            "target's is that of the ds_config: a pipeline where its section moe_ep has a layout. Optimizer states "
            "stay behind. Weights are mapped, checked, and written file by file."
        ),
        epilog="example: python -m ds_moe_ep convert ck-ep16 ck-tp8-pp2 --config ds_configs/tp8_pp2.json",
    )
    convert.add_argument("source", metavar="FROM_DIR", help="a folder that engine.save_checkpoint wrote")
    convert.add_argument("target", metavar="TO_DIR", help="the folder to make; it must not exist")
    convert.add_argument("--config", metavar="DS_CONFIG", required=True, help="the ds_config that TO_DIR is for")
    convert.add_argument("--tag", help="which checkpoint of FROM_DIR (default: the one that its file `latest` names)")
    convert.set_defaults(run=run_convert)


def _add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure, and write Records",
        description="Starts its own ranks on this machine and measures; every number goes into a file of Records.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="benchmarks:\n"
        + "\n".join(f"  {name:<10}{help}" for name, help in BENCHMARKS.items())
        + "\n\nexample: python -m ds_moe_ep bench systems --out systems.jsonl (its own options: bench systems --help)",
    )
    bench.add_argument("benchmark", choices=list(BENCHMARKS), metavar="BENCHMARK", help=", ".join(BENCHMARKS))
    bench.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="the benchmark's own options")
    bench.set_defaults(run=run_bench)


def run_bench(parsed: argparse.Namespace) -> int:
    """Runs one of the benchmarks; 130 after Ctrl-C, with what was measured until then on disk."""
    benchmark = importlib.import_module(f"ds_moe_ep.bench.{parsed.benchmark}.command")
    status: int = benchmark.main(parsed.options)
    return status


def run_check_config(parsed: argparse.Namespace) -> int:
    """Prints the check of `parsed.path`, as tables or JSON."""
    from ds_moe_ep.check.config import Budget, check_config

    budget = Budget(gpu_gb=parsed.gpu_gb, reserve_gb=parsed.reserve_gb, load=parsed.load)
    check = check_config(parsed.path, parsed.world_size, budget)
    if parsed.json:
        print(json.dumps(check.to_dict(), indent=2))
        return 0
    from ds_moe_ep.cli.tables import print_check

    print_check(check)
    return 0


def run_doctor(options: DoctorOptions) -> int:
    """Prints the doctor's verdicts; 1 where there is a problem."""
    from ds_moe_ep.doctor.command import run

    return run(options)


DOCTOR = Command(
    "doctor",
    "tell what is installed and usable here, and how the links between ranks do",
    DoctorOptions,
    run_doctor,
    "Looks at libraries, machine, environment variables and a ds_config, and lets ranks send and receive for a "
    "few seconds. Prints the verdict, then problems and warnings with their fixes, then the rest, one line "
    "each. Ranks are started here, on GPUs where there are enough; in a job of a launcher (deepspeed --module, "
    "torchrun -m, mpirun) the job's ranks are taken, and rank 0 prints. Exits with 1 where there is a problem.",
    "deepspeed --hostfile hosts --module ds_moe_ep doctor --config ds_configs/ep16.json",
)


def run_knobs(parsed: argparse.Namespace) -> int:
    """Prints the Markdown tables of README."""
    from ds_moe_ep.cli.tables import knob_table
    from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig

    print(knob_table(MoEConfig), knob_table(ModelConfig), knob_table(Layout), sep="\n\n")
    return 0


def run_figures(parsed: argparse.Namespace) -> int:
    """Prints the specification's figures as a Markdown table."""
    from ds_moe_ep.cli.tables import figure_table
    from ds_moe_ep.specification.derived import stated_and_derived

    print(figure_table(stated_and_derived()))
    return 0


def run_report(options: ReportOptions) -> int:
    """Writes the report, and prints what it wrote."""
    from ds_moe_ep.report.write import write_report

    for path in write_report(options.records, options.out):
        print(path)
    return 0


REPORT = Command(
    "report",
    "turn measured records into a page with figures",
    ReportOptions,
    run_report,
    "Reads files of Records, and for x.jsonl the spans in x.spans.jsonl beside it, and writes report.html (one file "
    "that stands alone), report.md and figures/. No number that is not in a Record.",
    "python -m ds_moe_ep report runs/systems.jsonl runs/scaling.jsonl -o out",
)


def run_convert(parsed: argparse.Namespace) -> int:
    """Carries weights from `parsed.source` to `parsed.target`, with progress, and prints what was written."""
    from contextlib import redirect_stdout

    from rich.console import Console
    from rich.progress import Progress

    with redirect_stdout(sys.stderr):  # DeepSpeed's log, which is no result
        from ds_moe_ep.engine.checkpoint.convert import prepare

    conversion = prepare(parsed.source, parsed.target, parsed.config, parsed.tag)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("converting", total=conversion.num_bytes)
        conversion.write(lambda num_bytes: progress.advance(task, num_bytes))
    print(conversion)
    return 0
