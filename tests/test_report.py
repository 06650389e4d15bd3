"""Reports: numbers beside the published ones, everything in one page, nothing from elsewhere."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from html.parser import HTMLParser

import pytest
from rich.console import Console

from trainer.evaluation import plots
from trainer.evaluation.report import Number, TableResult, provenance, to_html, write_report
from trainer.metrics import Interval


class Page(HTMLParser):
    """Rows of cells, the addresses that elements refer to, and the ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside = False
        self.rows, self.addresses, self.ids, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.addresses += [values[name] for name in ("src", "href", "xlink:href", "data") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append([])
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside and data.strip():
            self.rows[-1][-1].append(data.strip())


@pytest.fixture
def result():
    line = plots.lines([1, 2], {"a": [3, 4], "b": [1, 2]}, title="t", x_label="x", y_label="y")
    bars = plots.grouped_bars(["a"], {"x": [5.0]}, title="t")
    return TableResult(
        title="Table 2 & <script>alert(1)</script>",
        caption="Percent.",
        columns=("method", "MNIST", "CIFAR10"),
        rows=(
            (
                "GradMix",
                Number.percent(0.98125, Interval(0.97, 0.99, 0.005), published=99.8),
                Number(value=85, spread=0.4),
            ),
            ("C2AE", None, Number(value=None, published=89.5, digits=1)),
        ),
        notes=("20 of the paper's 600 epochs.",),
        figures={"line": line, "the bars": bars},
        facts={"command": "python -m trainer.reproduce table2", **provenance()},
    )


def test_the_page_has_every_number(result):
    page = Page(to_html(result))
    assert page.rows == [
        [["method"], ["MNIST"], ["CIFAR10"]],
        [["GradMix"], ["98.12", "97.00 to 99.00", "published 99.80"], ["85.00 ± 0.40"]],
        [["C2AE"], [], ["–", "published 89.5"]],
    ]
    html = to_html(result)
    assert "20 of the paper&#39;s 600 epochs." in html and "python -m trainer.reproduce table2" in html
    assert provenance()["hardware"] in html and provenance()["commit"] in html


def test_the_page_needs_nothing_else_and_runs_nothing(result):
    page = Page(to_html(result))
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "script" not in page.tags and page.tags.count("svg") == 2
    assert len(set(page.ids)) == len(page.ids)
    html = to_html(result)
    for name in ("line", "the-bars"):
        used = {part.split(")")[0] for part in html.split(f"url(#{name}-")[1:]}
        assert used and all(f'id="{name}-{each}"' in html for each in used)


def test_files(result, tmp_path):
    path = write_report(result, tmp_path / "table2")
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert {each.name for each in path.parent.iterdir()} == {"report.html", "table.json", "table.csv", "figures"}
    assert len(list((path.parent / "figures").iterdir())) == 4
    record = json.loads((path.parent / "table.json").read_text("utf-8"))
    assert record["rows"][0][1]["value"] == 98.125 and record["rows"][0][1]["published"] == 99.8
    assert record["facts"]["command"] == "python -m trainer.reproduce table2"
    rows = list(csv.reader(io.StringIO((path.parent / "table.csv").read_text("utf-8"))))
    assert rows[0] == [
        "method", "MNIST", "MNIST interval", "MNIST published", "CIFAR10", "CIFAR10 interval", "CIFAR10 published",
    ]  # fmt: skip
    assert rows[1] == ["GradMix", "98.12", "97.00 to 99.00", "99.80", "85.00 ± 0.40", "", ""]
    assert rows[2] == ["C2AE", "", "", "", "–", "", "89.5"]


def test_the_terminal(result):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(result.to_rich())
    text = console.export_text()
    for part in ("Table 2 & <script>", "98.12", "97.00 to 99.00", "published 99.80", "85.00 ± 0.40", "published 89.5"):
        assert part in text


def test_a_narrow_terminal_leaves_nothing_out():
    columns = ("row", "protocol", *(f"drop at {severity}" for severity in range(1, 6)))
    numbers = [Number(value=12.34)] * 5
    table = TableResult(title="t", columns=columns, rows=(("with GradMix", "cifar10-closed", *numbers),))
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(table.to_rich())
    text = console.export_text()
    assert "…" not in text
    cells = [line.split("│")[2].strip() for line in text.splitlines() if line.count("│") == 8]
    assert "".join(cells) == "cifar10-closed" and text.count("12.34") == 5


def test_markup_in_names_is_text():
    table = TableResult(title="[bold]t", columns=("[red]a", "b"), rows=(("[x]", "[/y]"),))
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(table.to_rich())
    text = console.export_text()
    assert "[bold]t" in text and "[red]a" in text and "[x]" in text and "[/y]" in text


def test_the_budget_goes_where_the_numbers_go(result):
    smoke = dataclasses.replace(result, budget="smoke")
    html = to_html(smoke)
    assert "<h1>Table 2 &amp; &lt;script&gt;alert(1)&lt;/script&gt; (budget smoke)</h1>" in html
    assert html.count("(budget smoke)") == 2  # the page's title, too
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(smoke.to_rich())
    assert "(budget smoke)" in " ".join(console.export_text().split()) and smoke.to_dict()["budget"] == "smoke"
    rows = list(csv.reader(io.StringIO(smoke.to_csv())))
    assert [row[-1] for row in rows] == ["budget", "smoke", "smoke"] and {len(row) for row in rows} == {8}
    assert "budget" not in result.to_csv() and "budget" not in to_html(result)

    column = TableResult(title="t", columns=("a", "budget"), rows=(("x", "short"),), budget="short")
    assert column.to_csv() == "a,budget,budget interval,budget published\nx,short,,\n"


def test_rows_have_to_fit():
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        TableResult(title="t", columns=("a", "b"), rows=(("x",),))


def test_numbers():
    assert Number.percent(None).text == "–" and Number(value=float("nan")).text == "–"
    assert Number(value=7.4567, digits=1).text == "7.5"
    assert Number.percent(0.5).interval == Number.percent(0.5).published_text == ""
