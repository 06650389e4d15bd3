"""The journal and its delivery: every point once, whatever happens to the store or to the process."""

from __future__ import annotations

import base64
import dataclasses
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from mlflow.tracking import MlflowClient
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.files import write_json
from data_pipeline.run_folder import RunFolder
from trainer import tracking
from trainer.config import TrackingConfig
from trainer.recipes import recipe
from trainer.reproduce.plan import ReproduceConfig
from trainer.reproduce.runner import opened
from trainer.tracking import JournalTracker, Link, check_store, deliver, resolve_uri
from trainer.train import begin
from tuning.space import SearchSpace
from tuning.sweep import SweepConfig
from tuning.sweep import begin as begin_sweep


@pytest.fixture
def uri(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(tmp_path)  # artifacts of an SQLite store go to the working folder
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_json(folder / "config.json", {"config": {"seed": 3, "mixing": {"kind": "gradmix"}}, "split_hash": "abc"})
    return folder


def points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in MlflowClient(uri).get_metric_history(run_id, key)]


def test_points_parameters_and_tags_arrive(uri, run_dir):
    tracker = JournalTracker(run_dir, uri=uri, experiment="e")
    for step in range(5):
        tracker.log({"loss": step / 2, "rate": 1.0}, step)
    tracker.close("FINISHED")
    link = Link(**json.loads((run_dir / "mlflow.json").read_text()))
    run = MlflowClient(uri).get_run(link.run_id)
    assert points(uri, link.run_id, "loss") == [(step, step / 2) for step in range(5)]
    assert run.data.params == {"seed": "3", "mixing.kind": "gradmix"}
    assert run.data.tags["split_hash"] == "abc" and run.info.status == "FINISHED" and run.info.run_name == "run"


def test_delivering_twice_and_from_the_beginning_changes_nothing(uri, run_dir):
    tracker = JournalTracker(run_dir, uri=uri, experiment="e", offline=True)
    for step in range(3):
        tracker.log({"loss": float(step)}, step)
    tracker.close("FINISHED")
    assert deliver(run_dir) == 3 and deliver(run_dir) == 0
    link = Link(**json.loads((run_dir / "mlflow.json").read_text()))
    # As after a crash between the delivery and the note of it, and even before the run's id was noted.
    link.replaced(delivered=0, run_id=None).save(run_dir)
    assert deliver(run_dir) == 3
    assert Link(**json.loads((run_dir / "mlflow.json").read_text())).run_id == link.run_id
    assert points(uri, link.run_id, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_resumed_run_repeats_no_point(uri, run_dir):
    first = JournalTracker(run_dir, uri=uri, experiment="e", offline=True)
    first.log({"loss": 1.0}, 1)
    first.log({"loss": 2.0}, 2)
    first.close("KILLED")
    with (run_dir / "journal.jsonl").open("a") as file:
        file.write('{"step": 3, "met')  # cut short by a kill
    second = JournalTracker(run_dir, uri=uri, experiment="e", offline=True)
    for step in (2, 3, 4):
        second.log({"loss": float(step)}, step)
    second.close("FINISHED")
    deliver(run_dir)
    link = Link(**json.loads((run_dir / "mlflow.json").read_text()))
    assert points(uri, link.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert len(MlflowClient(uri).search_runs(["1"])) == 1


def test_a_damaged_journal_names_the_line(uri, run_dir):
    """As a machine leaves it that lost its power."""
    tracker = JournalTracker(run_dir, uri=uri, experiment="e", offline=True)
    tracker.log({"x": 1.0}, 1)
    tracker.close("KILLED")
    with (run_dir / "journal.jsonl").open("ab") as file:
        file.write(bytes(40) + b"\n")
    with pytest.raises(InputError, match=r"journal.jsonl is damaged in line 2: remove that line"):
        JournalTracker(run_dir, uri=uri, experiment="e", offline=True)


def test_a_store_that_is_gone_costs_training_nothing_and_loses_nothing(uri, run_dir, monkeypatch):
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.05)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
    tracker = JournalTracker(run_dir, uri=dead, experiment="e")
    started = time.perf_counter()
    for step in range(20):
        tracker.log({"loss": float(step)}, step)
    assert time.perf_counter() - started < 1.0
    tracker.close("FINISHED")
    Link(**json.loads((run_dir / "mlflow.json").read_text())).replaced(uri=uri).save(run_dir)  # it is back
    assert deliver(run_dir) == 20
    link = Link(**json.loads((run_dir / "mlflow.json").read_text()))
    assert points(uri, link.run_id, "loss") == [(step, float(step)) for step in range(20)]
    assert MlflowClient(uri).get_run(link.run_id).info.status == "FINISHED"


WITH_PASSWORD = TrackingConfig(uri="http://alice:SECRET@host:5000", offline=True)


def test_no_record_holds_the_password_of_a_store(uri, run_dir, tmp_path):
    config = dataclasses.replace(recipe("digits"), tracking=WITH_PASSWORD)
    begin(config, RunFolder(tmp_path / "training"), {}, "")
    searched = SweepConfig(base=config, folder=tmp_path / "sweep")
    begin_sweep(searched, SearchSpace.read(searched.space, searched.trial_config), RunFolder(searched.path))
    table = ReproduceConfig(experiment="table2", folder=tmp_path / "tables", tracking=WITH_PASSWORD)
    opened(table, Console(quiet=True))
    for folder in (tmp_path / "training", searched.path, table.path):
        text = (folder / "config.json").read_text()
        assert "SECRET" not in text and '"uri": "http://host:5000"' in text
    assert config.tracking == WITH_PASSWORD  # which is what goes on being used

    # Nor does MLflow get the one that a run folder of an earlier version has in its record.
    record = {"tracking": {"uri": WITH_PASSWORD.uri}, "base": {"tracking": {"uri": WITH_PASSWORD.uri}}}
    write_json(run_dir / "config.json", {"config": {**record, "tracking_uri": WITH_PASSWORD.uri}, "split_hash": ""})
    JournalTracker(run_dir, uri=uri, experiment="e", offline=True).close("FINISHED")
    deliver(run_dir)
    client, run_id = MlflowClient(uri), Link.read(run_dir).run_id
    expected = dict.fromkeys(("tracking.uri", "base.tracking.uri", "tracking_uri"), "http://host:5000")
    assert client.get_run(run_id).data.params == expected
    artifact = Path(client.download_artifacts(run_id, "config.json", str(tmp_path)))
    assert "SECRET" not in artifact.read_text() and "http://host:5000" in artifact.read_text()


class Failing(BaseHTTPRequestHandler):
    """A server that is there and answers everything with an error."""

    def do_GET(self) -> None:
        self.send_response(500)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *args) -> None:
        pass


def test_a_server_that_answers_with_errors_is_asked_again_later(uri, run_dir, monkeypatch):
    monkeypatch.setattr(tracking, "_RETRY_SECONDS", 0.05)
    server = HTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        tracker = JournalTracker(run_dir, uri=f"http://127.0.0.1:{server.server_port}", experiment="e")
        started = time.perf_counter()
        for step in range(5):
            tracker.log({"loss": float(step)}, step)
        assert time.perf_counter() - started < 1.0
        tracker.close("FINISHED")
    finally:
        server.shutdown()
    # Another store gets the whole run, also what was recorded before it was named.
    JournalTracker(run_dir, uri=uri, experiment="e").close("FINISHED")
    link = Link.read(run_dir)
    assert points(uri, link.run_id, "loss") == [(step, float(step)) for step in range(5)]


def test_the_end_of_a_run_is_noted_while_a_delivery_hangs(uri, run_dir, monkeypatch):
    """Neither waits for the other, and neither takes back what the other has noted."""
    monkeypatch.setattr(tracking, "_CLOSE_SECONDS", 0.1)
    hangs, goes_on, log_batch = threading.Event(), threading.Event(), MlflowClient.log_batch

    def hanging(self, run_id, metrics=(), params=()):
        if metrics:
            hangs.set()
            goes_on.wait(60)
        log_batch(self, run_id, metrics=metrics, params=params)

    monkeypatch.setattr(MlflowClient, "log_batch", hanging)
    tracker = JournalTracker(run_dir, uri=uri, experiment="e")
    tracker.log({"loss": 1.0}, 1)
    assert hangs.wait(60)
    tracker.log({"loss": 2.0}, 2)
    tracker.close("FINISHED")
    link = Link.read(run_dir)
    assert (link.status, link.delivered) == ("FINISHED", 0)
    Link.change(run_dir, version="1", model_name="m")
    goes_on.set()
    tracker._thread.join(60)
    # Nor is what was going on taken for all there is.
    assert Link.read(run_dir) == link.replaced(delivered=1, version="1", model_name="m")
    assert MlflowClient(uri).get_run(link.run_id).info.status == "RUNNING"
    assert deliver(run_dir) == 1 and points(uri, link.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert MlflowClient(uri).get_run(link.run_id).info.status == "FINISHED"


def test_a_crash_before_the_parameters_arrived_is_made_good(uri, run_dir, monkeypatch):
    JournalTracker(run_dir, uri=uri, experiment="e", offline=True).close("RUNNING")
    write_json(run_dir / "config.json", {"config": {f"name{i}": i for i in range(250)}, "split_hash": "abc"})

    def crash(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking, "_describe", crash)
        deliver(run_dir)
    deliver(run_dir)
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert len(runs) == 1 and runs[0].data.params == {f"name{i}": str(i) for i in range(250)}


def test_the_command_line_delivers_and_tells(uri, run_dir, capsys):
    tracker = JournalTracker(run_dir, uri=uri, experiment="e", offline=True)
    tracker.log({"loss": 1.0}, 1)
    tracker.close("FINISHED")
    for command, answer in (
        ("status", "FINISHED, 0 of 1 lines"),
        ("sync", "1 new journal lines"),
        ("status", "1 of 1 lines"),
    ):
        tracking.app.cli(args=[command, str(run_dir)])
        assert answer in capsys.readouterr().out


def test_stores_that_cannot_be_used_are_one_line(tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(InputError, match="does not answer"):
        check_store(dead)
    with pytest.raises(InputError, match="create the folder"):
        check_store("sqlite:////nowhere/at/all.db")
    with pytest.raises(InputError, match="'garbage' is no MLflow store: give sqlite"):
        check_store("garbage")
    with pytest.raises(InputError, match=r"server http://127.0.0.1:\d+ does not answer"):
        check_store(dead.replace("http://", "http://user:secret@"))
    with pytest.raises(InputError, match="there is no MLflow store"):
        check_store(f"sqlite:///{tmp_path}/none.db", must_exist=True)
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "store.db").write_text("this is no database, though it is long enough to be looked at as one" * 20)
    with pytest.raises(InputError, match="cannot be used"):
        check_store(f"sqlite:///{tmp_path}/store.db")


class Guarded(BaseHTTPRequestHandler):
    """A server that wants alice's password, except for being asked whether it is there."""

    expected = "Basic " + base64.b64encode(b"alice:SECRET").decode()
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        granted = self.path == "/health" or self.headers["Authorization"] == self.expected
        self.send_response(200 if granted else 401)
        self.end_headers()
        self.wfile.write(b"{}" if granted else b"You are not authenticated.")

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def guarded(tmp_path, monkeypatch):
    """HOST:PORT of a server that wants a password, asked from a machine that knows none."""
    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    Guarded.asked.clear()
    server = HTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_server_that_refuses_the_password_is_one_line_before_anything_is_trained(guarded, tmp_path, monkeypatch):
    refused = r"server http://127.0.0.1:\d+ refuses access \(401 Unauthorized, You are not auth"
    with pytest.raises(InputError, match=f"{refused}.*MLFLOW_TRACKING_USERNAME .* ~/.mlflow/credentials, or .*USER:"):
        check_store(f"http://{guarded}")
    assert len(Guarded.asked) == 2  # and nothing is tried again
    with pytest.raises(InputError, match=refused) as error:
        check_store(f"http://alice:WRONG@{guarded}")
    assert "WRONG" not in str(error.value)
    # Every way in which MLflow itself finds them.
    check_store(f"http://alice:SECRET@{guarded}")
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = alice\nmlflow_tracking_password = SECRET\n"
    )
    check_store(f"http://{guarded}")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "alice")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "WRONG")
    with pytest.raises(InputError, match=refused):
        check_store(f"http://{guarded}")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "SECRET")
    check_store(f"http://{guarded}/")


def test_a_server_that_is_there_but_fails_is_one_line(monkeypatch):
    class Half(Guarded):
        seconds = 0.0

        def do_GET(self) -> None:
            time.sleep(self.seconds if self.path != "/health" else 0)
            self.send_response(200 if self.path == "/health" else 500)
            self.end_headers()

    server = HTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(InputError, match=r"cannot be used \(500 Internal Server Error\): look at its log"):
            check_store(f"http://127.0.0.1:{server.server_port}")
        # Nor is one that takes the request and says nothing waited for.
        monkeypatch.setattr(tracking, "_CHECK_SECONDS", 0.2)
        monkeypatch.setattr(Half, "seconds", 1.0)
        started = time.perf_counter()
        with pytest.raises(InputError, match=r"does not answer \(API request to http://127.*: start it") as error:
            check_store(f"http://alice:SECRET@127.0.0.1:{server.server_port}")
        assert time.perf_counter() - started < 3 and "SECRET" not in str(error.value)
    finally:
        server.shutdown()


def test_the_store_is_the_given_one_then_the_environments_then_sqlite(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(None) == "sqlite:///mlruns.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert resolve_uri(None) == "http://server:5000" and resolve_uri("sqlite:///x.db") == "sqlite:///x.db"
