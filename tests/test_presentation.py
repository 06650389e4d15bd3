"""Tables and pictures of evaluations: which there are, and what they say around the numbers."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.evaluation.evaluators import ClosedSet, Detectors, Evaluation, OpenSet
from trainer.evaluation.presentation import present

METRICS = ("auroc", "oscr", "tnr_at_95_tpr", "dtacc", "auin", "auout")


def open_set(seed: int, tested: int | None = 50) -> Evaluation:
    rng = np.random.default_rng(seed)
    numbers = {"auroc": 0.9, "oscr": 0.8, "closed_set_accuracy": 0.7}
    arrays = {"known_scores": rng.normal(2, 1, 30), "known_correct": rng.random(30) > 0.3,
              "unknown_scores": rng.normal(0, 1, 20)}  # fmt: skip
    return Evaluation(numbers, arrays=arrays, tested=tested)


def test_a_model_alone_and_several():
    alone = present(OpenSet(), {"a": open_set(0)}, threshold=1.5)
    assert alone.figures.keys() == {"scores", "roc", "oscr"} and [row[0] for row in alone.rows] == ["a"]
    assert len(alone.figures["scores"].axes) == 1
    assert "threshold 1.500" in [t.get_text() for t in alone.figures["scores"].axes[0].get_legend().get_texts()]
    several = present(OpenSet(), {name: open_set(seed) for seed, name in enumerate("abc")})
    assert several.figures.keys() == {"scores", "roc", "oscr"}
    titles = [axes.get_title("left") for axes in several.figures["scores"].axes]
    assert titles == [f"{name}: 30 known, 20 unknown" for name in "abc"]


@pytest.mark.parametrize("threshold", [None, 1.5])
def test_the_note_is_in_every_picture(threshold):
    shown = present(OpenSet(), {"a": open_set(0)}, threshold=threshold, note="budget smoke")
    assert [figure.get_supxlabel() for figure in shown.figures.values()] == ["budget smoke"] * 3


def test_how_many_images_were_measured():
    def notes(**tested):
        return present(OpenSet(), {name: open_set(0, count) for name, count in tested.items()}).notes

    assert notes(a=1000, b=1000)[0] == "Measured on 1,000 images."
    assert notes(a=1000, b=20)[0] == "Measured on 1,000 images (a), 20 images (b)."
    assert not any("Measured on" in note for note in notes(a=None))
    assert (
        present(ClosedSet(), {"a": Evaluation({"closed_set_accuracy": 1.0}, tested=7)}).notes[0].endswith("7 images.")
    )


def test_detectors_are_points_on_an_axis_that_zooms():
    names = ("energy", "knn")
    numbers = {f"{name}/{metric}": value for name, value in zip(names, (0.9988, 0.9984)) for metric in METRICS}
    axes = present(Detectors(names=names), {"a": Evaluation(numbers)}).figures["detectors"].axes[0]
    (points,) = axes.lines
    np.testing.assert_allclose(points.get_xdata(), [99.88, 99.84])
    assert len(axes.patches) == 0 and axes.get_xlim()[0] > 99.8 and axes.get_ylim()[1] < 99.9
