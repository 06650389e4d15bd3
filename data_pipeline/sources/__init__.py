"""Indexed datasets of (uint8 H×W×C image, label): digits, MNIST, SVHN, CIFAR, TinyImageNet, image folder, Parquet.

`open_source` is the way in. Every source knows all its labels without decoding an image, holds no open file, and may be
read from many threads, forked workers or pickled copies at once.
"""

from data_pipeline.sources.datasets import SOURCE_KINDS, check_classes, check_not_empty, open_source
from data_pipeline.sources.files import image_files
from data_pipeline.sources.source import CorruptImageError, Source

__all__ = [
    "SOURCE_KINDS",
    "CorruptImageError",
    "Source",
    "check_classes",
    "check_not_empty",
    "image_files",
    "open_source",
]
