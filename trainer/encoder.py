"""The encoder: a residual network with a projection head or a classifier on top.

One forward gives embeddings and the feature maps asked for, and with a classifier also logits.

Blocks are torchvision's; the network around them is here because torchvision's has neither the stem for small images
nor a width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from data_pipeline.errors import InputError
from trainer.config import Classifier, EncoderConfig

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
        embeddings: (B, D) float32, of length 1; what the head makes of the features, or with a classifier they
            themselves.
        maps: for each layer asked for, its output (B, K, h, w), part of the graph.
        logits: (B, classes) float32, the larger the more likely; None without a classifier.
        margins: (B, classes) float32, how far each view is outside of what the class's reciprocal point bounds; None
            but with reciprocal points.
    """

    embeddings: Tensor
    maps: dict[str, Tensor]
    logits: Tensor | None = None
    margins: Tensor | None = None


class Encoder(nn.Module):
    """Views (B, C, H, W) to `Encoded`. `channels` is C, 1 or 3.

    With a `classifier` of so many `classes` there is no projection head: the embedding is the features' direction.
    """

    def __init__(
        self, config: EncoderConfig, channels: int, classifier: Classifier | None = None, classes: int = 0
    ) -> None:
        super().__init__()
        block, depths = _DEPTHS[config.architecture]
        if config.stem == "small":
            self.stem = Stage(
                nn.Conv2d(channels, config.width, 3, padding=1, bias=False),
                nn.BatchNorm2d(config.width),
                nn.ReLU(inplace=True),
            )
        else:
            self.stem = Stage(
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
        self.head = self.classifier = None
        if classifier is None:
            self.head = nn.Sequential(
                nn.Linear(in_channels, config.hidden_dim),
                nn.ReLU(inplace=True),
                nn.Linear(config.hidden_dim, config.embedding_dim),
            )
        else:
            self.classifier = _CLASSIFIERS[classifier](in_channels, classes)
        self.features_dim = in_channels
        self.embedding_dim = config.embedding_dim if classifier is None else in_channels
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
        if self.classifier is None:
            embeddings = pooled if self.head is None else self.head(pooled)
            return Encoded(F.normalize(embeddings.float(), dim=1), maps)
        return Encoded(F.normalize(pooled.float(), dim=1), maps, *self.classifier(pooled))

    def drop_head(self) -> None:
        """Do without the projection head: the embedding becomes the direction of the pooled features."""
        self.head, self.embedding_dim = None, self.features_dim


class Stage(nn.Sequential):
    """Layers one after the other, which torch.compile takes as a whole, as it does not PyTorch's own class."""

    def forward(self, features: Tensor) -> Tensor:
        for layer in self:
            features = layer(features)
        return features


class EveryNthPixel(nn.Module):
    """(N, C, H, W) to every `stride`-th row and column of it.

    Before a 1×1 convolution it is the same as that of this stride, whose backward pass in oneDNN (PyTorch 2.11) writes
    past its memory for channels-last inputs of 64 pixels and fewer than 12 channels.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, features: Tensor) -> Tensor:
        return features[:, :, :: self.stride, :: self.stride]


class LinearClassifier(nn.Linear):
    """Features (B, D) to logits (B, classes) float32, and no margins."""

    def forward(self, features: Tensor) -> tuple[Tensor, None]:
        return super().forward(features).float(), None


class ReciprocalPoints(nn.Module):
    """Reciprocal points (Chen et al. 2021, ARPL): each stands for everything that is *not* its class.

    A view with features x ∈ ℝᴰ belongs to a class the more, the farther it is from that class's point p and the more
    it points elsewhere; and all classes are kept within one learnt radius R of their points, so that the open space
    between them is bounded:

        logitₖ = ‖x − pₖ‖² / D − x·pₖ
        marginₖ = ‖x − pₖ‖² / D − R

    Both are (B, classes) float32.
    """

    def __init__(self, dimension: int, classes: int) -> None:
        super().__init__()
        self.points = nn.Parameter(0.1 * torch.randn(classes, dimension))
        self.radius = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        # Differences of large squares: not in eight bits.
        with torch.autocast(features.device.type, enabled=False):
            features, points = features.float(), self.points.float()
            products = features @ points.T
            squares = features.square().sum(dim=1, keepdim=True) + points.square().sum(dim=1)
            distances = (squares - 2.0 * products) / features.shape[1]
            return distances - products, distances - self.radius


_CLASSIFIERS = {"linear": LinearClassifier, "reciprocal": ReciprocalPoints}


def _stage(block: type[nn.Module], in_channels: int, planes: int, depth: int, stride: int) -> Stage:
    out_channels = planes * block.expansion
    shortcut = None
    if stride != 1 or in_channels != out_channels:
        shortcut = nn.Sequential(
            EveryNthPixel(stride),
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    first = block(in_channels, planes, stride, shortcut)
    return Stage(first, *(block(out_channels, planes) for _ in range(depth - 1)))


def compile_stages(encoder: Encoder, backend: str = "inductor") -> None:
    """Let torch.compile fuse what lies between the convolutions, stage by stage: the feature maps between stages, whose
    gradients attribution needs, stay tensors of their own. Batches of any size share what is compiled."""
    # Stages are variants of one piece of code to the compiler, which gives up after eight.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for stage in (encoder.stem, *encoder.stages):
        stage.forward = _compiled(stage.forward, backend)


def _compiled(forward: Callable[[Tensor], Tensor], backend: str) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(forward, backend=backend)

    def call(features: Tensor) -> Tensor:
        torch._dynamo.maybe_mark_dynamic(features, 0)
        return compiled(features)

    return call


@torch.no_grad()
def encode(encoder: Encoder, views: Tensor, batch_size: int = 512) -> Encoded:
    """Embeddings, and logits if there are any, of views (B, C, H, W), B ≥ 1, with the encoder in evaluation mode, which
    is restored after."""
    was_training = encoder.training
    encoder.eval()
    try:
        parts = [encoder(part) for part in views.split(batch_size)]
    finally:
        encoder.train(was_training)
    columns = [None if column[0] is None else torch.cat(column) for column in zip(*(p[:1] + p[2:] for p in parts))]
    return Encoded(columns[0], {}, *columns[1:])


def embed(encoder: Encoder, views: Tensor, batch_size: int = 512) -> Tensor:
    """Embeddings (B, D) float32 of views (B, C, H, W); see `encode`."""
    return encode(encoder, views, batch_size).embeddings


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
            "set --encoder.* and --method to what it was trained with"
        )
    encoder.load_state_dict(state)
