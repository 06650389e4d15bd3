"""Tables of the paper: the plan, the published figures, and one small table from images to numbers."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from rich.console import Console

from data_pipeline.beton import read_build
from data_pipeline.cli import Preempted
from data_pipeline.errors import InputError
from data_pipeline.loader import Partitions
from data_pipeline.protocols import Protocol, protocol_names, split_count
from trainer import reproduce as module
from trainer.config import TrackingConfig, TrainConfig, recipe
from trainer.evaluators import BootstrapConfig, ClosedSet
from trainer.experiments import EXPERIMENTS, Column, Measure, Row, Variant, experiment, published
from trainer.registry import OpenSetModel
from trainer.reproduce import BUDGETS, Budget, ReproduceConfig, plan, reproduce, table_of

DIGITS = "digits-0-16px-raw-600images"


@pytest.fixture(autouse=True)
def cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)


def output() -> Console:
    return Console(record=True, width=140, quiet=False, file=open("/dev/null", "w"))


@pytest.mark.parametrize("name", [*EXPERIMENTS, "figure4"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_cell_of_every_experiment_is_a_configuration(name, budget):
    config = ReproduceConfig(experiment=name, budget=budget)
    chosen, cells = experiment(config.experiment), plan(config)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) and set(chosen.protocols) <= set(protocol_names())
    assert len({cell.config.folder for cell in cells}) == len(cells)
    variants = {variant.name: variant for variant in chosen.variants}
    runs = sum(len(chosen.splits or range(split_count(p))) for p in chosen.protocols) * len(chosen.seeds)
    assert len(cells) == runs * len(variants)
    for row in chosen.rows:
        # Every number of the table is found by a measure of its variant.
        for column in chosen.columns:
            assert (column.measure or row.measure) in variants[row.variant].measures
    for cell in cells:
        assert cell.config.protocol == cell.protocol.name and cell.config.split == cell.protocol.split
        limit = BUDGETS[budget]
        assert limit.epochs is None or cell.config.total_epochs <= limit.epochs
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
        columns = {column.number for column in experiment(name).columns}
        for label, protocols in published(name)["rows"].items():
            assert protocols.keys() <= set(experiment(name).protocols), label
            for numbers in protocols.values():
                assert numbers.keys() <= columns and all(5 < value < 100 for value in numbers.values()), label


def test_published_only_rows_come_first_and_measured_ones_keep_their_figures():
    config = ReproduceConfig(experiment="table2", protocols=("cifar10", "mnist"), splits=(0,), variants=("arpl",))
    result = table_of(config, plan(config))
    assert result.columns[:5] == ("row", "protocol", "AUROC (%)", "OSCR (%)", "accuracy (%)")
    rows = {row[:2]: row[2:] for row in result.rows}
    assert list(rows)[:2] == [("G-OpenMax", "cifar10"), ("OSRCI", "cifar10")]
    assert list(rows)[-1] == ("ARPL, algorithm 1", "mnist") and ("GRROSR", "mnist") not in rows
    auroc, oscr = rows["ARPL", "cifar10"][:2]
    assert (auroc.value, auroc.published, oscr.published) == (None, 90.1, None)
    assert rows["ARPL", "cifar10"][3:] == ("0 of 1", None, None, None)
    assert rows["MEDAF *", "cifar10"][0].published == 86.0
    assert result.heading == "Table 2: open set recognition (budget full)"
    assert any("splits of its own" in note for note in result.notes)


def test_a_budget_limits_and_never_raises():
    config = BUDGETS["short"].applied(experiment("table2").variants[4].config("cifar10"))
    assert (config.epochs, config.encoder.width, config.batch_size) == (20, 16, 64)
    assert config.optimizer.warmup_epochs == pytest.approx(20 / 30)
    mnist = BUDGETS["short"].applied(experiment("table2").variants[0].config("mnist"))
    assert mnist.epochs == 10
    assert mnist.phases == ()
    whole = experiment("table2").variants[0].config("cifar10")
    assert BUDGETS["full"].applied(whole) == whole


@pytest.mark.parametrize(
    ("phases", "limit", "expected"),
    [
        (("600:0:1", "10:1:1.2"), None, ("600:0:1", "10:1:1.2")),
        (("600:0:1", "10:1:1.2"), 700, ("600:0:1", "10:1:1.2")),
        (("600:0:1", "10:1:1.2"), 20, ("19:0:1", "1:1:1.2")),
        (("600:0:1", "10:1:1.2"), 2, ("1:0:1", "1:1:1.2")),
        (("3:1:0", "90:0:1", "7:1:1"), 50, ("1:1:0", "46:0:1", "3:1:1")),
        (("1:1:0", "1:0:1"), 1, ("1:1:0", "1:0:1")),
        ((), 5, ()),
    ],
)
def test_a_budget_keeps_the_proportions_of_phases(phases, limit, expected):
    config = dataclasses.replace(recipe("cifar10"), phases=phases)
    applied = Budget(epochs=limit).applied(config)
    assert applied.phases == expected
    assert applied.total_epochs == (sum(int(text.split(":")[0]) for text in expected) or limit)


def test_cifar_runs_have_the_published_phases_and_the_table_says_how_long_each_was_trained():
    cells = plan(ReproduceConfig(experiment="table2", protocols=("mnist", "cifar10", "cifar+10"), splits=(0,)))
    phased = {(c.variant.name, c.protocol.name) for c in cells if c.config.phases == ("600:0:1", "10:1:1.2")}
    assert phased == {(v, p) for v in ("gradmix", "supcon+simclr") for p in ("cifar10", "cifar+10")}
    lengths = {(c.variant.name, c.protocol.name): c.config.total_epochs for c in cells}
    assert (
        lengths["gradmix", "cifar10"] == 610 and lengths["cross_entropy", "mnist"] == lengths["arpl", "cifar10"] == 600
    )
    lines = module.schedules(cells)
    assert (
        "Trained for 600 epochs of θ = 0, λ = 1, then 10 epochs of θ = 1, λ = 1.2: gradmix, supcon+simclr on cifar10, "
        "cifar+10." in lines
    )
    assert "Trained for 600 epochs: cross_entropy, arpl on mnist, cifar10, cifar+10." in lines
    assert "Trained for 10 epochs of θ = 1, λ = 3: gradmix, supcon+simclr on mnist." in lines
    assert any("in place of RandAugment" in line for line in lines)
    said = module.schedules(plan(ReproduceConfig(experiment="table1", protocols=("tinyimagenet",))))
    assert not any("800" in line for line in module.schedules(plan(ReproduceConfig(experiment="figure5"))))
    assert any("800 for some" in line for line in said) and not any("RandAugment" in line for line in said)
    # Rows of one picture differ in the mixing alone.
    for name in ("figure2", "figure3", "beyond"):
        cells = plan(ReproduceConfig(experiment=name, protocols=("cifar10",), splits=(0,), seeds=(0,)))
        assert {cell.config.phases for cell in cells} == {("600:0:1", "10:1:1.2")}


def test_what_is_named_twice_is_run_once():
    once = ReproduceConfig(experiment="table2", protocols=("mnist",), splits=(0, 1), seeds=(3,), variants=("arpl",))
    twice = ReproduceConfig(
        experiment="table2",
        protocols=("mnist", "mnist"),
        splits=(0, 1, 0),
        seeds=(3, 3),
        variants=("arpl", "arpl"),
    )
    assert twice == once and [cell.name for cell in plan(twice)] == [cell.name for cell in plan(once)]


def test_a_budget_limits_the_images_of_what_takes_long_alone():
    def most(name: str, measure: str, budget: str) -> int | None:
        return BUDGETS[budget].measured(experiment(name).variants[0]).measures[measure].evaluator.max_images

    assert [most("table5", "corruptions", budget) for budget in ("smoke", "short", "full")] == [100, 1000, None]
    assert most("beyond", "attacks", "short") == 1000 and most("figure6", "coverage", "full") == 2560
    assert most("table1", "dimension", "smoke") == 20_000


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
    assert reproduce(dataclasses.replace(config, dry_run=True), console) is None
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
    said = console.export_text()
    assert (
        re.search(r"cross entropy +│ +digits │ +[0-9.]+ │.*│ +1 of 2 │", said) and "3 of 4 finished, 1 failed" in said
    )

    trained = []
    monkeypatch.undo()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "train", lambda c, *rest, train=module.train: (trained.append(c), train(c, *rest)))
    result = reproduce(config, console := output())
    assert [(c.method, c.split) for c in trained] == [("cross_entropy", 0)]
    said = console.export_text()
    assert "Budget smoke: at most 2 epochs, 600 training images" in said and "4 of 4 finished" in said
    assert not list(config.path.glob("*.error.txt"))
    table = (config.path / "table.txt").read_text()
    assert all(line in said for line in table.splitlines()) and "│ GradMix" in table
    page = (config.path / "report.html").read_text()
    assert "<svg" in page and "cross entropy, algorithm 1" in page

    rows = {row[0]: row[2:] for row in result.rows}
    records = [json.loads(path.read_text()) for path in sorted(config.path.glob("gradmix-*/evaluation.json"))]
    values = [100 * record["numbers"]["osr/auroc"] for record in records]
    found = rows["GradMix"][0]
    assert found.value == pytest.approx(statistics.fmean(values))
    assert found.spread == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    # The run's own metrics, at k = 10, are the same number found another way.
    own = json.loads((config.path / "gradmix-digits-0-seed0" / "metrics.json").read_text())
    assert 100 * own["auroc"]["10"] == pytest.approx(values[0], abs=1e-2)
    classifier = json.loads((config.path / "cross_entropy-digits-0-seed0" / "metrics.json").read_text())
    by_gallery = json.loads((config.path / "cross_entropy-digits-0-seed0" / "evaluation.json").read_text())["numbers"]
    assert classifier["auroc"]["10"] == pytest.approx(by_gallery["osr/auroc"], abs=1e-4)
    assert by_gallery["max_logit/auroc"] != by_gallery["osr/auroc"]
    assert all(number.published is None for row in rows.values() for number in row[:3]) and "SimCLR" not in rows
    assert rows["GradMix"][3:6] == ("2", "600", "2")
    assert records[0]["test_images"] == {"osr": sum(map(len, by_split_0(tmp_path)))}
    # Wherever the numbers stand, it says that they are a smoke test's.
    for name in ("table.csv", "table.txt", "table.json", "report.html"):
        assert "smoke" in (config.path / name).read_text(), name
    assert all(line.endswith(("budget", "smoke")) for line in result.to_csv().splitlines())
    log = (config.path / "log.txt").read_text().splitlines()
    assert all("smoke" in line for line in log if "AUROC" in line) and any("AUROC" in line for line in log)
    for name, figure in result.figures.items():
        mean = name.endswith("numbers")
        assert figure.get_supxlabel() == ("Mean over all runs. " if mean else "") + "Budget smoke."
        assert mean or figure.get_suptitle().endswith("digits, split 0, seed 0")

    assert {
        "digits_numbers",
        "digits_OpenSet_scores",
        "digits_OpenSet_roc",
        "digits_OpenSet_oscr",
    } <= result.figures.keys()

    # The states on the way have served.
    assert not list(config.path.rglob("step-*"))
    cell, part = plan(config)[0], Partitions(read_build(tmp_path / "data" / DIGITS), torch.device("cpu"))
    model = OpenSetModel.load(cell.config.folder / "model")
    accuracy = Measure(evaluator=ClosedSet(bootstrap=BootstrapConfig(resamples=0)), course=8)
    with pytest.raises(InputError, match="checkpoints are gone: add --restart"):
        module.course_of(accuracy, cell, model, part)

    trained.clear()
    reproduce(config, output())
    assert not trained

    # What is not whole is measured again, and the others are not.
    damaged = config.path / "gradmix-digits-0-seed0" / "evaluation.json"
    text = damaged.read_text()
    damaged.write_text(text[: len(text) // 2])
    (config.path / "cross_entropy-digits-1-seed0" / "arrays.npz").unlink()
    arrays = config.path / "gradmix-digits-1-seed0" / "arrays.npz"
    arrays.write_bytes(arrays.read_bytes()[:-40])
    again = reproduce(config, output())
    assert sorted((c.method, c.split) for c in trained) == [("cross_entropy", 1), ("gradmix", 0), ("gradmix", 1)]
    assert again.rows == result.rows and json.loads(damaged.read_text())["numbers"] == json.loads(text)["numbers"]

    # A request to end in the middle of a cell is said.
    def preempted(*args):
        raise Preempted

    monkeypatch.setattr(module, "train", preempted)
    damaged.unlink()
    with pytest.raises(Preempted):
        reproduce(config, console := output())
    assert "stopped by the system in gradmix-digits-0-seed0: the same command goes on there" in console.export_text()


def by_split_0(folder):
    """The test images of known and of unknown classes."""
    part = Partitions(read_build(folder / "data" / DIGITS), torch.device("cpu"))
    return part["test_known"].labels, part["test_unknown"].labels


def test_the_course_of_training_is_measured_and_its_checkpoints_go(monkeypatch):
    """A small figure 5: the states after each stretch are there, though many checkpoints were written between them."""
    accuracy = Measure(evaluator=ClosedSet(bootstrap=BootstrapConfig(resamples=0)), course=2)
    small = dataclasses.replace(
        experiment("table2"), variants=(Variant(name="x", config=of_digits, measures={"osr": accuracy}),), rows=()
    )
    monkeypatch.setattr(module, "experiment", lambda name: small)
    config = ReproduceConfig(experiment="figure5", protocols=("digits",), splits=(0,), budget="smoke")
    (cell,) = plan(config)
    assert (cell.config.checkpoint_every, cell.config.keep_checkpoints) == (1, 2)
    reproduce(config, output())
    with np.load(cell.config.folder / "arrays.npz") as arrays:
        assert arrays["osr/course/epoch"].tolist() == [1, 2]
        last = arrays["osr/course/closed_set_accuracy"][1]
    assert last == cell.record()["numbers"]["osr/closed_set_accuracy"]
    assert not (cell.config.folder / "checkpoints").exists()


def of_digits(protocol):
    # A checkpoint at every reading of the losses.
    return dataclasses.replace(recipe(protocol, "cross_entropy"), checkpoint_minutes=1e-9, log_every=1)


def test_a_deepspeed_file_is_known_by_its_content_and_has_to_be_there(tmp_path):
    path = tmp_path / "ds.json"
    config = ReproduceConfig(experiment="table2", protocols=("digits",), deepspeed_config=path, dry_run=True)
    with pytest.raises(InputError, match=r"there is no DeepSpeed configuration .*ds.json: correct --deepspeed-config"):
        reproduce(config, output())
    path.write_text('{"gradient_clipping": 1.0}')
    one, without = plan(config)[0].request, plan(dataclasses.replace(config, deepspeed_config=None))[0].request
    path.write_text('{"gradient_clipping": 2.0}')
    other = plan(config)[0].request
    assert one != other and without not in (one, other)
    path.rename(tmp_path / "renamed.json").write_text('{"gradient_clipping": 1.0}')
    assert plan(dataclasses.replace(config, deepspeed_config=tmp_path / "renamed.json"))[0].request == one


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
    assert module.counted({"osr": 680, "max_logit": 680}) == "680"
    assert module.counted({"osr": 1680, "attacks": 200}) == "1,680 (osr), 200 (attacks)"


def test_intervals_of_several_runs_are_their_mean_half_width():
    column, row = Column(number="auroc", title="AUROC"), Row(label="x", variant="x")
    runs = [
        finished("x", split, 0, {"numbers": {"osr/auroc": value}, "intervals": {"osr/auroc": [low, high]}})
        for split, (value, low, high) in enumerate([(0.90, 0.88, 0.91), (0.94, 0.93, 0.96), (0.98, 0.97, 1.0)])
    ]
    one = module.number_of(column, row, runs[:1], {})
    assert (one.value, one.low, one.high, one.spread) == pytest.approx((90, 88, 91, None))
    several = module.number_of(column, row, runs, {})
    half = (1.5 + 1.5 + 1.5) / 3
    assert (several.value, several.low, several.high) == pytest.approx((94, 94 - half, 94 + half))
    assert several.spread == pytest.approx(4.0)
    note = module.intervals_note([("x", "digits", several)])
    assert "mean half-width" in note[0] and module.intervals_note([("x", "digits", None)]) == []


def test_pictures_are_of_one_run_that_most_rows_have():
    rows = [Row(label=name, variant=name) for name in "abc"]
    cells = [
        finished("a", 0, 0, {}), finished("a", 1, 0, {"x": 1}), finished("b", 0, 0, None),
        finished("b", 1, 0, {"x": 1}), finished("c", 0, 1, {"x": 1}), finished("c", 1, 0, {"x": 1}),
        finished("a", 0, 1, {"x": 1}),
    ]  # fmt: skip
    name, shown = module.same_run(rows, "digits", cells)
    assert name == "split 1, seed 0" and {row.label: cell for row, cell in shown.items()} == {
        "a": cells[1], "b": cells[3], "c": cells[5],
    }  # fmt: skip
    name, shown = module.same_run(rows[:1], "digits", cells)
    assert name == "split 1, seed 0"


def test_a_table_in_mlflow_and_a_store_that_does_not_answer(tmp_path):
    store = f"sqlite:///{tmp_path}/mlruns.db"
    config = ReproduceConfig(
        experiment="table1",
        protocols=("digits",),
        splits=(0,),
        variants=("supcon",),
        budget="smoke",
        tracking=TrackingConfig(experiment="tables", alias="", uri="http://127.0.0.1:9"),
    )
    reproduce(config, console := output())
    said = console.export_text()
    assert said.count("going on without MLflow") == 1 and "1 of 1 finished" in said
    assert f"did not take the table: python -m trainer.tracking sync {config.path} delivers it later" in said

    config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, uri=store))
    result = reproduce(config, console := output())
    assert f"recorded in {store}, experiment tables" in console.export_text()
    reproduce(config, output())
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("tables").experiment_id])
    assert run.info.run_name == "table1-smoke" and run.info.status == "FINISHED"
    names = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "table.json", "table.csv", "table.txt", "figures"} <= names
    value = next(row for row in result.rows if row[0] == "SupCon")[3].value
    assert run.data.metrics["digits/SupCon/AUROC ---"] == pytest.approx(value)


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
