"""Evaluations: what can be measured, one frozen dataclass a kind, held by `Recipe.evaluations`.

Each runs one compiled function over a split (mplug2.inference) and compares with two baselines:

- `blind` is measured from training data, never from the model (mplug2.blind): the most frequent training
  answer to the very same question text, else to its type; the most frequent training caption, scored by the
  same metric; the most frequent class. Of a text "description . question" it reads the question alone. For
  retrieval, a constant ranking, which is chance; so for matching, by the choice of pairs.
- `chance` is exact by construction: one over the number of classes, or of possible answers to such a question
  (from the grammar), k over the gallery. For captions, what training captions drawn at random score.

Intervals take examples of one `video` or `picture` (the fields that name what is shown) together.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from mplug2 import blind
from mplug2.caption_scores import Form, PlainWords, caption_scores, in_words
from mplug2.errors import DataError, RecipeError
from mplug2.generate import Greedy, Search
from mplug2.inference import (
    Example,
    Inference,
    answers,
    captions,
    class_vectors,
    completions,
    matches,
    text_classes,
    text_vectors,
    vision_classes,
    vision_vectors,
)
from mplug2.metrics import Metric, exact_match, recall_at_k
from mplug2.pairs import Pairs
from mplug2.ranking import AnswerList
from mplug2.scores import Score, mean_score, no_score


class Measured(NamedTuple):
    """Scores by the end of their name ("" or "/count"), and for each example what was said: JSON-able,
    `index` first."""

    scores: dict[str, Score]
    predictions: list[dict[str, Any]]


class Evaluation(Protocol):
    """`outputs`: the functions of mplug2.inference that it runs, which name the modules it needs."""

    @property
    def outputs(self) -> tuple[Callable[..., Any], ...]: ...

    def measure(self, inference: Inference) -> Measured: ...


# ------------------------------------------------------------------------------------------------------------
# Classes


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Accuracy of `vision_classifier` on `clips`, `label`."""

    data: Any
    batch: int = 100
    outputs = (vision_classes,)

    def measure(self, inference: Inference) -> Measured:
        return _classes(self.data, *inference.over(self.data, {}, self.batch, vision_classes))


@dataclass(frozen=True, kw_only=True)
class TextClassification:
    """Accuracy of `text_classifier` on `text`, `label`; `length`: ids a text is cut or padded to."""

    data: Any
    length: int
    batch: int = 100
    outputs = (text_classes,)

    def measure(self, inference: Inference) -> Measured:
        return _classes(
            self.data, *inference.over(self.data, {"text": self.length}, self.batch, text_classes)
        )


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Accuracy of the class whose prompts lie nearest to the clip in the contrastive space: no classifier is
    used, only what texts and clips were taught to share.

    `classes`: what they are called, in the order of labels; `templates`: sentences with `{}` for the class. A
    class is the mean of its prompts' unit vectors, made a unit vector again. `length`: ids a prompt is cut or
    padded to.
    """

    data: Any
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    length: int = 32
    batch: int = 100
    outputs = (vision_vectors, text_vectors)

    def __post_init__(self) -> None:
        if not self.classes or not self.templates or any("{}" not in template for template in self.templates):
            raise RecipeError(
                f"zero-shot needs classes, and templates that hold {{}}; got {self.classes}, {self.templates}"
            )

    def measure(self, inference: Inference) -> Measured:
        prompts = [template.replace("{}", one) for one in self.classes for template in self.templates]
        vectors = inference.text_vectors(prompts, self.length, self.batch)
        names = class_vectors(vectors, len(self.classes))
        examples, seen = inference.over(self.data, {}, self.batch, vision_vectors)
        return _classes(self.data, examples, seen @ names.T, self.classes)


def _classes(
    data: Any, examples: Sequence[Example], logits: np.ndarray, names: Sequence[str] = ()
) -> Measured:
    """Accuracy of the highest of `N classes` logits."""
    said, truth = logits.argmax(-1), np.array([example["label"] for example in examples])
    if np.isnan(logits).any():
        raise DataError("the network's logits are not a number for some examples: they name no class")
    correct = (said == truth).astype(float)
    usual = blind.most_frequent(example["label"] for example in blind.training_examples(data, "label"))
    score = mean_score(
        "accuracy",
        correct,
        blind=float((truth == usual).mean()),
        chance=1 / logits.shape[-1],
        groups=_seen(examples),
    )
    named = (lambda label: names[label]) if names else int
    return Measured({"": score}, _predictions(examples, map(named, truth), map(named, said), correct))


# ------------------------------------------------------------------------------------------------------------
# Retrieval


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """R@1, R@5 and R@10 of texts for clips and of clips for texts, `clips`, `caption`; the gallery is the
    whole split.

    Equal captions are right for each other's clips; equal similarities rank by index. Scores are
    `/text_to_image@1` and so on (`video` where clips have more than one frame).
    """

    data: Any
    length: int
    batch: int = 100
    outputs = (vision_vectors, text_vectors)

    def measure(self, inference: Inference) -> Measured:
        examples, seen = inference.over(self.data, {}, self.batch, vision_vectors)
        texts = [example["caption"] for example in examples]
        said = inference.text_vectors(texts, self.length, self.batch)
        similarity, same = seen @ said.T, np.array(texts)[:, None] == np.array(texts)
        clip, gallery = "image" if examples[0]["frames"] == 1 else "video", len(examples)
        scores = {}
        for name, one_way in ((f"text_to_{clip}", similarity.T), (f"{clip}_to_text", similarity)):
            recall = recall_at_k(one_way, same)
            for k in recall.at:
                metric = f"R@{k} of {gallery}"
                if k >= gallery:
                    scores[f"/{name}@{k}"] = no_score(
                        metric, "every ranking finds it in so small a gallery", gallery
                    )
                    continue
                chance = float(np.mean([_chance_of_hit(right, gallery, k) for right in same.sum(1)]))
                scores[f"/{name}@{k}"] = mean_score(
                    metric, recall.hits(k), blind=chance, chance=chance, groups=_seen(examples)
                )
        nearest = similarity.argmax(1)
        correct = same[np.arange(gallery), nearest]
        return Measured(scores, _predictions(examples, texts, [texts[place] for place in nearest], correct))


def _chance_of_hit(right: int, gallery: int, k: int) -> float:
    """That `k` of a gallery, drawn without replacement, hold one of the `right` ones."""
    missed = 1.0
    for drawn in range(min(k, gallery)):
        missed *= max(0, gallery - right - drawn) / (gallery - drawn)
    return 1 - missed


# ------------------------------------------------------------------------------------------------------------
# Matching


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Accuracy of `matching`, "do they belong together?", on `clips`, `caption`: of every clip with its own
    caption and with a near one that is another clip's and does not hold of it.

    Every caption comes once with its own clip and once with another's, so that whoever reads captions alone,
    or sees clips alone, is right in exactly half of the pairs: `blind` and `chance`. `length`: ids a caption
    is cut or padded to. The value of an example is the share of its two pairs that were told right.
    """

    data: Any
    length: int
    batch: int = 100
    outputs = (matches,)

    def measure(self, inference: Inference) -> Measured:
        pairs = Pairs(inference.places(self.data))
        lengths = {"text": self.length, "other": self.length}
        examples, belongs = inference.over(pairs, lengths, self.batch, matches)
        correct = (belongs > 0.5) == [True, False]
        lines = []
        for place, (name, truth) in enumerate((("text", "yes"), ("other", "no"))):
            said = np.where(belongs[:, place] > 0.5, "yes", "no").tolist()
            of_pair = _predictions(examples, [truth] * len(examples), said, correct[:, place])
            lines += [line | {"text": one[name]} for line, one in zip(of_pair, examples, strict=True)]
        score = mean_score("accuracy", correct.mean(1), blind=0.5, chance=0.5)
        return Measured({"": score}, lines)


# ------------------------------------------------------------------------------------------------------------
# Generated text


@dataclass(frozen=True, kw_only=True)
class Captioning:
    """Exact match, BLEU-4, ROUGE-L and CIDEr of generated captions, `clips`, `caption` or, where an example
    has several references, `captions`: `/exact` `/bleu4` `/rouge_l` `/cider`. `form` says what words are
    compared; `CocoWords`, that of published numbers, adds `/meteor`."""

    data: Any
    search: Search = field(default_factory=Greedy)
    form: Form = PlainWords()
    batch: int = 100
    outputs = (captions,)

    def measure(self, inference: Inference) -> Measured:
        write = inference.writer(self.search)
        examples, ids = inference.over(self.data, {}, self.batch, captions, write)
        said, form = self.form.words(inference.texts(ids)), self.form
        references = in_words(form, [example.get("captions") or [example["caption"]] for example in examples])
        training = blind.training_examples(self.data, "caption")
        usual = form.words([example["caption"] for example in training])
        scores = caption_scores(said, references, usual, meteor=form.meteor, groups=_seen(examples))
        truth = [several if len(several) > 1 else several[0] for several in references]
        exact = exact_match(said, references).per_example
        return Measured(scores, _predictions(examples, truth, said, exact))


@dataclass(frozen=True, kw_only=True)
class Answering:
    """Accuracy of answers, `clips`, `question`, `answer` [, `type`], over all and by type (`/count`).

    `length`: ids a question is cut or padded to. `search`: how an answer is written, or a list that it is
    chosen from (mplug2.ranking). `right`: the metric that says which answers are right, such as
    `exact_match` or `vqa_accuracy`; where examples have `answers`, those are its references. `shuffled`: the
    frames of every clip come in another order, drawn once for each example, so that what is left is what an
    unordered set of frames tells.
    """

    data: Any
    length: int
    search: Search | AnswerList = field(default_factory=lambda: Greedy(length=8))
    right: Metric = exact_match
    shuffled: bool = False
    batch: int = 100
    outputs = (answers,)

    def measure(self, inference: Inference) -> Measured:
        prepare = _shuffled if self.shuffled else dict
        lengths, write = {"question": self.length}, inference.writer(self.search)
        examples, ids = inference.over(self.data, lengths, self.batch, answers, write, prepare=prepare)
        asked = operator.itemgetter("question")
        return _answers(self.data, examples, inference.texts(ids), "answer", asked, self.right)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Accuracy of a text's continuation, `text`, `target` [, `type`]: questions on a description, without
    pixels.

    `length`: ids the text is cut or padded to.
    """

    data: Any
    length: int
    search: Search = field(default_factory=lambda: Greedy(length=8))
    batch: int = 100
    outputs = (completions,)

    def measure(self, inference: Inference) -> Measured:
        lengths, write = {"text": self.length}, inference.writer(self.search)
        examples, ids = inference.over(self.data, lengths, self.batch, completions, write)

        def asked(example: Example) -> str:
            return example["text"].rsplit(" . ", 1)[-1]

        return _answers(self.data, examples, inference.texts(ids), "target", asked)


def _shuffled(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every clip's frames in an order drawn by the index of its example."""
    orders = [
        np.random.default_rng((0, index)).permutation(batch["clips"].shape[1]) for index in batch["index"]
    ]
    return batch | {"clips": np.take_along_axis(batch["clips"], np.array(orders)[:, :, None, None, None], 1)}


def _answers(
    data: Any,
    examples: Sequence[Example],
    said: list[str],
    answer: str,
    asked: Callable[[Example], str],
    right: Metric = exact_match,
) -> Measured:
    """Accuracy over all, then by type; `answer` names the field with the truth."""
    truth, types = (
        [example[answer] for example in examples],
        [example.get("type", "") for example in examples],
    )
    questions = [asked(example) for example in examples]
    references = [example.get("answers") or [example[answer]] for example in examples]
    correct = right(said, references).per_example
    guess = blind.blind_answers(
        (asked(one), one.get("type", ""), one[answer]) for one in blind.training_examples(data, answer)
    )
    guesses = [guess(question, type) for question, type in zip(questions, types, strict=True)]
    blind_correct = right(guesses, references).per_example
    chances = {type: blind.answer_chance(data, type) for type in set(types)}
    together = _seen(examples)
    scores = {}
    for type in ("", *sorted(set(types) - {""})):
        here = [place for place, one in enumerate(types) if type in ("", one)]
        known = [chance for place in here if (chance := chances[types[place]]) is not None]
        scores[f"/{type}" if type else ""] = mean_score(
            "accuracy",
            correct[here],
            blind=float(blind_correct[here].mean()),
            chance=float(np.mean(known)) if len(known) == len(here) else None,
            groups=[together[place] for place in here],
        )
    predictions = _predictions(examples, truth, said, correct)
    return Measured(
        scores, [line | {"question": question} for line, question in zip(predictions, questions, strict=True)]
    )


def _seen(examples: Sequence[Example]) -> list[Any]:
    """What each example shows: its `video` or `picture`, where it names one, else it is alone."""

    def shown(place: int, example: Example) -> Any:
        for kind in ("video", "picture"):
            name = example.get(kind)
            if isinstance(name, int | np.integer) or isinstance(name, str) and name:
                return kind, name
        return place

    return [shown(place, example) for place, example in enumerate(examples)]


def _predictions(
    examples: Sequence[Example], truth: Iterable[Any], said: Iterable[Any], correct: Iterable[Any]
) -> list[dict[str, Any]]:
    """One JSON-able line an example; `video` is the id of its video, where it has one."""
    return [
        {
            "index": int(example["index"]),
            "truth": right,
            "prediction": prediction,
            "correct": bool(hit),
            "type": example.get("type", ""),
        }
        | ({"video": example["video"]} if "video" in example else {})
        for example, right, prediction, hit in zip(examples, truth, said, correct, strict=True)
    ]
