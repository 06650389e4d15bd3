"""`python -m data_pipeline.export FOLDER --out DATA`: a build's images as safetensors, for machines without FFCV.

An export is a build like any other: the same images in the same order, the same manifest beside them. It is read whole,
into the memory of the device, and so is for data sets that fit there.
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from safetensors.torch import save_file

from data_pipeline import cli
from data_pipeline.beton import MANIFEST, Build, read_build
from data_pipeline.errors import InputError
from data_pipeline.files import full_disk_is_bad_input, replacing_folder, sha256, write_json
from data_pipeline.loader import load_all


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export, and where to."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Folder of one build."""
    out: Path = Path("exports")
    """Data folder of exports; the files go to a sub-folder of the build's own name."""
    workers: int = 1
    """FFCV decoding threads, 1 or more."""


def export(build: Build, out: Path, workers: int = 1) -> Build:
    """Write the images of `build` into a folder of the same name in `out`, in place of what is there.

    A partition's file holds `images` (count, H, W, C) uint8 and `labels` (count,) int64, -1 for unknown.

    Raises:
        InputError: `build` is an export itself, would be overwritten, or the disk is full.
    """
    if build.manifest.storage != "ffcv":
        raise InputError(f"{build.folder} is an export already: give the folder of a build")
    folder = out / build.folder.resolve().name
    if folder.resolve() == build.folder.resolve():
        raise InputError(f"the export would take the place of {build.folder}: name another --out")
    files = {}
    with full_disk_is_bad_input(folder), replacing_folder(folder) as partial:
        for name, record in build.manifest.files.items():
            batch = load_all(build, name, device=torch.device("cpu"), workers=workers)
            path = partial / f"{name}.safetensors"
            save_file({"images": batch.images, "labels": batch.labels}, path)
            write_json(partial / f"{name}.names.json", build.names(name))
            files[name] = dataclasses.replace(record, bytes=path.stat().st_size, sha256=sha256(path))
        manifest = dataclasses.replace(build.manifest, storage="safetensors", files=files)
        write_json(partial / MANIFEST, asdict(manifest))
    return Build(folder, manifest)


def main() -> None:
    config = cli.parse(
        ExportConfig,
        prog="python -m data_pipeline.export",
        description="A build's images as safetensors, for machines without FFCV.",
    )
    made = export(read_build(config.folder), config.out, config.workers)
    console = cli.console()
    for name, record in made.manifest.files.items():
        console.print(f"{name:>12}: {record.count:,} images, {record.bytes / 2**20:.1f} MiB")
    console.print(f"the files are in {made.folder}: train with --data {made.folder}")


if __name__ == "__main__":
    cli.run(main)
