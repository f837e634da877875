"""Pairs of clips and captions that do, and that do not, belong together: what matching is measured on."""

from collections.abc import Sequence
from typing import Any

from mplug2.errors import DataError


class Pairs:
    """The examples at some places, (source, index), as a data set: each with its caption as `text` and a
    false one as `other`.

    The false one begins like the true one: it is the next in the order of letters that does not hold of the
    clip, as far as the source knows (`fits`). Every caption is the false one of one example: so whoever reads
    captions alone, or sees clips alone, cannot tell. Raises DataError where there are no such pairs.
    """

    def __init__(self, places: Sequence[tuple[Any, int]]):
        self._places = places
        self._texts = [_texts(source, index)["caption"] for source, index in places]
        self._others = self._false()

    def source(self, split: str) -> "Pairs":
        return self

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, place: int) -> dict[str, Any]:
        source, index = self._places[place]
        return {**source[index], "text": self._texts[place], "other": self._texts[self._others[place]]}

    def _false(self) -> list[int]:
        """By place, the place whose caption is its false one: each once."""
        count, texts = len(self._places), self._texts
        order = sorted(range(count), key=lambda place: (texts[place], place))
        other = dict(zip(order, order[1:] + order[:1], strict=True))
        hold = [
            {texts[place], *(source.fits(index) if hasattr(source, "fits") else ())}
            for place, (source, index) in enumerate(self._places)
        ]
        for at, place in enumerate(order):
            if texts[other[place]] not in hold[place]:
                continue
            for near in order[at + 1 :] + order[:at]:
                if texts[other[near]] not in hold[place] and texts[other[place]] not in hold[near]:
                    other[place], other[near] = other[near], other[place]
                    break
            else:
                raise DataError(
                    f"no false pair for each of {count} examples: too many captions hold of the clip of "
                    f'"{texts[place]}"; matching is measured on clips that captions tell apart'
                )
        return [other[place] for place in range(count)]


def _texts(source: Any, index: int) -> dict[str, Any]:
    """The texts of an example, without its clips where the source can."""
    return source.texts(index) if hasattr(source, "texts") else source[index]
