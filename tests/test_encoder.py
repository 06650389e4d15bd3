"""The encoder against torchvision's network, its maps, and its weights on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from data_pipeline.errors import InputError
from trainer.config import EncoderConfig
from trainer.encoder import Encoder, compile_stages, embed, encode, load_encoder, save_encoder


@pytest.mark.parametrize("architecture", ["resnet18", "resnet34", "resnet50"])
def test_with_the_large_stem_it_is_torchvisions_network(architecture):
    ours = Encoder(EncoderConfig(architecture=architecture, stem="large"), 3).eval()
    reference = getattr(torchvision.models, architecture)().eval()
    names = [name for name in reference.state_dict() if not name.startswith("fc.")]
    body = [value for name, value in ours.state_dict().items() if not name.startswith("head.")]
    assert len(names) == len(body)
    reference.load_state_dict(dict(zip(names, body)), strict=False)
    reference.fc = torch.nn.Identity()
    views = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = reference(views)
        expected = torch.nn.functional.normalize(ours.head(features), dim=1)
        torch.testing.assert_close(ours(views).embeddings, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_embeddings_have_length_one_and_maps_the_size_of_their_stage(channels):
    encoder = Encoder(EncoderConfig(width=8, hidden_dim=16, embedding_dim=12), channels)
    encoded = encoder(torch.randn(3, channels, 32, 32), ("conv5_2", "conv3_2"))
    assert encoded.embeddings.shape == (3, 12) and encoded.embeddings.dtype == torch.float32
    torch.testing.assert_close(encoded.embeddings.norm(dim=1), torch.ones(3))
    assert {name: tuple(a.shape) for name, a in encoded.maps.items()} == {
        "conv3_2": (3, 16, 16, 16),
        "conv5_2": (3, 64, 4, 4),
    }
    assert all((a >= 0).all() for a in encoded.maps.values())


def test_the_gradient_of_a_map_is_the_gradient_of_the_loss_there():
    """Finite differences in one entry of the last map, through pooling, head and normalisation."""
    encoder = Encoder(EncoderConfig(width=4, hidden_dim=8, embedding_dim=6), 1).double().eval()
    target = torch.randn(2, 6, dtype=torch.float64)
    encoded = encoder(torch.randn(2, 1, 16, 16, dtype=torch.float64), ("conv5_2",))
    feature_map = encoded.maps["conv5_2"]
    feature_map.retain_grad()

    def loss_of(features: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.normalize(encoder.head(features.mean((2, 3))), dim=1) * target).sum()

    (encoded.embeddings * target).sum().backward()
    step = torch.zeros_like(feature_map)
    step[1, 3, 0, 1] = 1e-6
    numeric = (loss_of(feature_map.detach() + step) - loss_of(feature_map.detach() - step)).item() / 2e-6
    assert feature_map.grad[1, 3, 0, 1].item() == pytest.approx(numeric, rel=1e-3, abs=1e-6)


def test_embed_batches_without_touching_the_encoder():
    encoder = Encoder(EncoderConfig(width=4, hidden_dim=8, embedding_dim=6), 1).train()
    views = torch.randn(7, 1, 16, 16)
    before = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
    torch.testing.assert_close(embed(encoder, views, batch_size=3), embed(encoder, views))
    assert encoder.training and all(torch.equal(before[n], b) for n, b in encoder.named_buffers())


def test_weights_survive_the_disk_and_another_network_is_refused(tmp_path):
    config = EncoderConfig(width=4, hidden_dim=8, embedding_dim=6)
    encoder, twin = Encoder(config, 1), Encoder(config, 1)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    load_encoder(twin, tmp_path / "encoder.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), twin.state_dict().values()))
    for other in (EncoderConfig(width=8), EncoderConfig(architecture="resnet34", width=4)):
        with pytest.raises(InputError, match="holds another encoder"):
            load_encoder(Encoder(other, 1), tmp_path / "encoder.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    for path in ("bad.safetensors", "missing.safetensors"):
        with pytest.raises(InputError, match=path):
            load_encoder(twin, tmp_path / path)


@pytest.mark.parametrize("width", [4, 8])
def test_narrow_networks_survive_their_backward_pass_at_64_pixels(width):
    """oneDNN's strided 1×1 convolutions corrupted memory here; in a process of its own, since that kills it."""
    program = (
        "import torch\n"
        "from trainer.config import EncoderConfig\n"
        "from trainer.encoder import Encoder\n"
        f"encoder = Encoder(EncoderConfig(width={width}), 3).to(memory_format=torch.channels_last)\n"
        "views = torch.randn(96, 3, 64, 64).contiguous(memory_format=torch.channels_last)\n"
        "for _ in range(2): encoder(views).embeddings.sum().backward()\n"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("classifier", ["linear", "reciprocal"])
def test_a_classifier_stands_in_place_of_the_head(classifier, tmp_path):
    config = EncoderConfig(width=4, hidden_dim=8, embedding_dim=6)
    encoder = Encoder(config, 1, classifier, 5).train()
    views = torch.randn(7, 1, 16, 16)
    encoded = encode(encoder, views, batch_size=3)
    assert encoder.training and not any(name.startswith("head.") for name in encoder.state_dict())
    assert encoder.embedding_dim == 32 and encoded.embeddings.shape == (7, 32) and encoded.logits.shape == (7, 5)
    torch.testing.assert_close(encoded.embeddings.norm(dim=1), torch.ones(7))
    assert torch.equal(embed(encoder, views), encode(encoder, views).embeddings)
    features = encoder.eval()(views, ("conv5_2",)).maps["conv5_2"].mean(dim=(2, 3))
    logits, margins = encoder.classifier(features)
    torch.testing.assert_close(encoded.logits, logits)
    assert (margins is None) == (classifier == "linear") == (encoded.margins is None)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(views).logits.dtype == torch.float32
    assert encode(Encoder(config, 1), views).logits is None

    save_encoder(encoder, tmp_path / "encoder.safetensors")
    twin = Encoder(config, 1, classifier, 5)
    load_encoder(twin, tmp_path / "encoder.safetensors")
    assert torch.equal(twin.eval()(views).logits, encoder(views).logits)
    with pytest.raises(InputError, match=r"holds another encoder.*--method"):
        load_encoder(Encoder(config, 1), tmp_path / "encoder.safetensors")


def test_compiled_stages_compute_the_same_and_leave_the_maps_their_gradients():
    torch.manual_seed(0)
    config = EncoderConfig(width=4, hidden_dim=8, embedding_dim=6)
    plain, compiled = Encoder(config, 3), Encoder(config, 3)
    compiled.load_state_dict(plain.state_dict())
    graphs = []
    compile_stages(compiled, backend=lambda graph, inputs: graphs.append(graph) or graph)
    for size in (48, 32, 40):
        views = torch.randn(size, 3, 16, 16)
        gradients = []
        for encoder in (plain, compiled):
            encoded = encoder(views, ("conv4_2", "conv5_2"))
            for feature_map in encoded.maps.values():
                feature_map.retain_grad()
            (encoded.embeddings * torch.arange(6.0)).sum().backward()
            gradients.append([feature_map.grad for feature_map in encoded.maps.values()])
        for ours, theirs in zip(*gradients):
            torch.testing.assert_close(ours, theirs)
    assert len(graphs) == 5  # the stem and four stages, whatever the batch size
    assert compiled.state_dict().keys() == plain.state_dict().keys()
