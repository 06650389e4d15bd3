"""`python -m trainer.predict`: what a model says to the images in files, folders and globs, as a table.

Every file is a row, also one that cannot be read: its row says why. What is done is kept in a journal beside the output
until all is, so that the same command goes on where it was stopped; files that changed meanwhile are done again. It
ends with status 1 if no file could be read.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track

from data_pipeline import cli, images
from data_pipeline.errors import InputError
from data_pipeline.files import full_disk_is_bad_input, replacing
from data_pipeline.protocols import UNKNOWN
from data_pipeline.sources import image_files
from trainer.evaluate import device_by_default
from trainer.registry import OpenSetModel, load_model

EXIT_NONE_READABLE = 1
_DECODE_THREADS = 4
SUFFIXES = (".csv", ".jsonl", ".parquet")


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files that `paths` stand for, each once: files as they are, folders with all images below, globs.

    Raises:
        InputError: one stands for nothing.
    """
    found: dict[Path, None] = {}
    for text in paths:
        # A file may have a name that looks like a glob.
        places = [text] if os.path.exists(text) else sorted(glob.glob(os.path.expanduser(text), recursive=True))
        if not places:
            raise InputError(f"there is no file, folder or match for {text}: correct the path")
        files = [file for place in map(Path, places) for file in (image_files(place) if place.is_dir() else [place])]
        if not files:
            raise InputError(f"there is no image in {text} or below: name another folder")
        found.update(dict.fromkeys(files))
    return list(found)


def read_square(path: Path, size: int, channels: int) -> np.ndarray | InputError:
    """The image as a model is shown it, uint8 (size, size, channels), or what is wrong with it."""
    try:
        return images.decode(path.read_bytes(), channels, size)
    except InputError as error:
        return error
    except OSError as error:
        return InputError(f"not readable ({error.strerror or error}): correct the path")


def read_squares(paths: Sequence[Path], size: int, channels: int) -> Iterator[np.ndarray | InputError]:
    """`read_square` of many files, in order, decoded by threads that stay a batch ahead."""
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        for some in _batches(paths, 64):
            yield from pool.map(lambda path: read_square(path, size, channels), some)


def score_files(model: OpenSetModel, paths: Sequence[Path], console: Console) -> tuple[np.ndarray, list[Path]]:
    """Scores (M,) of the files that are images, and the files that are not."""
    scores, broken = [], []
    squares = read_squares(paths, model.card.image_size, model.card.channels)
    shown = track(
        zip(paths, squares), "images", len(paths), console=console, transient=True, disable=not console.is_terminal
    )
    for some in _batches(shown, 256):
        good = [square for _, square in some if isinstance(square, np.ndarray)]
        broken += [path for path, square in some if isinstance(square, InputError)]
        if good:
            scores.append(model.recognise(torch.from_numpy(np.stack(good))).scores)
    return np.concatenate(scores) if scores else np.empty(0, np.float32), broken


def answer_rows(model: OpenSetModel, paths: Sequence[Path], config: PredictConfig) -> list[dict[str, Any]]:
    """One row for each file: path, label, class, score, threshold, error and what else was asked for."""
    card = model.card
    squares = list(read_squares(paths, card.image_size, card.channels))
    good = [square for square in squares if isinstance(square, np.ndarray)]
    answers: Iterator[dict[str, Any]] = iter(())
    if good:
        answers = _answers(model, np.stack(good), config)
    rows = []
    for path, square in zip(paths, squares):
        row = {"path": printable(path), "label": None, "class": None, "score": None, "threshold": card.threshold}
        if isinstance(square, InputError):
            rows.append({**row, "error": f"the image is {square}"})
        else:
            rows.append({**row, "error": None, **next(answers)})
    return rows


def _answers(model: OpenSetModel, squares: np.ndarray, config: PredictConfig) -> Iterator[dict[str, Any]]:
    answer = model.recognise(torch.from_numpy(squares), min(config.neighbours, len(model.gallery)))
    near = model.name_neighbours(answer)
    for row, score in enumerate(answer.scores.tolist()):
        columns = {"label": answer.labels[row], "class": answer.classes[row], "score": score}
        if config.class_scores:
            columns |= {f"score_{n}": s for n, s in zip(model.card.class_names, answer.class_scores[row].tolist())}
        for number, neighbour in enumerate(near[row], 1):
            columns |= {f"neighbour_{number}": neighbour.id, f"similarity_{number}": neighbour.similarity}
        yield columns


class Journal:
    """The rows that are done, by file, in a hidden file beside the output, one JSON a line."""

    def __init__(self, out: Path, request: dict[str, Any], console: Console) -> None:
        """`request` is what the rows depend on beside the files; a journal of another one is not gone on with."""
        self.path = out.with_name(f".{out.name}.partial")
        entries: list[dict[str, Any]] = []
        if self.path.is_file():
            try:
                # What follows the last line's end was cut by a kill.
                first, *rest = map(json.loads, self.path.read_text("utf-8").split("\n")[:-1])
                entries = [entry for entry in rest if _still_holds(entry)] if first == request else []
            except (OSError, ValueError, KeyError, TypeError):
                console.print(f"{self.path} is damaged: all images are done anew", markup=False, highlight=False)
        self.rows: dict[Path, dict[str, Any]] = {Path(entry["path"]): entry["row"] for entry in entries}
        with replacing(self.path) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in (request, *entries)), "utf-8")

    def add(self, rows: dict[Path, dict[str, Any]], versions: Sequence[list[int]]) -> None:
        """`versions` are the files' as they were before they were read."""
        entries = [
            {"path": str(path), "version": version, "row": row} for (path, row), version in zip(rows.items(), versions)
        ]
        with full_disk_is_bad_input(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries))
        self.rows.update(rows)


def _still_holds(entry: dict[str, Any]) -> bool:
    """Whether the file could be read and has not changed since."""
    return entry["row"]["error"] is None and entry["version"] == _version(Path(entry["path"]))


def _version(path: Path) -> list[int]:
    """Numbers that change when the file does."""
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def write_table(out: Path, rows: Sequence[dict[str, Any]]) -> None:
    import pandas as pd

    with replacing(out) as partial:
        if out.suffix == ".jsonl":
            partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
            return
        # Said, since a column of nothing but empty cells does not tell what it is of.
        kinds = {"path": "str", "label": "str", "class": "str", "score": "float64", "error": "str"}
        frame = pd.DataFrame(list(rows)).astype(kinds)
        if out.suffix == ".csv":
            frame.to_csv(partial, index=False)
        else:
            frame.to_parquet(partial, index=False)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def printable(path: Path) -> str:
    """The path as one line of text: names of files may hold line breaks, and bytes that are no text."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], text)


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Which model to ask, about which images, and where its answers go."""

    paths: tyro.conf.Positional[tuple[str, ...]]
    """Image files, folders (all images below them) or quoted globs such as "photos/**/*.jpg"."""
    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a folder such as runs/demo/model."""
    out: Path = Path("predictions.csv")
    """Table to write; .csv, .jsonl or .parquet says which kind."""
    overwrite: bool = False
    """Replace a table that is there."""
    neighbours: int = 0
    """Also name so many of the nearest training images; 0 or more."""
    class_scores: bool = False
    """Also write the score of every known class."""
    batch_size: int = 256
    """Images at a time; what is done is kept after each batch. 1 or more."""
    tracking_uri: str | None = None
    """MLflow store of models:/ names. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise InputError("no image is named: give files, folders or quoted globs")
        if self.out.suffix not in SUFFIXES:
            raise InputError(f"out is {self.out}; let it end with {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        if self.neighbours < 0:
            raise InputError(f"neighbours is {self.neighbours}; set it to 0 or more")
        if self.batch_size < 1:
            raise InputError(f"batch-size is {self.batch_size}; set it to 1 or more")


def predict(config: PredictConfig, console: Console) -> list[dict[str, Any]]:
    """Answer for every file and write the table; returns its rows."""
    if config.out.exists() and not config.overwrite:
        raise InputError(f"{config.out} is there already: name another --out, or add --overwrite")
    paths = find_images(config.paths)
    model = load_model(config.model, config.tracking_uri, device_by_default())
    request = {"model": model.fingerprint, "neighbours": config.neighbours, "class_scores": config.class_scores}
    journal = Journal(config.out, request, console)
    left = [path for path in paths if path not in journal.rows]
    if len(left) < len(paths):
        console.print(f"going on: {len(paths) - len(left):,} of {len(paths):,} images are done")
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("images", total=len(paths), completed=len(paths) - len(left))
        for some in _batches(left, config.batch_size):
            versions = [_version(path) for path in some]
            journal.add(dict(zip(some, answer_rows(model, some, config))), versions)
            bar.advance(task, len(some))
    rows = [journal.rows[path] for path in paths]
    write_table(config.out, rows)
    journal.path.unlink()
    unknown = sum(row["label"] == UNKNOWN for row in rows)
    broken = sum(row["error"] is not None for row in rows)
    console.print(
        f"{len(rows):,} images: {len(rows) - unknown - broken:,} known, {unknown:,} unknown, {broken:,} unreadable"
        + (" (the column error says why)" if broken else "")
        + f"; written to {config.out}",
        highlight=False,
    )
    return rows


def main() -> None:
    config = cli.parse(
        PredictConfig,
        prog="python -m trainer.predict",
        description="Name the class of images, or say that it is unknown.",
    )
    rows = predict(config, cli.console())
    if all(row["error"] is not None for row in rows):
        raise SystemExit(EXIT_NONE_READABLE)


if __name__ == "__main__":
    cli.run(main)
