"""How much a model loses where images are not as they were in training: common corruptions and attacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from data_pipeline.corruptions import CORRUPTIONS, SEVERITIES, Corruption, constants, corrupt, read_corrupted
from data_pipeline.errors import InputError
from trainer.evaluation.checks import check_finite
from trainer.evaluation.evaluators import BootstrapConfig, Evaluation, FeatureModel, Subject, classified_right
from trainer.metrics import auroc

_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class CommonCorruptions:
    """Closed-set accuracy under the 15 common corruptions (the paper's table 5 and figure 4).

    The drop D_{c,s} = A_clean − A_{c,s} is that of corruption c in severity s, in shares.

    Numbers: clean_accuracy; accuracy_drop, the mean over all c and s; drop/CORRUPTION, the mean over severities;
    drop_at_severity/S, the mean over corruptions; accuracy/CORRUPTION/S. Arrays: accuracy (C, S), corruptions (C,) and
    severities (S,) as they were asked for, examples uint8 (C, 1 + S, H, W, channels), clean first.
    """

    corruptions: tuple[Corruption, ...] = CORRUPTIONS
    """Which to measure."""
    severities: tuple[int, ...] = SEVERITIES
    """Which of the severities 1 to 5 to measure."""
    corrupted_root: Annotated[Path | None, tyro.conf.arg(aliases=["--corrupted-root"])] = None
    """Folder of the official CIFAR-10-C or Tiny-ImageNet-C. Default: generate with the published constants; frost then
    is only like the official one."""
    max_images: int | None = None
    """At most so many test images, chosen at random with seed 0; 1 or more. Default: all. Not with official files, of
    which all are read."""
    seed: int = 0
    """Seed of what the corruptions draw."""
    bootstrap: tyro.conf.Suppress[BootstrapConfig] = field(default_factory=BootstrapConfig)

    def __post_init__(self) -> None:
        if not self.corruptions or not self.severities:
            raise InputError("corruptions.corruptions or corruptions.severities is empty; name at least one of each")
        for corruption in self.corruptions:
            for severity in self.severities:
                constants(corruption, severity, 32)
        if self.max_images is not None and self.max_images < 1:
            raise InputError(f"corruptions.max-images is {self.max_images}; set it to 1 or more")
        if self.max_images is not None and self.corrupted_root is not None:
            # Their order is not that of the clean images, so nobody knows which of them are the chosen ones.
            raise InputError(
                f"corruptions.max-images is {self.max_images}, but of the official files in {self.corrupted_root} all "
                "images are read: leave max-images out, so that the clean ones are all too, or leave out "
                "--corrupted-root"
            )

    def __call__(self, subject: Subject) -> Evaluation:
        batch = subject.some("test_known", self.max_images)
        images, labels = batch.images.cpu().numpy(), batch.labels.cpu().numpy()
        indices = batch.indices.cpu().numpy()
        clean = _correct(subject.model, images, labels, "test_known images")
        cases = [(corruption, severity) for corruption in self.corruptions for severity in self.severities]
        correct, examples = [], []
        for corruption, severity in subject.track(cases, "corruptions", len(cases)):
            what = f"test_known images under {corruption} of severity {severity}"
            if self.corrupted_root is not None:
                changed, truth = read_corrupted(
                    self.corrupted_root, corruption, severity, subject.classes, subject.class_names
                )
                if changed.shape[3] != images.shape[3]:
                    raise InputError(
                        f"{self.corrupted_root} holds colour images, the model takes grey ones: leave --corrupted-root "
                        "out to generate the corruptions"
                    )
                correct.append(_correct(subject.model, changed, truth, what))
                examples.append(changed[0])
                continue
            rows = []
            for start in range(0, len(images), _BATCH):
                part = slice(start, start + _BATCH)
                changed = corrupt(images[part], corruption, severity, indices=indices[part], seed=self.seed)
                rows.append(_correct(subject.model, changed, labels[part], what))
                if start == 0:
                    examples.append(changed[0])
            correct.append(np.concatenate(rows))
        return self._evaluation(clean, correct, images[0], examples)

    def _evaluation(
        self, clean: np.ndarray, correct: list[np.ndarray], image: np.ndarray, examples: list[np.ndarray]
    ) -> Evaluation:
        shape = (len(self.corruptions), len(self.severities))
        accuracy = np.array([each.mean() for each in correct]).reshape(shape)
        drop = clean.mean() - accuracy
        numbers = {
            "clean_accuracy": float(clean.mean()),
            "accuracy_drop": float(drop.mean()),
            **{f"drop/{name}": float(value) for name, value in zip(self.corruptions, drop.mean(axis=1))},
            **{f"drop_at_severity/{name}": float(value) for name, value in zip(self.severities, drop.mean(axis=0))},
        }
        for i, corruption in enumerate(self.corruptions):
            for j, severity in enumerate(self.severities):
                numbers[f"accuracy/{corruption}/{severity}"] = float(accuracy[i, j])
        # The official files' order is not that of the clean images, so these are drawn by themselves then.
        share = np.mean(correct, axis=0)
        if self.corrupted_root is None:
            lost = clean - share
            drop_of = (lambda i: float(lost[i].mean())), (len(lost),)
        else:
            drop_of = (lambda i, j: float(clean[i].mean() - share[j].mean())), (len(clean), len(share))
        intervals = self.bootstrap.intervals({"accuracy_drop": drop_of})
        rows = np.stack(examples).reshape(*shape, *examples[0].shape)
        first = np.broadcast_to(image, (shape[0], 1, *image.shape)) if image.shape == examples[0].shape else rows[:, :1]
        arrays = {
            "accuracy": accuracy,
            "corruptions": np.array(self.corruptions),
            "severities": np.array(self.severities),
            "examples": np.concatenate([first, rows], axis=1),
        }
        return Evaluation(numbers, intervals, arrays, tested=len(share))


def _correct(model: FeatureModel, images: np.ndarray, labels: np.ndarray, what: str) -> np.ndarray:
    """Whether the largest logit is the label's: (n,) float64, 0 or 1. `what` is what an error calls the images."""
    logits = model(torch.from_numpy(np.ascontiguousarray(images))).need_logits()
    check_finite(logits, "logits", what)
    return classified_right(logits, labels, what).astype(np.float64)


Attack = Literal["fgsm", "pgd"]


@dataclass(frozen=True, kw_only=True)
class AdversarialAttacks:
    """Closed-set accuracy and AUROC under attacks that know the model, within ±ε of each pixel; they are the
    Adversarial Robustness Toolbox's.

        fgsm   one step of ε along the sign of the gradient (Goodfellow et al. 2015)
        pgd    several smaller steps from a random start, each brought back to within ε (Madry et al. 2018)

    Accuracy is measured on known images changed so that the cross entropy of their class rises. AUROC is that of the
    largest logit, with its own attack: it is lowered on known images, to be turned away, and raised on unknown ones, to
    be let in.

    Numbers: clean/closed_set_accuracy, clean/auroc, and for each ATTACK and EPSILON (in 255ths)
    ATTACK/EPSILON/closed_set_accuracy, ATTACK/EPSILON/auroc with known and unknown images attacked, and
    ATTACK/EPSILON/auroc_unknown_attacked with the unknown ones alone; AUROC only where the data has unknown images.
    Arrays: epsilons (E + 1,), from 0, and for each attack accuracy/ATTACK and auroc/ATTACK (E + 1,).
    """

    attacks: tuple[Attack, ...] = ("fgsm", "pgd")
    """Which to measure."""
    epsilons: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Largest changes of a pixel, in 255ths; above 0."""
    steps: int = 10
    """Steps of pgd, each of 2.5 ε / steps; 1 or more."""
    max_images: int | None = 1000
    """At most so many known and so many unknown images, chosen at random with seed 0; 1 or more. None: all."""
    seed: int = 0
    """Seed of pgd's random start."""

    def __post_init__(self) -> None:
        if not self.attacks or not self.epsilons or min(self.epsilons) <= 0:
            raise InputError(f"attacks.epsilons is {self.epsilons}; name at least one attack and one ε above 0")
        if self.steps < 1 or (self.max_images is not None and self.max_images < 1):
            raise InputError("attacks.steps and attacks.max-images: set them to 1 or more")

    def __call__(self, subject: Subject) -> Evaluation:
        model, options = subject.model, {"steps": self.steps, "seed": self.seed}
        known = subject.some("test_known", self.max_images)
        pixels, labels = model.pixels(known.images).cpu(), known.labels.cpu()
        logits = _logits(model, pixels, "test_known images")
        shape, classes = tuple(pixels.shape[1:]), logits.shape[1]
        by_class = _classifier(model, _CrossEntropy(), shape, classes)
        by_score = _classifier(model, _LogitOf(), shape, classes)
        unknown = None
        if "test_unknown" in subject:
            unknown = model.pixels(subject.some("test_unknown", self.max_images).images).cpu()
            unknown_logits = _logits(model, unknown, "test_unknown images")

        def accuracy(known_logits: Tensor) -> float:
            return float(classified_right(known_logits, labels.numpy(), "test_known images").mean())

        def separation(known_logits: Tensor, unknown_logits: Tensor) -> float:
            return auroc(known_logits.amax(dim=1), unknown_logits.amax(dim=1))

        numbers = {"clean/closed_set_accuracy": accuracy(logits)}
        if unknown is not None:
            numbers["clean/auroc"] = separation(logits, unknown_logits)
        cases = [(attack, epsilon) for attack in self.attacks for epsilon in self.epsilons]
        for attack, epsilon in subject.track(cases, "attacks", len(cases)):
            prefix = f"{attack}/{epsilon:g}"
            attacked = f"images attacked by {prefix}"
            confused = _attack(by_class, attack, epsilon, pixels, labels, raise_loss=True, **options)
            numbers[f"{prefix}/closed_set_accuracy"] = accuracy(_logits(model, confused, f"test_known {attacked}"))
            if unknown is not None:
                nearest = [each.argmax(dim=1) for each in (logits, unknown_logits)]
                lowered = _attack(by_score, attack, epsilon, pixels, nearest[0], raise_loss=False, **options)
                raised = _attack(by_score, attack, epsilon, unknown, nearest[1], raise_loss=True, **options)
                disguised = _logits(model, raised, f"test_unknown {attacked}")
                numbers[f"{prefix}/auroc"] = separation(_logits(model, lowered, f"test_known {attacked}"), disguised)
                numbers[f"{prefix}/auroc_unknown_attacked"] = separation(logits, disguised)
        arrays = {"epsilons": np.array([0.0, *self.epsilons])}
        metrics = {"accuracy": "closed_set_accuracy"} | ({} if unknown is None else {"auroc": "auroc"})
        for attack in self.attacks:
            for short, metric in metrics.items():
                names = ["clean", *(f"{attack}/{epsilon:g}" for epsilon in self.epsilons)]
                arrays[f"{short}/{attack}"] = np.array([numbers[f"{name}/{metric}"] for name in names])
        return Evaluation(numbers, arrays=arrays, tested=len(pixels) + (0 if unknown is None else len(unknown)))


def _attack(
    classifier: Any,
    attack: Attack,
    epsilon: float,
    pixels: Tensor,
    labels: Tensor,
    *,
    raise_loss: bool,
    steps: int,
    seed: int,
) -> Tensor:
    """Pixels (N, C, h, w) changed by at most ε / 255, to raise or lower the classifier's loss for `labels` (N,)."""
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch

    # A targeted attack lowers the loss.
    limit, options = epsilon / 255, {"targeted": not raise_loss, "batch_size": _BATCH}
    if attack == "fgsm":
        method = FastGradientMethod(classifier, eps=limit, **options)
    else:
        method = ProjectedGradientDescentPyTorch(
            classifier,
            eps=limit,
            eps_step=2.5 * limit / steps,
            max_iter=steps,
            num_random_init=1,
            verbose=False,
            **options,
        )
    with _numpy_seed(seed), classifier.model.frozen():
        return torch.from_numpy(method.generate(pixels.cpu().numpy(), y=labels.cpu().numpy())).float()


class _Logits(nn.Module):
    """From pixels in [0, 1] to logits, as the toolbox wants a classifier."""

    def __init__(self, model: FeatureModel) -> None:
        super().__init__()
        self.network, self.model = model.network, model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.outputs(pixels).need_logits()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Weights get no gradient, which nobody asks for here and which takes a third of the time."""
        learnt = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        for parameter in learnt:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learnt:
                parameter.requires_grad_(True)


class _CrossEntropy(nn.Module):
    """The mean over images of the cross entropy of their label, log(1 + Σ exp(the other logits) / exp(its own)); labels
    are one-hot (N, C), as the toolbox passes them.

    PyTorch's own rounds the probability of a sure answer to 1 and its logit's gradient to 0: nothing would lower it.
    """

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        others = logits.masked_fill(labels > 0, -torch.inf).logsumexp(dim=1)
        return F.softplus(others - (logits * labels).sum(dim=1)).mean()


class _LogitOf(nn.Module):
    """The mean over images of the logit of their label; labels are one-hot (N, C), as the toolbox passes them."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits * labels).sum(dim=1).mean()


def _classifier(model: FeatureModel, loss: nn.Module, shape: tuple[int, ...], classes: int) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model=_Logits(model),
        loss=loss,
        input_shape=shape,
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if model.device.type == "cuda" else "cpu",
    )


@torch.no_grad()
def _logits(model: FeatureModel, pixels: Tensor, what: str) -> Tensor:
    """(N, C), finite, on the CPU. `what` is what an error calls the images."""
    parts = [model.outputs(part.to(model.device)).need_logits().cpu() for part in pixels.split(model.batch_size)]
    logits = torch.cat(parts)
    check_finite(logits, "logits", what)
    return logits


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """The toolbox draws from NumPy's global generator; here it begins with this seed and is put back after."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
