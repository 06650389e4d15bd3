"""What every source keeps to, what those of encoded images share, and the error for an image that is damaged."""

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from data_pipeline.errors import InputError
from data_pipeline.images import to_uint8

Subset = Literal["train", "test"]


class CorruptImageError(InputError):
    """One image cannot be decoded; the message names it. Whoever reads many images may leave it out and count it."""


class Source(ABC):
    """A map-style dataset: `source[i]` is (image, label) with the image a fresh uint8 array (H, W, C), C == `channels`,
    and the label an id into `class_names`; `labels` holds all of them, (n,) int64. Grey images are repeated to three
    channels, colour images reduced to luma for one. Reading raises `CorruptImageError` for an image that cannot be
    decoded, `InputError` for one that cannot be read, and `IndexError` outside [-n, n)."""

    def __init__(self, class_names: Sequence[str], labels: np.ndarray, channels: Literal[1, 3]) -> None:
        self.class_names = tuple(class_names)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.channels = channels
        # Of an image folder those that hold no image; not among the class names.
        self.empty_classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        index = range(len(self))[index]
        return self._pixels(index), int(self.labels[index])

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the images, their labels or their order. No image is decoded."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """What to call that image in a message: a file path, or "train.parquet row 17"."""

    @abstractmethod
    def _pixels(self, index: int) -> np.ndarray:
        """The image at 0 <= index < n as uint8 (H, W, C)."""


class EncodedSource(Source):
    """Images that are encoded somewhere, in any format Pillow knows."""

    @abstractmethod
    def _read(self, index: int) -> bytes:
        """The encoded image."""

    def _pixels(self, index: int) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(self._read(index))) as image:
                return to_uint8(image, self.channels)
        except Exception as error:  # on damaged bytes, decoders raise almost anything
            name = self.describe(index)
            # Only the system's own errors have a number. Not the image but the disk is at fault then, and leaving out
            # what it holds would hide that.
            if isinstance(error, OSError) and error.errno is not None:
                raise InputError(f"cannot read {name}: {error.strerror}; check the disk and permissions") from error
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else one_line(error)
            raise CorruptImageError(
                f"{name} is corrupt ({reason}); delete or repair it, "
                "or pass --skip-corrupt to leave such images out and count them"
            ) from error


def one_line(error: Exception) -> str:
    """What the error says, or its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def digest(*parts: Any) -> str:
    """16 hexadecimal digits of bytes, and of anything else by how it is written."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part if isinstance(part, (bytes, memoryview)) else repr(part).encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:16]
