"""Tables of the paper: the plan, the published figures, and one small table from images to numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics

import pytest
from rich.console import Console

from data_pipeline.errors import InputError
from data_pipeline.protocols import protocol_names, split_count
from trainer import reproduce as module
from trainer.experiments import EXPERIMENTS, experiment, published
from trainer.reproduce import BUDGETS, ReproduceConfig, full_name, plan, reproduce


@pytest.fixture(autouse=True)
def cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)


def output() -> Console:
    return Console(record=True, width=140, quiet=False, file=open("/dev/null", "w"))


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_cell_of_every_experiment_is_a_configuration(name, budget):
    chosen, cells = experiment(name), plan(ReproduceConfig(experiment=name, budget=budget))
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) and set(chosen.protocols) <= set(protocol_names())
    assert len({cell.config.folder for cell in cells}) == len(cells)
    variants = {variant.name: variant for variant in chosen.variants}
    runs = sum(len(chosen.splits or range(split_count(p))) for p in chosen.protocols) * len(chosen.seeds)
    assert len(cells) == runs * len(variants)
    for row in chosen.rows:
        # Every number of the table is found by a measure of its variant.
        for column in chosen.columns:
            assert full_name(row, column).rpartition("/")[0] in variants[row.variant].measures
    for cell in cells:
        assert cell.config.protocol == cell.protocol.name and cell.config.split == cell.protocol.split
        limit = BUDGETS[budget]
        assert limit.epochs is None or cell.config.epochs <= limit.epochs
    assert {variant.name for variant in chosen.variants} == {row.variant for row in chosen.rows}


def test_variants_of_one_protocol_differ_in_what_they_train():
    for name in EXPERIMENTS:
        cells = plan(ReproduceConfig(experiment=name, protocols=("cifar10",), splits=(0,)))
        assert len({json.dumps(cell.config.identity) for cell in cells}) == len(cells), name


def test_published_figures_are_the_papers():
    """A few of each table, from the paper itself, and that none is on a scale or under a name of its own."""
    table2 = published("table2")["rows"]
    assert len(table2) == 14 and table2["GradMix"]["tinyimagenet"] == {"auroc": 81.92}
    assert table2["MEDAF"]["cifar10"] == {"auroc": 86.0} and "mnist" not in table2["MEDAF"]
    assert "splits of its own" in published("table2")["marks"]["MEDAF"]
    assert statistics.fmean(v["auroc"] for v in table2["ARPL"].values()) == pytest.approx(92.1667, abs=1e-3)
    assert published("table1")["rows"]["SupCon"]["cifar10"] == {"intrinsic_dimension": 8.07, "auroc": 67.15}
    assert published("table3")["rows"]["GradMix"]["cifar100-closed"] == {"closed_set_accuracy": 78.0}
    assert published("table4")["rows"]["GradMix"]["cifar10-ood-svhn"]["dtacc"] == 99.81
    for name in EXPERIMENTS:
        columns = {column.number.rpartition("/")[2] for column in experiment(name).columns}
        for label, protocols in published(name)["rows"].items():
            assert protocols.keys() <= set(experiment(name).protocols), label
            for numbers in protocols.values():
                assert numbers.keys() <= columns and all(5 < value < 100 for value in numbers.values()), label


def test_published_only_rows_come_first_and_measured_ones_keep_their_figures():
    cells = plan(ReproduceConfig(experiment="table2", protocols=("cifar10",), splits=(0,)))
    rows = {row["label"]: row for row in module.protocol_rows("table2", cells)}
    assert list(rows)[:2] == ["G-OpenMax", "OSRCI"] and list(rows)[-1] == "GradMix"
    assert rows["ARPL"]["published"] == {"auroc": 90.1} and rows["ARPL"]["measured"] == {}
    assert rows["MEDAF"]["mark"] and rows["SimCLR"]["published"] == {}


def test_a_budget_limits_and_never_raises():
    config = BUDGETS["short"].applied(experiment("table2").variants[4].config("cifar10"))
    assert (config.epochs, config.encoder.width, config.batch_size) == (20, 16, 64)
    assert config.optimizer.warmup_epochs == pytest.approx(20 / 30)
    mnist = BUDGETS["short"].applied(experiment("table2").variants[0].config("mnist"))
    assert mnist.epochs == 10
    whole = experiment("table2").variants[0].config("cifar10")
    assert BUDGETS["full"].applied(whole) == whole


def test_a_table_from_images_to_numbers_that_goes_on_where_it_stopped(monkeypatch, tmp_path):
    config = ReproduceConfig(
        experiment="table2",
        protocols=("digits",),
        splits=(0, 1),
        variants=("gradmix", "cross_entropy"),
        budget="smoke",
        source="parquet",  # not of digits, which are bundled
    )
    console = output()
    assert reproduce(dataclasses.replace(config, dry_run=True), console) == {}
    said = console.export_text()
    assert "4 of 4 cells to compute" in said and not config.path.exists()

    # One cell fails as a bug would, and the rest goes on.
    def fail_once(config, *others, train=module.train):
        if config.method == "cross_entropy" and config.split == 0:
            raise ZeroDivisionError("a bug")
        train(config, *others)

    monkeypatch.setattr(module, "train", fail_once)
    console = output()
    with pytest.raises(InputError, match=r"1 of 4 cells failed.*cross_entropy-digits-0-seed0: ZeroDivisionError"):
        reproduce(config, console)
    assert "Traceback" in (config.path / "cross_entropy-digits-0-seed0.error.txt").read_text()
    assert re.search(r"cross entropy +│ +— │ +[0-9.]+ │.*│ +1 of 2 │", console.export_text())

    trained = []
    monkeypatch.undo()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "train", lambda c, *rest, train=module.train: (trained.append(c), train(c, *rest)))
    result = reproduce(config, console := output())
    assert [(c.method, c.split) for c in trained] == [("cross_entropy", 0)]
    said = console.export_text()
    assert "Budget smoke: at most 2 epochs, 600 training images" in said and "4 of 4 cells" in said
    assert not list(config.path.glob("*.error.txt"))
    table = (config.path / "table.txt").read_text()
    assert all(line in said for line in table.splitlines()) and "│ GradMix" in table

    rows = {row["label"]: row for row in result["protocols"]["digits"]}
    assert json.loads((config.path / "table.json").read_text()) == json.loads(json.dumps(result))
    numbers = [
        json.loads((config.path / f"gradmix-digits-{split}-seed0" / "evaluation.json").read_text())["numbers"]
        for split in (0, 1)
    ]
    found = rows["GradMix"]["measured"]["auroc"]
    assert found["mean"] == pytest.approx(statistics.fmean(n["osr/auroc"] for n in numbers))
    assert found["std"] == pytest.approx(abs(numbers[0]["osr/auroc"] - numbers[1]["osr/auroc"]) / 2**0.5)
    # The run's own metrics, at k = 10, are the same number found another way.
    own = json.loads((config.path / "gradmix-digits-0-seed0" / "metrics.json").read_text())
    assert own["auroc"]["10"] == pytest.approx(numbers[0]["osr/auroc"], abs=1e-4)
    assert rows["cross entropy"]["measured"]["auroc"] != rows["cross entropy, algorithm 1"]["measured"]["auroc"]
    assert all(row["published"] == {} for row in rows.values()) and "SimCLR" not in rows
    assert result["finished"] == 4 and not result["failed"]

    trained.clear()
    reproduce(config, output())
    assert not trained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": "table9"}, "unknown experiment 'table9'; known: table1"),
        ({"protocols": ("cifar",)}, "unknown protocol 'cifar'; known: digits"),
        ({"variants": ("softmax",)}, "unknown variant 'softmax'; known: gradmix"),
        ({"splits": (-1,)}, "set --splits and --seeds to 0 or more"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ReproduceConfig(**{"experiment": "table2", **change})
