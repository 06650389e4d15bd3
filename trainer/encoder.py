"""The encoder: a residual network with a projection head. One forward gives embeddings and the feature maps asked for.

Blocks are torchvision's; the network around them is here because torchvision's has neither the stem for small images
nor a width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from data_pipeline.errors import InputError
from trainer.config import EncoderConfig

_DEPTHS = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
}
# The paper names layers after ResNet-18, where every stage ends with its second block.
_STAGE_OF = {"conv3_2": 1, "conv4_2": 2, "conv5_2": 3}


class Encoded(NamedTuple):
    """What the encoder makes of B views.

    Attributes:
        embeddings: (B, D) float32, of length 1.
        maps: for each layer asked for, its output (B, K, h, w), part of the graph.
    """

    embeddings: Tensor
    maps: dict[str, Tensor]


class Encoder(nn.Module):
    """Views (B, C, H, W) to `Encoded`. `channels` is C, 1 or 3."""

    def __init__(self, config: EncoderConfig, channels: int) -> None:
        super().__init__()
        block, depths = _DEPTHS[config.architecture]
        if config.stem == "small":
            self.stem = nn.Sequential(
                nn.Conv2d(channels, config.width, 3, padding=1, bias=False),
                nn.BatchNorm2d(config.width),
                nn.ReLU(inplace=True),
            )
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(channels, config.width, 7, stride=2, padding=3, bias=False),
                nn.BatchNorm2d(config.width),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(3, stride=2, padding=1),
            )
        in_channels, stages = config.width, []
        for stage, depth in enumerate(depths):
            planes, stride = config.width * 2**stage, 1 if stage == 0 else 2
            stages.append(_stage(block, in_channels, planes, depth, stride))
            in_channels = planes * block.expansion
        self.stages = nn.ModuleList(stages)
        self.head = nn.Sequential(
            nn.Linear(in_channels, config.hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden_dim, config.embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, views: Tensor, layers: Sequence[str] = ()) -> Encoded:
        wanted = {_STAGE_OF[layer]: layer for layer in layers}
        maps = {}
        features = self.stem(views)
        for number, stage in enumerate(self.stages):
            features = stage(features)
            if number in wanted:
                maps[wanted[number]] = features
        pooled = features.mean(dim=(2, 3))
        # Similarities at a temperature of 0.05 need more than bfloat16's eight bits.
        return Encoded(F.normalize(self.head(pooled).float(), dim=1), maps)


def _stage(block: type[nn.Module], in_channels: int, planes: int, depth: int, stride: int) -> nn.Sequential:
    out_channels = planes * block.expansion
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        # Every second pixel, then 1×1: the same as a 1×1 convolution of stride 2, whose backward pass in oneDNN
        # (PyTorch 2.11) writes past its memory for channels-last inputs of 64 pixels and fewer than 12 channels.
        shortcut = nn.Sequential(
            nn.AvgPool2d(1, stride=stride),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    first = block(in_channels, planes, stride, shortcut)
    return nn.Sequential(first, *(block(out_channels, planes) for _ in range(depth - 1)))


@torch.no_grad()
def embed(encoder: nn.Module, views: Tensor, batch_size: int = 512) -> Tensor:
    """Embeddings (B, D) float32 of views (B, C, H, W) with the encoder in evaluation mode, which is restored after."""
    was_training = encoder.training
    encoder.eval()
    try:
        return torch.cat([encoder(part).embeddings for part in views.split(batch_size)])
    finally:
        encoder.train(was_training)


def save_encoder(encoder: Encoder, path: Path) -> None:
    """The encoder's weights and batch-norm statistics as float32 safetensors."""
    state = encoder.state_dict().items()
    save_file({k: v.float().contiguous() if v.is_floating_point() else v for k, v in state}, path)


def load_encoder(encoder: Encoder, path: Path) -> None:
    """Fill `encoder` from a file of `save_encoder`; raises `InputError` if it is of another network."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not readable as encoder weights ({error}): check the path") from error
    own = encoder.state_dict()
    different = [
        name for name in (own.keys() | state.keys())
        if name not in own or name not in state or own[name].shape != state[name].shape
    ]  # fmt: skip
    if different:
        raise InputError(
            f"{path} holds another encoder: {len(different)} of {len(own)} tensors differ, such as {min(different)}: "
            "set --encoder.* to what it was trained with"
        )
    encoder.load_state_dict(state)
