"""A table of results with the published numbers beside the measured ones: for the terminal, and as one HTML page.

The page holds everything, its pictures included, so that it can be sent or kept as it is.
"""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from data_pipeline.files import replacing, write_json
from data_pipeline.run_folder import source_commit
from trainer.evaluation.plots import save_figures, svg
from trainer.metrics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Number:
    """A measured number, as it is to be read: percent where the column says percent.

    `value` None: not measured, so that only the published one is shown.
    """

    value: float | None
    low: float | None = None
    """Lower end of its confidence interval; None: no interval."""
    high: float | None = None
    spread: float | None = None
    """Standard deviation over several runs; None: one run."""
    published: float | None = None
    """The same in the paper; None: the paper has none."""
    digits: int = 2
    """Digits after the point."""

    @classmethod
    def percent(
        cls, share: float | None, interval: Interval | None = None, *, published: float | None = None
    ) -> Number:
        """From a share in [0, 1] and its interval; `published` is in percent already, as papers have it."""
        ends = {} if interval is None else {"low": 100 * interval.low, "high": 100 * interval.high}
        return cls(value=None if share is None else 100 * share, published=published, **ends)

    @property
    def text(self) -> str:
        shown = self._shown(self.value)
        return shown if self.spread is None else f"{shown} ± {self._shown(self.spread)}"

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return ""
        return f"{self._shown(self.low)} to {self._shown(self.high)}"

    @property
    def published_text(self) -> str:
        return "" if self.published is None else self._shown(self.published)

    def _shown(self, value: float | None) -> str:
        return "–" if value is None or math.isnan(value) else f"{value:.{self.digits}f}"


Cell = str | Number | None
"""Text, a number, or nothing."""


@dataclass(frozen=True, kw_only=True)
class TableResult:
    """A table or figure: what it says, and what was done for it."""

    title: str
    budget: str = ""
    """By how much less than what the table is about its numbers were made, in a word or two: "smoke". It is printed
    with the title, and beside every row of the CSV file unless there is such a column. Empty: as it should be."""
    caption: str = ""
    """A sentence or two below the title."""
    columns: tuple[str, ...]
    """Headings; the first is that of the rows' names. Units belong here."""
    rows: tuple[tuple[Cell, ...], ...]
    """Each as long as `columns`."""
    notes: tuple[str, ...] = ()
    """What a reader has to know to compare: deviations, budgets, definitions."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    """By name, which is also that of its files."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """How it was made: command, epochs, images, seeds, time. `provenance()` gives commit, hardware and versions."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells in a table of {len(self.columns)} columns: {row}")

    @property
    def heading(self) -> str:
        """The title with the budget."""
        return f"{self.title} (budget {self.budget})" if self.budget else self.title

    def to_rich(self) -> Table:
        """For the terminal; interval and published number stand below a measured one."""
        table = Table(*map(escape, self.columns), title=escape(self.heading), caption=escape(self.caption) or None)
        for column in table.columns:
            column.overflow = "fold"  # on a narrow terminal nothing is left out
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.rows:
            table.add_row(*map(_on_terminal, row))
        return table

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the figures."""
        rows = [[cell.__dict__ if isinstance(cell, Number) else cell for cell in row] for row in self.rows]
        return {
            "title": self.title,
            "budget": self.budget,
            "caption": self.caption,
            "columns": list(self.columns),
            "rows": rows,
            "notes": list(self.notes),
            "facts": dict(self.facts),
        }

    def to_csv(self) -> str:
        """A line for each row; a number is three fields: measured, interval, published. The last is the budget."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        added = {"budget": self.budget} if self.budget and "budget" not in self.columns else {}
        writer.writerow([self.columns[0], *(f"{c}{part}" for c in self.columns[1:] for part in _PARTS), *added])
        for row in self.rows:
            writer.writerow([_text(row[0]), *(part for cell in row[1:] for part in _parts(cell)), *added.values()])
        return file.getvalue()


_PARTS = ("", " interval", " published")


def write_report(result: TableResult, folder: Path) -> Path:
    """Write report.html, table.json, table.csv and figures/NAME.png and .svg into `folder`; returns the page's path."""
    save_figures(result.figures, folder / "figures")
    drawn = {name: (folder / "figures" / f"{name}.svg").read_text("utf-8") for name in result.figures}
    write_json(folder / "table.json", result.to_dict())
    for path, text in ((folder / "table.csv", result.to_csv()), (folder / "report.html", to_html(result, drawn))):
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return folder / "report.html"


def to_html(result: TableResult, drawn: Mapping[str, str] | None = None) -> str:
    """The page. It refers to nothing outside of itself. `drawn` has its figures as SVG, if they have been drawn."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("trainer.evaluation", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "text": _text,
        "interval": lambda cell: cell.interval if isinstance(cell, Number) else "",
        "published": lambda cell: cell.published_text if isinstance(cell, Number) else "",
    }
    drawn = drawn or {name: svg(figure) for name, figure in result.figures.items()}
    pictures = {name: Markup(_inline(picture, name)) for name, picture in drawn.items()}
    date = time.strftime("%d %B %Y, %H:%M %Z")
    return environment.get_template("report.html.jinja").render(result=result, pictures=pictures, date=date)


def provenance() -> dict[str, str]:
    """Commit, hardware and versions of what runs now."""
    import torch

    return {
        "commit": source_commit() or "not in a checkout",
        "hardware": hardware(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
    }


def hardware() -> str:
    """What this process computes on."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    return f"{len(os.sched_getaffinity(0))} CPU cores, {_cpu_name()}"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _text(cell: Cell) -> str:
    return "" if cell is None else cell.text if isinstance(cell, Number) else cell


def _on_terminal(cell: Cell) -> str:
    if not isinstance(cell, Number):
        return escape(_text(cell))
    interval = f"\n[dim]{cell.interval}[/]" if cell.interval else ""
    return cell.text + interval + (f"\n[cyan]published {cell.published_text}[/]" if cell.published_text else "")


def _parts(cell: Cell) -> tuple[str, str, str]:
    if isinstance(cell, Number):
        return cell.text, cell.interval, cell.published_text
    return _text(cell), "", ""


def _inline(picture: str, name: str) -> str:
    """An SVG document as an element. Its ids begin with its name, since those of a page have to differ."""
    name = re.sub(r"\W+", "-", name)
    picture = picture[picture.index("<svg") :]
    picture = re.sub(r'\bid="', f'id="{name}-', picture)
    return re.sub(r'(url\(#|xlink:href="#)', rf"\g<1>{name}-", picture)
