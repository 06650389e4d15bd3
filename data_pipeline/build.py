"""`python -m data_pipeline.build`: from images on disk to the FFCV files of a protocol."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline import cli
from data_pipeline.beton import Build, folder_name, write_build
from data_pipeline.errors import InputError
from data_pipeline.ffcv_writer import Encoding, WriteMode
from data_pipeline.protocols import DATASETS, Protocol, custom_protocol
from data_pipeline.sources import SOURCE_KINDS, Source, check_classes, check_not_empty, open_source


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What to build, from where, into which folder."""

    protocol: str = "digits"
    """digits, mnist, svhn, cifar10, cifar+10, cifar+50, tinyimagenet, one of the -closed, -all and -ood ones, or
    custom."""
    split: int = 0
    """Which published split of known and unknown classes, from 0."""
    pseudo_open: int | None = None
    """Split the known classes again with this seed, 0 or more, from training images only: to choose hyperparameters."""
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
    """Use at most so many training images, equally many of each class: for trying things out. Default: all."""
    skip_corrupt: bool = False
    """Leave unreadable images out and count them, instead of stopping at the first."""


def build(config: BuildConfig, console: Console) -> Build:
    """Write the files of the protocol unless they are there."""
    protocol, sources = _open(config)
    size = protocol.info.image_size if config.image_size is None else config.image_size
    encoding = Encoding(image_size=size, write_mode=config.write_mode, quality=config.quality)
    console.print(
        f"protocol {protocol.name}, split {protocol.split}: {len(protocol.known)} known and {len(protocol.unknown)} "
        f"unknown classes, openness {protocol.openness:.3f}, split hash {protocol.split_hash}"
    )
    for name in sources["train"][1].empty_classes:
        console.print(f"class folder {name} is left out: it holds no image", markup=False, highlight=False)
    with Progress(
        TextColumn("{task.description:>12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        tasks = {name: bar.add_task(name, total=None) for name in protocol.partitions}
        made, written = write_build(
            config.out / folder_name(protocol, encoding),
            protocol,
            sources,
            class_names=_known_names(protocol, sources["train"][1]),
            encoding=encoding,
            skip_corrupt=config.skip_corrupt,
            progress=lambda name, total, done: bar.update(tasks[name], completed=done, total=total),
        )
    for name, record in made.manifest.files.items():
        skipped = f", {len(record.skipped)} corrupt left out" if record.skipped else ""
        outcome = f"written, {record.bytes / 2**20:.1f} MiB" if written else "already there"
        console.print(f"{name:>12}: {record.count:,} images, {outcome}{skipped}")
    if "test_unknown" not in made:
        console.print("no unknown class is named: AUROC and OSCR cannot be measured on this protocol")
    return made


def _open(config: BuildConfig) -> tuple[Protocol, dict[str, tuple[str, Source]]]:
    """The protocol, and for each of its partitions the kind of source and the source itself."""
    if config.known and config.protocol != "custom":
        raise InputError("--known names classes of a custom protocol: add --protocol custom or leave it out")

    @cache
    def source(dataset: str, subset: str) -> tuple[str, Source]:
        kind = config.source or SOURCE_KINDS[dataset][0]
        channels = DATASETS[dataset].channels
        opened = open_source(kind, dataset=dataset, subset=subset, root=config.root, channels=channels)
        check_classes(opened, dataset)
        return kind, opened

    if config.protocol == "custom":
        if not config.known:
            raise InputError("a custom protocol needs the names of its known classes: --known cat dog ...")
        _, train = source("custom", "train")
        check_not_empty(train, config.known)
        protocol = custom_protocol(config.known, train.class_names)
    else:
        protocol = Protocol(config.protocol, config.split)
    if config.train_images is not None:
        classes = dataclasses.replace(protocol.classes, train_images=config.train_images)
        protocol = dataclasses.replace(protocol, classes=classes)
    if config.pseudo_open is not None:
        protocol = protocol.pseudo_open(config.pseudo_open)
    return protocol, {name: source(part.dataset, part.subset) for name, part in protocol.partitions.items()}


def _known_names(protocol: Protocol, train: Source) -> list[str]:
    return [known if isinstance(known, str) else train.class_names[known] for known in protocol.known]


def main() -> None:
    config = cli.parse(
        BuildConfig,
        prog="python -m data_pipeline.build",
        description="Build the FFCV files of a protocol: train, calibration, test_known, test_unknown.",
    )
    console = cli.console()
    made = build(config, console)
    console.print(f"the files are in {made.folder}")


if __name__ == "__main__":
    cli.run(main)
