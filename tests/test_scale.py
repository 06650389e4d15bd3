"""The costs that cluster/README.md tells are those of the code: bytes sent, bytes held, operations."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.profiler import profile

from tests.bench import scale
from tests.bench.scale import Setting, measure, peak_bytes, setting_of, small
from tests.ranks import on_ranks
from trainer import losses
from trainer.config import EncoderConfig, ObjectiveConfig
from trainer.encoder import Encoder


@pytest.mark.parametrize(("ranks", "zero"), [(1, 0), (2, 1), (4, 0)])
def test_a_step_costs_what_the_formulas_say(ranks, zero, digits, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": zero, "reduce_bucket_size": 200_000}}))
    config = small(digits.folder, deepspeed_config=path)
    at = setting_of(config, ranks, zero, bucket=200_000)
    expected, held = scale.sent(at), scale.held(at)
    for found in on_ranks(measure, ranks, config, 1):
        assert sum(found["sent"].values()) == pytest.approx(sum(expected.values()), rel=1e-12)
        assert ranks == 1 or found["calls"] == scale.collectives(at)
        assert found["epoch"] == scale.sent_in_an_epoch(at) <= 8 * 3 * at.images  # 24 bytes an image at the most
        if not zero:
            assert found["state"] == held["weights, gradients, Adam"]
        # The first convolution needs no gradient of its input; else every operation of the forward pass returns twice.
        assert found["operations"] == pytest.approx(sum(scale.operations(at).values()), rel=0.03)
        added = sum(held[name] for name in ("embeddings of all ranks", "similarities", "activations", "ZeRO's bucket"))
        assert 0.5 * added < found["peak"] < added + 4 * 4 * at.weights


@pytest.mark.parametrize("most", [losses.MOST_AT_ONCE, 1 << 22], ids=["rows at once", "rows in parts"])
def test_a_rank_of_1024_holds_its_rows_of_a_batch_of_65536_only(most, monkeypatch):
    """This process is one of 1024 ranks with 64 images each; the others' keys are copies of its own."""
    ranks, at = 1024, Setting(ranks=1024, batch=65_536, images=65_536, side=32, encoder=EncoderConfig(embedding_dim=8))
    monkeypatch.setattr(losses, "MOST_AT_ONCE", most)
    monkeypatch.setattr(losses, "world_size", lambda: ranks)
    monkeypatch.setattr(losses, "rank", lambda: ranks - 1)
    monkeypatch.setattr(losses, "gather", lambda tensor: tensor.unsqueeze(0).expand(ranks, *tensor.shape))
    raw = torch.randn(3 * 64, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with profile(profile_memory=True, use_kineto=True) as memory:
        losses.objective(F.normalize(raw, dim=1), torch.arange(64) % 6, 0.3, ObjectiveConfig()).total.backward()
    assert raw.grad.isfinite().all()
    bound = scale.similarity_bytes(at) + scale.held(at)["embeddings of all ranks"]
    assert 0.3 * bound < peak_bytes(memory) < bound
    assert bound < 0.01 * 4 * (2 * at.batch) ** 2  # the matrix of all with all would take 69 GB


@pytest.mark.parametrize(
    ("architecture", "width", "side"),
    [("resnet18", 8, 16), ("resnet18", 4, 40), ("resnet34", 4, 24), ("resnet50", 2, 32)],
)
def test_activations_grow_with_views_channels_and_pixels(architecture, width, side):
    config = EncoderConfig(architecture=architecture, width=width, hidden_dim=16, embedding_dim=8)
    encoder = Encoder(config, 3).to(memory_format=torch.channels_last)
    views = torch.randn(24, 3, side, side).contiguous(memory_format=torch.channels_last)
    with profile(profile_memory=True, use_kineto=True) as memory:
        encoded = encoder(views, ("conv5_2",))
        encoded.maps["conv5_2"].retain_grad()
        encoded.embeddings.square().sum().backward()
    gradients = 4 * sum(weight.numel() for weight in encoder.parameters())
    expected = scale.held(Setting(ranks=1, batch=8, images=8, side=side, encoder=config))["activations"]
    assert peak_bytes(memory) - gradients == pytest.approx(expected, rel=0.1)
