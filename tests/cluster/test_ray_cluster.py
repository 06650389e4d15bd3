"""`ray up`, `ray submit`, `ray down` over a real sshd, with a tracking server on PostgreSQL; sweeps that are killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import ray.autoscaler
import yaml
from mlflow.tracking import MlflowClient

from tests.cluster.postgres import PASSWORD, PROGRAMS, TrackingServer
from tests.cluster.ray_cluster import ROOT, Machine

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(PROGRAMS is None or shutil.which("rsync") is None, reason="needs postgresql and rsync"),
    pytest.mark.skipif(os.geteuid() != 0, reason="sshd needs root"),
]
SMALL = [
    "--protocol", "digits", "--report-every", "1", "--seeds", "0", "--no-early-stopping",
    "--base.encoder.width", "4", "--base.encoder.hidden-dim", "16", "--base.encoder.embedding-dim", "16",
]  # fmt: skip


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    server = TrackingServer(tmp_path_factory.mktemp("tracking"))
    os.environ |= {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    yield server
    del os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
    server.stop()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    started = Machine(tmp_path_factory.mktemp("machine"))
    credentials = started.home / ".mlflow" / "credentials"
    credentials.parent.mkdir()
    credentials.write_text(
        f"[mlflow]\nmlflow_tracking_username = admin\nmlflow_tracking_password = {PASSWORD.replace('%', '%%')}\n"
    )
    yield started
    started.stop()


@pytest.fixture(scope="module")
def cluster(machine):
    """The cluster file of a cluster that is up."""
    path = machine.cluster_file()
    machine.ray("up", "-y", str(path))
    yield str(path)
    machine.ray("down", "-y", str(path))
    assert machine.run("pgrep -c raylet").strip() == "0"


def command(cluster: str, folder: Path, tracking: TrackingServer, *options: str) -> list[str]:
    # Ray joins what it is given without quoting, and runs it in the home folder.
    return [
        "submit", cluster, "tuning/sweep.py", "--", *SMALL, "--data", f"{folder}/data", "--folder", f"{folder}/sweep",
        "--base.tracking.uri", tracking.uri, *options,
    ]  # fmt: skip


def nested_runs(tracking: TrackingServer, folder: Path) -> list:
    client = MlflowClient(tracking.uri)
    parent = json.loads((folder / "sweep" / "mlflow.json").read_text())["run_id"]
    experiment = client.get_run(parent).info.experiment_id
    return client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")


def test_a_sweep_is_submitted_and_its_winner_registered(machine, cluster, tracking, tmp_path):
    output = machine.ray(
        *command(cluster, tmp_path, tracking, "--num-samples", "2", "--epochs", "2", "--final-epochs", "1")
    )
    result = json.loads((tmp_path / "sweep" / "result.json").read_text())
    assert len(result["trials"]) == 2 and not any(trial["error"] for trial in result["trials"])
    assert result["final"]["alias"] == "champion" and "the Ray cluster at auto: 1 node, 2 CPUs" in output
    assert "trial 1: " in output and "trial 2: " in output
    runs = nested_runs(tracking, tmp_path)
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    client = MlflowClient(tracking.uri)
    assert [point.step for point in client.get_metric_history(runs[0].info.run_id, "pseudo/auroc")] == [1, 2]
    assert client.get_model_version_by_alias("gradmix-digits", "champion").version


def test_a_killed_driver_goes_on_and_a_killed_trial_is_tried_again(machine, cluster, tracking, tmp_path):
    options = ["--num-samples", "4", "--epochs", "12", "--max-concurrent", "1", "--final-epochs", "0"]
    arguments = command(cluster, tmp_path, tracking, *options)
    log = tmp_path / "log"
    with log.open("w") as out:
        driver = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), *arguments], cwd=ROOT, stdout=out, stderr=out,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def wait(condition, what: str, seconds: float = 150) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"no {what}: {log.read_text()[-3000:]}"
            time.sleep(0.2)

    def reports() -> list[int]:
        files = sorted((tmp_path / "sweep" / "tune" / "search").glob("*/result.json"), key=lambda p: p.stat().st_ctime)
        return [len(path.read_text().splitlines()) for path in files]

    wait(lambda: sum(reports()) >= 3, "report of the first trial")
    assert "killed" in machine.run("pkill -9 -e -f '^ray::ImplicitFunc'")
    wait(lambda: reports().count(12) >= 1 and len(reports()) >= 2 and reports()[-1] >= 2, "second trial")
    assert "killed" in machine.run("pkill -9 -e -f '[s]weep.py --protocol'")
    assert driver.wait(60) != 0
    finished = {
        path.parent.name: path.read_text()
        for path in (tmp_path / "sweep" / "tune" / "search").glob("*/result.json")
        if len(path.read_text().splitlines()) == 12
    }
    assert finished and not (tmp_path / "sweep" / "result.json").exists()
    machine.ray(*arguments, "--resume")
    result = json.loads((tmp_path / "sweep" / "result.json").read_text())
    assert [trial["metrics"]["epoch"] for trial in result["trials"]] == [12] * 4
    for name, records in finished.items():  # not repeated
        assert (tmp_path / "sweep" / "tune" / "search" / name / "result.json").read_text() == records
    runs = nested_runs(tracking, tmp_path)
    assert [run.info.status for run in runs] == ["FINISHED"] * 4
    client = MlflowClient(tracking.uri)
    for run in runs:
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "pseudo/auroc")]
        assert steps == list(range(1, 13))


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster/ray/aws.yaml"])
def test_cluster_files_fit_rays_schema(name):
    schema = json.loads(Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text())
    config = yaml.safe_load((ROOT / name).read_text())
    jsonschema.validate(config, schema)
    for source in config["file_mounts"].values():
        assert (ROOT / source / "setup.py").is_file()


def test_no_cluster_file_has_ray_make_a_security_group():
    """The group that Ray makes lets in ssh from anywhere, whatever rules it is given."""
    config = yaml.safe_load((ROOT / "cluster" / "ray" / "aws.yaml").read_text())
    assert "security_group" not in config["provider"]
    assert all("SecurityGroupIds" in kind["node_config"] for kind in config["available_node_types"].values())


def test_the_kubernetes_file_opens_nothing_and_matches_the_pinned_ray():
    config = yaml.safe_load((ROOT / "cluster" / "ray" / "kuberay.yaml").read_text())
    head = config["spec"]["headGroupSpec"]
    assert config["kind"] == "RayCluster" and head["serviceType"] == "ClusterIP"
    assert f"ray=={config['spec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
