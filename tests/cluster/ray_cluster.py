"""`cluster.yaml` filled in for the two hosts n1 and n2, and the `ray` commands against it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import yaml

from tests.cluster.hosts import ADDRESSES, ROOT, SCRATCH, Hosts

HEAD = ADDRESSES["n1"]
# Each host's own, unlike most of the file system.
_HOME = f"{SCRATCH}/home"
# Ray would kill trials for what other programs of this machine take of its memory.
_ENVIRONMENT = f"HOME={_HOME} DS_ACCELERATOR=cpu RAY_memory_monitor_refresh_ms=0"
SSHD = f"SetEnv {_ENVIRONMENT}\nMaxStartups 100\nMaxSessions 100\n"


class RayCluster:
    """A Ray cluster with one CPU core on each of the two hosts, of which n1 is the head."""

    def __init__(self, hosts: Hosts, credentials: str) -> None:
        """`hosts` have to be made with `SSHD`. `credentials` for the tracking server go to the home of each."""
        self.hosts, self.file = hosts, hosts.folder / "cluster.yaml"
        home = hosts.folder / "ray-home"
        self._make_environment(home / "gradmix-osr")
        (home / ".mlflow").mkdir()
        (home / ".mlflow" / "credentials").write_text(credentials)
        Path("/tmp/ray").mkdir(exist_ok=True)
        for name in ADDRESSES:
            done = hosts.run(name, "sh", "-c", f"cp -r {home} {_HOME} && mount -t tmpfs tmpfs /tmp/ray")
            assert done.returncode == 0, done.stderr
        self._fill_in()

    def _make_environment(self, checkout: Path) -> None:
        """What `make setup` would install: the packages of this environment, and the code of the copied checkout."""
        environment, copied = checkout / ".venv", f"{_HOME}/gradmix-osr"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text(f"{copied}\n{sysconfig.get_path('purelib')}\n")
        program = environment / "bin" / "ray"
        program.write_text(f'#!/bin/sh\nexec {copied}/.venv/bin/python -m ray.scripts.scripts "$@"\n')
        program.chmod(0o755)
        # Newer than the files that are copied: there is nothing left for make to do.
        (environment / ".setup-done").touch()

    def _fill_in(self) -> None:
        text = (ROOT / "cluster.yaml").read_text()
        for given, filled in {
            "head_ip: 127.0.0.1 ": f"head_ip: {HEAD} ",
            "worker_ips: [] ": f"worker_ips: [{ADDRESSES['n2']}] ",
            "max_workers: 0 ": "max_workers: 1 ",
            "~/.ssh/id_ed25519 ": f"{self.hosts.folder}/user ",
            "~/gradmix-osr: .\n": f"~/gradmix-osr: {ROOT}\n",
            "ray start ": "ray start --object-store-memory=200000000 --num-cpus=1 ",
        }.items():
            assert given in text, f"cluster.yaml has no {given!r}"
            text = text.replace(given, filled)
        assert yaml.safe_load(text)["auth"]["ssh_user"] == "root"
        self.file.write_text(text)

    def ray(self, *arguments: str, seconds: float = 300) -> str:
        done = self.hosts.run("n1", *self.command(*arguments), seconds=seconds)
        assert done.returncode == 0, f"ray {' '.join(arguments)}: {done.stdout[-4000:]}{done.stderr[-2000:]}"
        return done.stdout

    def command(self, *arguments: str) -> list[str]:
        """A `ray` command for n1, as a person at that host's shell would give it."""
        settings = [f"HOME={_HOME}", "TMPDIR=/tmp", "RAY_UP_enable_autoscaler_v2=0", "RAY_USAGE_STATS_ENABLED=0"]
        program = [f"{_HOME}/gradmix-osr/.venv/bin/python", "-m", "ray.scripts.scripts"]
        return ["env", *settings, "RAY_AUTH_MODE=disabled", *program, *arguments]
