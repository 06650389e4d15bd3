"""The sweep on a real Ray on this machine: what is read, what is recorded, and what survives a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
from mlflow.tracking import MlflowClient
from ray.cluster_utils import Cluster
from rich.console import Console

from data_pipeline.beton import Build
from data_pipeline.build import BuildConfig, build
from data_pipeline.errors import InputError
from data_pipeline.protocols import Protocol
from data_pipeline.run_folder import RunFolder
from data_pipeline.sources import Source
from trainer.config import EncoderConfig, OptimizerConfig
from trainer.recipes import recipe
from trainer.tracking import NullTracker
from tuning.config import SweepConfig, parse_config
from tuning.nodes import check_shared, preflight
from tuning.report import Trial
from tuning.space import SearchSpace
from tuning.sweep import conclude, sweep
from tuning.trial import pseudo_name, pseudo_split, trial_scores
from tuning.winner import train_winner

QUIET = Console(quiet=True)
ROOT = Path(__file__).parents[1]
SMALL = ["--base.encoder.width", "4", "--base.encoder.hidden-dim", "16", "--base.encoder.embedding-dim", "16"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)


def run(command: list[str], output: Path) -> None:
    """Run it to its end. Not through a pipe: Ray's processes hold it, and may outlive what began them."""
    with output.open("w") as file:
        started = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        assert started.wait(300) == 0, output.read_text()
    finally:
        started.kill()


@pytest.fixture
def config(tmp_path) -> SweepConfig:
    base = dataclasses.replace(
        recipe("digits"), encoder=EncoderConfig(width=4, hidden_dim=16, embedding_dim=16), ks=(1, 5)
    )
    return SweepConfig(
        num_samples=2, epochs=2, report_every=1, seeds=(0,), final_epochs=1, base=base, folder=tmp_path / "sweep"
    )


def test_a_search_never_reads_an_image_of_an_unknown_class(monkeypatch, tmp_path):
    """Not when its files are made, and not from any file that others made."""
    known = {f"{label}" for label in Protocol("digits", 0).known}
    read: list[str] = []
    get = Source.__getitem__

    def recorded(self, index):
        image, label = get(self, index)
        read.append(self.class_names[label])
        assert "train" in self.describe(0)
        return image, label

    monkeypatch.setattr(Source, "__getitem__", recorded)
    for seed in (0, 1):
        build(BuildConfig(pseudo_open=seed, out=tmp_path / "data"), QUIET)
    monkeypatch.undo()
    assert set(read) == known

    opened: list[Path] = []
    file = Build.file

    def recorded_file(self, partition):
        path = file(self, partition)
        opened.append(path)
        return path

    monkeypatch.setattr(Build, "file", recorded_file)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    splits = [pseudo_split(tmp_path / "data", pseudo_name("digits", seed), 0, 1) for seed in (0, 1)]
    config = dataclasses.replace(recipe("digits"), epochs=1, encoder=EncoderConfig(width=4), ks=(1, 5))
    ((epoch, scores),) = trial_scores(config, splits, tmp_path / "trial", 1)
    assert epoch == 1 and 0 < scores["auroc"] < 1 and scores["k"] in (1, 5, 10)
    assert {path.parent.name for path in opened} == {f"digits-pseudo{seed}-0-16px-raw" for seed in (0, 1)}


def test_a_trial_that_dies_between_a_checkpoint_and_its_score_reports_it_later(monkeypatch, tmp_path):
    for seed in (0, 1):
        build(BuildConfig(pseudo_open=seed, out=tmp_path / "data"), QUIET)
    splits = [pseudo_split(tmp_path / "data", pseudo_name("digits", seed), 0, 1) for seed in (0, 1)]
    config = dataclasses.replace(recipe("digits"), epochs=3, encoder=EncoderConfig(width=4), ks=(1, 5))
    straight = dict(trial_scores(config, splits, tmp_path / "straight", 1))
    assert list(straight) == [1, 2, 3]

    def dies(trainers):
        raise KeyboardInterrupt

    trial = trial_scores(config, splits, tmp_path / "trial", 1)
    got = dict([next(trial)])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tuning.trial.mean_scores", dies)
        next(trial)
    later = dict(trial_scores(config, splits, tmp_path / "trial", 1))
    assert list(later) == [2, 3]
    # Nobody may have heard the last score: a trial that has trained all its epochs still has one.
    assert list(dict(trial_scores(config, splits, tmp_path / "trial", 1))) == [3]
    got |= later
    for scores in (*got.values(), *straight.values()):
        del scores["train_seconds"]
    assert got == straight


def test_a_sweep_is_one_run_with_its_trials_nested_and_the_winner_measured_once(config, tmp_path):
    store = f"sqlite:///{tmp_path}/store.db"
    tracking = dataclasses.replace(config.base.tracking, uri=store)
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, tracking=tracking))
    result = sweep(config, QUIET)
    assert len(result["trials"]) == 2 and not any(trial["error"] for trial in result["trials"])
    assert result["best"]["score"] == max(trial["score"] for trial in result["trials"])
    pictures = {"importance", "parallel_coordinates", "slices"}
    assert {path.name for path in (config.path / "plots").glob("*.png")} == {f"{name}.png" for name in pictures}

    client = MlflowClient(store)
    parent = json.loads((config.path / "mlflow.json").read_text())["run_id"]
    experiment = client.get_experiment_by_name("gradmix-osr").experiment_id
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(nested) == 2 and client.get_run(parent).info.status == "FINISHED"
    for run in nested:
        assert run.info.status == "FINISHED" and run.data.tags["split_hash"]
        assert float(run.data.params["search.objective.theta"]) > 0
        assert [m.step for m in client.get_metric_history(run.info.run_id, "pseudo/score")] in ([1], [1, 2])
    assert {artifact.path for artifact in client.list_artifacts(parent)} >= {"plots", "result.json", "config.json"}

    # The winner, on all known classes: the first model is the champion.
    assert result["final"]["alias"] == "champion"
    kept = json.loads(Path(client.download_artifacts(parent, "result.json", str(tmp_path))).read_text())
    assert kept["final"] == result["final"]
    version = client.get_model_version_by_alias("gradmix-digits", "champion").version
    assert client.get_model_version_by_alias("gradmix-digits", "challenger").version == version

    with pytest.raises(InputError, match="add --resume to go on"):
        sweep(config, QUIET)
    with pytest.raises(InputError, match="holds a sweep with other number of trials: name another --folder"):
        sweep(dataclasses.replace(config, num_samples=3, resume=True), QUIET)
    # Going on with a finished sweep trains nothing again, and no second version is registered.
    before = {path: path.stat().st_mtime_ns for path in config.path.glob("trials/*/*/checkpoints/*")}
    again = sweep(dataclasses.replace(config, resume=True), QUIET)
    assert again["best"] == result["best"] and len(again["trials"]) == 2
    assert before == {path: path.stat().st_mtime_ns for path in config.path.glob("trials/*/*/checkpoints/*")}
    assert len(client.search_model_versions("name='gradmix-digits'")) == 1
    assert again["final"]["alias"] == "champion"

    # Its trials are known to a later search of the same split.
    later = dataclasses.replace(config, warm_start=(parent,), num_samples=1, epochs=1, folder=tmp_path / "later")
    with pytest.raises(InputError, match=f"{parent} is of protocol digits, split 0"):
        sweep(dataclasses.replace(later, split=1), QUIET)
    (tmp_path / "narrow.yaml").write_text("objective.theta: {low: 1.0, high: 2.0}")
    with pytest.raises(InputError, match=f"{parent} has no trial of this search space"):
        sweep(dataclasses.replace(later, space=tmp_path / "narrow.yaml"), QUIET)
    assert len(sweep(dataclasses.replace(later, final_epochs=0), QUIET)["trials"]) == 1
    assert "starting from 2 trials of earlier sweeps" in (later.path / "log.txt").read_text()

    # What cannot be compared with the champion does not replace it.
    other = dataclasses.replace(config, split=1, num_samples=1, epochs=1, folder=tmp_path / "other")
    assert sweep(other, QUIET)["final"]["alias"] == "challenger"
    assert client.get_model_version_by_alias("gradmix-digits", "champion").version == version
    assert client.get_model_version_by_alias("gradmix-digits", "challenger").version != version


def test_a_trial_that_fails_is_tried_again_and_reported(config, tmp_path):
    space = tmp_path / "space.yaml"
    space.write_text("optimizer.learning_rate: {choices: [1.0e+30]}\n")
    offline = dataclasses.replace(config.base.tracking, offline=True)
    base = dataclasses.replace(config.base, tracking=offline)
    config = dataclasses.replace(config, space=space, num_samples=1, base=base, report_every=5)  # than there are epochs
    for resume in (False, True):
        with pytest.raises(InputError, match=r"no trial of 1 came to a score; the first said: .*not finite"):
            sweep(dataclasses.replace(config, resume=resume), QUIET)
    assert (config.path / "log.txt").read_text().count("failed") == 2


def test_a_trial_that_failed_does_not_win(config, tmp_path):
    space, tracker = SearchSpace.read(config.space, config.trial_config), NullTracker()

    def trial(name: str, score: float | None, error: str | None = None) -> Trial:
        metrics = {"auroc": score, "accuracy": 0.5, "k": 1, "epoch": 1}
        return Trial(
            name=name, values={name: 0.5 for name in space.distributions}, score=score, metrics=metrics, error=error
        )

    run = RunFolder(tmp_path / "folder")
    trials = [trial("a", 0.7), trial("b", 0.9, "the loss is not finite"), trial("c", 0.6)]
    assert conclude(config, space, trials, run, tracker)["best"]["trial"] == "a"
    with pytest.raises(InputError, match="no trial of 1 came to a score; the first said: the loss is not finite"):
        conclude(config, space, trials[1:2], run, tracker)
    with pytest.raises(InputError, match="they were stopped before their first one: raise --time-budget"):
        conclude(config, space, [trial("d", None)], run, tracker)


def test_the_winner_is_trained_with_what_was_found(config, monkeypatch, tmp_path):
    """And not in phases, which have a θ and a λ of their own."""
    trained = []

    def note(winner, console):
        trained.append(winner)
        raise KeyboardInterrupt

    monkeypatch.setattr("tuning.winner.train", note)
    made = build(BuildConfig(out=tmp_path / "data"), QUIET)
    base = dataclasses.replace(config.base, phases=("3:0:1",))
    config = dataclasses.replace(config, base=base, final_epochs=7)
    space = SearchSpace.read(config.space, config.trial_config)
    values = {name: distribution.low for name, distribution in space.distributions.items()}
    settings = SimpleNamespace(uri="sqlite:///x.db")
    with pytest.raises(KeyboardInterrupt):
        train_winner(config, space, {"trial": "t", "values": values, "k": 5}, made, settings, QUIET)
    (winner,) = trained
    assert winner.schedule == ((7, winner.objective),) and winner.objective.theta == values["objective.theta"]


def test_the_base_has_the_defaults_of_its_method():
    config = parse_config(["--base.method", "cross_entropy", "--num-samples", "3"])
    assert config.base == recipe("digits", "cross_entropy") and config.num_samples == 3
    with pytest.raises(InputError, match=r"space.yaml: objective.theta: unknown field 'theta'; known: label_smoothing"):
        sweep(config, QUIET)


def test_a_killed_sweep_goes_on_without_repeating_what_is_finished(tmp_path):
    command = [
        sys.executable, str(ROOT / "tuning" / "sweep.py"), "--num-samples", "4", "--epochs", "3", "--report-every", "1",
        "--seeds", "0", "--final-epochs", "0", "--max-concurrent", "1", "--no-early-stopping", "--folder", "killed",
        "--base.tracking.offline", *SMALL,
    ]  # fmt: skip
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        first = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    trials = tmp_path / "killed" / "trials"

    def finished() -> set[str]:
        done = set()
        for link in trials.glob("*/mlflow.json"):
            if json.loads(link.read_text())["status"] == "FINISHED":
                done.add(link.parent.name)
        return done

    end = time.monotonic() + 150
    while len(finished()) < 2:
        assert time.monotonic() < end and first.poll() is None, output.read_text()
        time.sleep(0.3)
    everything = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
    for process in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(everything, timeout=30)
    before = {path: path.stat().st_mtime_ns for name in finished() for path in (trials / name).rglob("step-*")}
    assert len(before) >= 2
    run([*command, "--resume"], output)
    result = json.loads((tmp_path / "killed" / "result.json").read_text())
    assert len(result["trials"]) == 4 and all(trial["score"] is not None for trial in result["trials"])
    assert before == {path: path.stat().st_mtime_ns for path in before}, "a finished trial was trained again"


def test_a_search_that_is_told_to_stop_names_no_winner(tmp_path):
    command = [
        sys.executable, str(ROOT / "tuning" / "sweep.py"), "--num-samples", "3", "--epochs", "2", "--report-every", "1",
        "--seeds", "0", "--final-epochs", "1", "--max-concurrent", "1", "--no-early-stopping", "--folder", "stopped",
        "--base.tracking.offline", *SMALL,
    ]  # fmt: skip
    folder = tmp_path / "stopped"
    for number, status, options in ((signal.SIGINT, 130, []), (signal.SIGUSR1, 75, ["--resume"])):
        output = tmp_path / f"{number.name}.txt"
        with output.open("w") as file:
            stopped = subprocess.Popen([*command, *options], stdout=file, stderr=subprocess.STDOUT)
        try:
            end = time.monotonic() + 150
            while "trial 1:" not in output.read_text():
                assert time.monotonic() < end and stopped.poll() is None, output.read_text()
                time.sleep(0.1)
            stopped.send_signal(number)
            assert stopped.wait(60) == status, output.read_text()
        finally:
            stopped.kill()
        assert output.read_text().endswith("stopped: the same command with --resume goes on\n")
        assert json.loads((folder / "mlflow.json").read_text())["status"] == "KILLED"
        assert not (folder / "result.json").exists() and not list(folder.glob("winner*"))
    run([*command, "--resume"], output)
    assert len(json.loads((folder / "result.json").read_text())["trials"]) == 3


def test_resources_that_can_never_be_met_are_refused_at_once():
    with pytest.raises(InputError, match="asks for 64 CPUs, no node of Ray has more than 2: set --cpus"):
        preflight(1, 64, 0, [{"CPU": 2.0}])
    with pytest.raises(InputError, match="asks for 1 GPUs, no node of Ray has more than 0"):
        preflight(1, 1, 1, [{"CPU": 2.0}])
    # Two nodes of two cores are no node of four.
    with pytest.raises(InputError, match="asks for 4 CPUs"):
        preflight(1, 4, 0, [{"CPU": 2.0}, {"CPU": 2.0}])
    with pytest.raises(InputError, match="no node of Ray has both 4 CPUs and 1 GPUs"):
        preflight(1, 4, 1, [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}])
    with pytest.raises(InputError, match="has 4 processes, Ray has room for 3: set --ranks"):
        preflight(4, 1, 0, [{"CPU": 1.0}, {"CPU": 2.0}])
    assert preflight(1, 2, 0.25, [{"CPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}]) == 1
    assert preflight(1, 0.1, 0.25, [{"CPU": 2.0, "GPU": 1.0}]) == 4
    # The processes of a trial may lie on several nodes.
    assert preflight(2, 1, 0, [{"CPU": 3.0}, {"CPU": 2.0}]) == 2


@pytest.fixture
def another_ray():
    """Of somebody else on this machine."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield
    cluster.shutdown()


def test_trials_of_two_ranks_score_what_those_of_one_do(config, another_ray):
    """And those that are stopped early leave their place to the next."""
    offline = dataclasses.replace(config.base.tracking, offline=True)
    # Small steps: in so small a network a difference of 1e-7 in the weights is one of 1e-3 in the loss three steps of
    # the usual size later, on one rank as on two.
    sgd = OptimizerConfig(name="sgd", learning_rate=1e-5)
    base = dataclasses.replace(config.base, batch_size=96, optimizer=sgd, tracking=offline)
    config = dataclasses.replace(config, base=base, final_epochs=0, cpus=0.9, max_concurrent=1)
    one, two = (
        sweep(dataclasses.replace(config, ranks=ranks, folder=config.path.parent / f"ranks{ranks}"), QUIET)["trials"]
        for ranks in (1, 2)
    )
    assert len(one) == len(two) == 2
    for alone, together in zip(one, two):
        assert not together["error"] and together["values"] == alone["values"]
        assert together["metrics"]["epoch"] == alone["metrics"]["epoch"]
        assert together["score"] == pytest.approx(alone["score"], abs=2e-3)


def test_a_batch_that_the_ranks_cannot_share_is_refused_before_the_search(config):
    with pytest.raises(InputError, match="a batch of 115 cannot be split evenly over 2 parts"):
        dataclasses.replace(config, ranks=2)


def test_what_was_refused_before_its_first_trial_is_asked_again_without_more_ado(config):
    with pytest.raises(InputError, match="asks for 64 CPUs"):
        sweep(dataclasses.replace(config, cpus=64.0), QUIET)
    result = sweep(dataclasses.replace(config, num_samples=1, epochs=1, final_epochs=0), QUIET)
    assert [trial["metrics"]["epoch"] for trial in result["trials"]] == [1]
    with pytest.raises(InputError, match="holds a sweep: add --resume"):
        sweep(config, QUIET)


def test_other_nodes_have_to_see_the_folders_and_reach_the_store(tmp_path):
    """Two nodes on this machine, of which the first is where the sweep runs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        check_shared("sqlite:///mlruns.db", [tmp_path / "not there"], ray.nodes())  # alone, all is this machine's own
        cluster.add_node(num_cpus=1)
        check_shared("http://server", [tmp_path], ray.nodes())
        with pytest.raises(InputError, match=r"has no .*not there: --data and --folder have to be shared"):
            check_shared("http://server", [tmp_path, tmp_path / "not there"], ray.nodes())
        with pytest.raises(InputError, match=r"SQLite file mlruns\.db: start a server"):
            check_shared("sqlite:///mlruns.db", [tmp_path], ray.nodes())
        check_shared(None, [tmp_path], ray.nodes())
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num-samples is 0; set it to 1 or more"),
        ({"seeds": ()}, "name one or more"),
        ({"cpus": 0.0}, "give a trial something to run on"),
        ({"resume": True, "restart": True}, "give one of them"),
        ({"time_budget": 0.0}, "set it above 0"),
        ({"final_epochs": -1}, "final-epochs is -1; set it to 0 or more"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(InputError, match=message):
        SweepConfig(**options)
