"""Handwriting: views of composed scenes as random-access sources of raw examples.

`Handwriting(view, frames, canvas).source(split)[index]` -> dict with `index`, `clips` uint8 T H W C unless
the view is text only, and the view's fields:

    digit          one digit: `label` = its kind, `caption`
    caption        the canonical `caption`
    describe       a partial description as `text`; half of the scenes hold one digit
    question       `question`, `answer`, `type`
    scene          everything at once: canonical `caption`, partial `text`, `question`, `answer`, `type`
    retrieval      canonical `caption`s, all distinct in validation and test
    text           `text` = a canonical caption, without the scene
    entail         `text` = "<caption> . <statement>", `label` 1 if it follows, else 0
    text_question  `text` = "<caption> . <question>", `target` = its answer, `type`

Train scenes are a pure function of (seed, view, frames, canvas, index), composed from train glyphs when they
are asked for; validation and test scenes are read from the data set that `mplug2.data.builders` writes once.
"""

import functools
import hashlib
from dataclasses import dataclass
from random import Random
from typing import Any

from mplug2.data import grammar, scenes
from mplug2.data.glyphs import check_split
from mplug2.errors import DataError, nearest

VIEWS = ("digit", "caption", "describe", "question", "scene", "retrieval", "text", "entail", "text_question")
TEXT_VIEWS = ("text", "entail", "text_question")
_NOT_IN_TEXT = ("size",)  # a canonical caption does not say sizes


@dataclass(frozen=True)
class Handwriting:
    """One view of handwriting: clips of `frames` frames on a square `canvas` of pixels."""

    view: str
    frames: int = 1
    canvas: int = 32
    examples: int = 1_000_000  # to a train epoch
    seed: int = 0  # of the train split; validation and test are fixed

    def __post_init__(self) -> None:
        if self.view not in VIEWS:
            known = ", ".join(VIEWS)
            raise DataError(
                f'unknown view "{self.view}" of handwriting; known are {known}{nearest(self.view, VIEWS)}'
            )

    def source(self, split: str) -> Any:
        """Examples of `split` ("train", "validation" or "test"), by index; a Grain random-access source."""
        if check_split(split) == "train":
            return Composed(self, split)
        from mplug2.data.builders import prepared  # TFDS, which training does not need

        return prepared(self, split)


@dataclass(frozen=True)
class Composed:
    """Examples composed as they are asked for; the same index gives the same example in any process."""

    data: Handwriting
    split: str

    def __len__(self) -> int:
        return self.data.examples

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, fields = self.draw(index)
        fields["index"] = index
        if self.data.view not in TEXT_VIEWS:
            fields["clips"] = scenes.render(scene)
        return fields

    def texts(self, index: int) -> dict[str, str]:
        """The strings of an example alone, without rendering its scene."""
        return {name: value for name, value in self.draw(index)[1].items() if isinstance(value, str)}

    def fits(self, index: int) -> frozenset[str]:
        """All captions and descriptions, partial or not, that hold of an example's scene."""
        return grammar.truths(self.draw(index)[0])

    def draw(self, index: int) -> tuple[scenes.Scene, dict[str, Any]]:
        """The scene of an example, and its fields without pixels."""
        data = self.data
        key = f"{data.seed}/{self.split}/{data.view}/{data.frames}/{data.canvas}/{index}".encode()
        rng = Random(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()))
        compose = functools.partial(scenes.compose, rng, self.split, data.frames, data.canvas)
        return _DRAW[data.view](rng, compose, data.frames)


_Drawn = tuple[scenes.Scene, dict[str, Any]]


def _digit(rng: Random, compose: grammar.Compose, frames: int) -> _Drawn:
    scene = compose(layout="corner" if frames == 1 else "motion")
    return scene, {"caption": grammar.caption(scene), "label": scene.digits[0].kind}


def _caption(rng: Random, compose: grammar.Compose, frames: int) -> _Drawn:
    scene = compose()
    return scene, {"caption": grammar.caption(scene)}


def _describe(rng: Random, compose: grammar.Compose, frames: int) -> _Drawn:
    alone = frames == 1 and rng.random() < 0.5
    scene = compose(count=1) if alone else compose(count=rng.randint(2, 3)) if frames == 1 else compose()
    return scene, {"text": grammar.describe(scene, rng)}


def _question(rng: Random, compose: grammar.Compose, frames: int) -> _Drawn:
    asked = grammar.ask(rng, compose, frames)
    return asked.scene, {"question": asked.question, "answer": asked.answer, "type": asked.type}


def _scene(rng: Random, compose: grammar.Compose, frames: int) -> _Drawn:
    scene, asked = _question(rng, compose, frames)
    return scene, asked | {"caption": grammar.caption(scene), "text": grammar.describe(scene, rng)}


def _text(rng: Random, compose: grammar.Compose, frames: int) -> _Drawn:
    scene = compose()
    return scene, {"text": grammar.caption(scene)}


def _entail(rng: Random, compose: grammar.Compose, frames: int) -> _Drawn:
    scene, statement, label = grammar.state(rng, compose, frames)
    return scene, {"text": f"{grammar.caption(scene)} . {statement}", "label": label}


def _text_question(rng: Random, compose: grammar.Compose, frames: int) -> _Drawn:
    asked = grammar.ask(rng, compose, frames, unless=_NOT_IN_TEXT)
    text = f"{grammar.caption(asked.scene)} . {asked.question}"
    return asked.scene, {"text": text, "target": asked.answer, "type": asked.type}


_DRAW = {
    "digit": _digit,
    "caption": _caption,
    "describe": _describe,
    "question": _question,
    "scene": _scene,
    "retrieval": _caption,
    "text": _text,
    "entail": _entail,
    "text_question": _text_question,
}
