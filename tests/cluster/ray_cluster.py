"""A machine to run `ray up` against: a real sshd on loopback, in a pid namespace and a home folder of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
HEAD, WORKER = "127.0.0.77", "127.0.0.78"


class Machine:
    """`ray stop` kills every Ray process that it sees: in the namespace those are this machine's own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self._make_environment(self.home / "gradmix-osr")
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        settings = folder / "sshd_config"
        settings.write_text(
            f"ListenAddress {HEAD}\nListenAddress {WORKER}\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nPermitRootLogin prohibit-password\n"
            f"MaxStartups 100\nMaxSessions 100\nSetEnv HOME={self.home} DS_ACCELERATOR=cpu\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        self._sshd = subprocess.Popen(
            ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", "/usr/sbin/sshd", "-D", "-f", str(settings)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + 20
        while socket.socket().connect_ex((HEAD, 22)):
            assert time.monotonic() < end and self._sshd.poll() is None, "sshd did not start"
            time.sleep(0.2)

    def _make_environment(self, checkout: Path) -> None:
        """What `make setup` would install: the packages of this environment, and the code of the copied checkout."""
        environment = checkout / ".venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "packages.pth").write_text(f"{checkout}\n{sysconfig.get_path('purelib')}\n")
        program = environment / "bin" / "ray"
        program.write_text(f'#!/bin/sh\nexec {environment}/bin/python -m ray.scripts.scripts "$@"\n')
        program.chmod(0o755)
        # Newer than the files that are copied: there is nothing left for make to do.
        (environment / ".setup-done").touch()

    def stop(self) -> None:
        self._sshd.kill()
        self._sshd.wait()

    def cluster_file(self) -> Path:
        """`cluster.yaml` with its lines filled in, and a small object store."""
        text = (ROOT / "cluster.yaml").read_text()
        text = text.replace("head_ip: 127.0.0.1 ", f"head_ip: {HEAD} ").replace(
            "~/.ssh/id_ed25519", f"{self.folder}/user"
        )
        text = text.replace("ray start --head", f"ray start --node-ip-address={HEAD} --head")
        text = text.replace("ray start ", "ray start --object-store-memory=200000000 --num-cpus=2 ")
        assert HEAD in text and f"{self.folder}/user" in text and "~/gradmix-osr: .\n" in text
        path = self.folder / "cluster.yaml"
        path.write_text(text.replace("~/gradmix-osr: .\n", f"~/gradmix-osr: {ROOT}\n"))
        assert yaml.safe_load(path.read_text())["auth"]["ssh_user"] == "root"
        return path

    def ray(self, *arguments: str, seconds: float = 300) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("ray")), *arguments],
            cwd=ROOT,
            env={**os.environ, "RAY_UP_enable_autoscaler_v2": "0", "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"ray {' '.join(arguments)}: {done.stdout[-4000:]}{done.stderr[-2000:]}"
        return done.stdout

    def run(self, command: str) -> str:
        """The output of a command on the machine."""
        return subprocess.run(
            ["ssh", "-q", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-i",
             f"{self.folder}/user", f"root@{HEAD}", command], capture_output=True, text=True, timeout=60,
        ).stdout  # fmt: skip
