"""The search space: from a file to distributions, and from drawn values to a training configuration.

`space.yaml` beside this file is the default, with the reasons for its ranges.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
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
_OWN = ("gamma_min", "gamma_share")
_SET_BY_THE_SWEEP = ("protocol", "split", "epochs", "phases", "data", "run_dir", "checkpoint_every", "tracking")
_KEYS = ("low", "high", "log", "zero_below", "choices")


@dataclass(frozen=True)
class SearchSpace:
    """What is varied, by name: a path into `TrainConfig`, or `gamma_min` or `gamma_share`."""

    distributions: dict[str, BaseDistribution]
    zero_below: dict[str, float] = field(default_factory=dict)
    """What is drawn below this counts as 0, which a logarithmic range never reaches."""

    @classmethod
    def read(cls, path: Path, base: TrainConfig) -> SearchSpace:
        """The space of a YAML file, to vary `base` with; raises `InputError` that names the entry and what is wrong."""
        try:
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise InputError(f"{path} is not a readable search space ({' '.join(str(error).split())})") from error
        if not isinstance(entries, dict) or not entries:
            raise InputError(
                f"{path} names nothing to vary: write entries like objective.theta: {{low: 0.1, high: 10}}"
            )
        distributions = {str(name): _distribution(f"{path}: {name}", entry) for name, entry in entries.items()}
        for name, distribution in distributions.items():
            _check(f"{path}: {name}", name, distribution, base)
        zeros = {str(name): entry["zero_below"] for name, entry in entries.items() if "zero_below" in entry}
        return cls(distributions, zeros)

    def apply(self, base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
        """`base` with the drawn `values` in place."""
        tree: dict[str, Any] = {}
        for name, value in self._with_zeros(values).items():
            if name not in _OWN:
                *path, last = name.split(".")
                node = tree
                for part in path:
                    node = node.setdefault(part, {})
                node[last] = value
        base = _replaced(base, tree)
        mixing = base.mixing
        if "gamma_min" in values or "gamma_share" in values:
            low = values.get("gamma_min", mixing.gamma_min)
            high = low + values["gamma_share"] * (LARGEST_GAMMA - low) if "gamma_share" in values else mixing.gamma_max
            mixing = dataclasses.replace(mixing, gamma_min=low, gamma_max=max(low, high))
        return dataclasses.replace(base, mixing=mixing)

    def _with_zeros(self, values: Mapping[str, Any]) -> dict[str, Any]:
        small = {name for name, least in self.zero_below.items() if name in values and values[name] < least}
        if {"objective.theta", "objective.lam"} <= small:
            # Not both: only their ratio counts then, and the larger one stays.
            small.remove(max("objective.theta", "objective.lam", key=values.__getitem__))
        return {name: 0.0 if name in small else value for name, value in values.items()}


def _distribution(where: str, entry: Any) -> BaseDistribution:
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r}; write {{low: ..., high: ...}} or {{choices: [...]}}")
    strange = entry.keys() - set(_KEYS)
    if strange:
        raise unknown_name(f"key in {where}", min(strange, key=str), _KEYS)
    if "choices" in entry:
        choices = entry["choices"]
        if entry.keys() != {"choices"} or not isinstance(choices, list) or not choices:
            raise InputError(f"{where} needs a list of choices and nothing else")
        return CategoricalDistribution(choices)
    if not isinstance(entry.get("log", False), bool):
        raise InputError(f"{where} has log {entry['log']!r}; write true or false")
    low, high, log = entry.get("low"), entry.get("high"), entry.get("log", False)
    if any(isinstance(bound, bool) or not isinstance(bound, (int, float)) for bound in (low, high)):
        raise InputError(f"{where} has the bounds {low!r} and {high!r}; give two numbers, low and high")
    least = entry.get("zero_below")
    if least is not None and not (type(least) in (int, float) and low <= least < high):
        raise InputError(f"{where} has zero_below {least!r}; set it between {low} and {high}")
    kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    try:
        return kind(low, high, log=log)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _check(where: str, name: str, distribution: BaseDistribution, base: TrainConfig) -> None:
    """Make sure that whatever is drawn is a configuration: the ends of a range and every choice are tried."""
    if name.partition(".")[0] in _SET_BY_THE_SWEEP:
        raise InputError(f"{where} cannot be varied: options of the sweep set it")
    if isinstance(distribution, CategoricalDistribution):
        drawn = list(distribution.choices)
    else:
        drawn = [distribution.low, distribution.high]
    try:
        for value in drawn:
            SearchSpace({}).apply(base, {name: value})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _replaced(config: Any, changes: Mapping[str, Any]) -> Any:
    """`config` with the fields that `changes` names; what it names of a field that is itself a configuration, in that.

    All fields of one configuration change at once: between two valid states there need not be one for each step.
    """
    fields = {field.name for field in dataclasses.fields(config)}
    new = {}
    for name, value in changes.items():
        if name not in fields:
            raise unknown_name("field", name, (*sorted(fields), *_OWN))
        present = getattr(config, name)
        if isinstance(value, dict):
            if not dataclasses.is_dataclass(present):
                raise InputError(f"field {name} has no fields of its own: leave out .{next(iter(value))}")
            value = _replaced(present, value)
        else:
            if isinstance(present, tuple) and isinstance(value, str):
                value = tuple(value.split("+"))
            kind = typing.get_type_hints(type(config))[name]
            if not _fits(value, kind):
                kind = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
                raise InputError(f"{value!r} is no value of {name}: give {kind}")
        new[name] = value
    return dataclasses.replace(config, **new)


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the annotated type `kind`, as far as those of a configuration's fields go."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in inner
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, inner[0]) for each in value)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind if kind in (int, bool, str, type(None)) else True
