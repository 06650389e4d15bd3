"""`python -m trainer.export`: a model as one ONNX file, encoder and gallery, that runs without PyTorch and MLflow.

    images (M, S, S, C) uint8  ->  embeddings (M, D), class_scores (M, classes), similarities (M, N) to the gallery

What else it takes to answer is in the file's metadata, each as JSON: class_names, threshold, k, image_size, channels,
gallery_ids. `examples/recognise_onnx.py` reads it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline import cli
from data_pipeline.errors import InputError
from data_pipeline.files import replacing
from trainer.registry import OpenSetModel, load_model

TOLERANCE = 1e-4
"""Largest difference from the PyTorch model that an exported one may have, in embeddings, scores and similarities."""

# The newest that PyTorch's exporter writes and ONNX Runtime reads.
_OPSET = 25


class Answer(nn.Module):
    """`OpenSetModel.recognise` in operations that ONNX has: normalise, embed, compare, sum the k largest by class."""

    def __init__(self, model: OpenSetModel) -> None:
        super().__init__()
        card = model.card
        self.encoder, self.k = model.encoder, card.k
        self.register_buffer("mean", torch.tensor(card.mean))
        self.register_buffer("std", torch.tensor(card.std))
        self.register_buffer("gallery", F.normalize(model.gallery.float(), dim=1))
        self.members = [(model.gallery_labels == label).nonzero()[:, 0] for label in range(len(card.class_names))]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        views = (images.float() / 255 - self.mean) / self.std
        embeddings = self.encoder(views.permute(0, 3, 1, 2)).embeddings
        similarities = embeddings @ self.gallery.T
        of_classes = [similarities[:, rows].topk(self.k).values.sum(dim=1) for rows in self.members]
        return embeddings, torch.stack(of_classes, dim=1), similarities


OUTPUTS = ("embeddings", "class_scores", "similarities")


def export(model: OpenSetModel, path: Path) -> float:
    """Write `model`, which is on the CPU, as ONNX; returns the largest difference found when it was tried.

    Raises:
        InputError: the packages of the extra "export" are missing, or the file does not answer as the model does.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  what PyTorch's exporter writes with
    except ImportError as error:
        raise InputError(
            f"exporting needs {error.name}: pip install -c constraints.txt 'gradmix-osr[export]'"
        ) from error
    answer, card = Answer(model).eval(), model.card
    # More than one image: a number of 1 would be taken for a constant.
    example = _noise(3, card.image_size, card.channels)
    with _silence(), torch.no_grad():
        program = torch.onnx.export(
            answer,
            (example,),
            dynamo=True,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes={"images": {0: torch.export.Dim("images", min=1)}},
        )
    proto = program.model_proto
    facts: dict[str, Any] = {
        "class_names": list(card.class_names), "threshold": card.threshold, "k": card.k, "image_size": card.image_size,
        "channels": card.channels, "gallery_ids": list(model.gallery_ids),
    }  # fmt: skip
    onnx.helper.set_model_props(proto, {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()})
    onnx.checker.check_model(proto)
    with replacing(path) as partial:
        onnx.save(proto, str(partial))
        worst = _largest_difference(answer, onnxruntime.InferenceSession(str(partial)), card.image_size, card.channels)
        if not worst <= TOLERANCE:
            raise InputError(f"the exported model differs from this one by {worst:.2g}: use other versions of onnx")
    return worst


def _largest_difference(answer: Answer, session: Any, size: int, channels: int) -> float:
    worst = 0.0
    for count in (1, 17):
        images = _noise(count, size, channels)
        with torch.no_grad():
            expected = answer(images)
        found = session.run(list(OUTPUTS), {"images": images.numpy()})
        worst = max([worst, *(float(np.abs(a - b.numpy()).max()) for a, b in zip(found, expected))])
    return worst


def _noise(count: int, size: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, size, size, channels), generator=generator, dtype=torch.uint8)


@contextlib.contextmanager
def _silence():
    """The exporter tells every step of its own."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Which model to export, and to which file."""

    model: str
    """models:/NAME@ALIAS, models:/NAME/VERSION, or a folder such as runs/demo/model."""
    out: Path = Path("model.onnx")
    """File to write; one that is there is replaced."""
    tracking_uri: str | None = None
    """MLflow store of models:/ names. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""


def main() -> None:
    config = cli.parse(
        ExportConfig,
        prog="python -m trainer.export",
        description="Write a model as one ONNX file that runs without PyTorch and MLflow.",
    )
    worst = export(load_model(config.model, config.tracking_uri), config.out)
    size = config.out.stat().st_size / 2**20
    print(f"written to {config.out}: {size:.1f} MiB, opset {_OPSET}; differs from the model by at most {worst:.1g}")


if __name__ == "__main__":
    cli.run(main)
