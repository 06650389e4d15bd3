"""The doctor finds what is missing and says what to do about it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest

from trainer import doctor

ROOT = Path(__file__).parents[1]


def run_doctor(**environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "trainer.doctor"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def finding(findings, what: str) -> doctor.Finding:
    return next(each for each in findings if each.what == what)


def test_here_nothing_needed_is_lacking_and_everything_is_named(tmp_path, monkeypatch):
    done = run_doctor(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlruns.db")
    assert done.returncode == 0, done.stdout + done.stderr
    for what in ("Python", "OpenCV (FFCV)", "libturbojpeg", "GPU", "DeepSpeed accelerator", "MLflow store", "SLURM"):
        assert what in done.stdout
    assert f"torch                  {metadata.version('torch')}" in done.stdout


def test_it_needs_nothing_but_python():
    program = "import sys, trainer.doctor; print([m for m in ('torch', 'numpy', 'rich', 'tyro') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_missing_libraries_have_their_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    findings = list(doctor.system_libraries())
    assert {each.state for each in findings} == {"lack"}
    assert "libopencv-dev" in finding(findings, "OpenCV (FFCV)").remedy
    assert "apt-get install" in finding(findings, "C++ compiler").remedy


def test_a_dead_server_is_reported_quickly(monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{probe.getsockname()[1]}")
    started = time.perf_counter()
    (found,) = doctor.mlflow_store()
    assert found.state == "lack" and "does not answer" in found.found and "start the server" in found.remedy
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("answer", [None, b"SSH-2.0-OpenSSH\r\n"], ids=["silent", "not-http"])
def test_a_port_that_speaks_no_http_is_reported_quickly(monkeypatch, answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply():
            connection, _ = server.accept()
            with connection:
                connection.recv(1024)
                connection.sendall(answer)

        if answer:
            threading.Thread(target=reply, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.perf_counter()
        (found,) = doctor.mlflow_store()
    assert found.state == "lack" and "start the server" in found.remedy
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("uri", "state"),
    [
        ("postgresql://me:s3cret@db:5432/mlflow", "optional"),
        ("http://me:s3cret@127.0.0.1:port", "lack"),
        ("sqlite:////no-such-folder/mlruns.db", "lack"),
    ],
)
def test_every_store_is_judged_and_no_password_is_shown(monkeypatch, uri, state):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (found,) = doctor.mlflow_store()
    assert found.state == state and found.remedy
    assert "s3cret" not in f"{found.found} {found.remedy}"


def test_a_damaged_manifest_does_not_hide_the_other_data(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, text in (("bad", '{"coun'), ("good", '{"files": {"train": {"count": 1200}}}')):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(text)
    bad, good = doctor.data_folders()
    assert "unreadable" in bad.found and "build it again" in bad.remedy
    assert good.state == "ok" and "1,200" in good.found


def test_a_build_for_one_cuda_version_is_the_tested_release(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "2.11.0+cu130")
    assert doctor.package("torch", "2.11.0").state == "ok"
    assert doctor.package("torch", "2.11.1").state == "lack"


def test_another_version_than_the_tested_one_is_a_lack():
    assert doctor.package("numpy", "0.0.1").state == "lack"
    assert "tested with 0.0.1" in doctor.package("numpy", "0.0.1").found
    assert doctor.package("no-such-package", "1").remedy == "make setup"


def test_a_lack_is_a_failure_and_an_option_is_not(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Finding("GPU", "optional", "none", "buy one")]),))
    assert doctor.main() == 0 and "everything needed is here" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter([doctor.Finding("disk", "lack", "0 GB", "free some")]),))
    assert doctor.main() == 1 and "1 of 1 lack" in capsys.readouterr().out


@pytest.mark.parametrize("name", doctor.PINNED)
def test_every_pinned_package_has_a_tested_version(name):
    assert f"\n{name}==" in (ROOT / "constraints.txt").read_text()
