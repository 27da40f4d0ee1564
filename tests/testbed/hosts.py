"""Hosts on one machine: every node of a test bed with a name, processes and an sshd of its own.

1. A host is a node's network namespace and, of its own: host name, process numbers, mounts. Files are the machine's, as
   on a shared file system; /dev/shm, /run, /etc/hosts and ssh's configuration are not.
2. Its first process is the sshd. When that ends, Linux ends every process of the host, and it ends with the process
   that opened the hosts, however that ends: nothing is left behind, after SIGKILL neither.
3. Keys, known hosts and configurations are made for the test bed and lie in its folder; hosts know each other alone.

Needs a test bed (root), sshd and ssh.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.bench.harness.processes import die_with_parent
from ds_moe_ep.bench.testbed import DEVICE, TestBed, open_testbed, why_not

SSHD = "/usr/sbin/sshd"
START_S = 20.0
SERVER = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PidFile none
MaxStartups 100
"""
CLIENT = """\
Host *
    User root
    IdentityFile {folder}/key
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
    ConnectTimeout 10
    LogLevel ERROR
"""
# Mounts of the host's own, then its first process; $1 is the folder, $2 the name, $3 the sshd.
BOOT = """\
set -e
hostname "$2"
mount -t tmpfs tmpfs /run && mkdir /run/sshd
mount -t tmpfs tmpfs /dev/shm
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh_config" /etc/ssh/ssh_config
exec "$3" -D -e -f "$1/sshd_config"
"""


def why_no_hosts() -> str | None:
    """Why no hosts can be made here, as a sentence; None where they can."""
    missing = [name for name, path in (("sshd", SSHD), ("ssh", "ssh")) if shutil.which(path) is None]
    return f"{', '.join(missing)} missing: install openssh-server" if missing else why_not()


@dataclass(frozen=True)
class Hosts:
    """Hosts that are open: a folder of their own, names and first processes in the order of nodes."""

    testbed: TestBed
    folder: Path
    names: tuple[str, ...]
    processes: tuple[subprocess.Popen[bytes], ...]

    def hostfile(self, slots: int) -> Path:
        """A hostfile with `slots` ranks per host."""
        path = self.folder / f"hostfile_{slots}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.names))
        return path

    def start(self, node: int, words: Sequence[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Starts a command on a host, as a user there does, in the folder of the log."""
        where = ["nsenter", "--target", str(self.first_process(node)), "--net", "--uts", "--mount", "--pid"]
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ} | variables
        with log.open("wb") as output:
            return subprocess.Popen(
                [*where, f"--wd={log.parent}", *words],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )

    def first_process(self, node: int) -> int:
        """The number that the machine gives to a host's first process."""
        parent = self.processes[node].pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def numbers(self, node: int) -> list[int]:
        """The numbers that the machine gives to the processes of a host."""
        namespace = os.readlink(f"/proc/{self.first_process(node)}/ns/pid")
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(path / "ns" / "pid") == namespace:
                    found.append(int(path.name))
            except OSError:  # it has ended meanwhile
                continue
        return found

    def crash(self, node: int) -> None:
        """Ends a host and its link at once, as a lost power supply does."""
        subprocess.run(
            ["nsenter", f"--net={self.testbed.nodes[node]}", "ip", "link", "set", DEVICE, "down"], check=True
        )
        os.kill(self.first_process(node), signal.SIGKILL)
        self.processes[node].wait(10)


@contextmanager
def open_hosts(num_hosts: int, folder: Path, names: Mapping[int, str] | None = None) -> Iterator[Hosts]:
    """`num_hosts` hosts `node1`, `node2`, ... that reach each other by ssh; `names` renames some by their number."""
    with ExitStack() as stack:
        testbed = stack.enter_context(open_testbed(num_hosts))
        listed = tuple(f"node{node + 1}" for node in range(num_hosts))
        _write_files(folder, testbed, listed)
        processes = []
        for node, name in enumerate(listed):
            called = (names or {}).get(node, name)
            processes.append(stack.enter_context(_host(folder, testbed.nodes[node], called)))
        hosts = Hosts(testbed, folder, listed, tuple(processes))
        for node in range(num_hosts):
            _wait_for_ssh(hosts, node)
        yield hosts


def _write_files(folder: Path, testbed: TestBed, names: Sequence[str]) -> None:
    for name in ("key", "host_key"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)]
        subprocess.run(words, check=True)
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    (folder / "ssh_config").write_text(CLIENT.format(folder=folder))
    public = " ".join((folder / "host_key.pub").read_text().split()[:2])
    known = [f"{name},{testbed.address(node)} {public}\n" for node, name in enumerate(names)]
    (folder / "known_hosts").write_text("".join(known))
    lines = [f"{testbed.address(node)} {name}\n" for node, name in enumerate(names)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))


@contextmanager
def _host(folder: Path, namespace: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """The process whose child is a host's first one, and which ends with it and it with this."""
    own = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
    words = ["nsenter", f"--net={namespace}", *own, "sh", "-c", BOOT, "sh", str(folder), name, SSHD]
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=die_with_parent
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _wait_for_ssh(hosts: Hosts, node: int) -> None:
    deadline, log = time.monotonic() + START_S, hosts.folder / "ssh_check.log"
    while True:
        assert hosts.processes[node].poll() is None, (hosts.folder / f"{hosts.names[node]}.log").read_text()
        try:
            code = hosts.start(0, ["ssh", hosts.names[node], "true"], log).wait(START_S)
        except (IndexError, FileNotFoundError):  # its first process has not begun
            code = 1
        if code == 0:
            return
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
