"""The search space: from a file to distributions, and from drawn values to a training configuration.

`space.yaml` beside this file is the default, with the reasons for its ranges.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from data_pipeline.errors import InputError, unknown_name
from trainer.config import TrainConfig

DEFAULT_SPACE = Path(__file__).with_name("space.yaml")

LARGEST_GAMMA = 0.9
_OWN = ("zero", "gamma_min", "gamma_share")


@dataclass(frozen=True)
class SearchSpace:
    """What is varied, by name: a path into `TrainConfig`, or one of `zero`, `gamma_min` and `gamma_share`."""

    distributions: dict[str, BaseDistribution]

    @classmethod
    def read(cls, path: Path) -> SearchSpace:
        """The space of a YAML file; raises `InputError` that names the entry and what is wrong with it."""
        try:
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"{path} is not a readable search space ({' '.join(str(error).split())})") from error
        if not isinstance(entries, dict) or not entries:
            raise InputError(
                f"{path} names nothing to vary: write entries like objective.theta: {{low: 0.1, high: 10}}"
            )
        space = cls({str(name): _distribution(f"{path}: {name}", entry) for name, entry in entries.items()})
        for name, distribution in space.distributions.items():
            _check(f"{path}: {name}", name, distribution)
        return space

    def apply(self, base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
        """`base` with the drawn `values` in place."""
        for name, value in values.items():
            if name not in _OWN:
                base = _replaced(base, name.split("."), value)
        mixing, objective = base.mixing, base.objective
        if "gamma_min" in values or "gamma_share" in values:
            low = values.get("gamma_min", mixing.gamma_min)
            high = low + values["gamma_share"] * (LARGEST_GAMMA - low) if "gamma_share" in values else mixing.gamma_max
            mixing = dataclasses.replace(mixing, gamma_min=low, gamma_max=max(low, high))
        if values.get("zero", "none") != "none":
            objective = dataclasses.replace(objective, **{values["zero"]: 0.0})
        return dataclasses.replace(base, mixing=mixing, objective=objective)


def _distribution(where: str, entry: Any) -> BaseDistribution:
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}; write {{low: ..., high: ...}} or {{choices: [...]}}")
    strange = entry.keys() - {"low", "high", "log", "choices"}
    if strange:
        raise unknown_name(f"key in {where}", min(strange, key=str), ("low", "high", "log", "choices"))
    if "choices" in entry:
        choices = entry["choices"]
        if entry.keys() != {"choices"} or not isinstance(choices, list) or not choices:
            raise InputError(f"{where} needs a list of choices and nothing else")
        return CategoricalDistribution(choices)
    low, high, log = entry.get("low"), entry.get("high"), entry.get("log", False)
    if any(isinstance(bound, bool) or not isinstance(bound, (int, float)) for bound in (low, high)):
        raise InputError(f"{where} has the bounds {low!r} and {high!r}; give two numbers, low and high")
    kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    try:
        return kind(low, high, log=log)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _check(where: str, name: str, distribution: BaseDistribution) -> None:
    """Make sure that whatever is drawn is a configuration: the ends of a range and every choice are tried."""
    if isinstance(distribution, CategoricalDistribution):
        drawn = list(distribution.choices)
    else:
        drawn = [distribution.low, distribution.high]
    if name == "zero" and not set(drawn) <= {"none", "theta", "lam"}:
        raise InputError(f"{where} has the choices {drawn}; they may be none, theta and lam")
    try:
        for value in drawn:
            SearchSpace({}).apply(TrainConfig(), {name: value})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _replaced(config: Any, path: list[str], value: Any) -> Any:
    name, *rest = path
    fields = {field.name for field in dataclasses.fields(config)}
    if name not in fields:
        raise unknown_name("field", name, (*sorted(fields), *_OWN))
    if rest:
        inner = getattr(config, name)
        if not dataclasses.is_dataclass(inner):
            raise InputError(f"field {name} has no fields of its own: leave out .{'.'.join(rest)}")
        value = _replaced(inner, rest, value)
    elif isinstance(getattr(config, name), tuple) and isinstance(value, str):
        value = tuple(value.split("+"))
    return dataclasses.replace(config, **{name: value})
