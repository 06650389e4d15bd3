"""The search space: what is drawn is always a configuration, and what is written wrongly is one line."""

from __future__ import annotations

import dataclasses
import re

import optuna
import pytest

from data_pipeline.errors import InputError
from trainer.config import TrainConfig
from trainer.recipes import recipe
from tuning.space import DEFAULT_SPACE, SearchSpace

optuna.logging.set_verbosity(optuna.logging.ERROR)


def drawn(space: SearchSpace, count: int) -> list[dict]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [study.ask(space.distributions).params for _ in range(count)]


def test_every_draw_of_the_default_space_is_a_configuration_in_order():
    space = SearchSpace.read(DEFAULT_SPACE, TrainConfig())
    zeros = []
    for values in drawn(space, 300):
        config = space.apply(recipe("digits"), values)
        assert 0 < config.mixing.gamma_min <= config.mixing.gamma_max <= 0.9
        theta, lam = values["objective.theta"], values["objective.lam"]
        assert config.objective.theta == (0 if theta < 0.1 and (lam >= 0.1 or theta < lam) else theta)
        assert config.objective.lam == (0 if lam < 0.1 and (theta >= 0.1 or lam < theta) else lam)
        zeros.append((config.objective.theta == 0, config.objective.lam == 0))
        # Nothing else has moved.
        back = dataclasses.replace(config, objective=recipe("digits").objective, mixing=recipe("digits").mixing)
        assert back == recipe("digits")
    assert set(zeros) == {(False, False), (True, False), (False, True)} and zeros.count((False, False)) > 180


def test_the_entries_that_the_file_offers_work(tmp_path):
    text = DEFAULT_SPACE.read_text()
    path = tmp_path / "space.yaml"
    path.write_text(re.sub(r"^# (?=[a-z]+\.[a-z_]+: \{)", "", text, flags=re.MULTILINE))
    space = SearchSpace.read(path, TrainConfig())
    assert len(space.distributions) == 11
    for values in drawn(space, 50):
        config = space.apply(TrainConfig(), values)
        assert config.mixing.layers == tuple(values["mixing.layers"].split("+"))
        assert isinstance(config.mixing.num_patches, int) and config.mixing.gradient_sign in (1, -1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names nothing to vary"),
        ("a: [", "not a readable search space"),
        ("objective.thta: {low: 0.1, high: 1.0}", "unknown field 'thta'; known: .*theta"),
        ("seed.more: {low: 1, high: 2}", "seed has no fields"),
        ("objective.theta: 3", "objective.theta is 3; write"),
        ("objective.theta: {low: 0.1}", "bounds 0.1 and None; give two numbers"),
        ("objective.theta: {low: 2.0, high: 1.0}", "objective.theta: .*low"),
        ("objective.theta: {low: 0.0, high: 1.0, log: true}", "objective.theta: "),
        ("objective.theta: {min: 0.0, high: 1.0}", "unknown key in .*'min'; known: low"),
        ("objective.temperature: {choices: []}", "needs a list of choices"),
        ("objective.temperature: {low: -1.0, high: 1.0}", "temperature is -1.0; set it above 0"),
        ("mixing.num_patches: {low: 1, high: 40}", "num-patches is 40; set it within 1 to 16"),
        ("mixing.layers: {choices: [conv9, conv5_2]}", r"\('conv9',\) is no value of layers: give tuple.*'conv5_2'"),
        ("mixing.place: {choices: [peak, nowhere]}", "'nowhere' is no value of place: give Literal.*'least'"),
        ("objective.theta: {choices: [a]}", "'a' is no value of theta: give float"),
        ("mixing.num_patches: {low: 1.0, high: 4.0}", "1.0 is no value of num_patches: give int"),
        ("objective.theta: {low: 0.1, high: 1.0, log: maybe}", "log 'maybe'; write true or false"),
        ("epochs: {low: 1, high: 5}", "epochs cannot be varied"),
        ("objective.lam: {low: 0.1, high: 1.0, zero_below: 2.0}", "zero_below 2.0; set it between 0.1 and 1.0"),
    ],
)
def test_what_is_written_wrongly_is_named(text, message, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        SearchSpace.read(path, TrainConfig())
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a readable search space"):
        SearchSpace.read(path, TrainConfig())
