"""Small models that tests register, serve and explain; and run folders as training leaves them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_pipeline.beton import Build
from data_pipeline.files import write_json
from data_pipeline.loader import Partitions
from trainer.config import EncoderConfig
from trainer.encoder import Encoder
from trainer.recipes import recipe
from trainer.recognition import build_model
from trainer.registry import OpenSetModel, register
from trainer.tracking import JournalTracker

NAME = "gradmix-digits"


def small_model(build: Build, seed: int = 0) -> OpenSetModel:
    """A network with random weights: digits of one kind are near each other in what it sees of them all the same."""
    config = dataclasses.replace(recipe("digits"), encoder=EncoderConfig(width=4, hidden_dim=16, embedding_dim=16), k=5)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = Encoder(config.encoder, build.manifest.channels)
        # Batch normalisation learns what is usual from the images; without it, everything looks alike.
        images = Partitions(build, torch.device("cpu"))["train"].images
        encoder.train()(images[:256].permute(0, 3, 1, 2).float() / 255 - 0.5)
    return build_model(encoder, Partitions(build, torch.device("cpu")), config)


def finished_run(folder: Path, model: OpenSetModel, uri: str, alias: str = "champion") -> str:
    """A run folder that training could have left, registered; returns the version."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"config": {"seed": 0}, "split_hash": model.card.split_hash})
    JournalTracker(folder, uri=uri, experiment="tests", offline=True).close("FINISHED")
    model.save(folder / "model")
    return register(folder, NAME, alias)


def write_images(folder: Path, images: torch.Tensor, prefix: str = "image") -> list[Path]:
    """Uint8 images (M, H, W, C) as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{prefix}{number:03}.png" for number in range(len(images))]
    for path, image in zip(paths, images.numpy()):
        Image.fromarray(np.squeeze(image)).save(path)
    return paths
