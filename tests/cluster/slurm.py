"""A real SLURM of two nodes on this machine: slurmctld and two slurmd, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

from tests.cluster.ports import free_ports

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2
KillWait=5
SlurmdTimeout=20
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_2} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Two nodes, n1 and n2; jobs see them as two hosts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir(parents=True)
        ports = free_ports(3)
        config = folder / "slurm.conf"
        config.write_text(
            _CONFIG.format(host=socket.gethostname(), folder=folder, port=ports[0], port_1=ports[1], port_2=ports[2])
        )
        self.environment = {**os.environ, "SLURM_CONF": str(config)}
        self._daemons = [self._start("slurmctld", "-D", "-c")]
        time.sleep(2)
        self._nodes = {name: self._start("slurmd", "-D", "-N", name) for name in ("n1", "n2")}
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"], 60, "two idle nodes")

    def run(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        fields = dict(
            item.split("=", 1) for item in self.run("scontrol", "-o", "show", "job", job).split() if "=" in item
        )
        return f"{fields['JobState']} {fields['ExitCode']} restarts={fields['Restarts']}"

    def wait(self, condition, seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} after {seconds} s: {self.logs()}"
            time.sleep(0.5)

    def logs(self) -> str:
        return "\n".join(f"{path}:\n{path.read_text()[-1500:]}" for path in self.folder.glob("*.log"))

    def stop(self) -> None:
        subprocess.run(["scancel", "-u", "root"], env=self.environment, capture_output=True, timeout=30)
        time.sleep(1)
        for daemon in (*self._nodes.values(), *self._daemons):
            daemon.kill()
            daemon.wait()

    def _start(self, *command: str) -> subprocess.Popen:
        path = shutil.which(command[0]) or f"/usr/sbin/{command[0]}"
        return subprocess.Popen(
            [path, *command[1:]], env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
