"""What each method makes of a batch's views, so that `Trainer.train_step` is one page for all of them.

A method says which of the views the encoder embeds, and turns what comes out into a loss with named parts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from trainer.config import AnyObjective, ARPLConfig, CrossEntropyConfig, ObjectiveConfig
from trainer.encoder import Encoded
from trainer.losses import CrossEntropy, Objective, ReciprocalLoss, cross_entropy, objective, reciprocal_loss
from trainer.mixing import Mixed


class Method(ABC):
    """One way to train. The views of a batch are (V·N, C, h, w) in blocks: all x¹, all x², and with mixing all x̃."""

    parts: ClassVar[tuple[str, ...]]
    """Names of what `losses` returns, the total first."""

    @abstractmethod
    def losses(self, encoded: Encoded, labels: Tensor, mixed: Mixed | None, settings: Any) -> Any:
        """The loss and its parts, scalars, as a named tuple of `parts`.

        Args:
            labels: (N,) int64.
            mixed: how x̃ was made; None without mixing.
            settings: the objective's configuration in this epoch.
        """


class Contrastive(Method):
    """SupCon, SimCLR and the paper's eq. 8."""

    parts = Objective._fields

    def losses(self, encoded: Encoded, labels: Tensor, mixed: Mixed | None, settings: ObjectiveConfig) -> Objective:
        gamma, share, partner = (mixed.gamma, mixed.share, mixed.partner) if mixed else (None, None, None)
        return objective(encoded.embeddings, labels, gamma, settings, share=share, partner=partner)


class LinearClassification(Method):
    """Cross entropy of both clean views."""

    parts = CrossEntropy._fields

    def losses(
        self, encoded: Encoded, labels: Tensor, mixed: Mixed | None, settings: CrossEntropyConfig
    ) -> CrossEntropy:
        return cross_entropy(encoded.logits, labels, settings)


class ReciprocalClassification(Method):
    """ARPL on both clean views."""

    parts = ReciprocalLoss._fields

    def losses(self, encoded: Encoded, labels: Tensor, mixed: Mixed | None, settings: ARPLConfig) -> ReciprocalLoss:
        return reciprocal_loss(encoded.logits, encoded.margins, labels, settings)


def method_of(config: AnyObjective) -> Method:
    """The method that an objective is trained by."""
    kinds = {
        ObjectiveConfig: Contrastive,
        CrossEntropyConfig: LinearClassification,
        ARPLConfig: ReciprocalClassification,
    }
    return kinds[type(config)]()
