"""The model behind `mlflow models serve`: what a request may hold, and what it gets back.

    {"inputs": [[[[0, ...], ...], ...], ...]}         images as whole numbers 0 to 255, (M, H, W, C) or (M, H, W)
    {"inputs": ["iVBORw0KGgo...", ...]}               image files in base64, of about one size
    {"dataframe_records": [{"image": ...}, ...]}      either, each image of a size of its own
    beside any of them: "params": {"neighbours": 5}   how many of the nearest training images to name; default k

Of strings in "inputs" or "instances" MLflow makes one array, each as long as the longest, before anything here is
called. No input schema prevents that but refuses or cuts something else: records of numbers, columns of any name, or
nested lists. Records stay as large as they are.

Every image becomes one row of the answer. An image that cannot be used refuses the whole request with status 400 and
one line that says which it is and what to do.
"""

from __future__ import annotations

import base64
import binascii
import textwrap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from torch import Tensor

from data_pipeline import images
from data_pipeline.errors import InputError
from trainer.registry import OpenSetModel, Recognition

MAX_IMAGES = 1024
"""Images in one request; more take long enough to be asked for in parts."""
MAX_NEIGHBOURS = 100


class RefusedRequest(MlflowException):
    """A request that cannot be answered, as status 400 and one line."""

    def __init__(self, line: str) -> None:
        self._line = line
        super().__init__(line, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        return self._line

    @message.setter
    def message(self, text: str) -> None:
        # On its way out MLflow writes the whole request, which may be megabytes, into the message.
        pass


class ServedModel:
    """What MLflow calls: `predict` on what it made of a request, or on arrays, lists and frames from Python."""

    def __init__(self, model: OpenSetModel) -> None:
        self.model = model
        self._recognise = SharedPasses(model)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """One row for each image: label, class, score, threshold, class_scores, neighbours."""
        card = self.model.card
        try:
            wanted = _count((params or {}).get("neighbours"), card.k)
            squares = read_images(model_input, card.image_size, card.channels)
        except InputError as error:
            raise RefusedRequest(str(error)) from error
        except (TypeError, ValueError) as error:  # of nested lists and tables there are more shapes than can be named
            reason = textwrap.shorten(str(error), 200) or type(error).__name__
            raise RefusedRequest(f'what was sent is no list of images ({reason}): put one into "inputs"') from error
        answer = self._recognise(torch.from_numpy(squares), min(wanted, len(self.model.gallery)))
        return pd.DataFrame(
            {
                "label": answer.labels,
                "class": answer.classes,
                "score": answer.scores.astype(float),
                "threshold": card.threshold,
                "class_scores": [dict(zip(card.class_names, row)) for row in answer.class_scores.tolist()],
                "neighbours": [
                    [{"id": n.id, "class": n.class_name, "similarity": n.similarity} for n in row]
                    for row in self.model.name_neighbours(answer)
                ],
            }
        )


def _count(neighbours: Any, default: int) -> int:
    """How many neighbours are asked for."""
    if neighbours is None:
        return default
    count = neighbours if isinstance(neighbours, int | np.integer) else -1
    if not 0 <= count <= MAX_NEIGHBOURS:
        raise InputError(f"neighbours is {textwrap.shorten(repr(neighbours), 30)}: ask for 0 to {MAX_NEIGHBOURS}")
    return int(count)


@dataclass
class _Waiting:
    images: Tensor
    num_neighbours: int
    result: Recognition | Exception | None = None


class SharedPasses:
    """`OpenSetModel.recognise` for many threads: requests that come while one is computed share the next pass.

    A pass takes all cores, so only one runs at a time, and for a few small images it takes hardly longer than for one.
    """

    def __init__(self, model: OpenSetModel) -> None:
        self._model = model
        self._computing, self._queueing = threading.Lock(), threading.Lock()
        self._queue: list[_Waiting] = []

    def __call__(self, images: Tensor, num_neighbours: int) -> Recognition:
        mine = _Waiting(images, num_neighbours)
        with self._queueing:
            self._queue.append(mine)
        while mine.result is None:
            with self._computing:
                if mine.result is None:  # nobody's pass has taken it along meanwhile
                    self._pass(self._take())
        if isinstance(mine.result, Exception):
            raise mine.result
        return mine.result

    def _take(self) -> list[_Waiting]:
        """The requests that have waited longest, at least one, of at most `MAX_IMAGES` images together."""
        with self._queueing:
            count, total = 1, len(self._queue[0].images)
            while count < len(self._queue) and total + len(self._queue[count].images) <= MAX_IMAGES:
                total += len(self._queue[count].images)
                count += 1
            taken, self._queue = self._queue[:count], self._queue[count:]
        return taken

    def _pass(self, requests: list[_Waiting]) -> None:
        try:
            most = max(each.num_neighbours for each in requests)
            answer = self._model.recognise(torch.cat([each.images for each in requests]), most)
        except Exception as error:
            for each in requests:
                each.result = error
            return
        start = 0
        for each in requests:
            rows = Recognition(*(column[start : start + len(each.images)] for column in answer))
            each.result = rows._replace(
                neighbours=rows.neighbours[:, : each.num_neighbours],
                similarities=rows.similarities[:, : each.num_neighbours],
            )
            start += len(each.images)


def read_images(model_input: Any, size: int, channels: int) -> np.ndarray:
    """The images of a request as the model is shown them, uint8 (M, size, size, channels), M ≥ 1.

    Raises:
        InputError: there are none or too many, or one of them cannot be used.
    """
    items = _items(model_input)
    if len(items) == 0:
        raise InputError('no image was sent: put at least one into "inputs"')
    if len(items) > MAX_IMAGES:
        raise InputError(f"{len(items)} images in one request: send at most {MAX_IMAGES}")
    if isinstance(items, np.ndarray) and items.dtype == np.uint8 and items.shape[1:] == (size, size, channels):
        return np.ascontiguousarray(items)
    squares = np.empty((len(items), size, size, channels), np.uint8)
    for number, item in enumerate(items):
        try:
            squares[number] = _square(item, channels, size)
        except InputError as error:
            raise InputError(f"image {number} is {error}" if len(items) > 1 else f"the image is {error}") from error
    return squares


def _items(model_input: Any) -> Sequence[Any]:
    """The images, one an item, out of all the forms that MLflow's parsers give."""
    if isinstance(model_input, pd.DataFrame):
        if model_input.empty:
            return []
        _check_one_column(model_input.columns)
        model_input = model_input.iloc[:, 0].tolist()
    if isinstance(model_input, dict):
        _check_one_column(list(model_input))
        (model_input,) = model_input.values()
    if isinstance(model_input, np.ndarray) and model_input.ndim == 0:
        model_input = model_input.item()
    if isinstance(model_input, str | bytes):
        return [model_input]
    if not isinstance(model_input, np.ndarray | list | tuple):
        raise InputError('what was sent is no list of images: put one into "inputs"')
    return model_input


def _check_one_column(names: Sequence[Any]) -> None:
    """Whatever its name is: one column leaves no doubt."""
    if len(names) != 1:
        listed = textwrap.shorten(", ".join(map(str, names)), 100) or "none"
        raise InputError(f'the images must be one column, such as "image", not {len(names)} columns ({listed})')


def _square(item: Any, channels: int, size: int) -> np.ndarray:
    """Base64 text, an encoded file's bytes, an array or a nested list as uint8 (size, size, channels)."""
    if isinstance(item, str):
        try:
            # What a browser makes of a file begins with "data:image/png;base64,"; other programs break lines.
            text = item.partition(",")[2] if item.startswith("data:") else item
            item = base64.b64decode("".join(text.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise InputError("neither base64 nor numbers: encode the file's bytes in base64") from error
    if isinstance(item, bytes):
        return images.decode(item, channels, size)
    try:
        array = np.asarray(item)
    except ValueError as error:
        raise InputError("made of rows of different lengths: send (H, W), (H, W, 1) or (H, W, 3)") from error
    return images.from_array(array, channels, size)
