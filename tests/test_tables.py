"""Tables of the paper from the numbers of cells, without training any."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data_pipeline.protocols import Protocol
from trainer.config import TrainConfig
from trainer.evaluation.evaluators import Evaluation
from trainer.recipes import recipe
from trainer.reproduce import tables
from trainer.reproduce.experiments import Column, Row, Variant
from trainer.reproduce.plan import ReproduceConfig, plan
from trainer.reproduce.tables import table_of


def test_published_only_rows_come_first_and_measured_ones_keep_their_figures():
    config = ReproduceConfig(experiment="table2", protocols=("cifar10", "mnist"), splits=(0,), variants=("arpl",))
    result = table_of(config, plan(config))
    assert result.columns[:5] == ("row", "protocol", "AUROC (%)", "OSCR (%)", "accuracy (%)")
    rows = {row[:2]: row[2:] for row in result.rows}
    published_only = [label for label, protocol in rows if protocol == "cifar10" and "ARPL" not in label]
    assert published_only[:4] == ["cross entropy", "OpenMax", "G-OpenMax", "OSRCI"], "in the paper's order"
    assert rows["cross entropy", "cifar10"][0].published == 67.7 and "GradMix" in published_only
    assert list(rows)[-1] == ("ARPL, algorithm 1", "mnist") and ("GRROSR", "mnist") not in rows
    auroc, oscr = rows["ARPL", "cifar10"][:2]
    assert (auroc.value, auroc.published, oscr.published) == (None, 90.1, None)
    assert rows["ARPL", "cifar10"][3:] == ("0 of 1", None, None, None)
    assert rows["MEDAF *", "cifar10"][0].published == 86.0
    assert result.heading == "Table 2: open set recognition (budget full)"
    assert any("splits of its own" in note for note in result.notes)


def test_a_mark_stands_where_a_published_figure_is_shown():
    config = ReproduceConfig(
        experiment="table2", protocols=("cifar10", "tinyimagenet"), splits=(0,), variants=("cross_entropy",)
    )
    label = "maximum logit (Vaze et al. 2022)"
    both = table_of(config, plan(config))
    rows = {row[:2] for row in both.rows}
    assert {(label, "cifar10"), (f"{label} *", "tinyimagenet")} <= rows
    assert (f"{label} *", "cifar10") not in rows and any(label in note for note in both.notes)
    # Nor is anything said about it where it is not.
    config = dataclasses.replace(config, protocols=("cifar10",))
    alone = table_of(config, plan(config))
    assert (label, "cifar10") in {row[:2] for row in alone.rows} and not any(label in note for note in alone.notes)


def test_cifar_runs_have_the_published_phases_and_the_table_says_how_long_each_was_trained():
    cells = plan(ReproduceConfig(experiment="table2", protocols=("mnist", "cifar10", "cifar+10"), splits=(0,)))
    phased = {(c.variant.name, c.protocol.name) for c in cells if c.config.phases == ("600:0:1", "10:1:1.2")}
    assert phased == {(v, p) for v in ("gradmix", "supcon+simclr") for p in ("cifar10", "cifar+10")}
    lengths = {(c.variant.name, c.protocol.name): c.config.total_epochs for c in cells}
    assert (
        lengths["gradmix", "cifar10"] == 610 and lengths["cross_entropy", "mnist"] == lengths["arpl", "cifar10"] == 600
    )
    lines = tables.schedules(cells)
    assert (
        "Trained for 600 epochs of θ = 0, λ = 1, then 10 epochs of θ = 1, λ = 1.2: gradmix, supcon+simclr on cifar10, "
        "cifar+10." in lines
    )
    assert "Trained for 600 epochs: cross_entropy, arpl on mnist, cifar10, cifar+10." in lines
    assert "Trained for 10 epochs of θ = 1, λ = 3: gradmix, supcon+simclr on mnist." in lines
    assert any("in place of RandAugment" in line for line in lines)
    said = tables.schedules(plan(ReproduceConfig(experiment="table1", protocols=("tinyimagenet",))))
    assert not any("800" in line for line in tables.schedules(plan(ReproduceConfig(experiment="figure5"))))
    assert any("800 for some" in line for line in said) and not any("RandAugment" in line for line in said)
    # Rows of one picture differ in the mixing alone.
    for name in ("figure2", "figure3", "beyond"):
        cells = plan(ReproduceConfig(experiment=name, protocols=("cifar10",), splits=(0,), seeds=(0,)))
        assert {cell.config.phases for cell in cells} == {("600:0:1", "10:1:1.2")}


@dataclasses.dataclass
class Finished:
    """A cell as `number_of` and `same_run` see it."""

    variant: Variant
    protocol: Protocol
    config: TrainConfig
    found: dict | None

    def record(self):
        return self.found


def finished(variant: str, split: int, seed: int, found: dict | None = None) -> Finished:
    made = Variant(name=variant, config=recipe, measures={})
    config = dataclasses.replace(recipe("digits"), split=split, seed=seed)
    return Finished(made, Protocol("digits", split), config, found)


def test_images_are_counted_by_measure_where_they_differ():
    assert tables.counted({"osr": {680}, "max_logit": {680}}) == "680"
    assert tables.counted({"osr": {1680}, "attacks": {200}}) == "1,680 (osr), 200 (attacks)"
    assert tables.counted({"osr": {289, 268}, "attacks": {200}}) == "268 or 289 (osr), 200 (attacks)"


def test_a_number_measured_by_other_code_than_its_model_was_trained_by_says_so():
    assert tables.commits({"commit": "a", "measured_by": "a"}) == "a"
    assert tables.commits({"commit": "a", "measured_by": "b"}) == "a, measured by b"


def test_nothing_is_said_of_rows_that_are_not_there():
    config = ReproduceConfig(experiment="table2", protocols=("digits",), splits=(0,), variants=("supcon",))
    notes = " ".join(table_of(config, plan(config)).notes)
    assert not any(word in notes for word in ("Cross entropy", "Algorithm 1", "MNIST"))
    # Nor of published rows, which digits have not.
    config = dataclasses.replace(config, variants=("supcon", "cross_entropy"))
    assert not any("published row" in note for note in table_of(config, plan(config)).notes)
    config = dataclasses.replace(config, protocols=("mnist",), variants=("supcon", "cross_entropy"))
    notes = " ".join(table_of(config, plan(config)).notes)
    assert "Cross entropy is the tuned recipe" in notes and "Algorithm 1" in notes and "MNIST is" not in notes
    # Classifiers are there, but none of them is scored so.
    for name in ("table3", "table4"):
        config = ReproduceConfig(experiment=name)
        notes = " ".join(table_of(config, plan(config)).notes)
        assert "Cross entropy is the tuned recipe" in notes and "Algorithm 1" not in notes


def test_the_seeds_are_those_that_were_asked_for():
    for seeds, said in (((), "3 training seeds"), ((0, 1, 3, 4), "4 training seeds"), ((0,), None)):
        config = ReproduceConfig(experiment="figure2", protocols=("digits",), splits=(0,), seeds=seeds)
        notes = " ".join(table_of(config, plan(config)).notes)
        assert (said in notes) if said else "training seeds" not in notes


def test_a_course_has_a_gap_where_a_row_has_no_state(monkeypatch):
    courses = {"a": [1.0, 2.0, 4.0], "b": [1.0, 2.0, 3.0, 4.0]}

    def found(cell, measure):
        epochs = np.array(courses[cell])
        return Evaluation({}, arrays={"course/epoch": epochs, "course/top1_accuracy": epochs / 100})

    monkeypatch.setattr(tables, "evaluation_of", found)
    (figure,) = tables.course_figures({Row(label=name, variant=name): name for name in courses}).values()
    lines = [line.get_ydata() for line in figure.axes[0].lines]
    np.testing.assert_array_equal(lines, [[1, 2, np.nan, 4], [1, 2, 3, 4]])


def test_intervals_of_several_runs_are_their_mean_half_width():
    column, row = Column(number="auroc", title="AUROC"), Row(label="x", variant="x")
    runs = [
        finished("x", split, 0, {"numbers": {"osr/auroc": value}, "intervals": {"osr/auroc": [low, high]}})
        for split, (value, low, high) in enumerate([(0.90, 0.88, 0.91), (0.94, 0.93, 0.96), (0.98, 0.97, 1.0)])
    ]
    one = tables.number_of(column, row, runs[:1], {})
    assert (one.value, one.low, one.high, one.spread) == pytest.approx((90, 88, 91, None))
    several = tables.number_of(column, row, runs, {})
    half = (1.5 + 1.5 + 1.5) / 3
    assert (several.value, several.low, several.high) == pytest.approx((94, 94 - half, 94 + half))
    assert several.spread == pytest.approx(4.0)
    note = tables.intervals_note([("x", "digits", several)])
    assert "mean half-width" in note[0] and tables.intervals_note([("x", "digits", None)]) == []


def test_the_bars_of_the_numbers_are_what_the_note_says():
    rows = [Row(label=name, variant=name) for name in "ab"]

    def bars(*cells: Finished) -> tuple[set[tuple[float, ...]], str]:
        figure, said = tables.numbers_figure("table2", rows, "digits", cells)
        (axes,) = figure.axes
        segments = [segment for collection in axes.collections for segment in collection.get_segments()]
        return {tuple(np.round(segment[:, 0], 6)) for segment in segments}, said

    def run(variant: str, split: int, value: float, *ends: float) -> Finished:
        intervals = {"osr/auroc": list(ends)} if ends else {}
        return finished(variant, split, 0, {"numbers": {"osr/auroc": value}, "intervals": intervals})

    one = [run("a", 0, 0.90, 0.88, 0.91), run("b", 0, 0.94, 0.93, 0.96)]
    ends, said = bars(*one)
    assert ends == {(88, 91), (93, 96)} and said.startswith("One run each")
    # Over several runs the spread says more.
    ends, said = bars(*one, run("a", 1, 0.94, 0.92, 0.95), run("b", 1, 0.94, 0.93, 0.96))
    spread = 4 / 2**0.5
    assert ends == {tuple(np.round([92 - spread, 92 + spread], 6)), (94, 94)} and "standard deviation" in said
    assert bars(run("a", 0, 0.9), run("b", 0, 0.8)) == (set(), "Mean over all runs. ")


def test_pictures_are_of_one_run_that_most_rows_have():
    rows = [Row(label=name, variant=name) for name in "abc"]
    cells = [
        finished("a", 0, 0, {}), finished("a", 1, 0, {"x": 1}), finished("b", 0, 0, None),
        finished("b", 1, 0, {"x": 1}), finished("c", 0, 1, {"x": 1}), finished("c", 1, 0, {"x": 1}),
        finished("a", 0, 1, {"x": 1}),
    ]  # fmt: skip
    name, shown = tables.same_run(rows, "digits", cells)
    assert name == "split 1, seed 0" and {row.label: cell for row, cell in shown.items()} == {
        "a": cells[1], "b": cells[3], "c": cells[5],
    }  # fmt: skip
    name, shown = tables.same_run(rows[:1], "digits", cells)
    assert name == "split 1, seed 0"
