"""What the evaluators refuse, because the number they would make of it looked right: one line that says whose it is."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from data_pipeline.errors import InputError


def check_finite(made: Tensor, what: str, images: str) -> None:
    """Raises `InputError` unless `what` a model made of M images, (M, ...), is finite throughout."""
    finite = made.isfinite()
    if finite.all():
        return
    spoilt = int((~finite).flatten(1).any(dim=1).sum())
    raise InputError(
        f"{spoilt} of {len(made)} {images} have {what} that are not finite: look at the model's mean and std, or "
        "measure another model, since the training of this one may have diverged"
    )


def check_labels(labels: np.ndarray | Tensor, classes: int, images: str, whose: str) -> None:
    """Raises `InputError` unless the labels (M,) of images, on the CPU, are places 0 to `classes` - 1."""
    values = np.asarray(labels)
    wrong = int(((values < 0) | (values >= classes)).sum())
    if wrong:
        raise InputError(
            f"{wrong} of {len(values)} {images} have labels outside of 0 to {classes - 1}, the classes of {whose}: "
            "number the known classes from 0, alike in train and test_known, and keep images of others in test_unknown"
        )
