"""`python -m results.tables`: rebuild tables of README.md and RESULTS.md, and figures, from the JSON files beside it.

A table stands between `<!-- NAME -->` and `<!-- end -->`; what is between them is replaced. `--check` changes nothing
and fails if that would change something.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline import cli
from data_pipeline.errors import InputError
from trainer.evaluation import plots
from trainer.reproduce.experiments import experiment

HERE = Path(__file__).parent
PAGES = HERE.parent / "README.md", HERE.parent / "RESULTS.md"
ARMS = {"gradmix": "GradMix", "supcon+simclr": "without mixing"}
SPACES = {"backbone": "on_backbone", "embedding": None}
Row = Sequence[str]


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """What to do with the pages."""

    check: bool = False
    """Only say whether they are what the files give."""


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def markdown(header: Row, rows: Sequence[Row]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(values: Sequence[float]) -> str:
    """Percent, with the standard deviation over splits where there are several."""
    spread = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{spread}"


def of_space(run: dict[str, Any], space: str) -> dict[str, Any]:
    return run if SPACES[space] is None else run[SPACES[space]]


def arms(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm, by split; splits that not every arm has are left out."""
    splits = [{path.stem.rsplit("-split", 1)[1] for path in folder.glob(f"{arm}-split*.json")} for arm in ARMS]
    both = sorted(set.intersection(*splits), key=int)
    return {arm: [read(folder / f"{arm}-split{split}.json") for split in both] for arm in ARMS}


def splits_table(folder: Path) -> str:
    """AUROC for every k, OSCR and accuracy of each arm, mean over splits."""
    runs = arms(folder)
    ks = list(next(iter(runs.values()))[0]["auroc"])
    rows = []
    for arm, name in ARMS.items():
        for space in SPACES:
            found = [of_space(run, space) for run in runs[arm]]
            rows.append(
                [
                    f"{name}, {space}",
                    *(mean([run["auroc"][k] for run in found]) for k in ks),
                    mean([run["oscr"]["10"] for run in found]),
                    mean([run["closed_set_accuracy"]["10"] for run in found]),
                ]
            )
    header = ["scored on", *(f"AUROC, k = {k}" for k in ks), "OSCR, k = 10", "accuracy, k = 10"]
    return markdown(header, rows)


def each_split_table(folder: Path) -> str:
    """AUROC and accuracy at k = 10 on the backbone, split by split."""
    runs, rows = arms(folder), []
    for split, pair in enumerate(zip(*runs.values())):
        cells = [str(split)]
        for run in pair:
            found = run["on_backbone"]
            cells += [f"{100 * found['auroc']['10']:.2f}", f"{100 * found['closed_set_accuracy']['10']:.2f}"]
        rows.append([*cells, *(f"{run['train_seconds']:.0f}" for run in pair)])
    names = list(ARMS.values())
    header = ["split", *(f"{what}, {name}" for name in names for what in ("AUROC", "accuracy"))]
    return markdown([*header, *(f"seconds, {name}" for name in names)], rows)


def selection_table(folder: Path) -> str:
    """What was tried on pseudo-open classes, in order."""
    rows = []
    for step in read(folder / "choice.json")["steps"]:
        run = read(folder / f"{step['name']}.json")
        rows.append(
            [
                f"`{step['args']}`" if step["args"] else "the paper's values",
                *(f"{100 * of_space(run, space)['auroc']['10']:.2f}" for space in SPACES),
                f"{100 * run['on_backbone']['closed_set_accuracy']['10']:.2f}",
                "kept" if step["kept"] else "dropped",
            ]
        )
    header = ["added to what was kept", *(f"AUROC, {space}" for space in SPACES), "accuracy, backbone", ""]
    return markdown(header, rows)


def open_set_table(folder: Path, protocol: str) -> str:
    """Table 2 of the paper on one protocol, from the records that `trainer.reproduce` keeps of its cells: AUROC of each
    split, and means where there are several."""
    table = experiment("table2")
    auroc, *_ = table.columns
    runs = {
        variant.name: {
            int(path.stem.split("-")[-2]): read(path)["numbers"]
            for path in folder.glob(f"{variant.name}-{protocol}-*-seed0.json")
        }
        for variant in table.variants
    }
    splits = sorted(set().union(*runs.values()))
    several = len(splits) > 1
    header = ["", *(f"AUROC, split {split}" if split == splits[0] else str(split) for split in splits if several)]
    header += [f"{column.title}, mean" if several else column.title for column in table.columns]
    rows = []
    for row in table.rows:
        if numbers := runs[row.variant]:
            by_split = [f"{100 * numbers[split][auroc.of(row)]:.2f}" if split in numbers else "–" for split in splits]
            means = [mean([of_run[column.of(row)] for of_run in numbers.values()]) for column in table.columns]
            rows.append([row.label, *(by_split if several else ()), *means])
    return markdown(header, rows)


def speed_table(*paths: Path) -> str:
    """Milliseconds a step and views a second, with and without torch.compile."""
    runs = [read(path) for path in paths]
    views = {"encoder alone, two views": 2, "SimCLR step": 2}
    names = dict.fromkeys(name for run in runs for name in run["milliseconds"])
    rows = []
    for name in names:
        cells = []
        for run in runs:
            time = run["milliseconds"].get(name)
            rate = time and views.get(name, 3) * run["config"]["batch_size"] / time * 1e3
            cells += [f"{time:.1f}", f"{rate:,.0f}"] if time else ["", ""]
        rows.append([name, *cells])
    kinds = ["compiled" if run["config"]["compile"] else "not compiled" for run in runs]
    return markdown(["", *(f"{what}, {kind}" for kind in kinds for what in ("ms", "views/s"))], rows)


def kernels_table(path: Path) -> str:
    """Bytes that have to move over the time of a kernel, as a share of what a copy reaches; a file of
    `tests.bench.gradmix`."""
    run = read(path)
    rows = [
        [
            name,
            f"{row['microseconds']:.0f}",
            f"{row['gb_per_s']:,.0f}",
            f"{row['gb_per_s'] / run['copy_gb_per_s']:.0%}",
        ]
        for name, row in run["rows"].items()
        if "gb_per_s" in row
    ]
    return markdown(["bfloat16, channels_last", "µs", "GB/s", "of a copy"], rows)


def where_time_goes_table(path: Path) -> str:
    run = read(path)
    rows = [[name, f"{time:.2f}"] for name, time in run["kernel_milliseconds"].items()]
    rows += [
        ["all kernels", f"{run['all_kernels']:.2f}"],
        ["floor of the arithmetic", f"{run['floor_arithmetic_milliseconds']:.2f}"],
        ["floor of the bytes", f"{run['floor_bytes_milliseconds']:.2f}"],
    ]
    return markdown(["GradMix step", "ms"], rows)


def figures(folder: Path) -> None:
    """AUROC over k, and the loss over epochs."""
    runs = arms(folder)
    ks = [int(k) for k in next(iter(runs.values()))[0]["auroc"]]
    by_k = {
        f"{name}, {space}": [
            100 * statistics.fmean(of_space(run, space)["auroc"][str(k)] for run in runs[arm]) for k in ks
        ]
        for arm, name in ARMS.items()
        for space in SPACES
    }
    losses = {
        f"{name}, {part}": [statistics.fmean(values) for values in zip(*curves)]
        for arm, name in ARMS.items()
        for part in ("supcon", "simclr")
        if (curves := [[epoch[part] for epoch in run["curve"]] for run in runs[arm]])
    }
    epochs = range(1, len(next(iter(losses.values()))) + 1)
    plots.save_figures(
        {
            "auroc_over_k": plots.lines(
                ks, by_k, title="CIFAR-10, mean of the splits", x_label="k", y_label="AUROC (percent)",
                logarithmic=True, markers=True,
            ),
            "losses": plots.lines(
                epochs, losses, title="CIFAR-10, mean of the splits", x_label="epoch", y_label="training loss"
            ),
        },
        folder,
    )  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "mnist, short": lambda: open_set_table(HERE / "table2", "mnist"),
    "cifar10, short": lambda: open_set_table(HERE / "table2", "cifar10"),
    "tinyimagenet, smoke": lambda: open_set_table(HERE / "table2", "tinyimagenet"),
    "speed": lambda: speed_table(HERE / "speed" / "step-1024.json", HERE / "speed" / "step-1024-compiled.json"),
    "where time goes": lambda: where_time_goes_table(HERE / "speed" / "step-1024-compiled.json"),
    "kernels": lambda: kernels_table(HERE / "speed" / "kernels.json"),
    "selection": lambda: selection_table(HERE / "cifar10" / "selection"),
    "cifar10": lambda: splits_table(HERE / "cifar10"),
    "cifar10 by split": lambda: each_split_table(HERE / "cifar10"),
}


def rebuilt(page: str) -> str:
    """The page with each of its tables made anew."""
    for name in re.findall(r"<!-- (.+?) -->\n", page):
        if name == "end":
            continue
        if name not in TABLES:
            raise InputError(f"a page asks for a table {name!r}: there are {', '.join(TABLES)}")
        start, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        before, rest = page.split(start)
        page = before + start + TABLES[name]() + end + rest.split(end, 1)[1]
    return page


def main() -> None:
    config = cli.parse(TablesConfig, prog="python -m results.tables", description=__doc__.split("\n")[0])
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        new = rebuilt(page)
        if config.check and new != page:
            raise InputError(f"{path.name} is not what the files give: run python -m results.tables")
        if not config.check:
            path.write_text(new, encoding="utf-8")
    if not config.check and any(arms(HERE / "cifar10").values()):
        figures(HERE / "cifar10")


if __name__ == "__main__":
    cli.run(main)
