"""Tiny data sets written in the real formats, and checks of what a source makes of them."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_pipeline.errors import InputError
from data_pipeline.sources import CorruptImageError, Source, open_source

DIGITS = tuple("0123456789")


def random_images(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def luma(image: np.ndarray) -> np.ndarray:
    """ITU-R 601, from the formula: (H, W, 3) to (H, W, 1), before rounding."""
    return (image @ np.array([0.299, 0.587, 0.114]))[..., None]


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def check(open_with: dict, images: np.ndarray, labels: list[int], class_names: tuple[str, ...]) -> None:
    """The whole contract, in both channel settings, against images (n, H, W) or (n, H, W, 3)."""
    for channels in (1, 3):
        source = open_source(**open_with, channels=channels)
        assert isinstance(source, Source)
        assert len(source) == len(images)
        assert source.class_names == class_names
        assert source.channels == channels
        assert source.labels.dtype == np.int64
        assert source.labels.tolist() == list(labels)
        for index, expected in enumerate(images):
            image, label = source[index]
            assert label == labels[index] and type(label) is int
            assert image.dtype == np.uint8 and image.shape == (*expected.shape[:2], channels)
            assert image.flags.c_contiguous and image.flags.writeable
            if expected.ndim == 2:
                assert (image == expected[..., None]).all()
            elif channels == 3:
                assert (image == expected).all()
            else:
                assert np.abs(image - luma(expected)).max() <= 1
        assert (source[-1][0] == source[len(source) - 1][0]).all()
        with pytest.raises(IndexError):
            source[len(source)]


def error(**open_with: object) -> str:
    """The message of the `InputError` that opening raises, which is one line."""
    with pytest.raises(InputError) as caught:
        open_source(**open_with)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def reading_error(source: Source, index: int, kind: type[InputError] = CorruptImageError) -> str:
    with pytest.raises(InputError) as caught:
        source[index]
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_shared_reading(source: Source, expected: list[np.ndarray]) -> None:
    """Right images for 8 threads, for 4 forked workers and for a pickled copy, reading here and there."""
    order = np.random.default_rng(0).integers(0, len(source), 40 * len(source)).tolist()
    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns far more often than by default, wherever they are
    try:
        with ThreadPoolExecutor(8) as pool:
            images = pool.map(lambda index: source[index][0], order)
            assert all((image == expected[index]).all() for index, image in zip(order, images, strict=True))
    finally:
        sys.setswitchinterval(switch_interval)

    with multiprocessing.get_context("fork").Pool(4, initializer=_adopt, initargs=(source,)) as pool:
        images = pool.map(_read_adopted, order, chunksize=1)
    assert all((image == expected[index]).all() for index, image in zip(order, images, strict=True))

    copy = pickle.loads(pickle.dumps(source))
    assert all((copy[index][0] == wanted).all() for index, wanted in enumerate(expected))


def _adopt(source: Source) -> None:
    global adopted
    adopted = source


def _read_adopted(index: int) -> np.ndarray:
    return adopted[index][0]


def idx(array: np.ndarray) -> bytes:
    """The format of MNIST's files: magic number with type 8 (uint8) and rank, big-endian sizes, data."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(root: Path) -> None:
    for name, count in (("train", 6), ("t10k", 4)):
        images = random_images((count, 28, 28), seed=count)
        write(root / f"MNIST/raw/{name}-images-idx3-ubyte", idx(images))
        write(root / f"MNIST/raw/{name}-labels-idx1-ubyte", idx((np.arange(count, dtype=np.uint8) * 2) % 10))


def parquet_table(
    images: list[bytes | None], labels: list, names: list[str], image: str = "image", label: str = "label"
) -> pa.Table:
    """What Hugging Face `datasets` writes."""
    features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
    schema = pa.schema(
        [(image, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), (label, pa.int64())],
        {"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"bytes": content, "path": None} for content in images]
    return pa.table([pa.array(rows, schema.field(image).type), pa.array(labels, pa.int64())], schema)


def write_parquet(path: Path, images: np.ndarray, labels: list, names: list[str], rows_per_group: int = 3) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = parquet_table([encode(image) for image in images], labels, names)
    pq.write_table(table, path, row_group_size=rows_per_group)


def image_folder(root: Path, subset: str = "train", channels: int = 3) -> Source:
    return open_source("imagefolder", dataset="custom", subset=subset, root=root, channels=channels)


def by_name(source: Source, root: Path) -> dict[str, int]:
    return {Path(source.describe(index)).relative_to(root).as_posix(): index for index in range(len(source))}
