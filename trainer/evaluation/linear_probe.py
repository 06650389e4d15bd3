"""How well a linear classifier does on frozen features (the paper's figure 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.errors import InputError
from trainer.evaluation.checks import check_labels
from trainer.evaluation.evaluators import Evaluation, Subject
from trainer.metrics import top_k_accuracy


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A linear classifier trained on the features of the training images and measured on the known test images.

    Numbers: top1_accuracy, top5_accuracy, both after the last epoch. Arrays, (epochs,) each: epoch from 1, train_loss,
    top1, top5.
    """

    epochs: int = 100
    """Passes over the training features; 1 or more."""
    batch_size: int = 256
    """Images of a step; 1 or more."""
    learning_rate: float = 0.1
    """Learning rate at the start; it falls to 0 along half a cosine. Features are brought to mean 0 and deviation 1."""
    momentum: float = 0.9
    """Momentum of SGD, 0 to below 1."""
    weight_decay: float = 0.0
    """L2 penalty on the weights; 0 or more."""
    seed: int = 0
    """Seed of the order."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"probe.{name.replace('_', '-')} is {getattr(self, name)}; set it to 1 or more")
        if self.learning_rate <= 0 or self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise InputError(
                f"probe.learning-rate is {self.learning_rate}, momentum {self.momentum}, weight-decay "
                f"{self.weight_decay}; set them above 0, within 0 to below 1, and to 0 or more"
            )

    def __call__(self, subject: Subject) -> Evaluation:
        train, test = (subject.outputs(name).features for name in ("train", "test_known"))
        labels, truth = subject.batch("train").labels.cpu(), subject.labels("test_known")
        # The probe's classes are those of its training images, whichever logits the model may have.
        classes = int(labels.max()) + 1
        for each, images in ((labels, "train images"), (truth, "test_known images")):
            check_labels(each, classes, images, "the training images")
        device = subject.model.device
        mean, deviation = train.mean(dim=0), train.std(dim=0, correction=0).clamp_min(1e-6)
        train, test = (((features - mean) / deviation).to(device) for features in (train, test))
        epochs, rows = self.fit(train, labels.to(device)), []
        for loss, classifier in subject.track(epochs, "linear probe", self.epochs):
            with torch.no_grad():
                logits = classifier(test).cpu().numpy()
            rows.append((loss, top_k_accuracy(logits, truth, 1), top_k_accuracy(logits, truth, 5)))
        loss, top1, top5 = np.array(rows).T
        return Evaluation(
            {"top1_accuracy": float(top1[-1]), "top5_accuracy": float(top5[-1])},
            arrays={"epoch": np.arange(1, self.epochs + 1), "train_loss": loss, "top1": top1, "top5": top5},
            tested=len(truth),
        )

    def fit(self, features: Tensor, labels: Tensor) -> Iterator[tuple[float, nn.Module]]:
        """After each epoch, the mean training loss and the classifier, from features (M, D) to logits (M, C)."""
        classifier = nn.Linear(features.shape[1], int(labels.max()) + 1, device=features.device)
        nn.init.zeros_(classifier.weight)
        nn.init.zeros_(classifier.bias)
        optimizer = torch.optim.SGD(
            classifier.parameters(), self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )
        steps = -(-len(labels) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * steps)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            total = torch.zeros((), device=features.device)
            for chosen in torch.randperm(len(labels), generator=generator).to(features.device).split(self.batch_size):
                loss = F.cross_entropy(classifier(features[chosen]), labels[chosen])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach() * len(chosen)
            yield total.item() / len(labels), classifier
