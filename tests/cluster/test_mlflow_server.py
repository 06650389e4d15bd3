"""Training that reports to a real MLflow server, which is killed in the middle and comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from tests.cluster.ports import free_ports, wait_until_up

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]


class Server:
    """`mlflow server` over an SQLite file in `folder`; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder}/store.db", "--artifacts-destination", f"{self.folder}/art",
        ]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        wait_until_up(self.uri, self.process)

    def kill(self) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    started = Server(tmp_path)
    yield started
    started.kill()


def test_a_server_that_dies_costs_no_training_and_no_metric(server, digits, tmp_path):
    run_dir, epochs = tmp_path / "run", 8
    command = [
        sys.executable, "-m", "trainer.train", "--data", str(digits.folder), "--run-dir", str(run_dir), "--epochs",
        str(epochs), "--encoder.width", "4", "--encoder.hidden-dim", "16", "--encoder.embedding-dim", "16",
        "--tracking.uri", server.uri,
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    training = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    journal = run_dir / "journal.jsonl"
    end = time.monotonic() + 120
    while not (journal.is_file() and len(journal.read_text().splitlines()) >= 2):
        assert time.monotonic() < end and training.poll() is None, training.stdout.read()
        time.sleep(0.2)
    server.kill()
    output = training.communicate(timeout=180)[0].decode()
    # All is trained, measured and kept; the registration alone could not be done, and says how to do it.
    assert training.returncode == 2 and "does not answer" in output and "Traceback" not in output, output
    assert json.loads((run_dir / "metrics.json").read_text())["epochs"] == epochs

    server.start()
    sync = subprocess.run(
        [sys.executable, "-m", "trainer.tracking", "sync", str(run_dir)], cwd=ROOT, capture_output=True, text=True
    )
    assert sync.returncode == 0, sync.stderr
    client = MlflowClient(server.uri)
    link = json.loads((run_dir / "mlflow.json").read_text())
    steps = [point.step for point in client.get_metric_history(link["run_id"], "train/total")]
    assert steps == list(range(1, epochs + 1))
    assert client.get_run(link["run_id"]).info.status == "FINISHED"
    # The same command again makes good what was left.
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stdout + again.stderr
    assert str(client.get_model_version_by_alias("gradmix-digits", "champion").version) == "1"


def test_a_server_that_dies_costs_a_sweep_nothing(server, tmp_path):
    command = [
        sys.executable, str(ROOT / "tuning" / "sweep.py"), "--num-samples", "2", "--epochs", "2", "--report-every", "1",
        "--seeds", "0", "--final-epochs", "0", "--no-early-stopping", "--folder", str(tmp_path / "sweep"), "--data",
        str(tmp_path / "data"), "--base.tracking.uri", server.uri, "--base.encoder.width", "4",
    ]  # fmt: skip
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    sweep = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob("sweep/trials/*/journal.jsonl")):
        assert time.monotonic() < end and sweep.poll() is None, sweep.stdout.read()
        time.sleep(0.1)
    server.kill()
    output = sweep.communicate(timeout=240)[0].decode()
    assert sweep.returncode == 2 and "the sweep is complete in" in output and "Traceback" not in output, output
    assert len(json.loads((tmp_path / "sweep" / "result.json").read_text())["trials"]) == 2

    server.start()
    again = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stdout + again.stderr
    client = MlflowClient(server.uri)
    parent = client.get_run(json.loads((tmp_path / "sweep" / "mlflow.json").read_text())["run_id"])
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert [run.info.status for run in (parent, *nested)] == ["FINISHED"] * 3
    for run in nested:
        assert [point.step for point in client.get_metric_history(run.info.run_id, "pseudo/score")] == [1, 2]
    assert {artifact.path for artifact in client.list_artifacts(parent.info.run_id)} >= {"plots", "result.json"}
