"""The model that comes out of training, and how MLflow keeps it.

One model is an encoder, a gallery of training embeddings, the class names, a threshold and the preprocessing: what it
takes to name the class of an image or say "unknown". On disk it is safetensors and JSON; MLflow loads them through
`_load_pyfunc` below, so nothing is pickled. `trainer.registry_commands` is what `python -m trainer.registry` can do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline import cli
from data_pipeline.errors import InputError
from data_pipeline.files import full_disk_is_bad_input, read_json, replacing_folder, write_json
from data_pipeline.protocols import UNKNOWN
from data_pipeline.views import render_plain
from trainer.config import Classifier, EncoderConfig, Features, check_alias
from trainer.encoder import Encoder, embed, encode, load_encoder, save_encoder
from trainer.open_set import Scores, class_scores, neighbours, score
from trainer.records import without_password
from trainer.tracking import Link, check_store, deliver, resolve_uri

if TYPE_CHECKING:  # imported where it is used: MLflow takes seconds
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

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
    """What trained the encoder, by its name in `trainer.recipes.METHODS`."""
    classifier: Classifier | None = None
    features: Features = "embedding"
    """What the score compares; "backbone": the encoder has no projection head."""

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> ModelCard:
        """Of a `model.json`; raises `InputError` if it is none of this version."""
        try:
            return cls.from_dict(read_json(path, "model"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} describes no model of this version ({error}): register it again") from error

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> ModelCard:
        record = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        return cls(**{**record, "encoder": EncoderConfig(**record["encoder"])})


class Recognition(NamedTuple):
    """What a model says to M images.

    Attributes:
        labels: (M,) str, the class name or "unknown".
        classes: (M,) str, the nearest class whatever the score.
        scores: (M,) float32, what was compared with the threshold: the largest of `class_scores`.
        class_scores: (M, C) float32, in the order of the card's class names.
        neighbours: (M, n) int64, the most similar training images as rows of the gallery, nearest first.
        similarities: (M, n) float32, their cosine similarities.
    """

    labels: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    class_scores: np.ndarray
    neighbours: np.ndarray
    similarities: np.ndarray


class Neighbour(NamedTuple):
    """A training image near to an image that was asked about."""

    row: int  # of the gallery, which is also its place in the build's train.beton
    id: str
    class_name: str
    similarity: float  # cosine, in [-1, 1]


class OpenSetModel:
    """Names the class of an image, or says "unknown".

    Attributes:
        gallery, gallery_labels: (N, D) embeddings of the training images, and (N,) int64 into `card.class_names`.
        gallery_ids: (N,) what each training image was called where it came from.
        calibration_scores: (n,) float32, the scores of the held-out known images that the threshold was set by; None
            for a model saved before these were kept.
    """

    def __init__(
        self,
        card: ModelCard,
        encoder: Encoder,
        gallery: Tensor,
        gallery_labels: Tensor,
        gallery_ids: Sequence[str] | None = None,
        calibration_scores: Tensor | None = None,
    ) -> None:
        self.card, self.encoder = card, encoder.eval()
        self.gallery, self.gallery_labels = gallery, gallery_labels
        self.gallery_ids = gallery_ids or [f"train[{row}]" for row in range(len(gallery_labels))]
        self.calibration_scores = calibration_scores

    @property
    def device(self) -> torch.device:
        return self.gallery.device

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with anything that an answer depends on."""
        state = hashlib.sha256(json.dumps(self.card.to_dict(), sort_keys=True).encode())
        for tensor in (*self.encoder.state_dict().values(), self.gallery, self.gallery_labels):
            state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return state.hexdigest()[:16]

    def embed(self, images: Tensor) -> Tensor:
        """Embeddings (M, D) of uint8 images (M, H, W, C) of any size; they are brought to the model's."""
        parts = [embed(self.encoder, self.render(part.to(self.device)), _BATCH) for part in images.split(_BATCH)]
        return torch.cat(parts) if parts else self.gallery.new_empty((0, self.gallery.shape[1]))

    def logits(self, images: Tensor) -> Tensor | None:
        """Logits (M, C) of uint8 images (M, H, W, C), M ≥ 1, a column for each of the card's class names; None for an
        encoder without a classifier. The largest, and their largest softmax, are scores: larger means more known."""
        if self.encoder.classifier is None:
            return None
        parts = images.split(_BATCH)
        return torch.cat([encode(self.encoder, self.render(part.to(self.device)), _BATCH).logits for part in parts])

    def score(self, images: Tensor, ks: Sequence[int]) -> Scores:
        """Scores and predicted classes (M, len(ks)); a larger score means more known."""
        return score(self.embed(images), self.gallery, self.gallery_labels, ks)

    def recognise(self, images: Tensor, num_neighbours: int = 0) -> Recognition:
        """The full answer to uint8 images (M, H, W, C), with so many of the nearest training images."""
        embeddings = self.embed(images)
        of_classes = class_scores(embeddings, self.gallery, self.gallery_labels, self.card.k)
        near = neighbours(embeddings, self.gallery, num_neighbours)
        by_class = of_classes.cpu().numpy()
        predictions = by_class.argmax(axis=1)  # of equal scores the lowest class, as `score` has it
        scores = by_class.max(axis=1)
        known = scores >= self.card.threshold
        names = np.array(self.card.class_names, dtype=object)
        return Recognition(
            labels=np.where(known, names[predictions], UNKNOWN),
            classes=names[predictions],
            scores=scores,
            class_scores=by_class,
            neighbours=near.rows.cpu().numpy(),
            similarities=near.similarities.cpu().numpy(),
        )

    def name_neighbours(self, answer: Recognition) -> list[list[Neighbour]]:
        """The neighbours of each image of an answer."""
        labels = self.gallery_labels.cpu().numpy()[answer.neighbours]
        return [
            [
                Neighbour(place, self.gallery_ids[place], self.card.class_names[label], similarity)
                for place, label, similarity in zip(*row)
            ]
            for row in zip(answer.neighbours.tolist(), labels.tolist(), answer.similarities.tolist())
        ]

    def predict(self, images: Tensor) -> dict[str, np.ndarray]:
        """For uint8 images (M, H, W, C): `label` is the class name or "unknown", `class` the nearest class whatever the
        score, `score` the score that was compared with the threshold."""
        answer = self.recognise(images)
        return {"label": answer.labels, "class": answer.classes, "score": answer.scores}

    def save(self, folder: Path) -> None:
        with full_disk_is_bad_input(folder), replacing_folder(folder) as partial:
            save_encoder(self.encoder, partial / "encoder.safetensors")
            save_file({"embeddings": self.gallery, "labels": self.gallery_labels}, partial / "gallery.safetensors")
            write_json(partial / "gallery_ids.json", list(self.gallery_ids))
            if self.calibration_scores is not None:
                save_file({"scores": self.calibration_scores}, partial / "calibration.safetensors")
            write_json(partial / "model.json", self.card.to_dict())

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> OpenSetModel:
        """The model of a folder, which is not needed any more when this returns."""
        card = ModelCard.read(folder / "model.json")
        encoder = Encoder(card.encoder, card.channels, card.classifier, len(card.class_names))
        if card.features == "backbone":
            encoder.drop_head()
        load_encoder(encoder, folder / "encoder.safetensors")
        # Models of earlier versions have neither of these.
        ids, calibration = folder / "gallery_ids.json", folder / "calibration.safetensors"
        try:
            # Copied, since safetensors maps the file into memory.
            gallery = load_file(folder / "gallery.safetensors")
            gallery = {name: tensor.to(device, copy=True) for name, tensor in gallery.items()}
            scores = load_file(calibration)["scores"].clone() if calibration.is_file() else None
        except (OSError, SafetensorError) as error:
            raise InputError(f"the model in {folder} is damaged ({error}): get it again") from error
        return cls(
            card,
            encoder.to(device),
            gallery["embeddings"],
            gallery["labels"],
            read_json(ids, "list of training images") if ids.is_file() else None,
            scores,
        )

    def render(self, images: Tensor) -> Tensor:
        """Uint8 images (M, H, W, C) as the encoder sees them: (M, C, S, S) float32."""
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

    check_alias(alias)
    link = Link.read(run_dir)
    card = ModelCard.read(run_dir / "model" / "model.json")
    check_store(link.uri, must_exist=link.run_id is not None)
    deliver(run_dir)
    link = Link.read(run_dir)
    mlflow.set_tracking_uri(link.uri)
    client = MlflowClient(link.uri)
    # Versions are numbered for each name: that of another one says nothing.
    version = link.version if link.model_name == model_name else None
    version = version or _version_of_run(client, model_name, link.run_id)
    if version is None:
        version = log_version(run_dir / "model", model_name, link.run_id, card)
    client.set_model_version_tag(model_name, version, "split_hash", card.split_hash)
    if alias:
        move_alias(client, model_name, alias, version, "registered after training")
    Link.change(run_dir, version=version, model_name=model_name)
    return version


def _version_of_run(client: MlflowClient, model_name: str, run_id: str | None) -> str | None:
    """The version of `model_name` that a run was registered as, also where a crash came before the note of it."""
    for found in client.search_model_versions(f"run_id = '{run_id}'"):
        # One with another threshold belongs to the run too, but is not what training made.
        if found.name == model_name and "recalibrated_from" not in found.tags:
            return str(found.version)
    return None


def log_version(folder: Path, model_name: str, run_id: str, card: ModelCard) -> str:
    """A new version of `model_name` from a folder of `OpenSetModel.save`, belonging to the MLflow run `run_id`."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, Map, Object, Property

    neighbour = Object(
        [Property("id", DataType.string), Property("class", DataType.string), Property("similarity", DataType.double)]
    )
    # No schema of the input: MLflow has none that takes arrays and files alike, and `trainer.serving` says more clearly
    # what is wrong with a request.
    signature = ModelSignature(
        outputs=Schema(
            [
                ColSpec(DataType.string, "label"),
                ColSpec(DataType.string, "class"),
                ColSpec(DataType.double, "score"),
                ColSpec(DataType.double, "threshold"),
                ColSpec(Map(DataType.double), "class_scores"),
                ColSpec(Array(neighbour), "neighbours"),
            ]
        ),
        params=ParamSchema([ParamSpec("neighbours", DataType.long, card.k)]),
    )
    # MLflow congratulates on standard error.
    with mlflow.start_run(run_id=run_id), contextlib.redirect_stderr(io.StringIO()):
        info = mlflow.pyfunc.log_model(
            name="model",
            loader_module="trainer.registry",
            data_path=str(folder),
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
            raise InputError(f"{uri} is no model: give models:/NAME@ALIAS, models:/NAME/VERSION or RUN/model")
        return OpenSetModel.load(Path(uri), device)
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
    from mlflow.utils.uri import is_local_uri

    store = resolve_uri(tracking_uri)
    check_store(store, must_exist=True)
    mlflow.set_tracking_uri(store)
    with tempfile.TemporaryDirectory() as fetched:
        try:
            # Files of this machine are read where they lie; MLflow would leave a copy of others behind at every call.
            is_here = is_local_uri(ModelsArtifactRepository.get_underlying_uri(uri), is_tracking_or_registry_uri=False)
            folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=None if is_here else fetched))
        except MlflowException as error:
            raise InputError(
                f"{uri} is not in the MLflow store {without_password(store)}: {_known_models(store)}"
            ) from error
        # MLflow keeps the folder that was logged somewhere inside its own.
        found = sorted(folder.rglob("model.json"))
        if not found:
            raise InputError(f"the registered model {uri} is not one of this project: register it again")
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


def find_version(uri: str, tracking_uri: str | None = None) -> ModelVersion:
    """The registry's record of "models:/NAME@ALIAS" or "models:/NAME/VERSION".

    Raises:
        InputError: the store does not answer, has no such version, or `uri` is not of this form.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    store = resolve_uri(tracking_uri)
    check_store(store, must_exist=True)
    name, version, alias = _parts(uri)
    client = MlflowClient(store)
    try:
        return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        raise InputError(
            f"{uri} is not in the MLflow store {without_password(store)}: {_known_models(store)}"
        ) from error


def _parts(uri: str) -> tuple[str, str, str]:
    """Name, version and alias, one of the last two empty."""
    rest = uri.removeprefix("models:/").strip("/")
    name, _, alias = rest.partition("@")
    version = ""
    if not alias:
        name, _, version = rest.partition("/")
    if not uri.startswith("models:/") or not name or not (alias or version.isdecimal()):
        raise InputError(f"{uri} names no registered model: give models:/NAME@ALIAS or models:/NAME/VERSION")
    return name, version, alias


class Move(NamedTuple):
    """One move of an alias, as the registry's tags keep it."""

    time: str
    alias: str
    old: str | None
    new: str
    why: str
    back: bool = False
    """Whether it was a demotion, back to the version that carried the alias before."""


_MOVE = "alias."


def move_alias(client: MlflowClient, name: str, alias: str, version: str, why: str, *, back: bool = False) -> None:
    """Give `alias` of the model `name` to `version`, and note in tags when, from which version and why.

    The model's tags are the history (`moves`); the version that comes and the one that goes are tagged too.
    """
    old = client.get_registered_model(name).aliases.get(alias)
    if old is not None and str(old) == version:
        return
    now = datetime.datetime.now(datetime.UTC)
    client.set_registered_model_alias(name, alias, version)
    record = {"old": None if old is None else str(old), "new": version, "why": why, "back": back}
    client.set_registered_model_tag(name, f"{_MOVE}{alias}.{now:%Y%m%dT%H%M%S.%f}", json.dumps(record))
    client.set_model_version_tag(name, version, f"{alias}.since", f"{now:%Y-%m-%d %H:%M:%S} UTC: {why}")
    if old is not None:
        client.set_model_version_tag(name, str(old), f"{alias}.until", f"{now:%Y-%m-%d %H:%M:%S} UTC: {why}")


def moves(client: MlflowClient, name: str) -> list[Move]:
    """Every noted move of an alias of the model `name`, the oldest first."""
    found = []
    for key, text in client.get_registered_model(name).tags.items():
        if key.startswith(_MOVE):
            alias, _, stamp = key.removeprefix(_MOVE).partition(".")
            found.append(Move(time=stamp, alias=alias, **json.loads(text)))
    return sorted(found)


def _load_pyfunc(data_path: str) -> Any:
    """MLflow's entry for models whose `loader_module` is this one."""
    from trainer.serving import ServedModel

    device = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu"
    return ServedModel(OpenSetModel.load(Path(data_path), device))


if __name__ == "__main__":
    from trainer.registry_commands import main

    cli.run(main)
