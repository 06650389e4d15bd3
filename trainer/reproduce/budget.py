"""How thorough a reproduction is: what a training and a measurement may cost at most."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from data_pipeline.protocols import Protocol
from trainer.config import Phase, TrainConfig
from trainer.evaluation.attribution_maps import Coverage
from trainer.evaluation.robustness import AdversarialAttacks, CommonCorruptions
from trainer.reproduce.experiments import Variant


class Budget(NamedTuple):
    """What a cell may cost at most; None: no limit."""

    epochs: int | None = None
    images: int | None = None
    width: int | None = None
    batch_size: int | None = None
    tested: int | None = None
    """Test images of what takes long: corruptions, attacks, attribution."""

    def applied(self, config: TrainConfig) -> TrainConfig:
        """`config` within this budget; a warm-up keeps its share of the epochs."""
        phases = scaled([Phase.parse(text) for text in config.phases], self.epochs)
        # Phases replace the epochs.
        epochs = config.epochs if phases else _least(self.epochs, config.epochs)
        share = (sum(phase.epochs for phase in phases) or epochs) / config.total_epochs
        warmup = config.optimizer.warmup_epochs * share
        return dataclasses.replace(
            config,
            epochs=epochs,
            phases=tuple(map(str, phases)),
            batch_size=_least(self.batch_size, config.batch_size),
            encoder=dataclasses.replace(config.encoder, width=_least(self.width, config.encoder.width)),
            optimizer=dataclasses.replace(config.optimizer, warmup_epochs=warmup),
        )

    def measured(self, variant: Variant) -> Variant:
        """`variant`, its evaluators within this budget."""
        measures = {}
        for name, wanted in variant.measures.items():
            evaluator = wanted.evaluator
            if self.tested is not None and isinstance(evaluator, (CommonCorruptions, AdversarialAttacks, Coverage)):
                most = self.tested if evaluator.max_images is None else min(self.tested, evaluator.max_images)
                evaluator = dataclasses.replace(evaluator, max_images=most)
            measures[name] = dataclasses.replace(wanted, evaluator=evaluator)
        return dataclasses.replace(variant, measures=measures)

    def train_images(self, protocol: Protocol) -> int | None:
        """Training images to build; at least 20 of each class, since a score sums the 10 nearest."""
        return self.images and max(self.images, 20 * len(protocol.known))

    def __str__(self) -> str:
        limits = {
            f"{self.epochs} epochs": self.epochs,
            f"{self.images} training images": self.images,
            f"width {self.width}": self.width,
            f"batches of {self.batch_size}": self.batch_size,
            f"{self.tested} test images for what takes long": self.tested,
        }
        said = [text for text, limit in limits.items() if limit is not None]
        return f"at most {', '.join(said)}" if said else "nothing is cut short"


BUDGETS = {
    "smoke": Budget(epochs=2, images=600, width=4, batch_size=64, tested=100),
    "short": Budget(epochs=20, images=5000, width=16, batch_size=64, tested=1000),
    "full": Budget(),
}


def scaled(phases: Sequence[Phase], limit: int | None) -> list[Phase]:
    """The phases in their proportions within `limit` epochs, each of 1 epoch at least."""
    total = sum(phase.epochs for phase in phases)
    if limit is None or total <= limit:
        return list(phases)
    epochs = [max(phase.epochs * limit // total, 1) for phase in phases]
    # What rounding left over, or took too much, is the longest phase's.
    longest = epochs.index(max(epochs))
    epochs[longest] = max(epochs[longest] + limit - sum(epochs), 1)
    return [dataclasses.replace(phase, epochs=number) for phase, number in zip(phases, epochs)]


def _least(limit: int | None, value: int) -> int:
    return value if limit is None else min(limit, value)
