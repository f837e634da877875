"""The hash of a split is of its examples: the same split the same, another one another."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mplug2.data.digest import digest
from mplug2.data.handwriting import Handwriting
from mplug2.data.stream import Mixture

DATA = Handwriting("question", examples=3000)


@dataclass(frozen=True)
class Changed:
    """A data set with one pixel changed in every example."""

    data: Any

    def source(self, split: str) -> Any:
        source = self.data.source(split)
        return [self._changed(source[index]) for index in range(20)]

    def _changed(self, example: dict[str, Any]) -> dict[str, Any]:
        clips = example["clips"].copy()
        clips[0, 0, 0] ^= np.uint8(1)
        return example | {"clips": clips}


@dataclass(frozen=True)
class Few(Changed):
    def _changed(self, example: dict[str, Any]) -> dict[str, Any]:
        return example


def test_the_hash_of_a_split_is_of_its_examples():
    found = digest(DATA)
    assert found == digest(replace(DATA)) and len(found) == 64
    others = [digest(DATA, "validation"), digest(replace(DATA, seed=1)), digest(replace(DATA, examples=2999))]
    others += [digest(replace(DATA, view="caption")), digest(Mixture({DATA: 1, replace(DATA, seed=1): 2}))]
    assert len({found, *others}) == 6
    assert digest(Few(DATA)) != digest(Changed(DATA))
