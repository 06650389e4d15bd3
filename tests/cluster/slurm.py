"""A real SLURM of two nodes: slurmctld and two slurmd on the two hosts of `tests.cluster.hosts`."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from tests.cluster.hosts import ADDRESSES, Hosts

_CONFIG = """
ClusterName=test
SlurmctldHost=n1({addresses[n1]})
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
NodeName=n1 NodeAddr={addresses[n1]} CPUs=2
NodeName=n2 NodeAddr={addresses[n2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Nodes n1 and n2, with the controller on n1; commands are given there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir(parents=True)
        self.hosts = Hosts(folder)
        config = folder / "slurm.conf"
        config.write_text(_CONFIG.format(folder=folder, addresses=ADDRESSES))
        self._environment = {"SLURM_CONF": str(config)}
        self._start("n1", "slurmctld", "-D", "-c")
        time.sleep(2)
        self._nodes = {name: self._start(name, "slurmd", "-D") for name in ADDRESSES}
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%T").split() == ["idle"], 60, "two idle nodes")

    def run(self, *command: str, seconds: float = 60, **environment: str) -> str:
        done = self.hosts.run("n1", *command, seconds=seconds, **self._environment, **environment)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        fields = dict(
            item.split("=", 1) for item in self.run("scontrol", "-o", "show", "job", job).split() if "=" in item
        )
        return f"{fields['JobState']} {fields['ExitCode']} restarts={fields['Restarts']}"

    def start_now(self, job: str) -> None:
        """What was put back into the queue would wait there for two minutes."""
        time.sleep(3)  # until the nodes have forgotten that they were to kill it
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def wait(self, condition, seconds: float, what: str, log: Path | None = None) -> None:
        """Until `condition()`; a failure shows the end of a job's `log`."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what} after {seconds} s: {self.logs(log)}"
            time.sleep(0.5)

    def logs(self, *others: Path | None) -> str:
        paths = [*self.folder.glob("*.log"), *(path for path in others if path is not None and path.exists())]
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in paths)

    def stop(self) -> None:
        self.hosts.stop()

    def _start(self, name: str, *command: str) -> subprocess.Popen:
        path = shutil.which(command[0]) or f"/usr/sbin/{command[0]}"
        return self.hosts.start(name, path, *command[1:], **self._environment)
