"""Budgets: what they cut short, and that they never ask for more."""

from __future__ import annotations

import dataclasses

import pytest

from trainer.recipes import recipe
from trainer.reproduce.budget import BUDGETS, Budget
from trainer.reproduce.experiments import experiment


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


def test_a_budget_limits_the_images_of_what_takes_long_alone():
    def most(name: str, measure: str, budget: str) -> int | None:
        return BUDGETS[budget].measured(experiment(name).variants[0]).measures[measure].evaluator.max_images

    assert [most("table5", "corruptions", budget) for budget in ("smoke", "short", "full")] == [100, 1000, None]
    assert most("beyond", "attacks", "short") == 1000 and most("figure6", "coverage", "full") == 2560
    assert most("table1", "dimension", "smoke") == 20_000
