"""Pictures show the numbers they were given, and are written as files that can be opened."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from trainer.evaluation import plots
from trainer.metrics import Curve, oscr_curve, roc_curve

random = np.random.default_rng(0)
KNOWN, UNKNOWN = random.normal(2, 1, 300), random.normal(0, 1, 200)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_histograms_add_up_to_all_images():
    axes = plots.score_histogram(KNOWN, UNKNOWN, threshold=0.5).axes[0]
    heights = [patch.get_height() for patch in axes.patches]
    assert sum(heights) == pytest.approx(200)  # 100 % of each group
    lowest = min(patch.get_x() for patch in axes.patches)
    assert lowest == pytest.approx(min(UNKNOWN.min(), KNOWN.min()))
    assert axes.lines[0].get_xdata()[0] == 0.5
    assert texts(axes) == ["unknown (200 images)", "known (300 images)", "threshold 0.500"]


@pytest.mark.parametrize("draw", [plots.roc_curves, plots.oscr_curves])
def test_curves_are_those_given_in_percent(draw):
    first = roc_curve(KNOWN, UNKNOWN)
    second = oscr_curve(KNOWN, KNOWN > 1, UNKNOWN)
    axes = draw({"a": first, "b": second}).axes[0]
    for line, curve in zip(axes.lines[-2:], (first, second)):
        np.testing.assert_allclose(line.get_xdata(), 100 * curve.x)
        np.testing.assert_allclose(line.get_ydata(), 100 * curve.y)
    assert texts(axes) == ["a", "b"]


def test_long_curves_are_thinned_but_keep_their_ends():
    x = np.linspace(0, 1, 50_000)
    line = plots.oscr_curves({"a": Curve(x, x**2)}).axes[0].lines[0]
    assert len(line.get_xdata()) == 1000
    assert (line.get_xdata()[[0, -1]] == [0, 100]).all() and (line.get_ydata()[[0, -1]] == [0, 100]).all()


@pytest.mark.parametrize("draw", [plots.roc_curves, plots.oscr_curves])
def test_a_dozen_curves_all_look_different(draw):
    curve = roc_curve(KNOWN, UNKNOWN)
    figure = draw({f"method {number}": curve for number in range(12)})
    lines = figure.axes[0].lines[-12:]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12
    assert figure.axes[0].get_legend() is None and len(figure.legends[0].get_texts()) == 12


@pytest.mark.parametrize("draw", [plots.grouped_bars, plots.grouped_points])
def test_a_dozen_series_all_look_different(draw):
    figure = draw(["a", "b"], {f"method {number}": [1.0, 2.0] for number in range(12)}, title="t")
    drawn = [container[0] for container in figure.axes[0].containers]
    looks = {
        (each.get_facecolor(), each.get_hatch())
        if draw is plots.grouped_bars
        else (each.get_color(), each.get_marker())
        for each in drawn
    }
    assert len(looks) == len(drawn) == 12


GROUPS = {
    "categories": ["none", "cut_mix"],
    "series": {"CIFAR10": [85.0, 87.0], "TinyImageNet": [77.0, 78.5]},
    "errors": {"CIFAR10": [(84.0, 85.5), None]},
    "title": "Ablation",
}


def drawn_lines(axes, across: int) -> set[tuple[float, ...]]:
    """Ends of error bars and published lines along one coordinate."""
    segments = [path.tolist() for collection in axes.collections for path in collection.get_segments()]
    return {tuple(point[across] for point in segment) for segment in segments}


def test_bars_with_error_bars_and_published_values():
    figure = plots.grouped_bars(**GROUPS, published=[88.0, None])
    axes = figure.axes[0]
    assert [patch.get_height() for patch in axes.patches] == [85.0, 87.0, 77.0, 78.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["none", "cut mix"]
    assert drawn_lines(axes, 1) == {(84.0, 85.5), (87.0, 87.0), (88.0, 88.0)}
    low, high = axes.get_ylim()
    assert low == 0 and 88 < high < 102
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["published", "CIFAR10", "TinyImageNet"]


def test_points_with_error_bars_and_published_values():
    figure = plots.grouped_points(**GROUPS, published=[88.0, None])
    axes = figure.axes[0]
    points = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() in "os"]
    assert points == [[85.0, 87.0], [77.0, 78.5]] and not axes.patches and not axes.texts
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "cut mix"]
    bottom, top = axes.get_ylim()
    assert bottom > 1 > 0 > top  # the first category is the uppermost
    assert drawn_lines(axes, 0) == {(84.0, 85.5), (87.0, 87.0), (88.0, 88.0)}
    low, high = axes.get_xlim()
    assert 70 < low < 77 and 88 < high < 92
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["published", "CIFAR10", "TinyImageNet"]


def test_a_long_title_over_long_names_is_not_cut_off():
    figure = plots.grouped_points(
        ["SimCLR, resnet18, no mixing", "maximum logit (Vaze et al. 2022)"], {"x": [20.6, 21.2]},
        title="Figure 5: linear probes of self-supervised features: tinyimagenet-all",
    )  # fmt: skip
    figure.draw_without_rendering()
    texts = [figure._suptitle, *figure.axes[0].get_yticklabels()]
    assert figure.get_suptitle().endswith("tinyimagenet-all")
    for box in (text.get_window_extent() for text in texts):
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_published_values_far_off_do_not_hide_the_differences():
    axes = plots.grouped_points(
        ["a", "b", "c"], {"x": [45.0, 47.0, 46.0]}, published=[91.33, 48.5, 3.0], title="t"
    ).axes[0]
    low, high = axes.get_xlim()
    assert 43 < low < 45 and 48.5 < high < 51
    assert [(text.get_text(), text.get_position()) for text in axes.texts] == [
        ("published 91.33 →", (1, 0)), ("← published 3", (0, 2)),
    ]  # fmt: skip
    # Nor are the texts drawn over the points.
    axes.figure.draw_without_rendering()
    pixels = axes.transData.transform([(45.0, 0), (46.0, 2)])
    assert axes.texts[0].get_window_extent().x0 > pixels[0][0] and axes.texts[1].get_window_extent().x1 < pixels[1][0]


def test_bars_below_0_and_points_close_together():
    assert plots.grouped_bars(["a"], {"x": [-5.0]}, title="t").axes[0].get_ylim()[0] < -5
    low, high = plots.grouped_bars(["a", "b"], {"x": [99.88, 99.84]}, title="t").axes[0].get_ylim()
    assert low == 0 and high > 99.88
    axes = plots.grouped_points(["a", "b"], {"x": [99.88, 99.84]}, title="t").axes[0]
    low, high = axes.get_xlim()
    assert 99.8 < low < 99.84 and 99.88 < high < 99.9
    axes.figure.draw_without_rendering()
    assert axes.xaxis.get_offset_text().get_text() == ""  # ticks are the values themselves
    assert plots.grouped_points(["a"], {"x": [None]}, title="t").axes[0].get_xlim() == (-1, 1)


def test_bars_that_are_missing():
    axes = plots.grouped_bars(["a", "b"], {"x": [None, 4.0]}, errors={"x": [None, (3.0, 5.0)]}, title="t").axes[0]
    assert [patch.get_height() for patch in axes.patches][1] == 4.0 and axes.get_ylim()[1] > 5
    assert plots.grouped_bars(["a"], {"x": [None]}, title="t").axes[0].get_ylim()[1] > 0


def test_lines():
    axes = plots.lines([1, 10, 100], {"a": [1, 2, 3]}, title="t", x_label="x", y_label="y", logarithmic=True).axes[0]
    assert axes.get_xscale() == "log" and axes.lines[0].get_ydata().tolist() == [1, 2, 3]
    assert axes.get_legend() is None


def test_the_slope_is_the_dimension():
    axes = plots.two_nn_fit(np.array([0.1, 0.2, 0.4]), np.array([0.3, 0.6, 1.3]), 3.1, title="t").axes[0]
    x, y = axes.lines[1].get_data()
    assert y[1] / x[1] == pytest.approx(3.1) and x[1] == 0.4


@pytest.mark.parametrize("channels", [1, 3])
def test_attribution_grids_lay_the_maps_over_the_images(channels):
    images = random.integers(0, 256, (3, 16, 16, channels)).astype(np.uint8)
    maps = {"with": random.random((3, 4, 4)), "without": np.zeros((3, 4, 4))}
    figure = plots.attribution_grid(images, maps)
    assert len(figure.axes) == 9
    shown = figure.axes[4].get_images()
    np.testing.assert_array_equal(shown[0].get_array().squeeze(), images[1].squeeze())
    np.testing.assert_array_equal(shown[1].get_array(), maps["with"][1])
    assert shown[0].get_extent() == list(shown[1].get_extent()) == [-0.5, 15.5, 15.5, -0.5]
    assert len(figure.axes[1].get_images()) == 1
    assert [figure.axes[row].get_title("left") for row in (0, 3, 6)] == ["images", "with", "without"]


def test_corruption_examples():
    examples = random.integers(0, 256, (2, 4, 8, 8, 3)).astype(np.uint8)
    figure = plots.corruption_examples(examples, ["fog", "glass_blur"], [1, 3, 5])
    assert len(figure.axes) == 8
    # Row by row: the second corruption's severity 3 is in the third row, second column.
    np.testing.assert_array_equal(figure.axes[5].get_images()[0].get_array(), examples[1, 2])


def test_histograms_of_scores_that_differ_in_their_last_digits():
    sure = 1 - np.array([0.0, 1e-16, 2e-16, 1e-15])
    for scale in (1.0, 1e6):
        (axes,) = plots.score_histogram(scale * sure[:2], scale * sure[2:]).axes
        for bars in axes.containers:
            assert sum(bar.get_height() for bar in bars) == pytest.approx(100)


def test_histograms_of_several_methods():
    scores = {"a": (KNOWN, UNKNOWN), "b": (10 * KNOWN[:50], UNKNOWN), "c": (KNOWN, UNKNOWN[:1])}
    figure = plots.score_histograms_figure(scores, title="t", note="budget smoke")
    assert [axes.get_title("left") for axes in figure.axes] == [
        "a: 300 known, 200 unknown", "b: 50 known, 200 unknown", "c: 300 known, 1 unknown",
    ]  # fmt: skip
    for axes, (known, unknown) in zip(figure.axes, scores.values()):
        heights = [patch.get_height() for patch in axes.patches]
        edges = np.histogram_bin_edges(np.r_[known, unknown], 60)
        expected = [100 * np.histogram(each, edges)[0] / len(each) for each in (unknown, known)]
        np.testing.assert_allclose(heights, np.concatenate(expected))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["unknown", "known"]
    assert figure.get_suptitle() == "t" and figure.get_supxlabel() == "budget smoke"
    assert len(plots.score_histograms_figure({"a": (KNOWN, UNKNOWN)}).axes) == 1


def test_a_note_is_part_of_every_picture():
    curve = roc_curve(KNOWN, UNKNOWN)
    images = np.zeros((1, 4, 4, 3), np.uint8)
    figures = [
        plots.score_histogram(KNOWN, UNKNOWN, note="budget smoke"),
        plots.roc_curves({"a": curve}, note="budget smoke"),
        plots.oscr_curves({"a": curve}, note="budget smoke"),
        plots.grouped_bars(["a"], {"x": [1.0]}, title="t", note="budget smoke"),
        plots.grouped_points(["a"], {"x": [1.0], "y": [2.0]}, title="t", note="budget smoke"),
        plots.lines([1, 2], {"a": [1, 2]}, title="t", x_label="x", y_label="y", note="budget smoke"),
        plots.two_nn_fit(np.array([0.1, 0.2]), np.array([0.3, 0.6]), 3.0, title="t", note="budget smoke"),
        plots.attribution_grid(images, {}, note="budget smoke"),
        plots.corruption_examples(images[None], ["fog"], [], note="budget smoke"),
    ]
    for figure in figures:
        assert figure.get_supxlabel() == "budget smoke"
        # It is drawn below everything else.
        figure.draw_without_rendering()
        note = figure._supxlabel.get_window_extent()
        others = [axes.get_tightbbox().y0 for axes in figure.axes if axes.get_tightbbox() is not None]
        others += [legend.get_window_extent().y0 for legend in figure.legends]
        assert note.y0 >= 0 and note.y1 <= min(others) + 1
    assert plots.with_note(figures[0], "").get_supxlabel() == ""
    long = plots.with_note(figures[0], "budget " * 60)
    long.draw_without_rendering()
    assert long._supxlabel.get_window_extent().x1 <= long.bbox.x1


def test_files(tmp_path):
    figure = plots.score_histogram(KNOWN, UNKNOWN)
    written = plots.save_figures({"scores": figure}, tmp_path / "figures")
    assert [path.name for path in written] == ["scores.png", "scores.svg"]
    with Image.open(written[0]) as picture:
        assert picture.size == (900, 600) and len(picture.getcolors(10**6)) > 20
    assert ElementTree.parse(written[1]).getroot().tag.endswith("svg")
    before = written[1].read_bytes()
    plots.save_figures({"scores": plots.score_histogram(KNOWN, UNKNOWN)}, tmp_path / "figures")
    assert written[1].read_bytes() == before
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"scores.png", "scores.svg"}


def test_no_figure_stays_in_pyplot_and_the_style_does_not_leak():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.lines([1, 2], {"a": [1, 2]}, title="t", x_label="x", y_label="y")
    assert dict(matplotlib.rcParams) == before
    if "matplotlib.pyplot" in sys.modules:
        assert sys.modules["matplotlib.pyplot"].get_fignums() == []


def test_slices_and_parallel_coordinates_show_every_trial_at_its_values():
    columns = {"rate": [0.01, 0.1, 1.0], "γ": [0.2, 0.4, 0.2], "layer": ["b", "a", "b"]}
    scores = [0.7, 0.9, 0.8]
    options = {"logarithmic": ["rate"], "title": "3 trials", "label": "score"}
    rate, gamma, layer = plots.slices(columns, scores, **options).axes
    for axes, places in ((rate, [0, 0.5, 1]), (gamma, [0, 1, 0]), (layer, [1, 0, 1])):
        np.testing.assert_allclose(axes.collections[0].get_offsets(), np.stack([places, scores], axis=1), atol=1e-12)
        np.testing.assert_allclose(axes.collections[1].get_offsets(), [[places[1], 0.9]], atol=1e-12)  # the best
    assert [text.get_text() for text in rate.get_xticklabels()] == ["0.01", "0.1", "1"]
    assert [text.get_text() for text in layer.get_xticklabels()] == ["a", "b"]

    axes = plots.parallel_coordinates(columns, scores, **options).axes[0]
    drawn = [line.get_ydata() for line in axes.lines[:3]]  # the best last, on top
    np.testing.assert_allclose(drawn, [[0, 0, 1], [1, 0, 1], [0.5, 1, 0]], atol=1e-12)
    assert {"0.01", "0.1", "1", "0.2", "0.3", "0.4", "a", "b"} == {text.get_text() for text in axes.texts}
