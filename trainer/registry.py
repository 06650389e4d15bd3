"""The model that comes out of training, and how MLflow keeps it.

One model is an encoder, a gallery of training embeddings, the class names, a threshold and the preprocessing: what it
takes to name the class of an image or say "unknown". On disk it is two safetensors files and a JSON file; MLflow loads
them through `_load_pyfunc` below, so nothing is pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline import cli
from data_pipeline.errors import InputError
from data_pipeline.files import full_disk_is_bad_input, read_json, replacing_folder, write_json
from data_pipeline.protocols import UNKNOWN
from data_pipeline.views import render_plain
from trainer.config import Classifier, EncoderConfig
from trainer.encoder import Encoder, embed, encode, load_encoder, save_encoder
from trainer.open_set import Scores, decide, score
from trainer.tracking import Link, check_store, deliver, resolve_uri, without_password

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Everything about a model that is not a tensor (`model.json`)."""

    protocol: dict[str, Any]
    split_hash: str
    class_names: tuple[str, ...]
    encoder: EncoderConfig
    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    k: int
    threshold: float
    accept: float
    """Share of held-out known images that the threshold was set to accept."""
    method: str = "gradmix"
    """What trained the encoder, by its name in `trainer.config.METHODS`."""
    classifier: Classifier | None = None

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> ModelCard:
        record = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        return cls(**{**record, "encoder": EncoderConfig(**record["encoder"])})


class OpenSetModel:
    """Names the class of an image, or says "unknown"."""

    def __init__(self, card: ModelCard, encoder: Encoder, gallery: Tensor, gallery_labels: Tensor) -> None:
        """`gallery` is (N, D), `gallery_labels` (N,) int64 into `card.class_names`."""
        self.card, self.encoder = card, encoder.eval()
        self.gallery, self.gallery_labels = gallery, gallery_labels

    @property
    def device(self) -> torch.device:
        return self.gallery.device

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (M, D) of uint8 images (M, H, W, C) of any size; they are brought to the model's."""
        parts = [embed(self.encoder, self._render(part.to(self.device)), _BATCH) for part in images.split(_BATCH)]
        return torch.cat(parts) if parts else self.gallery.new_empty((0, self.gallery.shape[1]))

    def logits(self, images: Tensor) -> Tensor | None:
        """Logits (M, C) of uint8 images (M, H, W, C), M ≥ 1, a column for each of the card's class names; None for an
        encoder without a classifier. The largest, and their largest softmax, are scores: larger means more known."""
        if self.encoder.classifier is None:
            return None
        parts = images.split(_BATCH)
        return torch.cat([encode(self.encoder, self._render(part.to(self.device)), _BATCH).logits for part in parts])

    def score(self, images: Tensor, ks: Sequence[int]) -> Scores:
        """Scores and predicted classes (M, len(ks)); a larger score means more known."""
        return score(self.embed(images), self.gallery, self.gallery_labels, ks)

    def predict(self, images: Tensor) -> dict[str, np.ndarray]:
        """For uint8 images (M, H, W, C): `label` is the class name or "unknown", `class` the nearest class whatever the
        score, `score` the score that was compared with the threshold."""
        scores, predictions = (column.squeeze(1).cpu() for column in self.score(images, [self.card.k]))
        names = np.array([*self.card.class_names, UNKNOWN], dtype=object)
        decided = decide(scores, predictions, self.card.threshold)
        return {"label": names[decided.numpy()], "class": names[predictions.numpy()], "score": scores.numpy()}

    def save(self, folder: Path) -> None:
        with full_disk_is_bad_input(folder), replacing_folder(folder) as partial:
            save_encoder(self.encoder, partial / "encoder.safetensors")
            save_file({"embeddings": self.gallery, "labels": self.gallery_labels}, partial / "gallery.safetensors")
            write_json(partial / "model.json", self.card.to_dict())

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> OpenSetModel:
        card = ModelCard.from_dict(read_json(folder / "model.json", "model"))
        encoder = Encoder(card.encoder, card.channels, card.classifier, len(card.class_names))
        load_encoder(encoder, folder / "encoder.safetensors")
        gallery = load_file(folder / "gallery.safetensors", device=str(device))
        return cls(card, encoder.to(device), gallery["embeddings"], gallery["labels"])

    def _render(self, images: Tensor) -> Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != self.card.channels:
            raise ValueError(
                f"images must be uint8 of shape (M, H, W, {self.card.channels}), "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )
        return render_plain(images, size=self.card.image_size, mean=self.card.mean, std=self.card.std)


def register(run_dir: Path, model_name: str, alias: str) -> str:
    """Log `run_dir`/model to the folder's MLflow run and register it; returns the version.

    Args:
        alias: moved to the new version; "" leaves aliases alone.
    """
    import mlflow
    from mlflow.tracking import MlflowClient

    link = Link.read(run_dir)
    card = ModelCard.from_dict(read_json(run_dir / "model" / "model.json", "model"))
    check_store(link.uri)
    deliver(run_dir)
    link = Link.read(run_dir)
    mlflow.set_tracking_uri(link.uri)
    client = MlflowClient(link.uri)
    # A crash between the registration and the note of it leaves a version of this run: it is taken, not made again.
    found = client.search_model_versions(f"run_id = '{link.run_id}'") if link.version is None else []
    version = link.version or next((str(each.version) for each in found if each.name == model_name), None)
    if version is None:
        version = _log_model(run_dir, model_name, link.run_id, card)
    client.set_model_version_tag(model_name, version, "split_hash", card.split_hash)
    if alias:
        client.set_registered_model_alias(model_name, alias, version)
    link.replaced(version=version).save(run_dir)
    return version


def _log_model(run_dir: Path, model_name: str, run_id: str, card: ModelCard) -> str:
    """A new version of `model_name` from `run_dir`/model."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, -1, -1, card.channels), "images")]),
        outputs=Schema([ColSpec("string", "label"), ColSpec("string", "class"), ColSpec("double", "score")]),
    )
    # MLflow congratulates on standard error.
    with mlflow.start_run(run_id=run_id), contextlib.redirect_stderr(io.StringIO()):
        info = mlflow.pyfunc.log_model(
            name="model",
            loader_module="trainer.registry",
            data_path=str(run_dir / "model"),
            signature=signature,
            input_example=np.zeros((1, card.image_size, card.image_size, card.channels), np.uint8),
            registered_model_name=model_name,
            pip_requirements=["gradmix-osr"],
            metadata={"split_hash": card.split_hash, "protocol": card.protocol["name"]},
        )
    return str(info.registered_model_version)


def load_model(uri: str, tracking_uri: str | None = None, device: torch.device | str = "cpu") -> OpenSetModel:
    """A registered model ("models:/NAME@ALIAS", "models:/NAME/VERSION") or a folder of `OpenSetModel.save`.

    Raises:
        InputError: the store does not answer, or has no such model, version or alias.
    """
    if not uri.startswith("models:/"):
        if not (Path(uri) / "model.json").is_file():
            raise InputError(f"{uri} is no model: give models:/NAME@ALIAS, models:/NAME/VERSION or a folder of a run")
        return OpenSetModel.load(Path(uri), device)
    import mlflow
    from mlflow.exceptions import MlflowException

    store = resolve_uri(tracking_uri)
    check_store(store, must_exist=True)
    mlflow.set_tracking_uri(store)
    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri))
    except MlflowException as error:
        raise InputError(
            f"{uri} is not in the MLflow store {without_password(store)}: {_known_models(store)}"
        ) from error
    # MLflow keeps the folder that was logged somewhere inside its own.
    found = sorted(folder.rglob("model.json"))
    if not found:
        raise InputError(f"the registered model in {folder} is not one of this project: register it again")
    return OpenSetModel.load(found[0].parent, device)


def _known_models(store: str) -> str:
    from mlflow.tracking import MlflowClient

    models = MlflowClient(store).search_registered_models()
    if not models:
        return "it has no model yet; train one first"
    described = [
        f"{model.name} ({', '.join(f'@{alias}' for alias in model.aliases) or 'no alias'})" for model in models
    ]
    return f"it has {', '.join(described)}"


class _PyFunc:
    """What MLflow calls: `predict` on a numpy array, or on {"images": array}."""

    def __init__(self, model: OpenSetModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        import pandas as pd

        images = model_input["images"] if isinstance(model_input, dict) else model_input
        return pd.DataFrame(self.model.predict(torch.from_numpy(np.ascontiguousarray(images))))


def _load_pyfunc(data_path: str) -> _PyFunc:
    """MLflow's entry for models whose `loader_module` is this one."""
    device = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    return _PyFunc(OpenSetModel.load(Path(data_path), device))


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """Which run's model to register, and under which name."""

    run_dir: Path
    """Run folder of a finished training."""
    model_name: str | None = None
    """Name in the registry. Default: METHOD-PROTOCOL."""
    alias: str = "champion"
    """Alias that is moved to the new version; empty for none."""


def main() -> None:
    config = cli.parse(
        RegisterConfig,
        prog="python -m trainer.registry",
        description="Register the model of a run folder in MLflow, where training could not do it itself.",
    )
    card = ModelCard.from_dict(read_json(config.run_dir / "model" / "model.json", "model"))
    name = config.model_name or f"{card.method}-{card.protocol['name']}"
    version = register(config.run_dir, name, config.alias)
    print(f"registered {name} version {version}" + (f" as @{config.alias}" if config.alias else ""))


if __name__ == "__main__":
    cli.run(main)
