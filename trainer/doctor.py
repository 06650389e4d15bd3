"""`make doctor`: what this machine has and lacks, each lack with its remedy. Needs nothing but Python itself."""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
PINNED = ("torch", "torchvision", "triton", "deepspeed", "ffcv", "ray", "mlflow", "numpy")
DEFAULT_URI = "sqlite:///mlruns.db"


@dataclass(frozen=True)
class Finding:
    """One line of the report. `lack` is something the project needs here, `optional` something that some use needs."""

    what: str
    state: Literal["ok", "lack", "optional"]
    found: str
    remedy: str = ""


def python_version() -> Iterator[Finding]:
    good = sys.version_info >= (3, 11)
    remedy = "" if good else "install Python 3.11 or newer and run make PYTHON=python3.12"
    yield Finding("Python", "ok" if good else "lack", platform.python_version(), remedy)


def machine() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding("cores, memory", "ok", f"{os.cpu_count()} cores, {memory:.0f} GB")
    free = shutil.disk_usage(ROOT).free / 2**30
    enough = free >= 10
    yield Finding(
        "disk", "ok" if enough else "lack", f"{free:.0f} GB free", "" if enough else "free 10 GB: the packages take 6"
    )


def system_libraries() -> Iterator[Finding]:
    remedy = "sh cluster/install_system_libraries.sh, or sudo apt-get install -y {}"
    compiler = shutil.which("c++") or shutil.which("g++")
    yield _have("C++ compiler", compiler, remedy.format("g++"))
    tool = shutil.which("pkg-config")
    yield _have("pkg-config", tool, remedy.format("pkg-config"))
    for what, module, package in (
        ("OpenCV (FFCV)", "opencv4", "libopencv-dev"),
        ("libturbojpeg (FFCV)", "libturbojpeg", "libturbojpeg0-dev"),
    ):
        version = _output(["pkg-config", "--modversion", module]) if tool else None
        yield _have(what, version, remedy.format(package))


def packages() -> Iterator[Finding]:
    inside = sys.prefix != sys.base_prefix
    yield Finding(
        "environment", "ok" if inside else "lack", sys.prefix if inside else "none", "" if inside else "make setup"
    )
    wanted = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name in PINNED:
        yield package(name, wanted[name])


def package(name: str, wanted: str) -> Finding:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Finding(name, "lack", "not installed", "make setup")
    # As for pip, 2.11.0+cu130 is 2.11.0: the same release built for one version of CUDA.
    if version.partition("+")[0] != wanted:
        return Finding(name, "lack", f"{version}, tested with {wanted}", f"pip install -c constraints.txt {name}")
    return Finding(name, "ok", version)


def accelerator() -> Iterator[Finding]:
    cards = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    driver_remedy = "training runs on the CPU; for a GPU install NVIDIA's driver"
    yield Finding("GPU", "ok" if cards else "optional", cards or "none", "" if cards else driver_remedy)
    if cards:
        program = "import torch; print(torch.version.cuda if torch.cuda.is_available() else '')"
        cuda = _output([sys.executable, "-c", program])
        remedy = "" if cuda else "install a PyTorch build that matches the driver"
        yield Finding("CUDA in PyTorch", "ok" if cuda else "lack", cuda or "not usable", remedy)
    chosen = os.environ.get("DS_ACCELERATOR") or ("cuda" if cards else None)
    remedy = "" if chosen else "without a GPU set DS_ACCELERATOR=cpu (make does it for you)"
    yield Finding("DeepSpeed accelerator", "ok" if chosen else "optional", chosen or "not set", remedy)


def mlflow_store() -> Iterator[Finding]:
    # Without user and password: reports get pasted into issues, and /health asks for neither.
    uri = re.sub(r"://[^/]*@", "://", os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI)
    if uri.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=3):
                yield Finding("MLflow store", "ok", uri)
        except (OSError, ValueError, http.client.HTTPException) as error:
            yield Finding(
                "MLflow store",
                "lack",
                f"{uri} does not answer: {error}",
                "start the server or unset MLFLOW_TRACKING_URI",
            )
        return
    if not uri.startswith("sqlite:///"):
        yield Finding("MLflow store", "optional", f"{uri}, not checked", "only sqlite:///FILE and http(s) are checked")
        return
    path = Path(uri.removeprefix("sqlite:///"))
    place = path if path.exists() else path.parent
    writable = os.access(place, os.W_OK)
    remedy = "" if writable else f"make {place} writable or set MLFLOW_TRACKING_URI"
    yield Finding("MLflow store", "ok" if writable else "lack", uri, remedy)


def slurm() -> Iterator[Finding]:
    version = _output(["sinfo", "--version"]) if shutil.which("sbatch") else None
    remedy = "" if version else "only for clusters that use it: install slurm-client on the node you submit from"
    yield Finding("SLURM", "ok" if version else "optional", version or "none", remedy)


def data_folders() -> Iterator[Finding]:
    manifests = sorted(Path("data").glob("[!.]*/manifest.json"))
    if not manifests:
        yield Finding("data", "optional", "nothing built in data/", "python -m data_pipeline.build --help")
    for manifest in manifests:
        try:
            count = json.loads(manifest.read_text(encoding="utf-8"))["files"]["train"]["count"]
        except (OSError, ValueError, KeyError, TypeError):
            yield Finding(
                "data", "optional", f"{manifest} is unreadable", f"delete {manifest.parent} and build it again"
            )
        else:
            yield Finding("data", "ok", f"{manifest.parent}: {count:,} training images")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python_version,
    machine,
    system_libraries,
    packages,
    accelerator,
    mlflow_store,
    slurm,
    data_folders,
)


def report(findings: list[Finding]) -> str:
    widths = [max(len(str(getattr(f, name))) for f in findings) for name in ("state", "what", "found")]
    return "\n".join(
        f"{f.state:<{widths[0]}}  {f.what:<{widths[1]}}  {f.found:<{widths[2]}}  {f.remedy}".rstrip() for f in findings
    )


def main() -> int:
    findings = [finding for check in CHECKS for finding in check()]
    print(report(findings))
    lacks = sum(finding.state == "lack" for finding in findings)
    print(f"\n{lacks} of {len(findings)} lack" if lacks else "\neverything needed is here")
    return 1 if lacks else 0


def _have(what: str, found: str | None, remedy: str) -> Finding:
    return Finding(what, "ok", found) if found else Finding(what, "lack", "missing", remedy)


def _output(command: list[str]) -> str | None:
    """The first line that a command prints, None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().split("\n")[0] or None


if __name__ == "__main__":
    sys.exit(main())
