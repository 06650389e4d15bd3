"""`ray up`, `ray submit`, `ray down` on two hosts, with a tracking server on PostgreSQL; processes and a node die."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from mlflow.tracking import MlflowClient

from tests.cluster.hosts import ADDRESSES, ROOT, Hosts
from tests.cluster.postgres import PASSWORD, PROGRAMS, TrackingServer
from tests.cluster.ray_cluster import HEAD, SSHD, RayCluster

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
def hosts(tmp_path_factory):
    started = Hosts(tmp_path_factory.mktemp("hosts"), SSHD)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def tracking(hosts, tmp_path_factory):
    """A tracking server on the head; these tests see its network."""
    os.environ |= {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    with hosts.network_of("n1"):
        server = TrackingServer(tmp_path_factory.mktemp("tracking"), HEAD)
        yield server
        server.stop()
    del os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]


@pytest.fixture(scope="module")
def cluster(hosts):
    """A cluster of two nodes that is up."""
    name, password = "mlflow_tracking_username = admin", PASSWORD.replace("%", "%%")
    made = RayCluster(hosts, f"[mlflow]\n{name}\nmlflow_tracking_password = {password}\n")
    made.ray("up", "-y", str(made.file))
    wait(lambda: "2.0 CPU" in made.ray("status"), "second node", lambda: made.ray("status"))
    yield made
    made.ray("down", "-y", str(made.file))
    assert hosts.run("n1", "pgrep", "-c", "raylet").stdout.strip() == "0"


class Sweep:
    """A sweep to submit to the cluster, in a folder of its own."""

    def __init__(self, cluster: RayCluster, tracking: TrackingServer, folder: Path, *options: str) -> None:
        self.cluster, self.tracking, self.folder = cluster, tracking, folder / "sweep"
        # Ray joins what it is given without quoting, and runs it in the home folder.
        self._arguments = [
            "submit", str(cluster.file), "tuning/sweep.py", "--", *SMALL, "--data", f"{folder}/data", "--folder",
            str(self.folder), "--base.tracking.uri", tracking.uri, *options,
        ]  # fmt: skip
        self.log = folder / "log"

    def run(self, *options: str) -> str:
        return self.cluster.ray(*self._arguments, *options)

    def start(self) -> subprocess.Popen:
        return self.cluster.hosts.start("n1", *self.cluster.command(*self._arguments), log=self.log)

    def result(self) -> dict:
        return json.loads((self.folder / "result.json").read_text())

    def reports(self) -> dict[str, list[dict]]:
        """What each trial has reported so far."""
        files = (self.folder / "tune" / "search").glob("*/result.json")
        return {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()] for path in files}

    def epochs(self) -> dict[str, list[int]]:
        """Of these reports. What goes on from a checkpoint reports it again."""
        return {name: [*dict.fromkeys(each["epoch"] for each in reports)] for name, reports in self.reports().items()}

    def wait(self, condition, what: str) -> None:
        wait(condition, what, lambda: self.log.read_text()[-3000:])

    def nested_runs(self) -> list:
        client = MlflowClient(self.tracking.uri)
        parent = json.loads((self.folder / "mlflow.json").read_text())["run_id"]
        experiment = client.get_run(parent).info.experiment_id
        return client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")

    def steps(self, run) -> list[int]:
        history = MlflowClient(self.tracking.uri).get_metric_history(run.info.run_id, "pseudo/auroc")
        return [point.step for point in history]


def wait(condition, what: str, state, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what}: {state()}"
        time.sleep(0.2)


def test_a_sweep_is_submitted_and_its_winner_registered(cluster, tracking, tmp_path):
    sweep = Sweep(cluster, tracking, tmp_path, "--num-samples", "4", "--epochs", "2", "--final-epochs", "1")
    output = sweep.run()
    result = sweep.result()
    assert len(result["trials"]) == 4 and not any(trial["error"] for trial in result["trials"])
    assert result["final"]["alias"] == "champion" and "the Ray cluster at auto: 2 nodes, 2 CPUs" in output
    assert "trial 1: " in output and "trial 4: " in output
    assert {report["node_ip"] for reports in sweep.reports().values() for report in reports} == {*ADDRESSES.values()}
    assert [(run.info.status, sweep.steps(run)) for run in sweep.nested_runs()] == [("FINISHED", [1, 2])] * 4
    assert MlflowClient(tracking.uri).get_model_version_by_alias("gradmix-digits", "champion").version


def test_the_ranks_of_a_trial_lie_on_both_nodes(cluster, tracking, tmp_path):
    sweep = Sweep(
        cluster, tracking, tmp_path, "--num-samples", "2", "--epochs", "2", "--final-epochs", "0", "--ranks", "2",
        "--cpus", "0.9", "--base.batch-size", "96",
    )  # fmt: skip
    before = cluster.hosts.sent("n2")
    sweep.run()
    assert cluster.hosts.sent("n2") - before > 1e6, "no gradients came from the second node"
    assert [trial["metrics"]["epoch"] for trial in sweep.result()["trials"]] == [2, 2]
    assert [(run.info.status, sweep.steps(run)) for run in sweep.nested_runs()] == [("FINISHED", [1, 2])] * 2


def test_a_killed_driver_goes_on_and_a_killed_trial_is_tried_again(cluster, tracking, tmp_path):
    sweep = Sweep(
        cluster, tracking, tmp_path, "--num-samples", "4", "--epochs", "12", "--max-concurrent", "1",
        "--final-epochs", "0",
    )  # fmt: skip
    driver = sweep.start()
    sweep.wait(lambda: any(len(epochs) >= 3 for epochs in sweep.epochs().values()), "report of the first trial")
    killed = [cluster.hosts.run(name, "pkill", "-9", "-e", "-f", "^ray::ImplicitFunc").stdout for name in ADDRESSES]
    assert "killed" in "".join(killed)

    def second_is_under_way() -> bool:
        lengths = sorted(map(len, sweep.epochs().values()))
        return len(lengths) >= 2 and lengths[-1] == 12 and lengths[-2] >= 2

    sweep.wait(second_is_under_way, "second trial")
    assert "killed" in cluster.hosts.run("n1", "pkill", "-9", "-e", "-f", "[s]weep.py --protocol").stdout
    assert driver.wait(60) != 0
    finished = {name: reports for name, reports in sweep.reports().items() if len(sweep.epochs()[name]) == 12}
    assert finished and not (sweep.folder / "result.json").exists()
    sweep.run("--resume")
    assert [trial["metrics"]["epoch"] for trial in sweep.result()["trials"]] == [12] * 4
    assert sweep.reports().items() >= finished.items()  # not repeated
    assert [(run.info.status, sweep.steps(run)) for run in sweep.nested_runs()] == [("FINISHED", [*range(1, 13)])] * 4


def test_the_trials_of_a_node_that_is_lost_move_elsewhere(cluster, tracking, tmp_path):
    sweep = Sweep(cluster, tracking, tmp_path, "--num-samples", "3", "--epochs", "60", "--final-epochs", "0")
    driver = sweep.start()

    def on_second_node() -> set[str]:
        latest = {name: reports[-1] for name, reports in sweep.reports().items() if reports}
        return {name for name, last in latest.items() if last["node_ip"] == ADDRESSES["n2"] and last["epoch"] < 40}

    sweep.wait(on_second_node, "trial on the second node")
    (lost,) = on_second_node()
    cluster.hosts.end("n2")
    assert driver.wait(240) == 0, sweep.log.read_text()[-3000:]
    assert [trial["metrics"]["epoch"] for trial in sweep.result()["trials"]] == [60] * 3
    # It went on from its checkpoint.
    assert len(sweep.reports()[lost]) <= 61 and sweep.reports()[lost][-1]["node_ip"] == HEAD
    assert sweep.epochs()[lost] == [*range(1, 61)]
    assert [(run.info.status, sweep.steps(run)) for run in sweep.nested_runs()] == [("FINISHED", [*range(1, 61)])] * 3


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


# What KubeRay's API reference (ray.io/v1, operator 1.2) puts around Kubernetes' own pod templates.
_STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
_GROUP = {"rayStartParams": _STRINGS, "template": {"type": "object"}}
_RAY_CLUSTER = {
    "type": "object",
    "properties": {
        "rayVersion": {"type": "string"},
        "suspend": {"type": "boolean"},
        "enableInTreeAutoscaling": {"type": "boolean"},
        "autoscalerOptions": {"type": "object"},
        "headServiceAnnotations": {"type": "object"},
        "headGroupSpec": {
            "type": "object",
            "properties": {
                **_GROUP,
                "serviceType": {"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                "headService": {"type": "object"},
                "enableIngress": {"type": "boolean"},
            },
            "required": ["rayStartParams", "template"],
            "additionalProperties": False,
        },
        "workerGroupSpecs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    **_GROUP,
                    "groupName": {"type": "string"},
                    **{name: {"type": "integer", "minimum": 0} for name in ("replicas", "minReplicas", "maxReplicas")},
                    "numOfHosts": {"type": "integer", "minimum": 1},
                    "suspend": {"type": "boolean"},
                    "scaleStrategy": {"type": "object"},
                },
                "required": ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["headGroupSpec"],
    "additionalProperties": False,
}


def test_the_kubernetes_file_fits_kuberays_fields_and_kubernetes_pods():
    config = yaml.safe_load((ROOT / "cluster" / "ray" / "kuberay.yaml").read_text())
    assert (config["apiVersion"], config["kind"]) == ("ray.io/v1", "RayCluster")
    jsonschema.validate(config["spec"], _RAY_CLUSTER)
    groups = [config["spec"]["headGroupSpec"], *config["spec"]["workerGroupSpecs"]]
    for number, group in enumerate(groups):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": f"group-{number}"}}
        kubernetes_validate.validate({**pod, "template": group["template"]}, "1.31", strict=True)


def test_the_kubernetes_file_opens_nothing_and_matches_the_pinned_ray():
    config = yaml.safe_load((ROOT / "cluster" / "ray" / "kuberay.yaml").read_text())
    head = config["spec"]["headGroupSpec"]
    assert config["kind"] == "RayCluster" and head["serviceType"] == "ClusterIP"
    assert f"ray=={config['spec']['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
