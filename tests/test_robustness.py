"""Accuracy under corruptions and attacks, for a model so simple that both can be followed by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from data_pipeline.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from data_pipeline.errors import InputError
from tests.feature_models import COLOURS, batch_of, colour_data, colour_model, diverged_model, open_set_model
from trainer.evaluation.evaluators import BootstrapConfig, FeatureModel, Subject
from trainer.evaluation.robustness import (
    AdversarialAttacks,
    CommonCorruptions,
    _attack,
    _classifier,
    _CrossEntropy,
    _LogitOf,
    _numpy_seed,
)

FEW = BootstrapConfig(resamples=30)


def hard_data(seed=0):
    """Colours so near to each other that noise matters: each class has 6 levels more of its own channel."""
    rng = np.random.default_rng(seed)
    labels = np.arange(45) % 3
    images = 120 + 6 * np.eye(3)[labels][:, None, None] + rng.normal(0, 20, (45, 8, 8, 3))
    return {"test_known": batch_of(np.clip(images, 0, 255).astype(np.uint8), labels)}


class TestCommonCorruptions:
    def test_equals_a_loop(self):
        data = hard_data()
        images, labels = data["test_known"].images.numpy(), data["test_known"].labels.numpy()
        evaluator = CommonCorruptions(corruptions=("fog", "gaussian_noise"), severities=(1, 5), seed=3, bootstrap=FEW)
        result = evaluator(Subject(colour_model(), data))

        def accuracy(pictures):
            return np.mean(pictures.mean(axis=(1, 2)).argmax(axis=1) == labels)

        expected = {"clean_accuracy": accuracy(images)}
        for name in ("fog", "gaussian_noise"):
            for severity in (1, 5):
                changed = corrupt(images, name, severity, indices=np.arange(45), seed=3)
                expected[f"accuracy/{name}/{severity}"] = accuracy(changed)
        drops = np.array([[expected["clean_accuracy"] - expected[f"accuracy/{c}/{s}"] for s in (1, 5)]
                          for c in ("fog", "gaussian_noise")])  # fmt: skip
        expected |= {"accuracy_drop": drops.mean(), "drop/fog": drops[0].mean(), "drop/gaussian_noise": drops[1].mean()}
        expected |= {"drop_at_severity/1": drops[:, 0].mean(), "drop_at_severity/5": drops[:, 1].mean()}
        assert result.numbers == pytest.approx(expected)
        assert 0 < expected["clean_accuracy"] < 1 and np.ptp(drops) > 0
        low, high, deviation = result.intervals["accuracy_drop"]
        assert low <= expected["accuracy_drop"] <= high and deviation > 0
        np.testing.assert_allclose(result.arrays["accuracy"], expected["clean_accuracy"] - drops)
        assert result.arrays["examples"].shape == (2, 3, 8, 8, 3) and result.tested == 45
        np.testing.assert_array_equal(result.arrays["examples"][:, 0], images[[0, 0]])
        np.testing.assert_array_equal(
            result.arrays["examples"][1, 2], corrupt(images[:1], "gaussian_noise", 5, indices=[0], seed=3)[0]
        )

    def test_all_of_them(self):
        result = CommonCorruptions(bootstrap=BootstrapConfig(resamples=0))(Subject(colour_model(), colour_data()))
        assert len(result.numbers) == 2 + 15 + 5 + 75 and result.intervals == {} and result.tested == 31
        assert result.arrays["corruptions"].tolist() == list(CORRUPTIONS)
        assert result.arrays["severities"].tolist() == list(SEVERITIES)

    def test_official_files(self, tmp_path):
        colours = np.broadcast_to(COLOURS[[2, 0, 1, 0]][:, None, None], (4, 32, 32, 3)).astype(np.uint8)
        wrong = colours[[1, 1, 2, 3]]
        np.save(tmp_path / "snow.npy", np.concatenate([colours, wrong, colours, colours, colours]))
        np.save(tmp_path / "labels.npy", np.tile([7, 4, 9, 4], 5).astype(np.uint8))
        evaluator = CommonCorruptions(corruptions=("snow",), severities=(1, 2), corrupted_root=tmp_path, bootstrap=FEW)
        result = evaluator(Subject(colour_model(), colour_data(), classes=(4, 9, 7), class_names=("r", "g", "b")))
        assert result.numbers["accuracy/snow/1"] == 1.0 and result.numbers["accuracy/snow/2"] == 0.75
        assert result.numbers["accuracy_drop"] == 0.125
        assert result.arrays["examples"].shape == (1, 3, 32, 32, 3) and result.tested == 4
        with pytest.raises(InputError, match="class 5 is not in"):
            evaluator(Subject(colour_model(), colour_data(), classes=(4, 9, 5), class_names=("r", "g", "b")))

        grey = {"test_known": batch_of(np.zeros((6, 16, 16, 1), np.uint8), np.arange(6))}
        with pytest.raises(InputError, match="takes grey ones"):
            evaluator(Subject(FeatureModel.of(open_set_model()), grey, classes=(4, 9, 7)))

    def test_some_clean_images_are_not_compared_with_all_official_ones(self, tmp_path):
        with pytest.raises(InputError, match=r"max-images is 10, but of the official files .* all images are read"):
            CommonCorruptions(corrupted_root=tmp_path, max_images=10)

    def test_answers_to_corrupted_images_that_are_not_finite(self):
        evaluator = CommonCorruptions(corruptions=("brightness",), severities=(1, 5), bootstrap=FEW)
        message = r"31 of 31 test_known images under brightness of severity 5 have logits that are not finite"
        with pytest.raises(InputError, match=message):
            evaluator(Subject(diverged_model(above=0.97), colour_data()))

    def test_official_labels_that_the_model_does_not_know(self, tmp_path):
        np.save(tmp_path / "snow.npy", np.zeros((20, 32, 32, 3), np.uint8))
        np.save(tmp_path / "labels.npy", np.tile([7, 4, 9, 5], 5).astype(np.uint8))
        evaluator = CommonCorruptions(corruptions=("snow",), severities=(1,), corrupted_root=tmp_path, bootstrap=FEW)
        with pytest.raises(InputError, match=r"1 of 4 test_known images under snow .* labels outside of 0 to 2"):
            evaluator(Subject(colour_model(), colour_data(), classes=(4, 9, 7, 5)))

    def test_bad_configurations(self):
        for options in (
            {"corruptions": ()}, {"severities": (0,)}, {"corruptions": ("rain",)}, {"max_images": 0},
        ):  # fmt: skip
            with pytest.raises(InputError):
                CommonCorruptions(**options)


class TestAdversarialAttacks:
    @pytest.mark.parametrize("attack", ["fgsm", "pgd"])
    def test_the_attack_on_a_linear_model_is_known(self, attack):
        """Logits are means of channels: cross entropy rises fastest where the class's own falls and the others rise, a
        logit where its channel rises alone."""
        model, batch = colour_model(), colour_data()["test_known"]
        pixels = model.pixels(batch.images)
        own = torch.nn.functional.one_hot(batch.labels, 3)[:, :, None, None]
        steps = {"steps": 10, "seed": 0}
        by_class = _classifier(model, _CrossEntropy(), tuple(pixels.shape[1:]), 3)
        by_score = _classifier(model, _LogitOf(), tuple(pixels.shape[1:]), 3)
        for raise_loss, sign in ((True, 1), (False, -1)):
            changed = _attack(by_class, attack, 8.0, pixels, batch.labels, raise_loss=raise_loss, **steps)
            expected = (pixels + sign * (1 - 2 * own) * 8 / 255).clamp(0, 1)
            torch.testing.assert_close(changed, expected, atol=1e-5, rtol=0)
            changed = _attack(by_score, attack, 8.0, pixels, batch.labels, raise_loss=raise_loss, **steps)
            expected = (pixels + sign * 8 / 255).clamp(0, 1)
            difference = (changed - pixels).abs()
            assert difference.max() <= 8 / 255 + 1e-6
            torch.testing.assert_close((changed * own).sum(1), (expected * own).sum(1), atol=1e-5, rtol=0)
            if attack == "fgsm":  # pgd's random start stays where there is no gradient
                assert (difference * (1 - own)).max() == 0

    def test_numbers(self):
        data = colour_data()
        result = AdversarialAttacks(attacks=("fgsm",), epsilons=(8.0, 100.0))(Subject(colour_model(), data))
        assert result.numbers["clean/closed_set_accuracy"] == result.numbers["clean/auroc"] == 1.0
        known, unknown = (data[name].images.numpy() / 255 for name in ("test_known", "test_unknown"))
        labels, nearest = data["test_known"].labels.numpy(), unknown.mean(axis=(1, 2)).argmax(axis=1)
        truth = np.r_[np.ones(len(known)), np.zeros(len(unknown))]

        own, nearest_own = (np.eye(3)[each][:, None, None] for each in (labels, nearest))

        def means(images, change):
            return np.clip(images + change * epsilon / 255, 0, 1).mean(axis=(1, 2))

        for epsilon in (8, 100):
            lowered, raised = means(known, -own).max(axis=1), means(unknown, nearest_own).max(axis=1)
            expected = {
                "closed_set_accuracy": np.mean(means(known, 1 - 2 * own).argmax(axis=1) == labels),
                "auroc": roc_auc_score(truth, np.r_[lowered, raised]),
                "auroc_unknown_attacked": roc_auc_score(truth, np.r_[means(known, 0).max(axis=1), raised]),
            }
            for name, value in expected.items():
                assert result.numbers[f"fgsm/{epsilon}/{name}"] == pytest.approx(value, abs=0.01)
        assert expected["closed_set_accuracy"] < 0.2 and expected["auroc"] < 0.2
        assert result.arrays["epsilons"].tolist() == [0, 8, 100]
        assert result.arrays["accuracy/fgsm"].tolist() == [
            result.numbers[f"{name}/closed_set_accuracy"] for name in ("clean", "fgsm/8", "fgsm/100")
        ]

    def test_being_surer_does_not_protect(self):
        evaluator = AdversarialAttacks(epsilons=(100.0,), steps=3)
        # Similarities over τ = 0.05 make a model very sure; the directions of the attacks are the same.
        unsure, sure = (evaluator(Subject(colour_model(scale=scale), colour_data())).numbers for scale in (10.0, 80.0))
        assert unsure["fgsm/100/closed_set_accuracy"] < 0.2
        assert sure == pytest.approx(unsure)

    def test_a_model_of_this_project_and_repeatability(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (20, 16, 16, 1)).astype(np.uint8)
        # Its own answers are the truth, so that without an attack it is never wrong.
        answers = open_set_model().score(torch.from_numpy(images), [3]).predictions[:, 0].numpy()
        data = {
            "test_known": batch_of(images, answers),
            "test_unknown": batch_of(images[::-1].copy(), np.full(20, -1)),
        }
        evaluator = AdversarialAttacks(epsilons=(64.0,), steps=3, max_images=12)
        before = np.random.get_state()[1].copy()
        first = evaluator(Subject(FeatureModel.of(open_set_model()), data))
        assert np.array_equal(np.random.get_state()[1], before)
        assert first.numbers == evaluator(Subject(FeatureModel.of(open_set_model()), data)).numbers
        assert first.numbers["clean/closed_set_accuracy"] == 1.0
        for attack in ("fgsm/64", "pgd/64"):
            auroc = [
                first.numbers[name] for name in (f"{attack}/auroc", f"{attack}/auroc_unknown_attacked", "clean/auroc")
            ]
            assert auroc[0] <= auroc[1] < auroc[2]
        assert first.tested == 12 + 12
        assert first.arrays.keys() == {"epsilons", "accuracy/fgsm", "accuracy/pgd", "auroc/fgsm", "auroc/pgd"}

    def test_without_unknown_images(self):
        data = colour_data()
        del data["test_unknown"]
        result = AdversarialAttacks(attacks=("fgsm",), epsilons=(2.0,))(Subject(colour_model(), data))
        assert result.numbers.keys() == {"clean/closed_set_accuracy", "fgsm/2/closed_set_accuracy"}
        assert result.arrays.keys() == {"epsilons", "accuracy/fgsm"} and result.tested == 31

    def test_answers_to_attacked_images_that_are_not_finite(self):
        evaluator = AdversarialAttacks(attacks=("fgsm",), epsilons=(200.0,))
        with pytest.raises(InputError, match="test_known images attacked by fgsm/200 have logits that are not finite"):
            evaluator(Subject(diverged_model(above=0.92), colour_data()))

    def test_without_logits(self):
        with pytest.raises(InputError, match="no logits"):
            AdversarialAttacks()(Subject(colour_model(with_logits=False), colour_data()))

    def test_bad_configurations(self):
        for options in ({"attacks": ()}, {"epsilons": ()}, {"epsilons": (0.0,)}, {"steps": 0}, {"max_images": 0}):
            with pytest.raises(InputError):
                AdversarialAttacks(**options)

    def test_numpys_generator_is_put_back_whatever_happens(self):
        before = np.random.get_state()[1].copy()
        with pytest.raises(RuntimeError), _numpy_seed(3):
            np.random.random()
            raise RuntimeError
        assert np.array_equal(np.random.get_state()[1], before)
