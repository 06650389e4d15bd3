"""Runs in MLflow, by way of a journal in the run folder, so that tracking can neither slow nor stop training.

Training appends to `journal.jsonl` and goes on. A background thread carries the journal to MLflow; what it could not
deliver is delivered by `python -m trainer.tracking sync RUN_FOLDER`. Every point keeps its own time stamp, and MLflow
stores equal points once, so delivering twice does no harm.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sqlite3
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import tyro

from data_pipeline import cli
from data_pipeline.errors import InputError
from data_pipeline.files import full_disk_is_bad_input, read_json, write_json
from trainer.records import without_password, without_passwords

DEFAULT_URI = "sqlite:///mlruns.db"

# What one request may hold, and one parameter.
_POINTS_PER_REQUEST = 1000
_PARAMS_PER_REQUEST = 100
_PARAM_LENGTH = 500
_RETRY_SECONDS = 5.0
_CLOSE_SECONDS = 30.0
_CHECK_SECONDS = 5.0
_REFUSED = (401, 403)
_changing = threading.Lock()

# The client's own retries block a caller for minutes when the server is gone; here the journal does the retrying.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
# What goes right in MLflow is no news to whoever watches a training run.
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")


class Tracker(Protocol):
    """Where a training run reports to."""

    @property
    def steps(self) -> set[int]:
        """What has been logged for, also by an earlier attempt at the run."""
        ...

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def close(self, status: str) -> None: ...


class NullTracker:
    """The tracker of every rank but the first."""

    @property
    def steps(self) -> set[int]:
        return set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        pass

    def close(self, status: str) -> None:
        pass


def resolve_uri(uri: str | None) -> str:
    """The store that is meant: the given one, MLFLOW_TRACKING_URI, or an SQLite file in the working folder."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI


def check_store(uri: str, *, must_exist: bool = False) -> None:
    """Make sure, within seconds, that the MLflow store can be used.

    Args:
        must_exist: also refuse an SQLite file that is not there yet, which writing would create.

    Raises:
        InputError: it does not answer, refuses user and password, cannot be opened, or is of a kind MLflow does not
            know.
    """
    shown = without_password(uri)
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        _check_server(uri)
    elif parts.scheme == "sqlite":
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.parent.is_dir():
            raise InputError(f"the MLflow store {shown} cannot be opened: create the folder {path.parent}")
        if must_exist and not path.is_file():
            raise InputError(f"there is no MLflow store {shown}: correct the URI, or train a model first")
        try:
            with sqlite3.connect(path, timeout=5) as connection:
                connection.execute("PRAGMA schema_version").fetchone()
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
        except sqlite3.Error as error:
            raise InputError(
                f"the MLflow store {shown} cannot be used ({error}): check the file, its permissions, or name another"
            ) from error
    elif parts.scheme.split("+")[0] not in ("postgresql", "mysql", "mssql"):
        raise InputError(
            f"{shown!r} is no MLflow store: give sqlite:///FILE, http://HOST:PORT or a database such as postgresql://..."
        )


def _check_server(uri: str) -> None:
    """Ask a server whether it is there, which needs no password, and then for something that does, once each."""
    shown = without_password(uri)
    remedy = "start it, correct the URI, or train with --tracking.offline to record in the run folder and deliver later"
    try:
        with urllib.request.urlopen(f"{shown.rstrip('/')}/health", timeout=_CHECK_SECONDS):
            pass
    except (OSError, ValueError, http.client.HTTPException) as error:
        if getattr(error, "code", None) not in _REFUSED:  # by a proxy that wants a password for everything
            reason = getattr(error, "reason", error)
            raise InputError(f"the MLflow server {shown} does not answer ({reason}): {remedy}") from error
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(
            get_default_host_creds(uri), "/api/2.0/mlflow/experiments/search", "GET", params={"max_results": 1},
            max_retries=0, timeout=_CHECK_SECONDS, raise_on_status=False,
        )  # fmt: skip
    except MlflowException as error:
        reason = without_password(str(error))
        raise InputError(f"the MLflow server {shown} does not answer ({reason}): {remedy}") from error
    said = f"{answer.status_code} {answer.reason}"
    if answer.text and not answer.text.lstrip().startswith(("<", "{")):
        said += f", {' '.join(answer.text.split())[:200]}"
    if answer.status_code in _REFUSED:
        raise InputError(
            f"the MLflow server {shown} refuses access ({said}): set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, write them to ~/.mlflow/credentials, or give http://USER:PASSWORD@HOST:PORT"
        )
    if answer.status_code >= 400:
        raise InputError(f"the MLflow server {shown} cannot be used ({said}): look at its log, or correct the URI")


@dataclass(frozen=True)
class Link:
    """Which MLflow run belongs to a run folder (`mlflow.json`)."""

    uri: str
    experiment: str
    run_name: str
    key: str
    """Made here before the run is, and kept as a tag of it: a run made just before a crash is found again by it."""
    run_id: str | None = None
    delivered: int = 0
    """Lines of the journal that MLflow has."""
    status: str = "RUNNING"
    version: str | None = None
    """Of the run's model in the registry; None: not registered yet."""
    model_name: str | None = None
    """Which registered model the version is of; None: not noted, as in links written earlier."""
    parent: str | None = None
    """The MLflow run that this one is nested in."""

    @classmethod
    def open(cls, run_dir: Path, *, uri: str, experiment: str, parent: str | None = None) -> Link:
        """The link of a run folder, made if there is none. Another store or experiment gets the whole run again."""
        if (run_dir / "mlflow.json").is_file():
            link = cls.read(run_dir)
            if (link.uri, link.experiment) == (uri, experiment):
                return link
            new = {"run_id": None, "delivered": 0, "version": None, "model_name": None}
            link = link.replaced(uri=uri, experiment=experiment, **new)
        else:
            link = cls(uri=uri, experiment=experiment, run_name=run_dir.name, key=uuid.uuid4().hex, parent=parent)
        link.save(run_dir)
        return link

    @classmethod
    def read(cls, run_dir: Path) -> Link:
        try:
            return cls(**read_json(run_dir / "mlflow.json", "link to MLflow"))
        except TypeError as error:
            raise InputError(f"{run_dir / 'mlflow.json'} is not a link to MLflow of this version: delete it") from error

    def save(self, run_dir: Path) -> None:
        write_json(run_dir / "mlflow.json", self.__dict__)

    def replaced(self, **changes: Any) -> Link:
        return Link(**{**self.__dict__, **changes})

    @classmethod
    def change(cls, run_dir: Path, **changes: Any) -> Link:
        """Change these fields alone of a run folder's link: another thread may be changing others. Returns it."""
        with _changing:
            link = cls.read(run_dir).replaced(**changes)
            link.save(run_dir)
        return link


class JournalTracker:
    """Journals to the run folder, and delivers to MLflow in the background unless `offline`."""

    def __init__(
        self, run_dir: Path, *, uri: str, experiment: str, offline: bool = False, parent: str | None = None
    ) -> None:
        self._run_dir = run_dir
        # A resumed run comes to steps again that are in the journal already; each counts once.
        self._logged = {(line["step"], *line["metrics"]) for line in _journal_lines(run_dir)}
        _drop_cut_line(run_dir / "journal.jsonl")
        self._journal = (run_dir / "journal.jsonl").open("a", encoding="utf-8")
        Link.open(run_dir, uri=uri, experiment=experiment, parent=parent)
        Link.change(run_dir, status="RUNNING")
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = None
        if not offline:
            self._thread = threading.Thread(target=self._deliver, name="mlflow-delivery", daemon=True)
            self._thread.start()

    @property
    def steps(self) -> set[int]:
        return {step for step, *_ in self._logged}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if (step, *metrics) in self._logged:
            return
        self._logged.add((step, *metrics))
        line = {"step": step, "time": int(time.time() * 1000), "metrics": dict(metrics)}
        with full_disk_is_bad_input(self._run_dir / "journal.jsonl"):
            self._journal.write(json.dumps(line) + "\n")
            self._journal.flush()
            # As durable as the checkpoint that may follow: a run that goes on from there does not log it again.
            os.fsync(self._journal.fileno())
        self._wake.set()

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED, and give delivery half a minute to catch up."""
        with contextlib.suppress(OSError):  # a full disk; what it has not taken is at most the line that said so
            self._journal.close()
        try:
            # Before the wait, which may be in vain: what was not delivered in time is delivered later as it ended.
            Link.change(self._run_dir, status=status)
        finally:
            self._stop.set()
            self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_SECONDS)
            if not self._thread.is_alive():
                went_through(lambda: deliver(self._run_dir))

    def _deliver(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            went = went_through(lambda: deliver(self._run_dir, points_alone=True))
            if not went and not self._stop.wait(_RETRY_SECONDS):
                self._wake.set()


def deliver(run_dir: Path, *, points_alone: bool = False) -> int:
    """Bring MLflow up to date with a run folder; returns how many journal lines were new to it.

    Makes the MLflow run if there is none yet, with the configuration as parameters and the split hash as a tag. When
    the run is over, its report and figures follow as artifacts, unless the `points_alone` are asked for.
    """
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    # It would print two lines for each run that ends, and ask the server for them.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    link = Link.read(run_dir)
    client = MlflowClient(link.uri)
    if link.run_id is None:
        record = read_json(run_dir / "config.json", "configuration")
        run_id = _find_or_create_run(client, link, record)
        # Noted only when the run is described: a crash in between repeats it, which changes nothing.
        _describe(client, run_id, record)
        Link.change(run_dir, run_id=run_id)
        link = link.replaced(run_id=run_id)
    lines = _journal_lines(run_dir)[link.delivered :]
    points: list[Metric] = []
    for line in lines:
        points += [Metric(key, value, line["time"], line["step"]) for key, value in line["metrics"].items()]
    try:
        client.get_run(link.run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise InputError(
            f"the MLflow store {without_password(link.uri)} has no run {link.run_id} of {run_dir}: call this from the "
            "folder that it was trained from, or bring back the store"
        ) from error
    for start in range(0, len(points), _POINTS_PER_REQUEST):
        client.log_batch(link.run_id, metrics=points[start : start + _POINTS_PER_REQUEST])
    Link.change(run_dir, delivered=link.delivered + len(lines))
    # The status is of before the lines were read: of a run that was over then, none is missing.
    if link.status != "RUNNING" and not points_alone:
        _deliver_report(client, link.run_id, run_dir)
        client.set_terminated(link.run_id, link.status)
    return len(lines)


def went_through(action: Callable[[], Any]) -> bool:
    """Whether `action`, which talks to MLflow, succeeded. MLflow raises anything: its own, its HTTP library's, SQL
    errors."""
    try:
        action()
    except Exception:
        return False
    return True


def _deliver_report(client: Any, run_id: str, run_dir: Path) -> None:
    """What `trainer.evaluation.report.write_report` left in the folder; delivered again, it replaces itself."""
    for name in ("report.html", "table.json", "table.csv", "table.txt"):
        if (run_dir / name).is_file():
            client.log_artifact(run_id, str(run_dir / name))
    if (run_dir / "figures").is_dir():
        client.log_artifacts(run_id, str(run_dir / "figures"), "figures")


def discard_journal(run_dir: Path) -> None:
    """Forget what a run folder recorded; the next tracker begins a new MLflow run."""
    for name in ("journal.jsonl", "mlflow.json"):
        (run_dir / name).unlink(missing_ok=True)


def _find_or_create_run(client: Any, link: Link, record: Mapping[str, Any]) -> str:
    from mlflow.exceptions import MlflowException

    try:
        experiment = client.get_experiment_by_name(link.experiment)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(link.experiment)
    except MlflowException:
        # Another process may have made it in between.
        experiment = client.get_experiment_by_name(link.experiment)
        if experiment is None:
            raise
        experiment_id = experiment.experiment_id
    found = client.search_runs([experiment_id], f"tags.`gradmix.key` = '{link.key}'")
    if found:
        return found[0].info.run_id
    tags = {"gradmix.key": link.key, "mlflow.runName": link.run_name, "split_hash": record.get("split_hash", "")}
    if link.parent is not None:
        tags["mlflow.parentRunId"] = link.parent
    return client.create_run(experiment_id, tags=tags, run_name=link.run_name).info.run_id


def _describe(client: Any, run_id: str, record: Mapping[str, Any]) -> None:
    """The configuration as parameters, and as a file."""
    from mlflow.entities import Param

    record = without_passwords(record)  # run folders of earlier versions hold them
    params = [Param(key, value[:_PARAM_LENGTH]) for key, value in _flatten(record.get("config", {})).items()]
    for start in range(0, len(params), _PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + _PARAMS_PER_REQUEST])
    client.log_dict(run_id, record, "config.json")


def _journal_lines(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "journal.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = []
    # What follows the last line break is being written, or was cut short by a crash.
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path} is damaged in line {number}: remove that line, whose numbers are lost") from error
    return lines


def _drop_cut_line(path: Path) -> None:
    if path.is_file():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = str(value)
    return flat


app = tyro.extras.SubcommandApp()


@app.command
def sync(run_dirs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Deliver to MLflow what run folders have recorded and it does not have yet.

    Args:
        run_dirs: Run folders, such as runs/demo.
    """
    for run_dir in run_dirs:
        link = Link.read(run_dir)
        check_store(link.uri, must_exist=link.run_id is not None)
        print(f"{run_dir}: {deliver(run_dir)} new journal lines delivered to {without_password(link.uri)}")


@app.command
def status(run_dirs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Say how much of what run folders have recorded MLflow has.

    Args:
        run_dirs: Run folders, such as runs/demo.
    """
    for run_dir in run_dirs:
        link = Link.read(run_dir)
        lines = len(_journal_lines(run_dir))
        print(f"{run_dir}: {link.status}, {link.delivered} of {lines} lines are in {without_password(link.uri)}")


if __name__ == "__main__":
    cli.run(lambda: app.cli(prog="python -m trainer.tracking", description=__doc__.split("\n")[0]))
