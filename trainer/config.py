"""Every knob of training, once: what it does, its unit, its range.

The command line (`trainer.train --help`) is made from these classes, so a knob that is not here does not exist, and one
of another method is not offered. Its defaults are those of `trainer.recipes`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_pipeline.errors import InputError
from data_pipeline.views import ViewConfig
from trainer.records import as_record

Layer = Literal["conv3_2", "conv4_2", "conv5_2"]
Architecture = Literal["resnet18", "resnet34", "resnet50"]
Features = Literal["embedding", "backbone"]
Classifier = Literal["linear", "reciprocal"]
"""What makes logits of features: weights and a bias for each class, or a reciprocal point (ARPL)."""


def check_alias(alias: str) -> None:
    """Raise `InputError` unless MLflow takes `alias`, or it is empty."""
    taken_for_a_version = alias.lower() == "latest" or re.fullmatch(r"v\d+", alias.lower())
    if taken_for_a_version or not re.fullmatch(r"[\w-]*", alias, re.ASCII):
        raise InputError(f"alias is {alias!r}; use letters, digits, - and _, but not latest nor v and a number")


def _require(holds: bool, field_name: str, value: object, remedy: str) -> None:
    if not holds or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{field_name} is {value}; {remedy}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The network from view to embedding."""

    architecture: Architecture = "resnet18"
    """Depth of the residual network."""
    width: int = 64
    """Channels of the first stage; 64 is the standard network, 16 a quarter of it. 1 or more."""
    stem: Literal["small", "large"] = "small"
    """small: 3×3, stride 1, no max-pool, for images up to about 96 pixels; large: 7×7, stride 2, max-pool."""
    hidden_dim: int = 512
    """Hidden units of the projection head, 1 or more."""
    embedding_dim: int = 128
    """Length of the embedding, 2 or more."""

    def __post_init__(self) -> None:
        _require(self.width >= 1, "encoder.width", self.width, "set it to 1 or more")
        _require(self.hidden_dim >= 1, "encoder.hidden-dim", self.hidden_dim, "set it to 1 or more")
        _require(self.embedding_dim >= 2, "encoder.embedding-dim", self.embedding_dim, "set it to 2 or more")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Equation 8, L = θ·L_supcon + λ·(L_simclr + γ²·L_gradmix); the defaults are the paper's for CIFAR-10."""

    theta: float = 1.0
    """θ, weight of the supervised loss; 0 or more."""
    lam: float = 1.2
    """λ, weight of the self-supervised losses; 0 or more, not both 0."""
    temperature: float = 0.05
    """τ, by which cosine similarities are divided; above 0."""
    denominator: Literal["negatives", "all"] = "negatives"
    """SupCon's denominator: other classes only (the paper's eq. 2), or everyone but the anchor (Khosla et al.)."""
    anchors: Literal["other", "both"] = "other"
    """What a mixed view is paired with: the other clean view of its image, or each of the two in turn."""

    classifier: ClassVar[None] = None

    def __post_init__(self) -> None:
        _require(self.theta >= 0, "objective.theta", self.theta, "set it to 0 or more")
        _require(self.lam >= 0, "objective.lam", self.lam, "set it to 0 or more")
        _require(self.theta + self.lam > 0, "objective.theta", self.theta, "let θ or λ be above 0")
        _require(self.temperature > 0, "objective.temperature", self.temperature, "set it above 0")

    @property
    def takes_mixed_views(self) -> bool:
        return self.lam > 0


@dataclass(frozen=True, kw_only=True)
class CrossEntropyConfig:
    """A closed-set classifier: cross entropy of a linear layer, which stands in place of the projection head."""

    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over all classes, 0 to below 1."""

    classifier: ClassVar[Classifier] = "linear"
    takes_mixed_views: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require_smoothing(self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class ARPLConfig:
    """Adversarial reciprocal point learning (Chen et al. 2021), without its generated confusing samples."""

    weight: float = 0.1
    """λ, weight of the term that bounds the open space; 0 or more."""
    temperature: float = 1.0
    """By which the logits are divided; above 0."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over all classes, 0 to below 1."""

    classifier: ClassVar[Classifier] = "reciprocal"
    takes_mixed_views: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _require(self.weight >= 0, "objective.weight", self.weight, "set it to 0 or more")
        _require(self.temperature > 0, "objective.temperature", self.temperature, "set it above 0")
        _require_smoothing(self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class MoCoConfig:
    """Momentum contrast (He et al. 2020) with the paper's values for its figure 5: no label is used."""

    temperature: float = 0.05
    """τ, by which cosine similarities are divided; above 0."""
    queue_size: int = 8196
    """Keys of earlier steps that a query is told from; at least the batch size."""
    momentum: float = 0.999
    """Share of its own weights that the key encoder keeps at each step, 0 to below 1."""

    classifier: ClassVar[None] = None
    takes_mixed_views: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "objective.temperature", self.temperature, "set it above 0")
        _require(self.queue_size >= 2, "objective.queue-size", self.queue_size, "set it to 2 or more")
        _require(0 <= self.momentum < 1, "objective.momentum", self.momentum, "set it within 0 to below 1")


AnyObjective = ObjectiveConfig | CrossEntropyConfig | ARPLConfig | MoCoConfig


def _require_smoothing(value: float) -> None:
    _require(0 <= value < 1, "objective.label-smoothing", value, "set it within 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class MixingConfig:
    """How the third view is made from the first."""

    kind: Literal["gradmix", "cutmix", "mixup", "none"] = "gradmix"
    """gradmix: a patch of another image at the most activated place; cutmix and mixup for comparison; none: no third
    view."""
    gamma_min: float = 0.1
    """γ_min, smallest side of the patch as a share of the image's side; within (0, 1)."""
    gamma_max: float = 0.5
    """γ_max, largest side of the patch; within (0, 1), at least γ_min."""
    gamma_per: Literal["step", "sample"] = "step"
    """Draw γ once for the batch, or for each image."""
    num_patches: int = 1
    """Patches per image, at peaks that do not overlap; 1 to 16."""
    place: Literal["peak", "random", "least"] = "peak"
    """Where the patch goes: the most activated place, or, as controls, anywhere or the least activated place."""
    peaks_from: Literal["previous_epoch", "same_step"] = "previous_epoch"
    """previous_epoch: a by-product of training, no extra pass; same_step: an extra forward and backward pass first."""
    attribution: Literal["layercam", "gradcam"] = "layercam"
    """How the activation map is made: eqs. 6-7 of the paper, or eqs. 4-5 ("vanilla" GradMix)."""
    gradient_sign: Literal[1, -1] = 1
    """1: gradient of the loss, as written in the paper; -1: of its negative, the class-activation reading."""
    layers: tuple[Layer, ...] = ("conv5_2",)
    """Layers whose maps are used; several are normalised, resized to the finest and added."""
    alpha: float = 1.0
    """α of the Beta(α, α) distribution that mixup and cutmix draw their share from; above 0."""

    def __post_init__(self) -> None:
        for name in ("gamma_min", "gamma_max"):
            value = getattr(self, name)
            _require(0 < value < 1, f"mixing.{name.replace('_', '-')}", value, "set it within (0, 1)")
        _require(
            self.gamma_min <= self.gamma_max,
            "mixing.gamma-min",
            self.gamma_min,
            f"set it to at most --mixing.gamma-max, which is {self.gamma_max}",
        )
        _require(1 <= self.num_patches <= 16, "mixing.num-patches", self.num_patches, "set it within 1 to 16")
        _require(len(self.layers) >= 1, "mixing.layers", self.layers, "name at least one layer")
        _require(len(set(self.layers)) == len(self.layers), "mixing.layers", self.layers, "name each layer once")
        _require(self.alpha > 0, "mixing.alpha", self.alpha, "set it above 0")

    @property
    def uses_peaks(self) -> bool:
        return self.kind == "gradmix" and self.place != "random"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate over time: linear warm-up, then half a cosine."""

    name: Literal["adam", "sgd"] = "adam"
    """Adam, or SGD with Nesterov momentum."""
    learning_rate: float = 1e-3
    """Learning rate after warm-up; above 0."""
    final_share: float = 0.8**3
    """Learning rate at the end as a share of the one after warm-up, 0 to 1; the paper's runs end at 0.8³."""
    warmup_epochs: float = 0.0
    """Epochs over which the learning rate rises from 0; 0 or more, may be a fraction."""
    weight_decay: float = 0.0
    """L2 penalty on all weights; 0 or more."""
    momentum: float = 0.9
    """Momentum of SGD, 0 to below 1; Adam does not use it."""

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "optimizer.learning-rate", self.learning_rate, "set it above 0")
        _require(0 <= self.final_share <= 1, "optimizer.final-share", self.final_share, "set it within 0 to 1")
        _require(self.warmup_epochs >= 0, "optimizer.warmup-epochs", self.warmup_epochs, "set it to 0 or more")
        _require(self.weight_decay >= 0, "optimizer.weight-decay", self.weight_decay, "set it to 0 or more")
        _require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "set it within 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of training with its own θ and λ, written EPOCHS:THETA:LAMBDA, such as 600:0:1."""

    epochs: int
    theta: float
    lam: float

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "phases", self, "give each phase 1 epoch or more")
        _require(math.isfinite(self.theta + self.lam), "phases", self, "give θ and λ as finite numbers")
        _require(min(self.theta, self.lam) >= 0 < self.theta + self.lam, "phases", self, "let θ or λ be above 0")

    @classmethod
    def parse(cls, text: str) -> Phase:
        try:
            epochs, theta, lam = text.split(":")
            values = int(epochs), float(theta), float(lam)
        except ValueError:
            raise InputError(f"phase {text!r} is not EPOCHS:THETA:LAMBDA; write it like 600:0:1") from None
        return cls(epochs=values[0], theta=values[1], lam=values[2])

    def __str__(self) -> str:
        return f"{self.epochs}:{self.theta:g}:{self.lam:g}"


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What is recorded in MLflow and under which names."""

    uri: str | None = None
    """MLflow store: sqlite:///FILE or http://HOST:PORT. Default: MLFLOW_TRACKING_URI, else sqlite:///mlruns.db."""
    experiment: str = "gradmix-osr"
    """MLflow experiment."""
    model_name: str | None = None
    """Name in the model registry. Default: METHOD-PROTOCOL."""
    alias: str = "champion"
    """Alias that is moved to the new model version; empty for none."""
    offline: bool = False
    """Record in the run folder only; deliver later with python -m trainer.tracking and trainer.registry."""

    def __post_init__(self) -> None:
        name = self.model_name or ""
        _require(not set(name) & set("/:@"), "tracking.model-name", repr(name), "leave out the characters / : @")
        check_alias(self.alias)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole training run: data, network, objective, schedule, evaluation and records."""

    protocol: str = "digits"
    """Protocol the files were built for; it also chooses the recipe that the other defaults come from."""
    method: str = "gradmix"
    """gradmix, supcon+simclr, supcon, simclr, moco, cross_entropy or arpl; it also chooses the defaults, and which
    options --objective has."""
    split: int = 0
    """Split of the protocol, from 0."""
    data: Path = Path("data")
    """Data folder that holds the built files, or the folder of one build."""
    run_dir: Path | None = None
    """Run folder. Default: runs/PROTOCOL-SPLIT-seedSEED, with the method after PROTOCOL where it is not gradmix."""
    restart: bool = False
    """Discard what the run folder holds and start over, instead of going on from its last checkpoint."""
    seed: int = 0
    """Seed of initial weights, order, views and mixing; 0 to 2⁶³ − 1."""

    epochs: int = 600
    """Passes over the training images; 1 or more."""
    phases: tuple[str, ...] = ()
    """Phases EPOCHS:THETA:LAMBDA one after the other; when given, they replace epochs, θ and λ. Contrastive methods."""
    batch_size: int = 256
    """Images of a step over all ranks; 2 or more. Each is seen in two or three views."""
    cache: Literal["auto", "resident", "stream"] = "auto"
    """resident: decode once, keep on the device; stream: decode every epoch; auto: resident where a quarter of the free
    memory holds it."""
    workers: int = 1
    """FFCV decoding threads of each rank; 1 or more."""

    batch_norm: Literal["global", "local", "shuffled"] = "global"
    """global: normalise over the images of all ranks, so that their number changes nothing; local: each rank over its
    own, without communication; shuffled: local, and moco's keys with other images than their queries, as in He et al.
    2020."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    objective: AnyObjective = field(default_factory=ObjectiveConfig)
    """The method's loss."""
    mixing: MixingConfig = field(default_factory=MixingConfig)
    views: ViewConfig = field(default_factory=ViewConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    compile: bool = False
    """Compile the encoder's stages with torch.compile: minutes at the start, shorter steps on a GPU; results differ by
    rounding."""
    deepspeed_config: Path | None = None
    """DeepSpeed JSON (ZeRO stage, precision, clipping, accumulation) in place of the built-in one."""
    init_from: Path | None = None
    """encoder.safetensors of another run to start from."""

    score_on: Features = "embedding"
    """What the score compares: the embedding, which the losses see, or the backbone's pooled features below the
    projection head. A classifier has no head."""
    k: int = 10
    """Neighbours per class in the score of the registered model; 1 or more."""
    ks: tuple[int, ...] = (1, 5, 10, 50)
    """Every k that evaluation reports, in one pass."""
    accept: float = 0.95
    """Share of held-out known images that the threshold accepts; within (0, 1]."""
    evaluate_every: int = 0
    """Evaluate on the test images every so many epochs; 0: only at the end."""
    checkpoint_every: int = 10
    """Write a checkpoint every so many epochs; 1 or more. The last epoch always writes one."""
    checkpoint_minutes: float = 10.0
    """Write one also when the last is so many minutes old, at a reading of the losses; above 0."""
    keep_checkpoints: int = 2
    """How many checkpoints at ends of epochs to keep, the newest ones; 1 or more. Of those within one, what is
    among the newest two is kept."""
    log_every: int = 10
    """Read the losses from the device every so many updates; 1 or more. Several ranks notice a request to stop then."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**63, "seed", self.seed, "set it within 0 to 2⁶³ − 1")
        _require(self.epochs >= 1, "epochs", self.epochs, "set it to 1 or more")
        _require(self.batch_size >= 2, "batch-size", self.batch_size, "set it to 2 or more")
        _require(self.workers >= 1, "workers", self.workers, "set it to 1 or more")
        for text in self.phases:
            Phase.parse(text)
        moco = isinstance(self.objective, MoCoConfig)
        _require(
            moco or self.batch_norm != "shuffled", "batch-norm", self.batch_norm, "it is moco's: set another, or moco"
        )
        if moco and self.objective.queue_size < self.batch_size:
            raise InputError(
                f"objective.queue-size is {self.objective.queue_size}; set it to at least --batch-size, "
                f"which is {self.batch_size}"
            )
        contrastive = isinstance(self.objective, ObjectiveConfig)
        _require(contrastive or not self.phases, "phases", self.phases, f"leave it out: {self.method} has no θ and λ")
        _require(
            self.objective.classifier is None or self.mixing.kind == "none",
            "mixing.kind",
            self.mixing.kind,
            f"set it to none: {self.method} makes nothing of a mixed view",
        )
        _require(0 < self.accept <= 1, "accept", self.accept, "set it within (0, 1]")
        _require(min((self.k, *self.ks)) >= 1, "ks", self.ks, "set k and every k of ks to 1 or more")
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            value = getattr(self, name)
            _require(value >= 1, name.replace("_", "-"), value, "set it to 1 or more")
        _require(self.checkpoint_minutes > 0, "checkpoint-minutes", self.checkpoint_minutes, "set it above 0")
        warmup = self.optimizer.warmup_epochs
        _require(
            warmup < self.total_epochs or warmup == 0,
            "optimizer.warmup-epochs",
            warmup,
            f"set it below the {self.total_epochs} epochs of the run",
        )
        _require(self.evaluate_every >= 0, "evaluate-every", self.evaluate_every, "set it to 0 or more")

    @property
    def schedule(self) -> tuple[tuple[int, AnyObjective], ...]:
        """Epochs and objective of each stretch of this run; one, if no phases were given."""
        phases = [Phase.parse(text) for text in self.phases]
        stretches = [(p.epochs, dataclasses.replace(self.objective, theta=p.theta, lam=p.lam)) for p in phases]
        return tuple(stretches) or ((self.epochs, self.objective),)

    @property
    def total_epochs(self) -> int:
        return sum(epochs for epochs, _ in self.schedule)

    def objective_at(self, epoch: int) -> AnyObjective:
        """The objective of epoch `epoch`, from 0."""
        for epochs, objective in self.schedule:
            if epoch < epochs:
                return objective
            epoch -= epochs
        raise IndexError("epoch past the end of the schedule")

    @property
    def folder(self) -> Path:
        method = "" if self.method == "gradmix" else f"-{self.method}"
        return self.run_dir or Path("runs") / f"{self.protocol}{method}-{self.split}-seed{self.seed}"

    @property
    def model_name(self) -> str:
        # MLflow model names take neither "/" nor ":"; "+" of cifar+10 is fine.
        return self.tracking.model_name or f"{self.method}-{self.protocol}"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without passwords."""
        return as_record(self)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that decide what the training computes; files that they name are known by their content, see
        `trainer.train.run_identity`."""
        free = {
            "data", "run_dir", "restart", "cache", "workers", "evaluate_every", "checkpoint_every",
            "checkpoint_minutes", "keep_checkpoints", "log_every", "tracking", "score_on", "k", "ks", "accept",
            "deepspeed_config", "compile", "init_from", "method",
        }  # fmt: skip
        return {name: value for name, value in self.to_dict().items() if name not in free}
