"""From what is asked of a table to its cells."""

from __future__ import annotations

import re

import pytest

from data_pipeline.errors import InputError
from data_pipeline.protocols import protocol_names, split_count
from trainer.budget import BUDGETS
from trainer.experiments import EXPERIMENTS, experiment
from trainer.plan import ReproduceConfig, plan


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
