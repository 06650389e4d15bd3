"""What each method makes of a batch's views, so that `Trainer.train_step` is one page for all of them.

A method says which of the views the encoder embeds, turns what comes out into a loss with named parts, and may remember
something from step to step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.batch_norm import synchronise
from trainer.config import ARPLConfig, CrossEntropyConfig, MoCoConfig, ObjectiveConfig, TrainConfig
from trainer.distributed import world_size
from trainer.encoder import Encoded, Encoder
from trainer.losses import (
    CrossEntropy,
    MomentumObjective,
    Objective,
    ReciprocalLoss,
    cross_entropy,
    momentum_objective,
    objective,
    reciprocal_loss,
)
from trainer.mixing import Mixed
from trainer.moco import KeyMemory


class Method(ABC):
    """One way to train. The views of N images are (V·N, C, h, w) in blocks: all x¹, all x², and with mixing all x̃."""

    parts: ClassVar[tuple[str, ...]]
    """Names of what `losses` returns, the total first."""

    memories: Mapping[str, Any] = {}
    """What has to be in a checkpoint, each a `trainer.checkpoint.Memory`."""

    def split(self, views: Tensor, n: int, *, epoch: int, step: int) -> tuple[Tensor, Tensor | None]:
        """The views that the encoder embeds, x¹ first, and the keys (N, D) that stand for the others."""
        return views, None

    @abstractmethod
    def losses(self, encoded: Encoded, keys: Tensor | None, labels: Tensor, mixed: Mixed | None, settings: Any) -> Any:
        """The loss and its parts, scalars, as a named tuple of `parts`.

        Args:
            encoded: of the views that `split` chose.
            labels: (N,) int64.
            mixed: how x̃ was made; None without mixing.
            settings: the objective's configuration in this epoch.
        """

    def remember(self, keys: Tensor | None, encoder: nn.Module, updated: bool) -> None:  # noqa: B027 (most do not)
        """Called after each batch; `updated`: whether the optimizer has taken a step."""


class Contrastive(Method):
    """SupCon, SimCLR and the paper's eq. 8."""

    parts = Objective._fields

    def losses(
        self, encoded: Encoded, keys: None, labels: Tensor, mixed: Mixed | None, settings: ObjectiveConfig
    ) -> Objective:
        gamma, share, partner = _of_mixed(mixed)
        return objective(encoded.embeddings, labels, gamma, settings, share=share, partner=partner)


class MomentumContrast(Method):
    """MoCo: x¹ and x̃ are queries, x² is the key of both."""

    parts = MomentumObjective._fields

    def __init__(self, config: TrainConfig, copy: Callable[[], Encoder], autocast: torch.autocast) -> None:
        """`copy` makes another encoder with the weights of the one that is trained."""
        self.config, self.autocast = config, autocast
        encoder = copy()
        if config.batch_norm == "global" and world_size() > 1:
            encoder = synchronise(encoder, next(encoder.parameters()).device)
        encoder.to(memory_format=torch.channels_last)
        self.memory = KeyMemory(encoder, config.objective.queue_size, seed=config.seed)
        self.memories = {"keys": self.memory}

    def split(self, views: Tensor, n: int, *, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        others = views[n : 2 * n]
        with self.autocast:
            if self.config.batch_norm == "shuffled":
                keys = self.memory.shuffled_keys(others, seed=self.config.seed, epoch=epoch, step=step)
            else:
                keys = self.memory.keys(others)
        return torch.cat([views[:n], views[2 * n :]]), keys

    def losses(
        self, encoded: Encoded, keys: Tensor, labels: Tensor, mixed: Mixed | None, settings: MoCoConfig
    ) -> MomentumObjective:
        gamma, share, partner = _of_mixed(mixed)
        queue = self.memory.queue
        return momentum_objective(encoded.embeddings, keys, queue, gamma, settings, share=share, partner=partner)

    def remember(self, keys: Tensor, encoder: nn.Module, updated: bool) -> None:
        self.memory.enqueue(keys)
        if updated:
            self.memory.follow(encoder, self.config.objective.momentum)


class LinearClassification(Method):
    """Cross entropy of both clean views."""

    parts = CrossEntropy._fields

    def losses(
        self, encoded: Encoded, keys: None, labels: Tensor, mixed: None, settings: CrossEntropyConfig
    ) -> CrossEntropy:
        return cross_entropy(encoded.logits, labels, settings)


class ReciprocalClassification(Method):
    """ARPL on both clean views."""

    parts = ReciprocalLoss._fields

    def losses(self, encoded: Encoded, keys: None, labels: Tensor, mixed: None, settings: ARPLConfig) -> ReciprocalLoss:
        return reciprocal_loss(encoded.logits, encoded.margins, labels, settings)


def method_of(config: TrainConfig, copy: Callable[[], Encoder], autocast: torch.autocast) -> Method:
    """The method of a run.

    Args:
        copy: makes another encoder with the weights of the one that is trained, on its device.
        autocast: the precision of its convolutions.
    """
    if isinstance(config.objective, MoCoConfig):
        return MomentumContrast(config, copy, autocast)
    without_memory = {
        ObjectiveConfig: Contrastive,
        CrossEntropyConfig: LinearClassification,
        ARPLConfig: ReciprocalClassification,
    }
    return without_memory[type(config.objective)]()


def _of_mixed(mixed: Mixed | None) -> tuple[Any, Tensor | None, Tensor | None]:
    return (mixed.gamma, mixed.share, mixed.partner) if mixed else (None, None, None)
