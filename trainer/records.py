"""What is written down of a configuration, where others may read it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any


def without_password(uri: str) -> str:
    """`uri` as it may be shown: user and password removed."""
    return re.sub(r"://[^/]*@", "://", uri)


def as_record(config: Any) -> dict[str, Any]:
    """A configuration as the plain JSON values that are recorded of it: everything but passwords."""
    return without_passwords(json.loads(json.dumps(dataclasses.asdict(config), default=str)))


def without_passwords(record: Mapping[str, Any]) -> dict[str, Any]:
    """`record` with the URIs of MLflow stores as they may be shown, however deep they lie."""
    shown = dict(record)
    for key, value in record.items():
        if isinstance(value, Mapping):
            shown[key] = without_passwords(value)
        elif key in ("uri", "tracking_uri") and isinstance(value, str):
            shown[key] = without_password(value)
    return shown
