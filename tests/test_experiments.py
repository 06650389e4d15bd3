"""What the paper's tables train, and the figures that it prints."""

from __future__ import annotations

import json
import statistics

import pytest

from trainer.reproduce.experiments import EXPERIMENTS, experiment, published
from trainer.reproduce.plan import ReproduceConfig, plan
from trainer.reproduce.tables import schedules


def test_variants_of_one_protocol_differ_in_what_they_train():
    for name in EXPERIMENTS:
        cells = plan(ReproduceConfig(experiment=name, protocols=("cifar10",), splits=(0,)))
        assert len({json.dumps(cell.config.identity) for cell in cells}) == len(cells), name


@pytest.mark.parametrize("protocol", ["mnist", "cifar10"])
def test_the_rows_beyond_the_paper_change_one_thing(protocol):
    variants = {variant.name: variant.config(protocol) for variant in experiment("beyond").variants}
    published_one = variants.pop("published")
    for name, config in variants.items():
        changed = {field for field, value in config.identity.items() if value != published_one.identity[field]}
        assert changed == {"objective" if name == "khosla" else "mixing"}, name


def test_mnist_is_said_to_be_trained_without_mixing_only_where_it_is():
    for name, said in (("table2", True), ("figure2", False), ("beyond", False)):
        notes = schedules(plan(ReproduceConfig(experiment=name, protocols=("mnist",), splits=(0,))))
        assert any("MNIST is trained without mixing" in note for note in notes) == said, name


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
