"""Configurations: what they refuse, and that every field has a reader and a line of help."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import InputError
from data_pipeline.protocols import protocol_names
from trainer import config as config_module
from trainer.config import CrossEntropyConfig, MixingConfig, ObjectiveConfig, TrackingConfig, TrainConfig
from trainer.recipes import METHODS, RECIPES, recipe
from trainer.train import parse_config

ROOT = Path(__file__).parents[1]
METHOD_HELP = Path(config_module.__file__).read_text().split("    method: str", 1)[1].split("split: int", 1)[0]


def test_the_defaults_are_the_papers():
    objective, mixing = ObjectiveConfig(), MixingConfig()
    assert (objective.theta, objective.lam, objective.temperature) == (1.0, 1.2, 0.05)
    assert (mixing.gamma_min, mixing.gamma_max, mixing.layers, mixing.attribution) == (
        0.1,
        0.5,
        ("conv5_2",),
        "layercam",
    )
    cifar = recipe("cifar10")
    assert (cifar.batch_size, cifar.epochs, cifar.optimizer.learning_rate) == (256, 600, 1e-3)
    assert cifar.optimizer.final_share == pytest.approx(0.512)
    mnist = recipe("mnist")
    assert (mnist.mixing.kind, mnist.objective.lam, mnist.views.rotation, mnist.views.flip) == ("none", 3.0, 5.0, 0.0)


def test_every_protocol_has_a_recipe():
    for name in (*protocol_names(), "custom", "cifar10-pseudo3"):
        assert recipe(name).protocol == name
    with pytest.raises(InputError, match="unknown protocol 'cifar'; known: digits"):
        recipe("cifar")
    assert set(RECIPES) == {*protocol_names(), "custom"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--mixing.gamma-min", "0"], "mixing.gamma-min is 0.0; set it within (0, 1)"),
        (["--mixing.gamma-max", "1"], "mixing.gamma-max is 1.0; set it within (0, 1)"),
        (["--mixing.gamma-min", "0.6"], "set it to at most --mixing.gamma-max, which is 0.5"),
        (["--mixing.num-patches", "0"], "mixing.num-patches is 0"),
        (["--mixing.layers", "conv5_2", "conv5_2"], "name each layer once"),
        (["--objective.temperature", "0"], "objective.temperature"),
        (["--objective.theta", "0", "--objective.lam", "0"], "let θ or λ be above 0"),
        (["--epochs", "0"], "epochs is 0"),
        (["--batch-size", "1"], "batch-size is 1"),
        (["--phases", "10:1"], "not EPOCHS:THETA:LAMBDA"),
        (["--phases", "0:1:1"], "1 epoch or more"),
        (["--accept", "0"], "accept is 0.0"),
        (["--views.scale", "0", "1"], "views.scale"),
        (["--optimizer.learning-rate", "-1"], "optimizer.learning-rate"),
        (["--encoder.width", "0"], "encoder.width"),
        (["--method", "softmax"], "unknown method 'softmax'; known: gradmix, supcon+simclr"),
        (["--method", "arpl", "--mixing.kind", "cutmix"], "mixing.kind is cutmix; set it to none: arpl makes nothing"),
        (["--method", "moco", "--objective.queue-size", "50"], "objective.queue-size is 50; set it to at least"),
        (["--batch-norm", "shuffled"], "batch-norm is shuffled; it is moco's"),
        (["--method", "cross_entropy", "--phases", "2:1:1"], "leave it out: cross_entropy has no θ and λ"),
        (["--method", "cross_entropy", "--objective.label-smoothing", "1"], "set it within 0 to below 1"),
        (["--method", "arpl", "--objective.weight", "-1"], "objective.weight is -1.0"),
        (["--protocol", "imagenet"], "unknown protocol 'imagenet'; known: digits, mnist"),
    ],
)
def test_what_is_out_of_range_is_refused_with_the_remedy(args, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_config(args)


def test_the_command_line_replaces_the_recipes_values():
    config = parse_config(
        ["--protocol", "mnist", "--epochs", "3", "--mixing.layers", "conv3_2", "conv4_2", "--local_rank=0"]
    )
    expected = recipe("mnist")
    assert config == dataclasses.replace(
        expected, epochs=3, mixing=dataclasses.replace(expected.mixing, layers=("conv3_2", "conv4_2"))
    )


def test_a_method_is_the_protocols_recipe_with_its_own_objective():
    base = recipe("cifar10")
    for method, (theta, lam) in {"supcon": (1, 0), "simclr": (0, 1), "supcon+simclr": (1, 1.2)}.items():
        config = recipe("cifar10", method)
        assert (config.objective.theta, config.objective.lam, config.mixing.kind) == (theta, lam, "none")
        assert dataclasses.replace(config, objective=base.objective, mixing=base.mixing, method="gradmix") == base
    classifier = parse_config(["--protocol", "tinyimagenet", "--method", "cross_entropy"])
    assert classifier == recipe("tinyimagenet", "cross_entropy")
    assert classifier.objective == CrossEntropyConfig(label_smoothing=0.9) and classifier.batch_size == 128
    assert (classifier.optimizer.learning_rate, classifier.optimizer.warmup_epochs) == (0.01, 20)
    assert recipe("cifar10", "arpl").optimizer.learning_rate == 0.1
    for protocol in ("mnist", "svhn", "cifar+10", "tinyimagenet-closed"):
        for method in ("cross_entropy", "arpl"):
            of_vaze = recipe(protocol, method)
            assert (of_vaze.epochs, of_vaze.optimizer.warmup_epochs) == (600, 20), "not the contrastive recipe's"
    assert recipe("digits", "arpl").epochs == recipe("digits").epochs
    names = {(recipe("digits", method).folder, recipe("digits", method).model_name) for method in METHODS}
    assert len(names) == len(METHODS) and (Path("runs/digits-0-seed0"), "gradmix-digits") in names
    assert all(method in METHOD_HELP for method in METHODS), "the help names every method"


def test_an_option_of_another_method_is_not_there(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--method", "cross_entropy", "--objective.theta", "1"])
    assert "Unrecognized options: --objective.theta" in capsys.readouterr().err


def test_phases_replace_epochs_and_weights():
    config = TrainConfig(phases=("600:0:1", "10:1:1.2"))
    assert config.total_epochs == 610
    assert (config.objective_at(599).theta, config.objective_at(599).lam) == (0.0, 1.0)
    assert (config.objective_at(600).theta, config.objective_at(600).lam) == (1.0, 1.2)
    assert config.objective_at(0).temperature == config.objective.temperature
    with pytest.raises(IndexError):
        config.objective_at(610)
    single = TrainConfig(epochs=5)
    assert single.total_epochs == 5 and single.objective_at(4) == single.objective


def test_the_identity_follows_what_is_computed_and_nothing_else():
    base = TrainConfig()
    for change in ({"seed": 1}, {"epochs": 3}, {"mixing": MixingConfig(num_patches=2)}, {"batch_size": 8}):
        assert dataclasses.replace(base, **change).identity != base.identity, change
    for change in ({"run_dir": Path("x")}, {"k": 3}, {"log_every": 1}, {"checkpoint_minutes": 2.0}):
        assert dataclasses.replace(base, **change).identity == base.identity, change


def test_every_field_has_help_and_a_reader():
    """A knob without an explanation, or one that nothing reads, is a lie to whoever sets it."""
    own = Path(config_module.__file__).read_text() + (ROOT / "data_pipeline/views.py").read_text()
    # Readers, not the checks of ranges beside the fields themselves.
    code = re.sub(r"    def __post_init__.*?\n\n", "", own, flags=re.DOTALL) + "".join(
        path.read_text()
        for folder in ("trainer", "data_pipeline")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("config.py", "views.py")
    )
    classes = [c for name, c in vars(config_module).items() if name.endswith("Config") and dataclasses.is_dataclass(c)]
    assert len(classes) >= 7
    for owner in classes:
        for item in dataclasses.fields(owner):
            if not dataclasses.is_dataclass(item.type) and "Config" not in str(item.type):
                assert re.search(rf'    {item.name}: [^\n]+\n    """', own), f"{owner.__name__}.{item.name} has no help"
            assert re.search(rf"\.{item.name}\b", code), f"nothing reads {owner.__name__}.{item.name}"


def test_light_modules_import_torch_and_numpy_only():
    modules = ["trainer.gradmix", "trainer.losses", "trainer.attribution", "trainer.metrics", "trainer.open_set"]
    modules += ["trainer.mixing", "trainer.evaluation", "trainer.reproduce", "data_pipeline.views"]
    heavy = ("ffcv", "deepspeed", "ray", "mlflow", "tyro", "rich", "torchvision", "sklearn", "pyarrow", "PIL")
    program = f"import sys, {', '.join(modules)}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("alias", ["latest", "v3", "two words", "a/b", "a@b", "naïve"])
def test_an_alias_that_mlflow_does_not_take_is_refused_at_once(alias):
    with pytest.raises(InputError, match=r"alias is .*; use letters, digits"):
        TrackingConfig(alias=alias)
    assert TrackingConfig(alias="").alias == "" and TrackingConfig(alias="v3-careful_1").alias == "v3-careful_1"
