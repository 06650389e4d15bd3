"""Pictures of what evaluators find: functions from arrays to matplotlib figures, in one style.

No figure is registered with pyplot, so that nothing has to be closed and no display is asked for. Shares in [0, 1] are
shown in percent. Every function takes `note=`, which is printed small below the picture: what a reader has to know who
finds it alone, such as the budget it was made with.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipeline.files import replacing
from trainer.metrics import Curve

if TYPE_CHECKING:
    from cycler import Cycler
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
LINE_STYLES = ("-", "--", "-.", ":")
KNOWN, UNKNOWN = COLOURS[0], COLOURS[1]

_STYLE: dict[str, Any] = {
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "gradmix",
}
_MOST_POINTS = 1000
_MOST_INSIDE = 7
"""Curves whose legend leaves room for them."""
_NOTE_LETTERS = 17
"""Letters of a note for each inch of a figure's width."""


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(draw)
    def drawn(*args: Any, note: str = "", **kwargs: Any) -> Figure:
        import matplotlib
        from cycler import cycler

        with matplotlib.rc_context(_STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}):
            return with_note(draw(*args, **kwargs), note)

    return drawn


def with_note(figure: Figure, note: str) -> Figure:
    """The same figure, with `note` printed small below it; another note takes its place, an empty one removes it."""
    lines = textwrap.fill(note, int(_NOTE_LETTERS * figure.get_figwidth()))
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=7, color="#666666")
    return figure


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write NAME.png and NAME.svg for every figure, each whole or not at all; returns the paths."""
    written = []
    for name, figure in figures.items():
        with replacing(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=150)
        with replacing(folder / f"{name}.svg") as partial:
            partial.write_text(svg(figure), encoding="utf-8")
        written += [folder / f"{name}.png", folder / f"{name}.svg"]
    return written


def svg(figure: Figure) -> str:
    """The figure as an SVG document; the same figure gives the same text."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


@_styled
def score_histogram(
    known: np.ndarray, unknown: np.ndarray, *, threshold: float | None = None, title: str = "Scores", bins: int = 60
) -> Figure:
    """How scores of known (n,) and unknown (m,) images are spread, each group's bars adding up to 1."""
    figure, axes = _axes(title, "score (larger: more known)", "share of the images (percent)")
    groups = {f"unknown ({len(unknown):,} images)": unknown, f"known ({len(known):,} images)": known}
    _histograms(axes, groups, bins)
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1.2, label=f"threshold {threshold:.3f}")
    axes.legend()
    return figure


@_styled
def score_histograms_figure(
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]], *, title: str = "Scores", bins: int = 60
) -> Figure:
    """Small histograms below each other, as `score_histogram`'s: for each label the scores of known (n,) and of unknown
    (m,) images. Scores of different rows have scales of their own."""
    figure = _figure(6.0, 1.2 + 1.1 * len(scores))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    for axes, (name, (known, unknown)) in zip(figure.subplots(len(scores), squeeze=False)[:, 0], scores.items()):
        axes.set_title(f"{name}: {len(known):,} known, {len(unknown):,} unknown", fontsize=9, fontweight="normal")
        _histograms(axes, {"unknown": unknown, "known": known}, bins)
        axes.locator_params(axis="y", nbins=3)
        axes.tick_params(labelsize=8)
    axes.set_xlabel("score (larger: more known)")
    figure.supylabel("share of the images (percent)", fontsize=10)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


@_styled
def roc_curves(curves: Mapping[str, Curve], *, title: str = "Receiver operating characteristic") -> Figure:
    """One curve for each label, with chance as a diagonal."""
    figure, axes = _axes(title, "unknown images accepted (percent)", "known images accepted (percent)")
    axes.plot([0, 100], [0, 100], color="#bbbbbb", linewidth=1, linestyle=":")
    _rates(figure, axes, curves)
    return figure


@_styled
def oscr_curves(curves: Mapping[str, Curve], *, title: str = "Open set classification rate") -> Figure:
    """One curve for each label."""
    figure, axes = _axes(title, "unknown images accepted (percent)", "known images accepted and right (percent)")
    _rates(figure, axes, curves)
    return figure


@_styled
def grouped_bars(
    categories: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    errors: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
    published: Sequence[float | None] | None = None,
    title: str,
    label: str = "percent",
) -> Figure:
    """Bars from 0 side by side, a group for each category and a look for each series: what is told by how long they
    are, such as losses.

    Args:
        series: for each label, a value for each category, as it is to be shown; None leaves its place empty.
        errors: for some labels, the ends (low, high) of each value's error bar, or None.
        published: for each category the published value, drawn as a line over the group, or None.
    """
    width = 1.2 + 0.36 * len(categories) * max(len(series), 2)
    figure, axes = _axes(title, "", label, width=min(max(6.0, width), 16.0))
    thickness, ends = 0.92 * 0.8 / max(len(series), 1), [0.0]
    for name, places, values, sides, look in _groups(series, errors or {}, {"hatch": ("", "///", "...", "xxx")}):
        axes.bar(
            places, values, thickness, yerr=sides, label=name, edgecolor="white", linewidth=0,
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"}, **look,
        )  # fmt: skip
        ends += _ends(values, sides)
    known = [(place, value) for place, value in enumerate(published or ()) if value is not None]
    for place, value in known:
        name = "published" if place == known[0][0] else None
        axes.hlines(value, place - 0.42, place + 0.42, label=name, **_PUBLISHED)
    ends += [value for _, value in known]
    low, high = min(ends), max(ends)
    margin = 0.15 * (high - low) or 1.0
    axes.set_ylim(0.0 if low == 0 else low - margin, high + margin)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_xticks(range(len(categories)), [_spaced(name) for name in categories])
    axes.set_xlim(-0.6, len(categories) - 0.4)
    if sum(map(len, categories)) > 9 * figure.get_figwidth():
        axes.tick_params(axis="x", labelrotation=35)
        for tick in axes.get_xticklabels():
            tick.set_horizontalalignment("right")
            tick.set_rotation_mode("anchor")
    axes.grid(axis="x", visible=False)
    if len(series) > 1 or known:
        _legend_beside(figure, axes)
    return figure


@_styled
def grouped_points(
    categories: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    errors: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
    published: Sequence[float | None] | None = None,
    title: str,
    label: str = "percent",
) -> Figure:
    """A line of points for each category, below each other on an axis that is zoomed to them: what is told by small
    differences, such as AUROC of ablations or detectors. The arguments are those of `grouped_bars`; a published value
    farther off than the points are spread would hide their differences, and is written at the side."""
    height = 1.4 + max(0.3, 0.2 * len(series)) * max(len(categories), 3)
    figure, axes = _axes("", label, "", width=7.0, height=height)
    # Above the names, too, since what they leave of the width may be less than its length.
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes.locator_params(axis="x", nbins=7)
    ends: list[float] = []
    for name, places, values, sides, look in _groups(series, errors or {}, {"marker": ("o", "s", "^", "D")}):
        axes.errorbar(
            values, places, xerr=sides, label=name, linestyle="none", markersize=5, elinewidth=1, capsize=2, **look
        )
        ends += _ends(values, sides)
    known = [(place, value) for place, value in enumerate(published or ()) if value is not None]
    low, high = (min(ends), max(ends)) if ends else (0.0, 0.0)
    reach = (high - low) or 2.0
    near = [(place, value) for place, value in known if not ends or low - reach <= value <= high + reach]
    for place, value in near:
        name = "published" if place == near[0][0] else None
        axes.vlines(value, place - 0.42, place + 0.42, label=name, **_PUBLISHED)
    inside = [*ends, *(value for _, value in near)] or [0.0]
    margin = 0.15 * (max(inside) - min(inside)) or 1.0
    limits = [min(inside) - margin, max(inside) + margin]
    for place, value in known:
        if (place, value) not in near:
            right = value > high
            axes.text(
                right, place, f"published {value:g} →" if right else f"← published {value:g}", va="center",
                ha="right" if right else "left", transform=axes.get_yaxis_transform(), fontsize=8, color="#444444",
            )  # fmt: skip
            # Room for it beside the points.
            limits[right] = max(inside) + 3 * margin if right else min(inside) - 3 * margin
    axes.set_xlim(*limits)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.set_yticks(range(len(categories)), [_spaced(name) for name in categories])
    axes.set_ylim(len(categories) - 0.4, -0.6)
    if len(series) > 1 or near:
        _legend_beside(figure, axes)
    return figure


def _looks(count: int, **looks: Sequence[str]) -> Cycler:
    """How `count` series look: the first of `looks` in as many colours as share them out evenly, then the next one in
    the same colours. Eighteen, six ways on three networks, have a colour for the way and a line for the network."""
    from cycler import cycler

    rounds = max(1, math.ceil(count / len(COLOURS)))
    return cycler(**looks) * cycler(color=COLOURS[: max(1, math.ceil(count / rounds))])


_PUBLISHED = {"color": "black", "linestyle": "--", "linewidth": 1.2}


def _groups(
    series: Mapping[str, Sequence[float | None]],
    errors: Mapping[str, Sequence[tuple[float, float] | None]],
    looks: Mapping[str, Sequence[str]],
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray | None, dict[str, str]]]:
    """For each series its label, its places (n,) beside those of the others, its values (n,), the lengths (2, n) of its
    error bars below and above them, if it has any, and its look of `_looks`."""
    cycle = itertools.cycle(_looks(len(series), **looks))
    for number, ((name, given), look) in enumerate(zip(series.items(), cycle)):
        values = np.array([math.nan if value is None else value for value in given])
        places = np.arange(len(values)) + (number - (len(series) - 1) / 2) * 0.8 / len(series)
        sides, bars = None, errors.get(name)
        if bars is not None and any(bars):
            ends = np.array([(value, value) if bar is None else bar for value, bar in zip(values, bars)])
            sides = np.abs(ends.T - values)
        yield name, places, values, sides, look


@_styled
def lines(
    x: Sequence[float],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    logarithmic: bool = False,
    markers: bool = False,
) -> Figure:
    """A line for each label over a common x, whose axis may be logarithmic."""
    figure, axes = _axes(title, x_label, y_label)
    axes.set_prop_cycle(_looks(len(series), linestyle=LINE_STYLES))
    for name, values in series.items():
        axes.plot(x, values, label=name, marker="o" if markers else None, markersize=4)
    if logarithmic:
        axes.set_xscale("log")
    elif all(float(value).is_integer() for value in x):
        axes.locator_params(axis="x", integer=True)
    if len(series) > _MOST_INSIDE:
        _legend_beside(figure, axes)
    elif len(series) > 1:
        axes.legend()
    return figure


@_styled
def slices(
    columns: Mapping[str, Sequence[Any]],
    scores: Sequence[float],
    *,
    logarithmic: Collection[str] = (),
    title: str,
    label: str,
) -> Figure:
    """The score over each of several quantities, in small pictures beside each other, the best one marked.

    Args:
        columns: for each quantity its values, one for each score: numbers, on a `logarithmic` scale where named, or
            anything else, evenly spaced.
    """
    figure = _figure(max(6.0, 2.2 * len(columns)), 3.4)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    best = int(np.argmax(scores))
    for axes, (name, values) in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns.items()):
        places, ticks = _places(values, name in logarithmic)
        axes.scatter(places, scores, s=18, color=COLOURS[0], alpha=0.7, linewidth=0)
        axes.scatter(places[best], scores[best], s=45, color=COLOURS[1])
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xlim(-0.06, 1.06)
        axes.set_xlabel(name)
    figure.axes[0].set_ylabel(label)
    return figure


@_styled
def parallel_coordinates(
    columns: Mapping[str, Sequence[Any]],
    scores: Sequence[float],
    *,
    logarithmic: Collection[str] = (),
    title: str,
    label: str,
) -> Figure:
    """A line for each score through its values of all quantities, as `slices` takes them; darker is better, and the
    best one is marked."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, axes = _axes(title, "", "", width=max(6.0, 1.9 * len(columns)))
    colours = ScalarMappable(Normalize(min(scores), max(scores)), "cividis_r")
    scaled = {name: _places(values, name in logarithmic) for name, values in columns.items()}
    paths = np.stack([places for places, _ in scaled.values()], axis=1)
    order = np.argsort(scores)
    for number in order:
        marked = {"color": COLOURS[1], "linewidth": 2.5} if number == order[-1] else {"linewidth": 1.2}
        axes.plot(paths[number], **{"color": colours.to_rgba(scores[number]), "linestyle": "-", **marked})
    for column, (_, ticks) in enumerate(scaled.values()):
        axes.axvline(column, color="#444444", linewidth=0.8, zorder=0)
        for place, text in ticks.items():
            axes.annotate(text, (column, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    figure.colorbar(colours, ax=axes, label=label)
    return figure


def _places(values: Sequence[Any], logarithmic: bool) -> tuple[np.ndarray, dict[float, str]]:
    """Where values lie between the least, 0, and the largest, 1; and marks for such a scale."""
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        names = sorted({str(value) for value in values})
        spots = dict(zip(names, np.linspace(0, 1, len(names)) if len(names) > 1 else [0.5]))
        return np.array([spots[str(value)] for value in values]), {float(spot): name for name, spot in spots.items()}
    there, back = (np.log, np.exp) if logarithmic else (np.asarray, np.asarray)
    numbers = there(np.asarray(values, float))
    low, high = numbers.min(), numbers.max()
    if low == high:
        return np.full(len(numbers), 0.5), {0.5: f"{back(low):.3g}"}
    return (numbers - low) / (high - low), {mark: f"{back(low + mark * (high - low)):.3g}" for mark in (0.0, 0.5, 1.0)}


@_styled
def two_nn_fit(log_ratio: np.ndarray, log_survival: np.ndarray, dimension: float, *, title: str) -> Figure:
    """The points that `trainer.metrics.two_nn` fits, and its line, whose slope is the intrinsic dimension."""
    figure, axes = _axes(title, "log μ, ratio of the distances to the two nearest neighbours", "−log(1 − F(μ))")
    chosen = _thinned(len(log_ratio))
    axes.plot(log_ratio[chosen], log_survival[chosen], ".", markersize=3, label="images")
    end = float(log_ratio.max())
    axes.plot([0, end], [0, dimension * end], color=UNKNOWN, label=f"slope {dimension:.2f}")
    axes.legend()
    return figure


@_styled
def attribution_grid(
    images: np.ndarray, maps: Mapping[str, np.ndarray], *, title: str = "Where the models look"
) -> Figure:
    """Images in the first row, and in a row for each model the same images under its attribution maps.

    Each map is shown between 0 and its own largest value, so that rows compare where, not how much.

    Args:
        images: uint8 (E, H, W, C), E ≥ 1.
        maps: for each label (E, h, w), 0 or more.
    """
    count = len(images)
    figure = _figure(1.1 * count + 1.2, 1.15 * (1 + len(maps)) + 0.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = figure.subplots(1 + len(maps), count, squeeze=False)
    height, width = images.shape[1:3]
    for row, (name, layer) in zip(grid, (("images", None), *maps.items())):
        for column, axes in enumerate(row):
            axes.set_axis_off()
            _show(axes, images[column])
            if layer is not None:
                largest = float(layer[column].max())
                axes.imshow(
                    layer[column], cmap="inferno", alpha=0.6, vmin=0, vmax=largest or 1.0, interpolation="bilinear",
                    extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                )  # fmt: skip
        row[0].set_title(name, fontsize=9, fontweight="normal")
    return figure


@_styled
def corruption_examples(
    examples: np.ndarray, corruptions: Sequence[str], severities: Sequence[int], *, title: str = "Corruptions"
) -> Figure:
    """uint8 (C, 1 + S, H, W, channels): a column for each corruption, the clean image above its severities."""
    count, rows = examples.shape[:2]
    figure = _figure(0.8 * count + 0.8, 0.8 * rows + 1.2)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    grid = figure.subplots(rows, count, squeeze=False)
    for column, name in enumerate(corruptions):
        for row in range(rows):
            axes = grid[row, column]
            axes.set_axis_off()
            _show(axes, examples[column, row])
        grid[0, column].set_title(name.replace("_", "\n"), fontsize=7, fontweight="normal", loc="center")
    for row, name in enumerate(["clean", *map(str, severities)]):
        axes = grid[row, 0]
        axes.text(-0.15, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=9)
    return figure


def _ends(values: np.ndarray, sides: np.ndarray | None) -> list[float]:
    """All that an axis has to hold."""
    drawn = values if sides is None else np.r_[values - sides[0], values + sides[1]]
    return drawn[~np.isnan(drawn)].tolist()


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _histograms(axes: Axes, groups: Mapping[str, np.ndarray], bins: int) -> None:
    """Of unknown and of known images, over the same bins, the bars of each group adding up to 100 percent."""
    together = np.concatenate(list(groups.values()))
    try:
        edges = np.histogram_bin_edges(together, bins=bins)
    except ValueError:  # they differ by less than bins can be narrow, as the softmax of very sure answers does
        margin = 0.5 * max(float(np.abs(together).max()), 1.0)
        edges = np.linspace(together.min() - margin, together.max() + margin, bins + 1)
    for (label, scores), colour in zip(groups.items(), (UNKNOWN, KNOWN)):
        weights = np.full(len(scores), 100 / len(scores))
        axes.hist(scores, edges, weights=weights, color=colour, alpha=0.6, label=label)


def _rates(figure: Figure, axes: Axes, curves: Mapping[str, Curve]) -> None:
    axes.set_prop_cycle(_looks(len(curves), linestyle=LINE_STYLES))
    for name, curve in curves.items():
        chosen = _thinned(len(curve.x))
        axes.plot(100 * curve.x[chosen], 100 * curve.y[chosen], label=name)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 101)
    if len(curves) <= _MOST_INSIDE:
        axes.legend(loc="lower right")
    else:
        _legend_beside(figure, axes)


def _legend_beside(figure: Figure, axes: Axes) -> None:
    """A legend right of the axes, which keep their width."""
    figure.set_figwidth(figure.get_figwidth() + 2.2)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")


def _thinned(count: int) -> np.ndarray:
    """Places of at most so many points that a picture can show."""
    return np.unique(np.linspace(0, count - 1, min(count, _MOST_POINTS)).round().astype(int))


def _show(axes: Axes, image: np.ndarray) -> None:
    if image.shape[2] == 1:
        axes.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255)
    else:
        axes.imshow(image)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _axes(title: str, x_label: str, y_label: str, width: float = 6.0, height: float = 4.0) -> tuple[Figure, Axes]:
    figure = _figure(width, height)
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    return figure, axes
