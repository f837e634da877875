"""Prediction: a composed network that captions, answers and classifies, `clips` uint8 `B T H W C` in, texts
out.

Each of the three is a function of mplug2.inference, compiled for few numbers of rows (`in_buckets`), whatever
callers send. It composes what it needs, so a network without `text` still captions.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mplug2 import adapt, hub
from mplug2.card_wording import wording_of_cards
from mplug2.data.clips import frame_count, read_video
from mplug2.data.pixels import Preprocessing, read_image
from mplug2.data.scenes import CORNERS
from mplug2.data.tokens import Tokenizer
from mplug2.data.wording import Wording
from mplug2.errors import CardError, DataError
from mplug2.generate import Greedy, Search
from mplug2.hub.card import Card
from mplug2.hub.card_tokenizer import tokenizer_of
from mplug2.hub.gate import NONE
from mplug2.inference import (
    Compiled,
    Compute,
    Writer,
    answers,
    captions,
    class_vectors,
    in_buckets,
    scaled_vision_vectors,
    text_vectors,
)
from mplug2.network import Network, Parameters
from mplug2.sharding import Mesh

TEMPLATES = ("a {}", *(f"a {{}} at the {corner}" for corner in CORNERS))
"""Sentences of the handwriting world with `{}` for a class; "a" becomes "an" where it should."""


class Predictor:
    """A network with its parameters, tokenizer and preprocessing, ready to be asked.

    `length`: ids that a question or a prompt is cut or padded to; `wording`: how questions were worded in
    training (None: as they were); `mesh`: devices of this process that it is spread over (None: one).
    Methods raise RecipeError, naming what is missing, when the network lacks a module that they compose, and
    DataError for inputs of another shape or type.
    """

    def __init__(
        self,
        network: Network,
        params: Parameters,
        tokenizer: Tokenizer,
        preprocessing: Preprocessing,
        *,
        search: Search = Greedy(length=24),  # noqa: B008  frozen
        length: int = 32,
        wording: Wording | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self.network, self.params = network, jax.tree.map(jnp.asarray, params)
        self.tokenizer, self.preprocessing, self.wording = tokenizer, preprocessing, wording
        # A text encoder has a table of positions, and no more of them.
        tables: list[Any] = [config for config in network.configs.values() if hasattr(config, "positions")]
        self.length = min([length, *(config.positions for config in tables)])
        special = tokenizer.table()
        self._write = Writer(search, special["begin"], special["end"])
        self._compiled = Compiled(network, self.params, preprocessing, mesh)
        self.cards: Mapping[str, Card] = NONE

    @classmethod
    def of(cls, *cards: Card | str | Path, mesh: Mesh | None = None) -> "Predictor":
        """Of cards, shelf names, families or directories (default: the shelf), with the tokenizer,
        preprocessing and wording that the cards state, loaded onto a `mesh` (default: one device). Raises
        CardError where they do not fit together, or state no tokenizer or preprocessing, RecipeError for a
        mesh of more devices than this process has."""
        devices = None if mesh is None else mesh.build(jax.local_devices())

        def composed() -> tuple[Mapping[str, Card], tuple[Network, Parameters], Tokenizer]:
            chosen = hub.cards(*cards)
            return chosen, hub.compose(*chosen.values(), mesh=devices), tokenizer_of(chosen.values())

        chosen, (network, params), tokenizer = hub.again(composed)
        made = cls(
            network,
            params,
            tokenizer,
            preprocessing_of(chosen.values()),
            wording=wording_of_cards(chosen.values()),
            mesh=devices,
        )
        made.cards = chosen
        return made

    def adapted(self, *cards: Card | str | Path, deltas: adapt.Deltas = NONE) -> "Predictor":
        """This predictor with these deltas and no others, of cards or as they are: ask the one that a request
        wants. They share what is compiled, unless either has a prompt, and this one stays as it is. Raises
        CardError for the delta of another base than the card that this predictor is of, or where it is of a
        run or a bundle, which has no cards to compare with; RecipeError for one of another module."""
        if cards and not self.cards:
            raise CardError(
                "this predictor is not made of cards, so the base of a delta's card cannot be compared: "
                "use Predictor.of, or give the deltas themselves, deltas={module: (config, params)}"
            )
        loaded = hub.deltas(self.cards, *cards) if cards else {}
        other = copy.copy(self)
        other.network, other.params = adapt.beside(self.network, self.params, {**loaded, **deltas})
        other.params = jax.tree.map(jnp.asarray, other.params)
        other._compiled = self._compiled.on(other.network, other.params)
        return other

    def image(self, path: str | Path) -> np.ndarray:
        """A picture file -> clips uint8 `1 1 H W C`. Raises DataError for one that cannot be read."""
        return self.preprocessing.from_pil(read_image(path))[None]

    def video(self, path: str | Path) -> np.ndarray:
        """A video file -> clips uint8 `1 T H W C`. Raises DataError for one that cannot be read, is empty, or
        is shorter than T frames: frames shown twice would be an event that is not there."""
        frames, there = self.preprocessing.frames, frame_count(path)
        if 0 < there < frames:
            raise DataError(f"the video {path} has {there} frame(s), fewer than the {frames} asked for")
        return self.preprocessing.from_frames(read_video(path, frames))[None]

    def caption(self, clips: np.ndarray) -> list[str]:
        """A caption for each clip."""
        return self._texts(self._asked(captions, self._write)(_batch(clips)))

    def answer(self, clips: np.ndarray, question: str | Sequence[str]) -> list[str]:
        """An answer for each clip, to one question or to one each."""
        questions = [question] * len(clips) if isinstance(question, str) else list(question)
        if len(questions) != len(clips):
            raise DataError(
                f"{len(questions)} questions for {len(clips)} clips: give one, or one for each clip"
            )
        if self.wording is not None:
            questions = [self.wording.question(one, "test") for one in questions]
        batch = _batch(clips) | {"question": self._ids(questions)}
        return self._texts(self._asked(answers, self._write)(batch))

    def classify(
        self, clips: np.ndarray, classes: Sequence[str], templates: Sequence[str] = TEMPLATES
    ) -> np.ndarray:
        """Probabilities float32 `B classes`: how near each clip is to the mean of a class's prompts."""
        if not classes or not templates or any("{}" not in template for template in templates):
            raise DataError(
                f"classes need a name, and templates a {{}} for it; got {list(classes)}, {list(templates)}"
            )
        prompts = [fill(template, one) for one in classes for template in templates]
        vectors = self._asked(text_vectors)({"text": self._ids(prompts)})
        names = class_vectors(vectors, len(classes))
        logits = self._asked(scaled_vision_vectors)(_batch(clips)) @ names.T
        likely = np.exp(logits - logits.max(-1, keepdims=True))
        return likely / likely.sum(-1, keepdims=True)

    def unknown(self, text: str) -> list[str]:
        """Words of a text that the tokenizer does not give back as they are."""
        words = dict.fromkeys(re.findall(r"[^\W_]+", _text(text).lower()))
        return [
            word for word in words if self.tokenizer.decode(self.tokenizer.encode(word, self.length)) != word
        ]

    def is_cut(self, text: str) -> bool:
        """Whether the end of a text is not read: it has more than `length` tokens."""
        pad = self.tokenizer.table()["pad"]
        whole = self.tokenizer.encode(_text(text), self.length + 4 * len(text))  # at most one of every byte
        return int((whole != pad).sum()) > self.length

    def _asked(self, outputs: Callable[..., Any], *fixed: Any) -> Compute:
        return in_buckets(self._compiled(outputs, *fixed))

    def _ids(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self.tokenizer.encode(_text(text), self.length) for text in texts])

    def _texts(self, ids: np.ndarray) -> list[str]:
        return [self.tokenizer.decode(row) for row in ids]


def _text(text: str) -> str:
    """Raises DataError for what no tokenizer can read: half of a surrogate pair, as Python reads bytes that
    are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f'"{text}" is not text: {text[error.start]!r} is no letter') from None
    return text


def _batch(clips: np.ndarray) -> dict[str, np.ndarray]:
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[-1] != 3 or not clips.size:
        raise DataError(f"expected clips uint8 B T H W 3, got {clips.dtype} {clips.shape}")
    return {"clips": clips, "index": np.arange(len(clips), dtype=np.int32)}


def fill(template: str, name: str) -> str:
    """A template with its class: "a {}" and "eight" -> "an eight"."""
    return re.sub(r"\ba (?=[aeiou])", "an ", template.replace("{}", name))


def preprocessing_of(cards: Iterable[Card]) -> Preprocessing:
    """The preprocessing that cards state. Raises CardError if there is none."""
    for card in cards:
        if card.preprocessing is not None:
            return card.preprocessing
    raise CardError("none of the cards states a preprocessing; those of vision modules do")
