"""What a data set owes to whoever reads it: a source of every split, and examples with the right fields. What
it does not keep, and what its code raises, is refused with its name, the example and the field.
"""

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from mplug2.errors import DataError
from mplug2.fields import said
from mplug2.mistakes import in_words


def source_of(data: Any, split: str, name: str) -> Any:
    """The source of a split of the data called `name`. Raises DataError unless it gives examples by index,
    one at least."""
    if isinstance(data, type) or not callable(getattr(data, "source", None)):
        raise DataError(f"{name} is {said(data)}, expected an object with a method source(split)")
    with in_words(f"{name}, its {split} split", kind=DataError):
        source = data.source(split)
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__") or isinstance(source, Mapping):
        raise DataError(
            f'{name}: source("{split}") gives {said(source)}, expected examples by index: a list, or an '
            "object with __len__ and __getitem__"
        )
    with in_words(f"{name}, the length of its {split} split", kind=DataError):
        count = len(source)
    if not count:
        raise DataError(f"{name} is empty: its {split} split holds no example")
    return source


def example_of(source: Any, index: int, name: str) -> Mapping[str, Any]:
    """An example, checked. Raises DataError."""
    with in_words(f"{name}, example {index}", kind=DataError):
        example = source[index]
        check(example)
    return example


def check(example: Any) -> None:
    """Raises DataError with the field that is not what a batch is made of: `index` and `label` whole numbers,
    `clips` uint8 T H W 3."""
    if not isinstance(example, Mapping):
        raise DataError(f"it is {said(example)}, expected a mapping of fields")
    if "index" not in example:
        raise DataError(
            f'it has no "index", the number of the example; it has {", ".join(map(str, example))}'
        )
    for field in ("index", "label"):
        if field in example and not _is_whole(example[field]):
            raise DataError(f'its "{field}" is {said(example[field])}, expected a whole number')
    clips = example.get("clips")
    if "clips" in example and not (
        isinstance(clips, np.ndarray)
        and clips.dtype == np.uint8
        and clips.ndim == 4
        and clips.shape[-1] == 3
        and clips.size
    ):
        raise DataError(f'its "clips" are {said(clips)}, expected an array uint8 (T, H, W, 3)')


def _is_whole(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
