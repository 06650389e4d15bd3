"""A table or figure of the paper, from what its cells measured: rows beside the published ones, notes, pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence, Set
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console

from data_pipeline import cli
from data_pipeline.files import replacing
from trainer.config import TrainConfig
from trainer.evaluation import plots
from trainer.evaluation.evaluators import Evaluation
from trainer.evaluation.presentation import present
from trainer.evaluation.report import Number, TableResult, write_report
from trainer.evaluation.robustness import CommonCorruptions
from trainer.reproduce.budget import BUDGETS
from trainer.reproduce.experiments import REMARKS, Column, Row, experiment, published
from trainer.reproduce.measure import evaluation_of
from trainer.reproduce.plan import Cell, ReproduceConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NONE = "—"


def write_tables(
    config: ReproduceConfig, cells: Sequence[Cell], failed: Sequence[str], console: Console
) -> TableResult:
    """Print the experiment's table and save it as text, JSON, CSV and a page with pictures."""
    result = table_of(config, cells, failed)
    console.print(result.to_rich())
    for line in (*result.notes, *(f"{name}: {text}" for name, text in result.facts.items())):
        console.print(line, markup=False, highlight=False)
    text = Console(file=StringIO(), width=cli.WIDTH)
    text.print(result.to_rich())
    with replacing(config.path / "table.txt") as partial:
        partial.write_text(text.file.getvalue(), encoding="utf-8")
    console.print(f"written to {write_report(result, config.path)}", markup=False, highlight=False)
    return result


def table_of(config: ReproduceConfig, cells: Sequence[Cell], failed: Sequence[str] = ()) -> TableResult:
    """Every row of every protocol: those that are published only, in the paper's order, then those that are measured.

    A number is the mean over splits and seeds, its spread their standard deviation.
    """
    chosen, figures = experiment(config.experiment), published(config.experiment)
    lines: list[tuple[Any, ...]] = []
    for protocol in dict.fromkeys(cell.protocol.name for cell in cells):
        ours = {row.label for row in chosen.rows if cells_of(row, protocol, cells)}
        for label, by_protocol in figures["rows"].items():
            paper = by_protocol.get(protocol)
            if label not in ours and paper is not None:
                found = [Number(value=None, published=paper.get(column.number)) for column in chosen.columns]
                lines.append((label, protocol, *found, None, None, None, None))
        for row in chosen.rows:
            own = cells_of(row, protocol, cells)
            if own:
                paper = figures["rows"].get(row.label, {}).get(protocol, {})
                found = [number_of(column, row, own, paper) for column in chosen.columns]
                lines.append((row.label, protocol, *found, *effort(own)))
    marked = [line for line in lines if line[0] in figures["marks"] and has_published(line)]
    marks = {line[0]: figures["marks"][line[0]] for line in marked}
    done = [record for record in (cell.record() for cell in cells) if record]
    tested: dict[str, dict[str, set[int]]] = {}
    for cell, record in ((cell, cell.record()) for cell in cells):
        for measure, count in record["test_images"].items() if record else ():
            tested.setdefault(cell.protocol.name, {}).setdefault(measure, set()).add(count)
    units = [f"{column.title} (%)" if column.percent else column.title for column in chosen.columns]
    return TableResult(
        title=chosen.title,
        budget=config.budget,
        caption=f"Budget {config.budget}: {BUDGETS[config.budget]}. Mean ± standard deviation over runs; "
        "published: what the paper prints.",
        columns=("row", "protocol", *units, "runs", "train images", "epochs", "training"),
        rows=tuple((f"{line[0]} *", *line[1:]) if line in marked else line for line in lines),
        notes=(
            *(f"* {label}: {mark}." for label, mark in marks.items()),
            *chosen.notes,
            *seeds_note(cells),
            *corruption_notes(cells),
            *intervals_note(lines),
            *schedules(cells),
            *algorithm_note(lines),
        ),
        figures=pictures(config.experiment, config.budget, cells),
        facts={
            "command": config.command,
            "test images": "; ".join(f"{name} {counted(by)}" for name, by in tested.items()) or NONE,
            "cells": f"{len(done)} of {len(cells)} finished" + (f", {len(failed)} failed" if failed else ""),
            "commit": "; ".join(sorted(set(map(commits, done)))) or NONE,
            **{name: "; ".join(sorted({r[name] for r in done})) or NONE for name in ("hardware", "versions")},
            **{f"failed {number}": text for number, text in enumerate(failed, 1)},
        },
    )


def has_published(line: Sequence[Any]) -> bool:
    """Whether a row shows a published figure, of which alone a mark speaks."""
    return any(isinstance(cell, Number) and cell.published is not None for cell in line)


def commits(record: Mapping[str, Any]) -> str:
    """Which code trained the cell, and which measured it, where that is another."""
    trained, measured = record["commit"], record["measured_by"]
    return trained if measured == trained else f"{trained}, measured by {measured}"


def counted(images: Mapping[str, Set[int]]) -> str:
    """How many test images each measure had, of splits that differ all that there are; once where all had as many."""
    texts = {measure: " or ".join(f"{count:,}" for count in sorted(counts)) for measure, counts in images.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return ", ".join(f"{text} ({measure})" for measure, text in texts.items())


def schedules(cells: Sequence[Cell]) -> list[str]:
    """How long, and with which weights, the variants are trained on each protocol, and what is known to differ."""
    trained: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        variants = trained.setdefault(schedule_text(cell.config), {}).setdefault(cell.protocol.name, [])
        if cell.variant.name not in variants:
            variants.append(cell.variant.name)
    lines = []
    for text, protocols in trained.items():
        # Protocols whose variants are the same are named together.
        groups: dict[tuple[str, ...], list[str]] = {}
        for protocol, variants in protocols.items():
            groups.setdefault(tuple(variants), []).append(protocol)
        who = "; ".join(f"{', '.join(variants)} on {', '.join(names)}" for variants, names in groups.items())
        lines.append(f"Trained for {text}: {who}.")
    configs = [cell.config for cell in cells]
    return lines + [remark for applies, remark in REMARKS if any(map(applies, configs))]


def schedule_text(config: TrainConfig) -> str:
    """The epochs of each stretch, with θ and λ where the objective has them."""
    stretches = []
    for epochs, objective in config.schedule:
        weights = f" of θ = {objective.theta:g}, λ = {objective.lam:g}" if hasattr(objective, "theta") else ""
        stretches.append(f"{epochs} {'epoch' if epochs == 1 else 'epochs'}{weights}")
    return ", then ".join(stretches)


def seeds_note(cells: Sequence[Cell]) -> list[str]:
    """How many there are, if several."""
    seeds = {cell.config.seed for cell in cells}
    if len(seeds) < 2:
        return []
    return [f"{len(seeds)} training seeds on every split, to tell rows apart that differ by less than runs do."]


def algorithm_note(lines: Sequence[Sequence[Any]]) -> list[str]:
    """What the rows of classifiers scored in another way are, if there are any."""
    if not any(line[0].endswith(", algorithm 1") for line in lines):
        return []
    return ['"Algorithm 1" scores a classifier\'s features by their nearest training images, as GradMix is scored.']


def corruption_notes(cells: Sequence[Cell]) -> list[str]:
    """Where corrupted images come from, if there are any."""
    measures = [measure.evaluator for cell in cells for measure in cell.variant.measures.values()]
    roots = dict.fromkeys(each.corrupted_root for each in measures if isinstance(each, CommonCorruptions))
    return [
        "Corruptions are generated; frost is a generated texture in place of photographs, which are not at hand."
        if root is None
        else f"The corrupted images are those of the official files in {root}."
        for root in roots
    ]


def intervals_note(lines: Sequence[Sequence[Any]]) -> list[str]:
    """What the intervals are, if there are any."""
    if not any(cell.interval for line in lines for cell in line if isinstance(cell, Number)):
        return []
    return [
        "± is the standard deviation over runs. The interval below a number is of drawing the test images anew: of one "
        "run its 95 % bootstrap interval, of several their mean more and less the mean half-width of their intervals."
    ]


def cells_of(row: Row, protocol: str, cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if (cell.variant.name, cell.protocol.name) == (row.variant, protocol)]


def number_of(column: Column, row: Row, cells: Sequence[Cell], paper: Mapping[str, float]) -> Number:
    """Mean and spread of what a row's cells measured, its interval, and what the paper prints.

    The interval of a single cell is its own; of several, the mean more and less the mean half-width of theirs.
    """
    name, scale = column.of(row), 100.0 if column.percent else 1.0
    records = [record for record in (cell.record() for cell in cells) if record]
    values = [scale * record["numbers"][name] for record in records]
    low = high = None
    intervals = [record["intervals"][name] for record in records if name in record["intervals"]]
    if len(intervals) == 1 == len(records):
        low, high = (scale * end for end in intervals[0])
    elif intervals:
        half = statistics.fmean(scale * (high - low) / 2 for low, high in intervals)
        low, high = statistics.fmean(values) - half, statistics.fmean(values) + half
    return Number(
        value=statistics.fmean(values) if values else None,
        spread=statistics.stdev(values) if len(values) > 1 else None,
        low=low,
        high=high,
        published=paper.get(column.number),
    )


def effort(cells: Sequence[Cell]) -> list[str | None]:
    """Runs, training images, epochs and time of a row."""
    records = [record for record in (cell.record() for cell in cells) if record]
    if not records:
        return [f"0 of {len(cells)}", None, None, None]
    runs = str(len(records)) if len(records) == len(cells) else f"{len(records)} of {len(cells)}"
    images = sorted({f"{record['train_images']:,}" for record in records})
    seconds = statistics.fmean(record["train_seconds"] for record in records)
    return [runs, " or ".join(images), str(records[0]["epochs"]), duration(seconds)]


def pictures(name: str, budget: str, cells: Sequence[Cell]) -> dict[str, Figure]:
    """For each protocol: the first column of all rows, what each kind of evaluator has to show of one run of each row,
    and the course of training."""
    chosen, drawn = experiment(name), {}
    for protocol in dict.fromkeys(cell.protocol.name for cell in cells):
        rows = [row for row in chosen.rows if any(cell.record() for cell in cells_of(row, protocol, cells))]
        if rows:
            numbers, said = numbers_figure(name, rows, protocol, cells)
            others = {column.measure for column in chosen.columns} - {None}
            run, members = same_run(rows, protocol, cells)
            found = {**evaluator_figures(members, others), **course_figures(members)}
            for figure in found.values():
                # Beside the title of a figure of many axes, above that of a single one.
                title = ": ".join(filter(None, (figure.get_suptitle(), f"{protocol}, {run}")))
                figure.suptitle(title, x=0.01, ha="left", fontsize=11)
            for title, figure in {"numbers": numbers, **found}.items():
                plots.with_note(figure, f"{said if figure is numbers else ''}Budget {budget}.")
                drawn[f"{protocol.replace('+', '-')}_{title}"] = figure
    return drawn


def same_run(rows: Sequence[Row], protocol: str, cells: Sequence[Cell]) -> tuple[str, dict[Row, Cell]]:
    """The split and seed that most of the rows have finished, the first of several, and their cells of it. Rows beside
    each other in one picture are of the same images and start from the same random numbers."""
    runs: dict[tuple[int, int], dict[Row, Cell]] = {}
    for row in rows:
        for cell in cells_of(row, protocol, cells):
            if cell.record():
                runs.setdefault((cell.config.split, cell.config.seed), {})[row] = cell
    # In the plan's order, whichever row came first.
    planned = dict.fromkeys((cell.config.split, cell.config.seed) for cell in cells)
    split, seed = max((run for run in planned if run in runs), key=lambda run: len(runs[run]))
    return f"split {split}, seed {seed}", runs[split, seed]


def numbers_figure(name: str, rows: Sequence[Row], protocol: str, cells: Sequence[Cell]) -> tuple[Figure, str]:
    """The first column, and what its points and bars are."""
    chosen, found = experiment(name), {}
    column = chosen.columns[0]
    for row in rows:
        paper = published(name)["rows"].get(row.label, {}).get(protocol, {})
        found[row.label] = number_of(column, row, cells_of(row, protocol, cells), paper)
    numbers, said = found.values(), "Mean over all runs. "
    ends = [None if n.spread is None else (n.value - n.spread, n.value + n.spread) for n in numbers]
    if any(ends):
        said = "Mean and standard deviation over all runs. "
    elif any(number.interval for number in numbers):
        ends = [(number.low, number.high) if number.interval else None for number in numbers]
        said = "One run each, with its bootstrap interval over test images. "
    figure = plots.grouped_points(
        list(found),
        {column.title: [number.value for number in numbers]},
        errors={column.title: ends},
        published=[number.published for number in numbers],
        title=f"{chosen.title}: {protocol}",
        label=f"{column.title} (percent)" if column.percent else column.title,
    )
    return figure, said


def evaluator_figures(shown: Mapping[Row, Cell], others: set[str]) -> dict[str, Figure]:
    """The rows side by side, one cell of each, by their own measure and by `others`; those of one kind share their
    pictures."""
    kinds: dict[type, dict[str, Evaluation]] = {}
    evaluators = {}
    for row, cell in shown.items():
        for name in {row.measure: None, **dict.fromkeys(others)}:
            evaluator = cell.variant.measures[name].evaluator
            evaluators.setdefault(type(evaluator), evaluator)
            kinds.setdefault(type(evaluator), {})[row.label] = evaluation_of(cell, name)
    figures = {}
    for kind, evaluations in kinds.items():
        for title, figure in present(evaluators[kind], evaluations).figures.items():
            figures[f"{kind.__name__}_{title}"] = figure
    return figures


def course_figures(shown: Mapping[Row, Cell]) -> dict[str, Figure]:
    """Each number over training, as a line for each row; where a row has no state, its line has a gap."""
    courses: dict[str, dict[str, dict[float, float]]] = {}
    for row, cell in shown.items():
        arrays = evaluation_of(cell, row.measure).arrays
        for name in sorted(arrays.keys() - {"course/epoch"}):
            if name.startswith("course/"):
                course = dict(zip(arrays["course/epoch"].tolist(), (100 * arrays[name]).tolist()))
                courses.setdefault(name.removeprefix("course/"), {})[row.label] = course
    epochs = sorted({epoch for rows in courses.values() for course in rows.values() for epoch in course})
    return {
        f"course_{name}": plots.lines(
            epochs,
            {label: [course.get(epoch, math.nan) for epoch in epochs] for label, course in series.items()},
            title=f"{plain(name)} over training",
            x_label="epochs",
            y_label=f"{plain(name)} (percent)",
            markers=True,
        )
        for name, series in courses.items()
    }


def plain(name: str) -> str:
    return name.replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")


def numbers_line(name: str, cell: Cell) -> str:
    """What the table says of a cell alone, for the log."""
    chosen, lines = experiment(name), []
    for row in chosen.rows:
        if row.variant == cell.variant.name:
            found = [f"{column.title} {number_of(column, row, [cell], {}).text}" for column in chosen.columns]
            lines.append(f"{row.label}: {', '.join(found)}")
    return "; ".join(lines)


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
