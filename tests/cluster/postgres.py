"""PostgreSQL (Debian's package) and `cluster/mlflow/serve.sh` on it, in a folder of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.cluster.ports import free_ports, wait_until_up

ROOT = Path(__file__).parents[2]
PASSWORD = "a-%long password"  # characters that have to be quoted in a URI
QUOTED = "a-%25long%20password"
PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


class TrackingServer:
    """A tracking server with passwords; its user is admin, with `PASSWORD`."""

    def __init__(self, folder: Path, host: str = "127.0.0.1") -> None:
        """It listens on `host`, an address of this machine."""
        self.folder, self._host = folder, host
        self._store_port, self._port = free_ports(2)
        self.uri = f"http://{host}:{self._port}"
        # PostgreSQL does not run as root, and does not get into a folder of pytest's.
        self.store = Path(tempfile.mkdtemp(prefix="postgres-"))
        shutil.chown(self.store, "postgres", "postgres")
        database = f"{self.store}/db"
        self._run("initdb", "-D", database, "--auth-local=trust", "--auth-host=scram-sha-256")
        options = f"-p {self._store_port} -h 127.0.0.1 -k {self.store}"
        self._run("pg_ctl", "-D", database, "-w", "-l", f"{self.store}/log", "-o", options, "start")
        script = (ROOT / "cluster" / "mlflow" / "createdb.sql").read_text()
        connection = ("-h", str(self.store), "-p", str(self._store_port))
        self._run("psql", *connection, "-v", f"password={PASSWORD}", "-v", "ON_ERROR_STOP=1", "-f", "-", given=script)
        self._start()

    def _run(self, program: str, *arguments: str, given: str = "") -> None:
        output = self.folder / "postgres-output.log"  # a pipe would stay open in the server that pg_ctl starts
        with open(output, "w") as log:
            done = subprocess.run(
                ["runuser", "-u", "postgres", "--", str(PROGRAMS / program), *arguments],
                input=given, text=True, stdout=log, stderr=log, timeout=60, cwd=self.store,
            )  # fmt: skip
        assert done.returncode == 0, f"{program}: {output.read_text()}"

    def _start(self) -> None:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "GRADMIX_MLFLOW_STORE": f"postgresql://mlflow:{QUOTED}@127.0.0.1:{self._store_port}/mlflow",
            "GRADMIX_MLFLOW_FOLDER": str(self.folder / "server"),
            "GRADMIX_MLFLOW_HOST": self._host,
            "GRADMIX_MLFLOW_PORT": str(self._port),
            "GRADMIX_MLFLOW_WORKERS": "1",
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        }
        with open(self.folder / "server.log", "a") as log:
            self._server = subprocess.Popen(
                ["bash", str(ROOT / "cluster" / "mlflow" / "serve.sh")], env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        wait_until_up(self.uri, self._server)

    def stop(self) -> None:
        os.killpg(self._server.pid, 9)
        self._server.wait()
        self._run("pg_ctl", "-D", f"{self.store}/db", "-m", "immediate", "stop")
        shutil.rmtree(self.store)
