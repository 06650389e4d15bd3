"""From what is asked of a table to its cells."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from data_pipeline.protocols import protocol_names, split_count
from trainer.reproduce.budget import BUDGETS
from trainer.reproduce.experiments import EXPERIMENTS, experiment
from trainer.reproduce.plan import ReproduceConfig, plan, training_name
from trainer.reproduce.tables import table_of


@pytest.mark.parametrize("name", [*EXPERIMENTS, "figure4"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_cell_of_every_experiment_is_a_configuration(name, budget):
    config = ReproduceConfig(experiment=name, budget=budget)
    chosen, cells = experiment(config.experiment), plan(config)
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names) and set(chosen.protocols) <= set(protocol_names())
    assert len({cell.folder for cell in cells}) == len(cells)
    variants = {variant.name: variant for variant in chosen.variants}
    runs = sum(split_count(p) for p in chosen.protocols) * len(chosen.seeds)
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


def folders(name: str, protocol: str = "cifar10", **changes) -> dict[str, Path]:
    """The run folder of each variant of an experiment, on one split."""
    config = ReproduceConfig(**{"experiment": name, "protocols": (protocol,), "splits": (0,), "seeds": (0,), **changes})
    return {cell.variant.name: cell.config.folder for cell in plan(config)}


@pytest.mark.parametrize("budget", BUDGETS)
def test_what_tables_train_alike_is_one_run(budget):
    def alike(*runs: tuple[str, str], protocol: str) -> Path:
        (run,) = {folders(name, protocol, budget=budget)[variant] for name, variant in runs}
        return run

    for protocol in ("cifar10", "tinyimagenet"):
        unmixed = [(name, "supcon+simclr") for name in ("table2", "figure6", "beyond")] + [("figure2", "none")]
        mixed = [("table2", "gradmix"), ("figure2", "layercam"), ("figure3", "conv5_2"), ("beyond", "published")]
        assert alike(*unmixed, protocol=protocol) != alike(*mixed, ("figure6", "gradmix"), protocol=protocol)
        alike(("table1", "supcon"), ("table2", "supcon"), protocol=protocol)
    alike(("table1", "supcon+simclr"), ("table2", "supcon+simclr"), protocol="tinyimagenet")
    # On CIFAR-10, table 1 compares both without the published phases.
    assert folders("table1", budget=budget)["supcon+simclr"] != folders("table2", budget=budget)["supcon+simclr"]
    assert folders("table3", "cifar10-closed")["gradmix"] == folders("figure4", "cifar10-closed")["gradmix"]
    digits = folders("table2", "mnist", budget=budget)
    assert digits["gradmix"] == digits["supcon+simclr"] != digits["supcon"]  # MNIST is not mixed


def test_what_is_trained_otherwise_or_on_other_images_is_another_run(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"gradient_clipping": 1.0}')
    changes = [
        {}, {"splits": (1,)}, {"seeds": (1,)}, {"budget": "smoke"}, {"budget": "short"}, {"protocol": "tinyimagenet"},
        {"protocol": "cifar+10"}, {"deepspeed_config": path},
    ]  # fmt: skip
    runs = [folder for change in changes for folder in folders("table2", **change).values()]
    path.write_text('{"gradient_clipping": 2.0}')
    runs += folders("table2", deepspeed_config=path).values()
    assert len(set(runs)) == len(runs) == 9 * 6
    # Not what only says how it is computed.
    assert folders("table2", workers=2, data=tmp_path, restart=True) == folders("table2")
    # Fewer images of the same classes are other images, though all else is as it was.
    cell, *_ = plan(ReproduceConfig(experiment="table2", protocols=("cifar10",), splits=(0,)))
    fewer = dataclasses.replace(cell.protocol, classes=dataclasses.replace(cell.protocol.classes, train_images=600))
    assert training_name(cell.config, fewer) != training_name(cell.config, cell.protocol) == cell.config.folder.name
    # A run that keeps its states for the course of training, or a model that answers otherwise.
    changes = [
        {"keep_checkpoints": 9}, {"k": 3}, {"accept": 0.9}, {"score_on": "backbone"}, {"compile": True},
        {"init_from": tmp_path},
    ]  # fmt: skip
    for change in changes:
        assert training_name(dataclasses.replace(cell.config, **change), cell.protocol) != cell.config.folder.name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiment": "table9"}, "unknown experiment 'table9'; known: table1"),
        ({"protocols": ("cifar",)}, "unknown protocol 'cifar'; known: digits"),
        ({"protocols": ("custom",)}, "custom is for images of your own: use trainer.train and trainer.evaluate"),
        ({"variants": ("softmax",)}, "unknown variant 'softmax'; known: gradmix"),
        ({"splits": (-1,)}, "set --splits and --seeds to 0 or more"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ReproduceConfig(**{"experiment": "table2", **change})


def test_a_table_of_unknown_classes_wants_some():
    with pytest.raises(InputError, match="cifar10-closed has no unknown class, and table2 measures how"):
        plan(ReproduceConfig(experiment="table2", protocols=("cifar10-closed",)))
    assert plan(ReproduceConfig(experiment="table3", protocols=("cifar10-closed",)))


def test_official_corruptions_are_read_at_every_budget(tmp_path):
    def told(protocol, root):
        config = ReproduceConfig(experiment="figure4", protocols=(protocol,), budget="smoke", corrupted_root=root)
        (cell, *_) = cells = plan(config)
        (measure,) = cell.variant.measures.values()
        notes = " ".join(table_of(config, cells).notes)
        return measure.evaluator.corrupted_root, measure.evaluator.max_images, "frost is" in notes

    assert told("cifar10-closed", None) == (None, 100, True)
    assert told("cifar10-closed", tmp_path) == (tmp_path, None, False)
    for name in ("CIFAR-10-C", "Tiny-ImageNet-C"):
        (tmp_path / name).mkdir()
    assert told("cifar10-closed", tmp_path) == (tmp_path / "CIFAR-10-C", None, False)
    assert told("tinyimagenet-closed", tmp_path) == (tmp_path / "Tiny-ImageNet-C", None, False)
    with pytest.raises(InputError, match="table1 measures no corruptions: leave --corrupted-root out"):
        ReproduceConfig(experiment="table1", corrupted_root=tmp_path)
    with pytest.raises(InputError, match=r"there is no folder .*gone: correct --corrupted-root"):
        ReproduceConfig(experiment="table5", corrupted_root=tmp_path / "gone")
    config = ReproduceConfig(experiment="table5", corrupted_root=tmp_path)
    assert f"--corrupted-root {tmp_path}" in config.command
