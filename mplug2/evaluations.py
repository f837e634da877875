"""Evaluations: what can be measured, one frozen dataclass a kind, held by `Recipe.evaluations`.

Each runs one compiled function over a split (mplug2.evaluate.Bench) and compares with two baselines:

- `blind` is measured from training data, never from the model (mplug2.blind): the most frequent training
  answer to the very same question text, else to its type; the most frequent training caption, scored by the
  same metric; the most frequent class. Of a text "description . question" it reads the question alone. For
  retrieval, a constant ranking, which is chance.
- `chance` is exact by construction: one over the number of classes, or of possible answers to such a question
  (from the grammar), k over the gallery. For captions, what training captions drawn at random score.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from mplug2 import blind
from mplug2.errors import RecipeError
from mplug2.evaluate import Batch, Bench, Example, Measured
from mplug2.generate import Greedy, Search
from mplug2.metrics import bleu, cider, exact_match, recall_at_k, rouge_l
from mplug2.roles import (
    Array,
    Connector,
    Contrastive,
    Decoder,
    Fusion,
    Head,
    Temporal,
    Text,
    Universal,
    Vision,
    padding_mask,
)
from mplug2.routes import fused_memory, read, see
from mplug2.scores import Score, corpus_score, mean_score

# ---------------------------------------------------------------------------------------------------------------------
# Classes


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Accuracy of `vision_classifier` on `clips`, `label`."""

    data: Any
    batch: int = 100

    def measure(self, bench: Bench) -> Measured:
        def classify(
            batch: Batch,
            *,
            vision: Vision,
            universal: Universal,
            vision_classifier: Head,
            temporal: Temporal | None = None,
            connector: Connector | None = None,
        ) -> Array:
            seen = see(
                batch["clips"], vision=vision, universal=universal, temporal=temporal, connector=connector
            )
            return vision_classifier(seen)

        return _classes(self.data, *bench.run(classify, self.data, {}, self.batch))


@dataclass(frozen=True, kw_only=True)
class TextClassification:
    """Accuracy of `text_classifier` on `text`, `label`; `length`: ids a text is cut or padded to."""

    data: Any
    length: int
    batch: int = 100

    def measure(self, bench: Bench) -> Measured:
        def classify(batch: Batch, *, text: Text, universal: Universal, text_classifier: Head) -> Array:
            return text_classifier(read(batch["text"], text=text, universal=universal))

        return _classes(self.data, *bench.run(classify, self.data, {"text": self.length}, self.batch))


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Accuracy of the class whose prompts lie nearest to the clip in the contrastive space; no class was trained as such.

    `classes`: what they are called, in the order of labels; `templates`: sentences with `{}` for the class. A class is the
    mean of its prompts' unit vectors, made a unit vector again. `length`: ids a prompt is cut or padded to.
    """

    data: Any
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    length: int = 32
    batch: int = 100

    def __post_init__(self) -> None:
        if not self.classes or not self.templates or any("{}" not in template for template in self.templates):
            raise RecipeError(
                f"zero-shot needs classes, and templates that hold {{}}; got {self.classes}, {self.templates}"
            )

    def measure(self, bench: Bench) -> Measured:
        def name(batch: Batch, *, text: Text, universal: Universal, contrastive: Contrastive) -> Array:
            prompts = contrastive.text(read(batch["prompt"], text=text, universal=universal))
            mean = prompts.reshape(len(self.classes), len(self.templates), -1).mean(1)
            return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)

        prompts = [template.replace("{}", one) for one in self.classes for template in self.templates]
        ids = np.stack([bench.tokenizer.encode(prompt, self.length) for prompt in prompts])
        names = bench.compile(name)({"prompt": ids})

        def look(
            batch: Batch,
            *,
            vision: Vision,
            universal: Universal,
            contrastive: Contrastive,
            temporal: Temporal | None = None,
            connector: Connector | None = None,
        ) -> Array:
            seen = see(
                batch["clips"], vision=vision, universal=universal, temporal=temporal, connector=connector
            )
            return contrastive.vision(seen) @ batch["names"].T

        def prepare(batch: dict[str, np.ndarray]) -> dict[str, Any]:
            return batch | {"names": names}

        return _classes(self.data, *bench.run(look, self.data, {}, self.batch, prepare), self.classes)


def _classes(
    data: Any, examples: Sequence[Example], logits: np.ndarray, names: Sequence[str] = ()
) -> Measured:
    """Accuracy of the highest of `N classes` logits."""
    said, truth = logits.argmax(-1), np.array([example["label"] for example in examples])
    correct = (said == truth).astype(float)
    source = data.source("train")
    count = min(len(source), 1000)  # labels come with pixels
    usual = blind.most_frequent(source[index]["label"] for index in range(count))
    score = mean_score("accuracy", correct, blind=float((truth == usual).mean()), chance=1 / logits.shape[-1])
    named = (lambda label: names[label]) if names else int
    return Measured({"": score}, _predictions(examples, map(named, truth), map(named, said), correct))


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """R@1, R@5 and R@10 of texts for clips and of clips for texts, `clips`, `caption`; the gallery is the whole split.

    Equal captions are right for each other's clips; equal similarities rank by index. Scores are `/text_to_image@1` and so
    on (`video` where clips have more than one frame).
    """

    data: Any
    length: int
    batch: int = 100

    def measure(self, bench: Bench) -> Measured:
        frames: set[int] = set()

        def embed(
            batch: Batch,
            *,
            vision: Vision,
            text: Text,
            universal: Universal,
            contrastive: Contrastive,
            temporal: Temporal | None = None,
            connector: Connector | None = None,
        ) -> tuple[Array, Array]:
            frames.add(batch["clips"].shape[1])
            seen = see(
                batch["clips"], vision=vision, universal=universal, temporal=temporal, connector=connector
            )
            tokens = read(batch["caption"], text=text, universal=universal)
            return contrastive.vision(seen), contrastive.text(tokens)

        examples, (seen, said) = bench.run(embed, self.data, {"caption": self.length}, self.batch)
        captions = np.array([example["caption"] for example in examples])
        same = captions[:, None] == captions[None]
        clip = "image" if frames == {1} else "video"
        scores, gallery = {}, len(examples)
        similarity = seen @ said.T
        for name, one_way in ((f"text_to_{clip}", similarity.T), (f"{clip}_to_text", similarity)):
            recall = recall_at_k(one_way, same)
            for k in recall.at:
                chance = float(np.mean([_chance_of_hit(right, gallery, k) for right in same.sum(1)]))
                hits = recall.hits(k)
                scores[f"/{name}@{k}"] = mean_score(f"R@{k} of {gallery}", hits, blind=chance, chance=chance)
        nearest_text = similarity.argmax(1)
        correct = same[np.arange(gallery), nearest_text]
        return Measured(
            scores, _predictions(examples, captions.tolist(), captions[nearest_text].tolist(), correct)
        )


def _chance_of_hit(right: int, gallery: int, k: int) -> float:
    """That `k` of a gallery, drawn without replacement, hold one of the `right` ones."""
    missed = 1.0
    for drawn in range(min(k, gallery)):
        missed *= max(0, gallery - right - drawn) / (gallery - drawn)
    return 1 - missed


# ---------------------------------------------------------------------------------------------------------------------
# Generated text


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """Exact match, BLEU-4, ROUGE-L and CIDEr of generated captions, `clips`, `caption`: `/exact` `/bleu4` `/rouge_l`
    `/cider`. Texts are compared in lower case, words parted by blanks."""

    data: Any
    search: Search = field(default_factory=Greedy)
    batch: int = 100

    def measure(self, bench: Bench) -> Measured:
        def caption(
            batch: Batch,
            *,
            vision: Vision,
            universal: Universal,
            decoder: Decoder,
            temporal: Temporal | None = None,
            connector: Connector | None = None,
        ) -> Array:
            seen = see(
                batch["clips"], vision=vision, universal=universal, temporal=temporal, connector=connector
            )
            return bench.write(decoder, seen, None, self.search, batch)

        examples, ids = bench.run(caption, self.data, {}, self.batch)
        said, truth = bench.texts(ids), [_plain(example["caption"]) for example in examples]
        usual = [_plain(example["caption"]) for example in blind.training_examples(self.data)]
        constant = [blind.most_frequent(usual)] * len(truth)
        guessed = blind.random_captions(usual, len(truth))
        references = [[text] for text in truth]
        scores = {}
        for name, label, metric in (
            ("/exact", "exact match", exact_match),
            ("/rouge_l", "ROUGE-L", rouge_l),
            ("/cider", "CIDEr", cider),
        ):
            blind_score, chance = metric(constant, references).value, metric(guessed, references).value
            scores[name] = mean_score(
                label, metric(said, references).per_example, blind=blind_score, chance=chance
            )

        def bleu4(texts: Sequence[str], indices: Sequence[int]) -> float:
            return bleu([texts[i] for i in indices], [references[i] for i in indices]).value

        everything = range(len(truth))
        scores["/bleu4"] = corpus_score(
            "BLEU-4",
            functools.partial(bleu4, said),
            len(truth),
            blind=bleu4(constant, everything),
            chance=bleu4(guessed, everything),
        )
        return Measured(
            scores, _predictions(examples, truth, said, exact_match(said, references).per_example)
        )


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Accuracy of generated answers, `clips`, `question`, `answer` [, `type`], over all and by type (`/count`).

    `length`: ids a question is cut or padded to. `shuffled`: the frames of every clip come in another order, drawn once
    for each example, so that what is left is what an unordered set of frames tells.
    """

    data: Any
    length: int
    search: Search = field(default_factory=lambda: Greedy(length=8))
    shuffled: bool = False
    batch: int = 100

    def measure(self, bench: Bench) -> Measured:
        def answer(
            batch: Batch,
            *,
            vision: Vision,
            text: Text,
            universal: Universal,
            fusion: Fusion,
            decoder: Decoder,
            temporal: Temporal | None = None,
            connector: Connector | None = None,
        ) -> Array:
            seen = see(
                batch["clips"], vision=vision, universal=universal, temporal=temporal, connector=connector
            )
            tokens = read(batch["question"], text=text, universal=universal)
            memory, mask = fused_memory(seen, tokens, batch["question"], fusion=fusion)
            return bench.write(decoder, memory, mask, self.search, batch)

        prepare = _shuffled if self.shuffled else dict
        examples, ids = bench.run(answer, self.data, {"question": self.length}, self.batch, prepare)
        return _answers(
            self.data, examples, bench.texts(ids), "answer", asked=lambda example: example["question"]
        )


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Accuracy of a text's continuation, `text`, `target` [, `type`]: questions on a description, without pixels.

    `length`: ids the text is cut or padded to.
    """

    data: Any
    length: int
    search: Search = field(default_factory=lambda: Greedy(length=8))
    batch: int = 100

    def measure(self, bench: Bench) -> Measured:
        def complete(batch: Batch, *, text: Text, universal: Universal, decoder: Decoder) -> Array:
            memory = read(batch["text"], text=text, universal=universal)
            return bench.write(decoder, memory, padding_mask(batch["text"]), self.search, batch)

        examples, ids = bench.run(complete, self.data, {"text": self.length}, self.batch)

        def asked(example: Example) -> str:
            return example["text"].rsplit(" . ", 1)[-1]

        return _answers(self.data, examples, bench.texts(ids), "target", asked)


def _shuffled(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every clip's frames in an order drawn by the index of its example."""
    orders = [
        np.random.default_rng((0, index)).permutation(batch["clips"].shape[1]) for index in batch["index"]
    ]
    return batch | {"clips": np.take_along_axis(batch["clips"], np.array(orders)[:, :, None, None, None], 1)}


def _answers(
    data: Any, examples: Sequence[Example], said: list[str], answer: str, asked: Callable[[Example], str]
) -> Measured:
    """Exact match over all, then by type; `answer` names the field with the truth."""
    truth, types = (
        [example[answer] for example in examples],
        [example.get("type", "") for example in examples],
    )
    questions, references = [asked(example) for example in examples], [[text] for text in truth]
    correct = exact_match(said, references).per_example
    guess = blind.blind_answers(
        (asked(one), one.get("type", ""), one[answer]) for one in blind.training_examples(data)
    )
    guesses = [guess(question, type) for question, type in zip(questions, types, strict=True)]
    blind_correct = exact_match(guesses, references).per_example
    chances = {type: blind.answer_chance(data, type) for type in set(types)}
    scores = {}
    for type in ("", *sorted(set(types) - {""})):
        here = [place for place, one in enumerate(types) if type in ("", one)]
        known = [chance for place in here if (chance := chances[types[place]]) is not None]
        scores[f"/{type}" if type else ""] = mean_score(
            "accuracy",
            correct[here],
            blind=float(blind_correct[here].mean()),
            chance=float(np.mean(known)) if len(known) == len(here) else None,
        )
    predictions = _predictions(examples, truth, said, correct)
    return Measured(
        scores, [line | {"question": question} for line, question in zip(predictions, questions, strict=True)]
    )


def _plain(text: str) -> str:
    """Lower case, one blank between words: what exact match compares and the caption metrics split."""
    return " ".join(text.lower().split())


def _predictions(
    examples: Sequence[Example], truth: Iterable[Any], said: Iterable[Any], correct: Iterable[Any]
) -> list[dict[str, Any]]:
    """One JSON-able line an example."""
    return [
        {
            "index": int(example["index"]),
            "truth": right,
            "prediction": prediction,
            "correct": bool(hit),
            "type": example.get("type", ""),
        }
        for example, right, prediction, hit in zip(examples, truth, said, correct, strict=True)
    ]
