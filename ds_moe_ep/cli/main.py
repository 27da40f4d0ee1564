"""The command line: parses, calls, prints. Exit code 2 for a configuration that cannot work."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ds_moe_ep import __version__
from ds_moe_ep.bench.demo.options import DemoOptions
from ds_moe_ep.cli.options import (
    BENCHMARKS,
    BenchOptions,
    CheckOptions,
    ConvertOptions,
    NoOptions,
)
from ds_moe_ep.config.command_line import INTERRUPTED, Parser, refused
from ds_moe_ep.config.options import Command
from ds_moe_ep.doctor.options import DoctorOptions
from ds_moe_ep.errors import EngineError, MoEError
from ds_moe_ep.live.options import WatchOptions
from ds_moe_ep.report.options import ReportOptions
from ds_moe_ep.simulate.options import AuditOptions, CalibrateOptions, PlanOptions
from ds_moe_ep.verification.options import VerifyOptions

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "python -m ds_moe_ep"  # `ds-moe-ep` is the same, where scripts are on the PATH
PAPER_WIDTH = 120  # columns


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of a command line: 0, or 2 with the error's text on stderr; with --json it is an object
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
        prog=PROGRAM,
        description="Expert-parallel MoE layers for DeepSpeed. No command here needs a device.",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("--version", action="version", version=f"ds-moe-ep {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (_demo(), *_of_configurations(), *_of_simulations(), *_of_files()):
        command.add_to(commands)
    return parser


def _demo() -> Command[Any]:
    return Command(
        "demo",
        "show in a minute what overlap hides, on an emulated link, and what ranks say when one dies",
        DemoOptions,
        run_demo,
        "Starts 4 ranks as 2 nominal nodes on this machine and runs one expert-parallel layer forward and backward, "
        "serial beside overlapped. Experts are emulated (a wait per row), and so is the link between the nodes (real "
        "messages, let out at a rate); the layer, its schedules and its transfers are the real ones. Prints two "
        "timelines, the step times, and how much of the communication was hidden. Needs no root.",
        example=f"{PROGRAM} demo --link 50mbit --trace demo.json",
    )


def _of_configurations() -> tuple[Command[Any], ...]:
    return (
        Command(
            "check-config",
            "tell what a ds_config would run, or why it cannot",
            CheckOptions,
            run_check_config,
            "Reads a ds_config and prints what it would run: ranks, experts, batch, memory of a GPU; with --verbose "
            "parameters by kind, traffic and arithmetic too. All numbers are derived from shapes; none is measured. "
            "Exits with 2 where the configuration cannot work, with the reason and the way out.",
            example="python -m ds_moe_ep check-config ep16 --world-size 16 --gpu-gb 80",
        ),
        Command(
            "doctor",
            "tell what is installed and usable here, and how the links between ranks do",
            DoctorOptions,
            run_doctor,
            "Looks at libraries, machine, environment variables and a ds_config, and lets ranks send and receive for a "
            "few seconds. Prints the verdict, then problems and warnings with their fixes, then the rest, one line "
            "each. Ranks are started here, on GPUs where there are enough; in a job of a launcher (deepspeed --module, "
            "torchrun -m, mpirun) the job's ranks are taken, and rank 0 prints. Exits with 1 where there is a problem.",
            example="deepspeed --hostfile hosts --module ds_moe_ep doctor --config ds_configs/ep16.json",
        ),
        Command(
            "verify",
            "run a training script for two steps, and tell whether its engine trains what it says",
            VerifyOptions,
            run_verify,
            "Runs a training script until its first engine with MoE layers has taken two steps, and compares them with "
            "a dense model: routing, balance loss, gradients, what moved, the norm that clips, replicas, a checkpoint "
            "saved and loaded. One verdict per line with the parameter, the rank and the way out. In a launcher's job "
            "every rank runs it, and rank 0 prints; else --ranks starts them here. Exits with 1 where there is a "
            "problem.",
            example="python -m ds_moe_ep verify --ranks 4 --script train.py --config ds_configs/ep16.json",
        ),
        Command(
            "knobs",
            "print every knob as a Markdown table",
            NoOptions,
            run_knobs,
            "Prints every knob as a Markdown table.",
        ),
        Command(
            "figures",
            "print the specification's figures, stated and derived",
            NoOptions,
            run_figures,
            "Prints the specification's figures beside what its shapes and links imply.",
        ),
    )


def _of_simulations() -> tuple[Command[Any], ...]:
    return (
        Command(
            "audit",
            "print the specification's figures: stated, derived, simulated on a cluster, and the verdict",
            AuditOptions,
            run_audit,
            "Prints every figure of the specification as it is stated, as its shapes and links imply it, and as its "
            "jobs are simulated on a cluster of 16 devices, with a bar from the ranges of the cluster's numbers. The "
            "verdict is computed from these numbers. Nothing is measured.",
            example="python -m ds_moe_ep audit --markdown",
        ),
        Command(
            "plan",
            "tell what a ds_config will do on a cluster, before anybody rents it",
            PlanOptions,
            run_plan,
            "Simulates a step of the job on a cluster that a file describes, and prints: does it fit, tokens per "
            "second, what is hidden, utilization, what bounds it, and what is faster; with --verbose every table, "
            "too. Nothing is started and nothing measured; every number has a bar, from the ranges of the cluster's "
            "numbers. Exits with 2 where the job cannot work or does not fit, with the way out.",
            example="python -m ds_moe_ep plan --config ep16 --cluster h100_4x4 --compare tp8_pp2",
        ),
        Command(
            "calibrate",
            "fit a cluster's numbers to Records of runs",
            CalibrateOptions,
            run_calibrate,
            "Fits the numbers of a cluster to Records of `bench probe`, of `bench overlap`, or of both, and prints "
            "what it fitted and the error on the runs that it held out. What was not measured stays as the file has "
            "it.",
            example="python -m ds_moe_ep calibrate probe.jsonl --cluster h100_4x4 --out mine.json",
        ),
    )


def _of_files() -> tuple[Command[Any], ...]:
    benchmarks = "\n".join(f"  {name:<10}{help}" for name, help in BENCHMARKS.items())
    return (
        Command(
            "watch",
            "serve a live page of a run: loss, speed, hidden share, load of experts and ranks",
            WatchOptions,
            run_watch,
            "Serves one page on this machine that shows a run as it goes, or after it: loss, tokens per second, hidden "
            "share beside its blocking control, layers by experts over time, rows per rank, slowest rank, replicas. It "
            "reads the files in the folder alone, which may be a copy from another machine, and fetches nothing.",
            example="python -m ds_moe_ep watch runs/first",
        ),
        Command(
            "report",
            "turn measured records into a page with figures",
            ReportOptions,
            run_report,
            "Reads files of Records, and for x.jsonl the spans in x.spans.jsonl beside it, and writes report.html "
            "(one file that stands alone), report.md and figures/. No number that is not in a Record.",
            example="python -m ds_moe_ep report runs/systems.jsonl runs/scaling.jsonl -o out",
        ),
        Command(
            "convert",
            "carry a checkpoint to another size or layout, without ranks",
            ConvertOptions,
            run_convert,
            "Carries a DeepSpeed checkpoint to the sizes of a ds_config, without ranks: between sizes of expert "
            "parallelism with its optimizer states; to or from tensor x pipeline parallelism (where the section moe_ep "
            "has a layout) its weights; with --to, to a Hugging Face folder or fp32 weights. The checkpoint's layout "
            "is read from its files. Says the bytes needed and free first, refuses a damaged file by its name, and "
            "writes file by file with checksums (SHA256SUMS): after a kill the same command goes on where it ended.",
            example="python -m ds_moe_ep convert ck-ep16 ck-tp8-pp2 --config ds_configs/tp8_pp2.json",
        ),
        Command(
            "bench",
            "measure, and write Records",
            BenchOptions,
            run_bench,
            "Starts its own ranks on this machine and measures; every number goes into a file of Records.",
            epilog=f"benchmarks:\n{benchmarks}\n\nits own options: {PROGRAM} bench systems --help\n"
            f"example: {PROGRAM} bench systems --out systems.jsonl",
        ),
    )


def run_bench(options: BenchOptions) -> int:
    """Runs one of the benchmarks; 130 after Ctrl-C, with what was measured until then on disk."""
    benchmark = importlib.import_module(f"ds_moe_ep.bench.{options.benchmark}.command")
    status: int = benchmark.main(list(options.options))
    return status


def run_check_config(options: CheckOptions) -> int:
    """Prints the check of a ds_config, as lines, tables or JSON; 0."""
    from ds_moe_ep.check.config import Budget, check_config

    budget = Budget(gpu_gb=options.gpu_gb, reserve_gb=options.reserve_gb, load=options.load)
    check = check_config(options.path, options.world_size, budget, options.tensor_ranks)
    if options.json:
        print(json.dumps(check.to_dict(), indent=2))
        return 0
    from ds_moe_ep.cli.tables import print_check

    print_check(check, verbose=options.verbose)
    return 0


def run_demo(options: DemoOptions) -> int:
    """Shows what overlap hides, or what ranks say when one dies; 1 where a survivor does not name it."""
    from ds_moe_ep.bench.demo.command import run

    return run(options)


def run_doctor(options: DoctorOptions) -> int:
    """Prints the doctor's verdicts; 1 where there is a problem."""
    from ds_moe_ep.doctor.command import run

    return run(options)


def run_verify(options: VerifyOptions) -> int:
    """Prints the verdicts on a script's engine; 1 where there is a problem."""
    from ds_moe_ep.verification.command import run

    return run(options)


def run_knobs(options: NoOptions) -> int:
    """Prints the Markdown tables of README; 0."""
    from ds_moe_ep.cli.tables import knob_table
    from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig

    print(knob_table(MoEConfig), knob_table(ModelConfig), knob_table(Layout), sep="\n\n")
    return 0


def run_figures(options: NoOptions) -> int:
    """Prints the specification's figures as a Markdown table; 0."""
    from ds_moe_ep.cli.tables import figure_table
    from ds_moe_ep.specification.claims import stated_and_derived

    print(figure_table(stated_and_derived()))
    return 0


def run_plan(options: PlanOptions) -> int:
    """Prints and writes the plan of a job, or its sweep and the curve of that; 0."""
    from ds_moe_ep.simulate.plan.command import run

    code = run(options, _console())
    if options.sweep is not None and options.out is not None:
        from ds_moe_ep.report.sections.sweep import draw_curves

        for path in draw_curves(options.out):
            print(path, file=sys.stderr)
    return code


def run_audit(options: AuditOptions) -> int:
    """Prints and writes the audit; 0."""
    from ds_moe_ep.simulate.audit.command import run

    return run(options, _console())


def run_calibrate(options: CalibrateOptions) -> int:
    """Prints and writes the calibration; 0."""
    from ds_moe_ep.simulate.calibrate.command import run

    return run(options, _console())


def run_report(options: ReportOptions) -> int:
    """Writes the report, and prints the files that it wrote; 0."""
    from ds_moe_ep.report.write import write_report

    for path in write_report(options.records, options.out):
        print(path)
    return 0


def run_watch(options: WatchOptions) -> int:
    """Serves the page of a run until Ctrl-C, or prints one snapshot; 0."""
    from ds_moe_ep.live.command import run

    return run(options, partial(print, flush=True))


def run_convert(options: ConvertOptions) -> int:
    """Carries a checkpoint to another size or layout, with progress, and prints what was written; 0."""
    from contextlib import redirect_stdout

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    with redirect_stdout(sys.stderr):  # DeepSpeed's log, which is no result
        from ds_moe_ep.engine.checkpoint.convert.prepare import prepare

    conversion = prepare(
        options.source,
        options.target,
        options.config,
        options.tag,
        to=options.to,
        world_size=options.world_size,
        weights_only=options.weights_only,
    )
    print(conversion.room(), file=sys.stderr)
    columns = TextColumn("converting"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("converting", total=conversion.num_bytes)
        conversion.write(lambda num_bytes: progress.advance(task, num_bytes))
    print(conversion)
    return 0


def _console() -> Console:
    """The terminal as wide as it is; PAPER_WIDTH columns where the output goes elsewhere."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PAPER_WIDTH)
