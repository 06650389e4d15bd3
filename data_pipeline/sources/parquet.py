"""Parquet files as Hugging Face `datasets` writes them."""

from __future__ import annotations

import bisect
import itertools
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from data_pipeline.errors import InputError
from data_pipeline.sources.source import EncodedSource, Source, Subset, digest, one_line

_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "fine_label")


def open_parquet(root: Path, subset: Subset, channels: Literal[1, 3]) -> Source:
    """Files as Hugging Face `datasets` writes them: a column of structs with the encoded image in `bytes`, a column of
    integer labels, and the class names in the metadata. Several files are concatenated in the order of their names."""
    patterns = ["train*.parquet"] if subset == "train" else ["test*.parquet", "val*.parquet"]
    paths = next((found for pattern in patterns if (found := sorted(root.glob(pattern)))), None)
    if paths is None:
        raise InputError(f"there is no {' or '.join(patterns)} in {root}; put it there, or pass another --root")

    class_names: tuple[str, ...] = ()
    labels, groups = [], []
    for path in paths:
        file_class_names, file_labels, file_groups = _inspect(path)
        if path != paths[0] and file_class_names != class_names:
            raise InputError(f"{path} and {paths[0].name} name different classes; move one of them out of the folder")
        class_names = file_class_names
        labels.append(file_labels)
        groups += file_groups
    source = _ParquetSource(groups, class_names, np.concatenate(labels), channels)
    if not len(source):
        raise InputError(f"no images found: {' and '.join(str(path) for path in paths)} has no rows; write it again")
    return source


class _RowGroup(NamedTuple):
    path: Path
    number: int  # among the row groups of the file
    first_row: int  # in the file
    num_rows: int
    column: str  # of the encoded images


def _inspect(path: Path) -> tuple[tuple[str, ...], np.ndarray, list[_RowGroup]]:
    """Class names, labels and row groups of one file, without reading its images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            image_column = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
            label_column = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
            if (
                image_column is None
                or label_column is None
                or not pa.types.is_struct(schema.field(image_column).type)
                or schema.field(image_column).type.get_field_index("bytes") < 0
                or not pa.types.is_integer(schema.field(label_column).type)
            ):
                raise InputError(
                    f"{path} has columns {', '.join(f'{field.name}: {field.type}' for field in schema)}; write it with "
                    "columns image: struct<bytes, path> and label: integer, as Hugging Face datasets does"
                )
            label_values = file.read(columns=[label_column]).column(0)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable Parquet file ({one_line(error)}); get it again") from error

    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        class_names = tuple(features[label_column]["names"])
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} does not name its classes; write it with Hugging Face datasets and {label_column} as a ClassLabel"
        ) from error
    labels = label_values.fill_null(-1).to_numpy()
    strange = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(strange):
        raise InputError(
            f"{path} row {strange[0]} has label {label_values[strange[0]]}, which is not one of its {len(class_names)} "
            "class names; remove such rows, or name all classes"
        )

    num_rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    first_rows = [0, *itertools.accumulate(num_rows)]
    groups = [_RowGroup(path, i, first_rows[i], num_rows[i], f"{image_column}.bytes") for i in range(len(num_rows))]
    return class_names, labels, groups


class _PerThread(threading.local):
    """What one thread keeps for itself; a copy in another process starts without it."""

    row_group: tuple[int, Any] = (-1, None)  # its number and its images

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class _ParquetSource(EncodedSource):
    """Rows of Parquet files. Each thread keeps the row group that it read last, so reading in order, or nearly, reads
    each row group once."""

    def __init__(
        self, groups: list[_RowGroup], class_names: Sequence[str], labels: np.ndarray, channels: Literal[1, 3]
    ) -> None:
        super().__init__(class_names, labels, channels)
        self._groups = groups
        self._starts = [0, *itertools.accumulate(group.num_rows for group in groups)]
        self._last = _PerThread()

    @property
    def fingerprint(self) -> str:
        paths = sorted({group.path for group in self._groups})
        versions = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return digest(self.class_names, self.labels.tobytes(), versions)

    def describe(self, index: int) -> str:
        number, row = self._locate(index)
        group = self._groups[number]
        return f"{group.path.name} row {group.first_row + row}"

    def _locate(self, index: int) -> tuple[int, int]:
        """Which row group, and which row in it."""
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _read(self, index: int) -> bytes:
        number, row = self._locate(index)
        if self._last.row_group[0] != number:
            self._last.row_group = (number, _read_row_group(self._groups[number]))
        _, images = self._last.row_group
        return images[row].as_py() or b""


def _read_row_group(group: _RowGroup) -> Any:
    """The encoded images of one row group, an Arrow array of binary."""
    import pyarrow.parquet as pq

    # In this thread alone: readers run side by side already, and Arrow's pool does not go with a fork.
    with pq.ParquetFile(group.path) as file:
        table = file.read_row_group(group.number, columns=[group.column], use_threads=False)
    return table.flatten().column(0)
