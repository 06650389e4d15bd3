"""`python -m data_pipeline.build`: from images on disk to the FFCV files of a protocol."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline import cli
from data_pipeline.beton import Encoding, WriteMode, folder_name, write_partition
from data_pipeline.errors import InputError
from data_pipeline.protocols import DATASETS, Protocol, custom_protocol
from data_pipeline.sources import SOURCE_KINDS, Source, open_source


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build, from where, into which folder."""

    protocol: str = "digits"
    """digits, mnist, svhn, cifar10, cifar+10, cifar+50, tinyimagenet, one of the -closed and -ood ones, or custom."""
    split: int = 0
    """Which published split of known and unknown classes, from 0."""
    pseudo_open: int | None = None
    """Split the known classes again with this seed, from training images only: for choosing hyperparameters."""
    source: str | None = None
    """Where images come from: bundled, torchvision, tinyimagenet, parquet or imagefolder. Default: by protocol."""
    root: Path | None = None
    """Folder of the images; several datasets may lie in sub-folders named after them. Not needed for digits."""
    out: Path = Path("data")
    """Data folder; the files go to a sub-folder named after protocol, split, size and encoding."""
    known: tuple[str, ...] = ()
    """Names of the known classes (custom only); every other class of the data is unknown."""
    image_size: int | None = None
    """Side of the stored square images, pixels, 8 to 1024. Default: the dataset's own (CIFAR 32, TinyImageNet 64)."""
    write_mode: WriteMode = "raw"
    """raw keeps every pixel, jpg compresses, smart compresses only images above 12 kB."""
    quality: int = 90
    """JPEG quality, 1 to 100; raw ignores it."""
    train_images: int | None = None
    """Use only so many training images, evenly over the classes: for trying things out. Default: all."""
    skip_corrupt: bool = False
    """Leave unreadable images out and count them, instead of stopping at the first."""


def build(config: BuildConfig, console: Console) -> Path:
    """Write every partition's file that is not there yet; returns their folder."""
    protocol, sources = _open(config)
    encoding = Encoding(
        image_size=config.image_size or protocol.info.image_size, write_mode=config.write_mode, quality=config.quality
    )
    folder = config.out / folder_name(protocol, encoding)
    console.print(
        f"protocol {protocol.name}, split {protocol.split}: {len(protocol.known)} known and {len(protocol.unknown)} "
        f"unknown classes, openness {protocol.openness:.3f}, split hash {protocol.split_hash}"
    )
    columns = (
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    for name, part in protocol.partitions.items():
        kind, source = sources[part.dataset, part.subset]
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task(name, total=len(part.select(source)[0]))
            manifest, written = write_partition(
                folder,
                name,
                protocol=protocol,
                source=source,
                source_kind=kind,
                class_names=_known_names(protocol, sources),
                encoding=encoding,
                skip_corrupt=config.skip_corrupt,
                progress=lambda done, bar=bar, task=task: bar.update(task, completed=done),
            )
        skipped = f", {len(manifest.skipped)} corrupt left out" if manifest.skipped else ""
        outcome = f"written, {manifest.bytes / 2**20:.1f} MiB" if written else "already there"
        console.print(f"{name:>12}: {manifest.count:,} images, {outcome}{skipped}")
    if "test_unknown" not in protocol.partitions:
        console.print("no unknown class is named: AUROC and OSCR cannot be measured on this protocol")
    return folder


def _open(config: BuildConfig) -> tuple[Protocol, dict[tuple[str, str], tuple[str, Source]]]:
    """The protocol, and for each (dataset, subset) that it uses the kind of source and the source itself."""
    if config.known and config.protocol != "custom":
        raise InputError("--known names classes of a custom protocol: add --protocol custom or leave it out")

    def source(dataset: str, subset: str) -> tuple[str, Source]:
        kind = config.source or SOURCE_KINDS[dataset][0]
        return kind, open_source(
            kind, dataset=dataset, subset=subset, root=config.root, channels=DATASETS[dataset].channels
        )

    if config.protocol == "custom":
        if not config.known:
            raise InputError("a custom protocol needs the names of its known classes: --known cat dog ...")
        opened = source("custom", "train")
        protocol = custom_protocol(config.known, opened[1].class_names)
    else:
        protocol = Protocol(config.protocol, config.split)
    if config.train_images is not None:
        classes = dataclasses.replace(protocol.classes, train_images=config.train_images)
        protocol = dataclasses.replace(protocol, classes=classes)
    if config.pseudo_open is not None:
        protocol = protocol.pseudo_open(config.pseudo_open)

    wanted = {(part.dataset, part.subset) for part in protocol.partitions.values()}
    return protocol, {key: source(*key) for key in sorted(wanted)}


def _known_names(protocol: Protocol, sources: dict[tuple[str, str], tuple[str, Source]]) -> list[str]:
    names = sources[protocol.train.dataset, "train"][1].class_names
    return [known if isinstance(known, str) else names[known] for known in protocol.known]


def main() -> None:
    config = cli.parse(
        BuildConfig,
        prog="python -m data_pipeline.build",
        description="Build the FFCV files of a protocol: train, calibration, test_known, test_unknown.",
    )
    console = Console(soft_wrap=True)
    folder = build(config, console)
    console.print(f"the files are in {folder}")


if __name__ == "__main__":
    cli.run(main)
