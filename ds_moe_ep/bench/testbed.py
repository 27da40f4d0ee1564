"""Nodes on one machine: network namespaces joined by a bridge, each behind a link of a chosen rate.

    python -m ds_moe_ep.bench.testbed --nodes 4 --ranks 4 --rate 100mbit -- python train.py ...

1. Every node is a namespace with a veth into a bridge that lies in a namespace of its own: the machine's network is not
   touched, and the ranks' traffic is the only traffic.
2. A token bucket (`tc tbf`) shapes what leaves the node: all its ranks share a full-duplex link of that rate. Nothing
   shapes what arrives: several nodes that send to one at once are not slowed. Ranks of one node talk over its loopback.
3. A namespace lives as long as a process in it. Its holder waits for a pipe to close, which it does when this process
   ends, however it ends, and ranks end with it: nothing is left behind, after SIGKILL neither.

Needs Linux, root, and ip, tc, nsenter, unshare and sysctl (iproute2, util-linux, procps).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from ds_moe_ep.bench.harness.processes import END_S, POLL_S, die_with_parent, loopback_environment
from ds_moe_ep.config.command_line import number, refused
from ds_moe_ep.config.options import option, parse
from ds_moe_ep.errors import ConfigError, EngineError, MoEError

TOOLS = ("ip", "tc", "nsenter", "unshare", "sysctl")
DEVICE = "eth0"  # every node's one interface beside its loopback
SUBNET = "10.77.0"
BURST = "64kb"  # the largest packet that a veth hands over at once
QUEUE = "16mb"  # holds all that the senders' sockets do: a link delays, it drops nothing
# A queue of seconds must not make TCP send again what still waits in it; a fabric for GPUs has no slow start either.
ROUTE = ("rto_min", "5s", "initcwnd", "64")
CLONE_NEWNET = 0x40000000


def why_not() -> str | None:
    """Why no test bed can be made here, as a sentence; None where it can."""
    if not sys.platform.startswith("linux"):
        return f"sys.platform={sys.platform!r}: network namespaces are Linux's"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"commands {', '.join(missing)} are missing: install iproute2, util-linux and procps"
    if os.geteuid() != 0:
        return "network namespaces need root: run it with sudo"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True)
    return f"no network namespace can be made: {tried.stderr.strip()}" if tried.returncode else None


@dataclass(frozen=True)
class Environment:
    """Links that are measured on: a name for Records, and the rate of every node's link (None: no limit)."""

    name: str
    rate_mbit: float | None


@dataclass(frozen=True)
class TestBed:
    """The namespaces of a test bed that is open: their paths, the bridge's first. May be sent to other processes."""

    __test__ = False  # not a case for pytest

    hub: str
    nodes: tuple[str, ...]

    def address(self, node: int) -> str:
        """The node's address on the bridge."""
        return f"{SUBNET}.{node + 1}"

    def shape(self, rate_mbit: float | None) -> None:
        """Gives every node's link a rate in Mbit/s; None lifts the limit. Takes effect at once."""
        for namespace in self.nodes:
            _shape(namespace, rate_mbit)

    def sent_bytes(self, node: int) -> int:
        """Bytes that have left the node, headers included."""
        found = json.loads(_inside(self.nodes[node], "ip", "-json", "-statistics", "link", "show", DEVICE))
        return int(found[0]["stats64"]["tx"]["bytes"])


@contextmanager
def open_testbed(num_nodes: int, rate_mbit: float | None = None) -> Iterator[TestBed]:
    """A test bed of `num_nodes` nodes, gone when the block or the process ends. Raises EngineError where none is."""
    reason = why_not()
    if reason is not None:
        raise EngineError(f"testbed.nodes={num_nodes}: {reason}")
    with ExitStack() as stack:
        hub, *nodes = (stack.enter_context(_namespace()) for _ in range(num_nodes + 1))
        testbed = TestBed(hub, tuple(nodes))
        _inside(hub, "ip", "link", "add", "bridge", "type", "bridge")
        _inside(hub, "ip", "link", "set", "bridge", "up")
        for node, namespace in enumerate(nodes):
            holder = namespace.split("/")[2]
            peer = ("peer", "name", DEVICE, "netns", holder)
            _inside(hub, "ip", "link", "add", _port(node), "type", "veth", *peer)
            _inside(hub, "ip", "link", "set", _port(node), "master", "bridge", "up")
            _inside(namespace, "ip", "address", "add", f"{testbed.address(node)}/24", "dev", DEVICE)
            for device in ("lo", DEVICE):
                _inside(namespace, "ip", "link", "set", device, "up")
            _inside(namespace, "ip", "route", "change", f"{SUBNET}.0/24", "dev", DEVICE, *ROUTE)
            _inside(namespace, "sysctl", "-qw", "net.ipv4.tcp_slow_start_after_idle=0")
        testbed.shape(rate_mbit)
        yield testbed


def enter(namespace: str) -> None:
    """Moves the calling process into a namespace; before it has threads or sockets of its own."""
    with open(namespace) as handle:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(handle.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def rank_environment(testbed: TestBed, rank: int, ranks_per_node: int, port: int) -> dict[str, str]:
    """The launcher's variables for one rank: ranks fill node after node, rank 0's node serves the store."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % ranks_per_node),
        "WORLD_SIZE": str(ranks_per_node * len(testbed.nodes)),
        "LOCAL_WORLD_SIZE": str(ranks_per_node),
        "MASTER_ADDR": testbed.address(0),
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": DEVICE,
    }


def take_place(testbed: TestBed | None, rank: int, num_ranks: int, ranks_per_node: int, port: int) -> None:
    """Moves the calling process to its node of a test bed, if there is one, and sets the launcher's variables."""
    if testbed is None:
        os.environ.update(loopback_environment(rank, num_ranks, port))
    else:
        enter(testbed.nodes[rank // ranks_per_node])
        os.environ.update(rank_environment(testbed, rank, ranks_per_node, port))


@contextmanager
def _namespace() -> Iterator[str]:
    """The path of a new network namespace."""
    words = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    # In a session of its own: Ctrl-C must not take the links away from ranks that are saving.
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert holder.stdin is not None and holder.stdout is not None
    try:
        holder.stdout.readline()  # it has entered its namespace
        yield f"/proc/{holder.pid}/ns/net"
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


def _port(node: int) -> str:
    return f"node{node}"


def _shape(namespace: str, rate_mbit: float | None) -> None:
    if rate_mbit is None:
        subprocess.run([*_enter_words(namespace), "tc", "qdisc", "del", "dev", DEVICE, "root"], capture_output=True)
        return
    bucket = ("tbf", "rate", f"{round(rate_mbit * 1e6)}bit", "burst", BURST, "limit", QUEUE)
    _inside(namespace, "tc", "qdisc", "replace", "dev", DEVICE, "root", *bucket)


def _inside(namespace: str, *words: str) -> str:
    done = subprocess.run([*_enter_words(namespace), *words], capture_output=True, text=True)
    if done.returncode:
        raise EngineError(f"testbed: `{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout


def _enter_words(namespace: str) -> tuple[str, str]:
    return ("nsenter", f"--net={namespace}")


def parse_rate(text: str) -> float | None:
    """Mbit/s of a rate like 100mbit or 2gbit; None for `none`."""
    for suffix, scale in (("gbit", 1e3), ("mbit", 1.0), ("kbit", 1e-3)):
        if text.endswith(suffix):
            return number(above=0)(text.removesuffix(suffix)) * scale
    if text == "none":
        return None
    raise argparse.ArgumentTypeError(f"={text}: write a rate like 100mbit or 2gbit, or none")


@dataclass(frozen=True, kw_only=True)
class BedOptions:
    """Nodes, their ranks and links, and the command that every rank runs."""

    nodes: int = option(4, "network namespaces", least=1, most=200)
    ranks: int = option(4, "processes in each of them", least=1)
    rate: float | None = option(None, "of every node's link, like 100mbit (default: no limit)", type=parse_rate)
    port: int = option(29500, "of the store that the ranks meet at", least=1, most=65535)
    command: tuple[str, ...] = option(help="what every rank runs", positional=True, rest=True, metavar="-- COMMAND")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command once per rank; the first exit code that is not 0, or 0."""
    words = sys.argv[1:] if arguments is None else arguments
    description = "Runs a command once per rank, on nodes of this machine that are joined by shaped links."
    try:
        options = parse(BedOptions, words, prog="python -m ds_moe_ep.bench.testbed", description=description)
        if not options.command:
            raise ConfigError("testbed.command: there is none; write it behind --")
        with open_testbed(options.nodes, options.rate) as testbed:
            return _run_everywhere(testbed, options.ranks, options.port, options.command)
    except MoEError as error:
        return refused(error)


def _run_everywhere(testbed: TestBed, ranks_per_node: int, port: int, words: Sequence[str]) -> int:
    """Starts all ranks and waits for them; the first failure ends the others; after Ctrl-C they end themselves."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks_per_node * len(testbed.nodes)):
            environment = os.environ | rank_environment(testbed, rank, ranks_per_node, port)
            inside = [*_enter_words(testbed.nodes[rank // ranks_per_node]), *words]
            processes.append(subprocess.Popen(inside, env=environment, preexec_fn=die_with_parent))
        while [process for process in processes if process.poll() is None]:  # asks every one of them
            if failed := [process.returncode for process in processes if process.returncode]:
                return failed[0]
            time.sleep(POLL_S)
        return next((process.returncode for process in processes if process.returncode), 0)
    except KeyboardInterrupt:
        _end(processes)  # they have got it, too
        return 130
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        _end(processes)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Waits a moment for the processes, and kills those that do not end."""
    deadline = time.monotonic() + END_S
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
