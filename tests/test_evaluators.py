"""The contract: what a model makes of images, what is computed once; evaluators against answers known beforehand."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from data_pipeline.errors import InputError
from tests.feature_models import (
    SIZE,
    MeanColour,
    colour_data,
    colour_model,
    diverged_model,
    open_set_model,
    without_images,
)
from trainer.evaluation.attribution_maps import Coverage
from trainer.evaluation.detectors import DetectorName
from trainer.evaluation.evaluators import (
    TEMPERATURE,
    BootstrapConfig,
    ClosedSet,
    Detectors,
    Evaluator,
    FeatureModel,
    IntrinsicDimension,
    OpenSet,
    OutOfDistribution,
    Subject,
)
from trainer.evaluation.linear_probe import LinearProbe
from trainer.evaluation.robustness import AdversarialAttacks, CommonCorruptions
from trainer.metrics import detection_metrics, two_nn
from trainer.open_set import class_scores

FEW = BootstrapConfig(resamples=50)


class Counting(FeatureModel):
    calls = 0

    def __call__(self, images):
        self.calls += 1
        return super().__call__(images)


class TestFeatureModel:
    def test_any_module(self):
        images = colour_data()["test_known"].images
        outputs = colour_model()(images)
        means = images.numpy().mean(axis=(1, 2)) / 255
        np.testing.assert_allclose(outputs.features, means, atol=1e-6)
        np.testing.assert_allclose(outputs.logits, 10 * means, atol=1e-5)
        assert colour_model(with_logits=False)(images).logits is None

    def test_normalises_and_resizes(self):
        network = MeanColour(with_logits=False)
        model = FeatureModel(network, image_size=5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.2))
        image = torch.full((2, 12, 12, 3), 51, dtype=torch.uint8)
        expected = (0.2 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.4, 0.2])
        np.testing.assert_allclose(model(image).features, np.stack([expected] * 2), atol=1e-6)
        assert model.pixels(image).shape == (2, 3, 5, 5) and model.pixels(image).max() == pytest.approx(0.2)
        with pytest.raises(ValueError, match=r"uint8 of shape \(M, H, W, 3\)"):
            model(image.float())
        with pytest.raises(ValueError, match=r"uint8 of shape \(M, H, W, 3\)"):
            model(image[..., :1])

    def test_a_model_of_this_project(self):
        ours = open_set_model(k=3)
        images = torch.randint(0, 256, (9, 16, 16, 1), dtype=torch.uint8)
        outputs = FeatureModel.of(ours)(images)
        torch.testing.assert_close(outputs.features, ours.embed(images), atol=1e-5, rtol=1e-5)
        expected = class_scores(ours.embed(images), ours.gallery, ours.gallery_labels, 3) / (3 * TEMPERATURE)
        torch.testing.assert_close(outputs.logits, expected, atol=1e-4, rtol=1e-4)
        scores = ours.score(images, [3])
        torch.testing.assert_close(outputs.logits.amax(dim=1) * 3 * TEMPERATURE, scores.scores[:, 0], atol=1e-4, rtol=0)
        assert torch.equal(outputs.logits.argmax(dim=1), scores.predictions[:, 0])

    def test_the_backbone_is_what_the_head_is_given(self):
        ours = open_set_model()
        images = torch.randint(0, 256, (5, 16, 16, 1), dtype=torch.uint8)
        features = FeatureModel.of(ours, "backbone")(images).features
        assert features.shape == (5, 32)
        with torch.no_grad():
            again = torch.nn.functional.normalize(ours.encoder.head(features), dim=1)
        torch.testing.assert_close(again, ours.embed(images), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("classifier", [None, "linear"])
    def test_an_encoder_alone(self, classifier):
        ours = open_set_model(classifier=classifier)
        images = torch.randint(0, 256, (5, 16, 16, 1), dtype=torch.uint8)
        outputs = FeatureModel(ours.encoder, image_size=16, mean=ours.card.mean, std=ours.card.std)(images)
        torch.testing.assert_close(outputs.features, ours.embed(images), atol=1e-5, rtol=1e-5)
        assert (outputs.logits is None) == (classifier is None)
        if classifier:
            torch.testing.assert_close(outputs.logits, ours.logits(images), atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("classifier", ["linear", "reciprocal"])
    def test_a_classifier_of_this_project(self, classifier):
        ours = open_set_model(classifier=classifier)
        images = torch.randint(0, 256, (5, 16, 16, 1), dtype=torch.uint8)
        outputs = FeatureModel.of(ours)(images)
        torch.testing.assert_close(outputs.logits, ours.logits(images), atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(ours.encoder.classifier(outputs.features)[0], outputs.logits)

    def test_a_gallery_gives_classes_to_features(self):
        data = colour_data()
        model = colour_model(with_logits=False).with_gallery(data["train"].images, data["train"].labels, k=4)
        outputs = model(data["test_known"].images)
        features = colour_model()(data["train"].images).features
        expected = class_scores(outputs.features, features, data["train"].labels, 4) / (4 * TEMPERATURE)
        torch.testing.assert_close(outputs.logits, expected, atol=1e-4, rtol=1e-4)
        with pytest.raises(InputError, match="fewer than k = 21"):
            colour_model().with_gallery(data["train"].images, data["train"].labels, k=21)
        with pytest.raises(InputError, match="k is 0; set it to 1"):
            colour_model().with_gallery(data["train"].images, data["train"].labels, k=0)
        with pytest.raises(InputError, match="20 of 60 gallery images have labels outside of 0 to 1"):
            colour_model().with_gallery(data["train"].images, data["train"].labels - 1)

    @pytest.mark.parametrize(
        ("made", "said"),
        [
            (lambda means: means[:, :, None, None], r"\[\(7, 3, 1, 1\)\] of 7 images"),
            (lambda means: means[:, 0], r"\[\(7,\)\]"),
            (lambda means: means[:4], r"\[\(4, 3\)\]"),
            (lambda means: (means, means, means), "return features"),
            (lambda means: (means, means[:, :, None]), r"\(7, 3, 1\)"),
            (lambda means: {"features": means}, "dict"),
            (lambda means: None, "NoneType"),
        ],
    )
    def test_what_is_neither_features_nor_a_pair_is_said(self, made, said):
        class Other(MeanColour):
            def forward(self, views):
                return made(super().forward(views))

        model = FeatureModel(Other(False), image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
        data = colour_data()
        images = data["train"].images[:7]
        with pytest.raises(InputError, match=said):
            model(images)
        with pytest.raises(InputError, match="let it return features"):
            model.with_gallery(images, data["train"].labels[:7], k=1)

    def test_features_of_half_precision(self):
        class Half(MeanColour):
            def forward(self, views):
                return super().forward(views).half()

        data = colour_data()
        model = FeatureModel(Half(False), image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
        model = model.with_gallery(data["train"].images, data["train"].labels, k=4)
        assert OpenSet(bootstrap=FEW)(Subject(model, data)).numbers["closed_set_accuracy"] == 1

    def test_gradients_reach_the_pixels_and_the_layer(self):
        pixels = torch.rand(4, 3, SIZE, SIZE, requires_grad=True)
        colour_model().outputs(pixels).logits[:, 1].sum().backward()
        expected = torch.zeros_like(pixels)
        expected[:, 1] = 10 / SIZE**2
        torch.testing.assert_close(pixels.grad, expected)
        outputs, layer = colour_model().maps(pixels)
        (gradient,) = torch.autograd.grad(outputs.features[:, 0].sum(), layer)
        assert layer.shape == pixels.shape and gradient[:, 0].unique().item() == pytest.approx(1 / SIZE**2)
        bare = FeatureModel(MeanColour(), image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
        with pytest.raises(InputError, match="no layer"):
            bare.maps(pixels)

    def test_dropout_is_off(self):
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5))
        model = FeatureModel(network, image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
        images = colour_data()["train"].images
        assert torch.equal(model(images).features, model(images).features)


class TestSubject:
    def test_a_partition_goes_through_the_model_once(self):
        network = MeanColour()
        model = Counting(network, image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
        subject = Subject(model, colour_data())
        for evaluator in (OpenSet(bootstrap=FEW), OutOfDistribution(bootstrap=FEW), ClosedSet(bootstrap=FEW)):
            assert isinstance(evaluator, Evaluator)
            evaluator(subject)
        assert model.calls == 2
        Detectors(bootstrap=FEW)(subject)
        assert model.calls == 3

    def test_some_images(self):
        subject = Subject(colour_model(), colour_data())
        some = subject.some("test_known", 5)
        assert len(some.labels) == 5 and (some.indices.diff() > 0).all()
        assert torch.equal(some.images, subject.batch("test_known").images[some.indices])
        assert torch.equal(some.indices, subject.some("test_known", 5).indices)
        assert len(subject.some("test_known", None).labels) == len(subject.some("test_known", 99).labels) == 31

    def test_a_missing_partition(self):
        data = colour_data()
        del data["test_unknown"]
        subject = Subject(colour_model(), data)
        assert "test_unknown" not in subject
        with pytest.raises(InputError, match="no test_unknown images"):
            OpenSet()(subject)
        assert ClosedSet(bootstrap=FEW)(subject).numbers == {"closed_set_accuracy": 1.0}


class TestEvaluators:
    @pytest.fixture(scope="class")
    def subject(self):
        return Subject(colour_model(), colour_data())

    def scores(self, subject):
        known, unknown = (subject.outputs(name).logits.max(dim=1).values for name in ("test_known", "test_unknown"))
        return known.double().numpy(), unknown.double().numpy()

    def test_open_set(self, subject):
        known, unknown = self.scores(subject)
        result = OpenSet(bootstrap=FEW)(subject)
        truth = np.r_[np.ones(31), np.zeros(40)]
        assert result.numbers["auroc"] == pytest.approx(roc_auc_score(truth, np.r_[known, unknown])) == 1.0
        assert result.numbers["oscr"] == result.numbers["closed_set_accuracy"] == 1.0
        assert result.intervals.keys() == result.numbers.keys() and result.intervals["auroc"] == (1.0, 1.0, 0.0)
        np.testing.assert_allclose(result.arrays["known_scores"], known)
        np.testing.assert_allclose(result.arrays["unknown_scores"], unknown)
        assert result.arrays["known_correct"].all() and result.tested == 31 + 40

    def test_wrong_classes_cost_accuracy_and_oscr_but_not_auroc(self):
        data = colour_data()
        labels = data["test_known"].labels.clone()
        labels[:10] = (labels[:10] + 1) % 3
        data["test_known"] = data["test_known"]._replace(labels=labels)
        result = OpenSet(bootstrap=FEW)(Subject(colour_model(), data))
        assert result.numbers["auroc"] == 1.0
        assert result.numbers["oscr"] == result.numbers["closed_set_accuracy"] == pytest.approx(21 / 31)
        low, high, _ = result.intervals["closed_set_accuracy"]
        assert low < 21 / 31 < high < 1

    def test_out_of_distribution(self, subject):
        result = OutOfDistribution(detector="max_softmax", bootstrap=FEW)(subject)
        known, unknown = (
            subject.outputs(name).logits.softmax(dim=1).amax(dim=1).double().numpy()
            for name in ("test_known", "test_unknown")
        )
        assert result.numbers == pytest.approx(detection_metrics(known, unknown))
        assert result.intervals.keys() == {"auroc"} and result.tested == 71

    def test_detectors(self, subject):
        result = Detectors(names=("max_logit", "knn"), bootstrap=FEW)(subject)
        alone = OutOfDistribution(detector="knn", bootstrap=FEW)(subject)
        assert result.numbers["knn/tnr_at_95_tpr"] == alone.numbers["tnr_at_95_tpr"]
        assert result.intervals["knn/auroc"] == alone.intervals["auroc"]
        assert (
            result.tested == 71
            and result.numbers["max_logit/auroc"] == 1.0
            and result.numbers["closed_set_accuracy"] == 1.0
        )
        assert set(result.arrays) == {
            "max_logit/known_scores", "max_logit/unknown_scores", "knn/known_scores", "knn/unknown_scores",
            "known_correct",
        }  # fmt: skip

    def test_every_detector_of_a_model_of_this_project(self):
        rng = np.random.default_rng(0)

        def batch(count):
            images = torch.from_numpy(rng.integers(0, 256, (count, 16, 16, 1)).astype(np.uint8))
            return images, torch.arange(count) % 6, torch.arange(count)

        data = {name: type(colour_data()["train"])(*batch(60)) for name in ("train", "test_known", "test_unknown")}
        result = Detectors(bootstrap=BootstrapConfig(resamples=0))(Subject(FeatureModel.of(open_set_model()), data))
        assert len(result.numbers) == 7 * 6 + 1 and result.intervals == {}
        assert all(0 <= value <= 1 for value in result.numbers.values())

    def test_top_5(self):
        class Squares(torch.nn.Module):
            def forward(self, views):
                return views.mean(dim=(2, 3)), views.flatten(1)[:, :9]

        images = torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8)
        images[:, 0, :8, 0] = torch.arange(8, 0, -1, dtype=torch.uint8)
        data = {"test_known": type(colour_data()["train"])(images, torch.tensor([0, 4]), torch.arange(2))}
        model = FeatureModel(Squares(), image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
        result = ClosedSet(bootstrap=FEW)(Subject(model, data))
        assert result.numbers == {"closed_set_accuracy": 0.5, "top5_accuracy": 1.0} and result.tested == 2

    def test_intrinsic_dimension(self, subject):
        features = subject.outputs("train").features.numpy()
        result = IntrinsicDimension(partition="train")(subject)
        assert result.numbers == {"intrinsic_dimension": two_nn(features).dimension, "images": 60.0}
        assert len(result.arrays["log_ratio"]) == len(result.arrays["log_survival"]) == 54
        few = IntrinsicDimension(max_images=20)(subject)
        assert few.numbers["images"] == few.tested == 20

    def test_a_collapsed_model_has_no_dimension(self):
        data = colour_data()
        data["test_known"] = data["test_known"]._replace(images=torch.zeros_like(data["test_known"].images))
        with pytest.raises(InputError, match="31 test_known images have no intrinsic dimension"):
            IntrinsicDimension()(Subject(colour_model(), data))

    def test_detection_asks_for_no_classes(self, subject):
        """Whether an image is known is neither a matter of its label nor, by its features, of logits."""
        data = colour_data()
        data["test_known"] = data["test_known"]._replace(labels=torch.full((31,), -1))
        assert OutOfDistribution(bootstrap=FEW)(Subject(colour_model(), data)).numbers["auroc"] == 1.0
        detector = OutOfDistribution(detector="knn", bootstrap=FEW)
        assert detector(Subject(colour_model(with_logits=False), data)).numbers == detector(subject).numbers

    def test_prefixed(self, subject):
        result = OpenSet(bootstrap=FEW)(subject).prefixed("a")
        assert set(result.numbers) == set(result.intervals) == {"a/auroc", "a/oscr", "a/closed_set_accuracy"}
        assert "a/known_scores" in result.arrays and result.tested == 71

    def test_bad_configurations(self):
        for make, message in (
            (lambda: BootstrapConfig(resamples=1), "resamples is 1"),
            (lambda: BootstrapConfig(confidence=1.0), "confidence is 1.0"),
            (lambda: Detectors(names=()), "names is empty"),
            (lambda: IntrinsicDimension(max_images=2), "max-images is 2"),
        ):
            with pytest.raises(InputError, match=message):
                make()


EVERY = {
    "closed set": ClosedSet(bootstrap=FEW),
    **{name: OpenSet(detector=name, bootstrap=FEW) for name in get_args(DetectorName)},
    "detection": OutOfDistribution(bootstrap=FEW),
    "detectors": Detectors(bootstrap=FEW),
    "dimension": IntrinsicDimension(),
    "coverage": Coverage(),
    "probe": LinearProbe(epochs=1),
    "corruptions": CommonCorruptions(corruptions=("fog",), severities=(1,), bootstrap=FEW),
    "attacks": AdversarialAttacks(attacks=("fgsm",), epsilons=(1.0,)),
}


def relabelled(partition, places, label):
    data = colour_data()
    labels = data[partition].labels.clone()
    labels[places] = label
    return data | {partition: data[partition]._replace(labels=labels)}


class TestOddInput:
    """One clear line instead of a number that looks right, or of a library's own words."""

    @pytest.mark.parametrize("name", EVERY)
    def test_a_model_whose_answers_are_not_finite(self, name):
        message = r"(60 of 60 train|31 of 31 test_known|31 of 31) images have .* not finite: .* mean and std"
        with pytest.raises(InputError, match=message):
            EVERY[name](Subject(diverged_model(), colour_data()))

    def test_how_many_answers_are_not_finite(self):
        subject = Subject(diverged_model(above=0.845), colour_data())
        for _ in range(2):
            with pytest.raises(InputError, match="11 of 31 test_known images have features that are not finite"):
                subject.outputs("test_known")
        assert len(subject.outputs("test_unknown").features) == 40

    def test_logits_alone_that_are_not_finite(self):
        class Endless(MeanColour):
            def forward(self, views):
                features, logits = super().forward(views)
                return features, logits / 0

        model = FeatureModel(Endless(), image_size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
        with pytest.raises(InputError, match="31 of 31 test_known images have logits that are not finite"):
            ClosedSet(bootstrap=FEW)(Subject(model, colour_data()))

    @pytest.mark.parametrize("name", EVERY)
    def test_no_known_images(self, name):
        with pytest.raises(InputError, match="test_known has no images"):
            EVERY[name](Subject(colour_model(), without_images(colour_data(), "test_known")))

    @pytest.mark.parametrize("name", ["max_logit", "detection", "detectors", "attacks"])
    def test_no_unknown_images(self, name):
        with pytest.raises(InputError, match="test_unknown has no images"):
            EVERY[name](Subject(colour_model(), without_images(colour_data(), "test_unknown")))

    @pytest.mark.parametrize("name", ["knn", "detectors", "probe"])
    def test_no_training_images(self, name):
        with pytest.raises(InputError, match="train has no images"):
            EVERY[name](Subject(colour_model(), without_images(colour_data(), "train")))

    @pytest.mark.parametrize("label", [3, -1])
    @pytest.mark.parametrize("name", ["closed set", "max_logit", "probe", "corruptions", "attacks"])
    def test_a_label_of_no_class(self, name, label):
        data = relabelled("test_known", [3, 7], label)
        with pytest.raises(InputError, match="2 of 31 test_known images have labels outside of 0 to 2"):
            EVERY[name](Subject(colour_model(), data))

    @pytest.mark.parametrize("label", [3, -1])
    def test_a_training_label_of_no_class(self, label):
        data = relabelled("train", [0], label)
        with pytest.raises(InputError, match="1 of 60 train images have labels outside of 0 to 2"):
            EVERY["openmax"](Subject(colour_model(), data))

    def test_a_network_with_classes_of_its_own_can_be_probed(self):
        data = colour_data()
        for name in ("train", "test_known"):
            data[name] = data[name]._replace(labels=2 * data[name].labels)
        assert EVERY["probe"](Subject(colour_model(), data)).tested == 31
