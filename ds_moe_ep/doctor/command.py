"""The command: gathers, judges, prints. Exit code 0, or 1 where something keeps the run from working."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from rich.console import Console

from ds_moe_ep.comm.launcher import World, launched
from ds_moe_ep.config.section import load_ds_config, read_section
from ds_moe_ep.config.topology import RankGrid
from ds_moe_ep.doctor.ask_hosts import ask_hosts
from ds_moe_ep.doctor.facts import Facts
from ds_moe_ep.doctor.gather import gather
from ds_moe_ep.doctor.hosts import judge_hosts, read_hostfile
from ds_moe_ep.doctor.job import JobFacts, job_without_config, judge_job
from ds_moe_ep.doctor.links.local_ranks import try_local_links
from ds_moe_ep.doctor.links.outcome import LinksOutcome, LinkTrial
from ds_moe_ep.doctor.links.verdicts import judge_links
from ds_moe_ep.doctor.machine import judge_machine
from ds_moe_ep.doctor.options import DoctorOptions
from ds_moe_ep.doctor.packages import judge_packages
from ds_moe_ep.doctor.variables import Run, judge_variables
from ds_moe_ep.doctor.verdicts import GROUPS, Verdict, print_verdicts, to_dict, worst
from ds_moe_ep.errors import ConfigError, TopologyError

LOCAL_RANKS = 4  # at most, where --ranks is not given
LINE_WIDTH = 110


def run(options: DoctorOptions) -> int:
    """Runs the doctor. In a job every rank runs it, tries the links, and rank 0 prints; its exit code counts.

    Raises ConfigError for one rank that shall try its links, and for a hostfile that no launcher takes.
    """
    _check(options)
    world = launched(os.environ)
    outcome, groups, node_size = _try(options, world) if options.links else (None, (), 0)
    code = 0
    if world is None or world.rank == 0:
        facts = gather()
        verdicts = judge(options, facts, world)
        if outcome is None:
            why = "one rank has none" if options.links else "--no-links"
            verdicts.append(Verdict("links", "links", "note", f"not tried: {why}"))
        else:
            verdicts += judge_links(outcome, groups, node_size)
        _show(verdicts, options)
        code = int(worst(verdicts) == "problem")
    if outcome is not None and outcome.stuck:
        sys.stdout.flush()
        os._exit(code)  # a transfer that does not end would keep the process
    return code


def _check(options: DoctorOptions) -> None:
    if options.ranks is not None and options.ranks < 2 and options.links:
        raise ConfigError(f"doctor.ranks={options.ranks}: a link needs two ranks; give 2 or more, or --no-links")
    if options.hostfile is not None:
        read_hostfile(options.hostfile)


def judge(options: DoctorOptions, facts: Facts, world: World | None) -> list[Verdict]:
    """All verdicts but those on links, in the order of the groups."""
    world_size = world.size if world is not None else options.world_size
    here = world.local_size if world is not None else None
    job: JobFacts | None = None
    about_job: list[Verdict] = []
    if options.config is not None:
        about_job, job = judge_job(options.config, facts, world_size, here)
    if options.hostfile is not None:
        about_job += judge_hosts(ask_hosts(options.hostfile, options.wait))
    job = job or job_without_config(world_size or 1, here or world_size or 1)
    run_here = Run(num_ranks=job.ranks_here, num_nodes=job.num_nodes, depth=job.depth)
    verdicts = judge_packages(facts) + judge_machine(facts, job.ranks_here) + judge_variables(facts, run_here)
    return sorted(verdicts + about_job, key=lambda verdict: GROUPS.index(verdict.group))


def _try(options: DoctorOptions, world: World | None) -> tuple[LinksOutcome | None, tuple[tuple[int, ...], ...], int]:
    """Outcome of the links, the expert groups that were tried, and the size of a node; nothing for one rank alone."""
    ep_size, node_size, data_first = _asked(options.config)
    size = world.size if world is not None else options.ranks or min(ep_size or LOCAL_RANKS, LOCAL_RANKS)
    if size < 2:
        return None, (), 0
    groups: tuple[tuple[int, ...], ...] = (tuple(range(size)),)
    if world is not None and ep_size and ep_size > 1 and size % ep_size == 0:
        grid = RankGrid(world_size=size, ep_size=ep_size, data_before_expert=data_first)
        groups = tuple(tuple(group) for group in grid.ep_groups())
    trial = LinkTrial(groups=groups, node_size=node_size, seconds=options.seconds, start_s=options.wait)
    if world is None:
        return try_local_links(size, trial), groups, node_size
    from ds_moe_ep.doctor.links.ranks import try_links  # imports torch

    return try_links(world, trial), groups, node_size


def _asked(config: str | None) -> tuple[int | None, int, bool]:
    """ep_size, node_size and DeepSpeed's order of ranks in a ds_config; of one that cannot be read, nothing."""
    if config is None:
        return None, 0, False
    try:
        ds_config = load_ds_config(config)
        section = read_section(ds_config)
    except (ConfigError, TopologyError):
        return None, 0, False
    size = section.layout.size if section.layout.size > 1 else section.moe.ep_size
    return size, section.moe.node_size, bool(ds_config.get("use_data_before_expert_parallelism", False))


def _show(verdicts: Sequence[Verdict], options: DoctorOptions) -> None:
    if options.json:
        print(json.dumps(to_dict(verdicts), indent=2))
        return
    print_verdicts(verdicts, Console(width=None if sys.stdout.isatty() else LINE_WIDTH), verbose=options.verbose)
