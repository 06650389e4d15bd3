"""What `tests.bench.step` times is the steps and nothing that happens once."""

from __future__ import annotations

import dataclasses

import torch

from tests.bench.step import NoiseImages, compile_patches, training_step
from trainer.config import EncoderConfig
from trainer.engine import join_ranks
from trainer.recipes import recipe
from trainer.step import Trainer


def test_patches_of_every_size_are_rendered_before_a_step_is_timed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    join_ranks()
    small = dataclasses.replace(recipe("cifar10"), batch_size=2, encoder=EncoderConfig(width=2))
    trainer = Trainer(small, NoiseImages(torch.device("cpu"), 8, 6))
    render, sizes = trainer.render, []

    def note(*args, **patches):
        sizes.append(patches["gamma"])
        return render(*args, **patches)

    monkeypatch.setattr(trainer, "render", note)
    compile_patches(trainer, 5)
    rendered = list(sizes)
    step = training_step(trainer)
    for _ in range(5):
        step()
    assert sizes == 2 * rendered and len(set(rendered)) == 5
