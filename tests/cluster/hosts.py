"""Two hosts on this machine: namespaces of their own, joined by a cable, each with a name, an address and an sshd.

What they share with each other and with this machine is the file system, as nodes of a cluster share one; network,
process numbers, host name, /dev/shm and the scratch folder `SCRATCH` are each host's own.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
ADDRESSES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}
SCRATCH = "/mnt"

_INIT = """
set -e
hostname {name}
ip link set lo up
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs {scratch}
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh /etc/ssh/ssh_config.d
while true; do sleep infinity || true; done
"""
_SSHD = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
StrictModes no
PermitRootLogin prohibit-password
"""
_SSH = """
IdentityFile {folder}/user
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
ServerAliveInterval 10
LogLevel ERROR
"""


class Hosts:
    """n1 and n2. Everything that runs on them ends with them."""

    def __init__(self, folder: Path, sshd: str = "") -> None:
        """`sshd` are further lines of its configuration."""
        self.folder, self.home = folder, folder / "home"
        self.home.mkdir()
        (folder / "ssh").mkdir()
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "ssh" / "test.conf").write_text(_SSH.format(folder=folder))
        (folder / "sshd_config").write_text(_SSHD.format(folder=folder) + sshd)
        Path("/run/sshd").mkdir(exist_ok=True)
        self._namespaces = {name: self._make(name) for name in ADDRESSES}
        self._inits = {name: self._init_of(name) for name in ADDRESSES}
        one, two = (self._inits[name] for name in ADDRESSES)
        _run("ip", "link", "add", "wire", "netns", one, "type", "veth", "peer", "name", "wire", "netns", two)
        for name, address in ADDRESSES.items():
            for change in (["addr", "add", f"{address}/24", "dev"], ["link", "set", "up", "dev"]):
                _run("nsenter", "-t", self._inits[name], "--net", "ip", *change, "wire")
            self.start(name, "/usr/sbin/sshd", "-D", "-f", str(folder / "sshd_config"))
            self._wait(lambda name=name: self._answers(name), f"sshd on {name}")

    def command(self, name: str, *command: str, **environment: str) -> list[str]:
        """`command` as this machine runs it on the host `name`, in the checkout."""
        changes = {"HOME": str(self.home), "TMPDIR": SCRATCH, **environment}
        return [
            "nsenter", "-t", self._inits[name], "--net", "--uts", "--mount", "--pid", "--", "env", "-C", str(ROOT),
            *(f"{key}={value}" for key, value in changes.items()), *command,
        ]  # fmt: skip

    def start(self, name: str, *command: str, log: Path | None = None, **environment: str) -> subprocess.Popen:
        """A process on the host, whose output goes to `log`."""
        with open(log or os.devnull, "w") as out:
            return subprocess.Popen(
                self.command(name, *command, **environment), stdout=out, stderr=out, stdin=subprocess.DEVNULL
            )

    def run(self, name: str, *command: str, seconds: float = 60, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(name, *command, **environment), capture_output=True, text=True, timeout=seconds,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def sent(self, name: str) -> int:
        """Bytes that the host has sent to the other one."""
        lines = self.run(name, "cat", "/proc/net/dev").stdout.splitlines()
        return int(next(line for line in lines if "wire:" in line).split(":")[1].split()[8])

    @contextmanager
    def network_of(self, name: str) -> Iterator[None]:
        """This thread, and what it starts, sees the network of the host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open("/proc/thread-self/ns/net") as own, open(f"/proc/{self._inits[name]}/ns/net") as other:
            assert libc.setns(other.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
            try:
                yield
            finally:
                libc.setns(own.fileno(), 0)

    def end(self, name: str) -> None:
        """Kill all that runs on the host. Its end of the cable stays, which would take the other end with it."""
        self.run(name, "sh", "-c", "kill -9 -1")

    def cut(self) -> None:
        """Pull the cable: nobody is told, packets just stop to arrive."""
        _run("nsenter", "-t", self._inits["n2"], "--net", "ip", "link", "set", "down", "dev", "wire")

    def mend(self) -> None:
        _run("nsenter", "-t", self._inits["n2"], "--net", "ip", "link", "set", "up", "dev", "wire")

    def stop(self) -> None:
        for namespace in self._namespaces.values():
            namespace.kill()
            namespace.wait()

    def _make(self, name: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "bash", "-c",
             _INIT.format(name=name, folder=self.folder, scratch=SCRATCH)]
        )  # fmt: skip

    def _init_of(self, name: str) -> str:
        """The process that all others of the host descend from, by its number on this machine."""
        parent = self._namespaces[name].pid
        children = Path(f"/proc/{parent}/task/{parent}/children")
        self._wait(lambda: children.read_text().split(), f"host {name}")
        init = children.read_text().split()[0]
        self._wait(
            lambda: _output("nsenter", "-t", init, "--uts", "--mount", "sh", "-c", f"hostname; ls {SCRATCH}") == name,
            f"name of host {name}",
        )
        return init

    def _answers(self, name: str) -> bool:
        done = self.run("n1", "ssh", "-o", "ConnectTimeout=2", name, "hostname")
        return done.stdout.strip() == name

    def _wait(self, condition, what: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} after {seconds} s"
            time.sleep(0.1)


def environment() -> dict[str, str]:
    """What a training command on a host needs: this Python first, this checkout's code, and no GPU."""
    return {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
