"""Evaluation: every example is scored once; baselines, chances and results are what they claim.

The network is made of pieces that compute what is known beforehand: `Glimpse` reads the first pixel of every
frame, so a score says which frames arrived in which order.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mplug2 import blind
from mplug2.caption_scores import CocoWords, PlainWords
from mplug2.console import Console
from mplug2.data import grammar
from mplug2.data.handwriting import Handwriting
from mplug2.data.pixels import Preprocessing
from mplug2.data.stream import Mixture
from mplug2.data.tokens import SentencePiece
from mplug2.errors import DataError, RecipeError
from mplug2.evaluate import (
    Answering,
    Captioning,
    Classification,
    Completion,
    Matching,
    Retrieval,
    ZeroShot,
    evaluate,
)
from mplug2.evaluations import _classes, _seen, _shuffled
from mplug2.inference import Compiled, Inference
from mplug2.judge import Judge
from mplug2.metrics import equal_strings, exact_match, vqa_accuracy
from mplug2.network import Network
from mplug2.pairs import Pairs
from mplug2.recipe import Recipe
from mplug2.scores import Results, Score, corpus_score, mean_score
from mplug2.tools import evaluate as tool

CLASSES = 5
IDENTITY = Preprocessing(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))


# --- pieces whose outputs are known


@dataclass(frozen=True)
class Piece:
    """A module's config that builds `kind()`."""

    kind: type

    def build(self, *, rngs: nnx.Rngs, execution: Any) -> nnx.Module:
        return self.kind()


class Glimpse(nnx.Module):
    """Vision: one token, the first pixel of every frame."""

    def __call__(self, clips, temporal=None, *, key=None):
        return clips[:, :, 0, 0, 0][:, None]


class Through(nnx.Module):
    """Universal: what comes in goes out."""

    def vision(self, tokens, *, key=None):
        return tokens

    def text(self, tokens, mask, *, key=None):
        return tokens


class Ids(nnx.Module):
    """Text: one token, the first word's id less that of the begin token."""

    def __call__(self, ids, *, key=None):
        return ids[:, 1:2, None].astype(jnp.float32)


class Exact(nnx.Module):
    """Vision classifier: the class is the pixel of the first frame."""

    def __call__(self, tokens, *, key=None):
        return jax.nn.one_hot(tokens[:, 0, 0].astype(int), CLASSES)


class OnCircle(nnx.Module):
    """Contrastive: numbers below 200 as angles, so that equal numbers are nearest; unit vectors."""

    def _turn(self, tokens):
        angle = tokens[:, 0, 0] * (2 * jnp.pi / 200)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)

    vision = text = _turn


class Gazing(nnx.Module):
    """Fusion: text tokens, and beside each the first pixel of the clip."""

    def __call__(self, vision, text, mask, *, key=None):
        return vision, jnp.concatenate([text, jnp.broadcast_to(vision[:, :1, :1], text.shape)], -1)


class Equal(nnx.Module):
    """Matching: they belong together where the first word is the pixel."""

    def __call__(self, tokens, *, key=None):
        return jax.nn.one_hot((tokens[:, 0, 0] == tokens[:, 0, 1]).astype(int), 2)


@dataclass(frozen=True)
class Memory:
    """A data set whose splits are all these examples."""

    examples: tuple

    def source(self, split: str):
        return self.examples


def clip(*pixels: int) -> np.ndarray:
    return np.stack([np.full((2, 2, 3), pixel, np.uint8) for pixel in pixels])


def recipe(**evaluations) -> Recipe:
    modules = {
        "vision": Piece(Glimpse),
        "universal": Piece(Through),
        "text": Piece(Ids),
        "vision_classifier": Piece(Exact),
        "contrastive": Piece(OnCircle),
        "fusion": Piece(Gazing),
        "matching": Piece(Equal),
    }
    return Recipe(
        name="known", modules=modules, objectives={}, evaluations=evaluations, preprocessing=IDENTITY
    )


def measured(evaluations, **options):
    one = recipe(**evaluations)
    network = Network(one.modules)
    quiet = Console(quiet=True)
    return evaluate(network, network.init(0), one, SentencePiece(), console=quiet, **options)


LABELS = (0, 3, 3, 1, 3, 4, 2)
SEVEN = Memory(
    tuple({"index": 10 + place, "clips": clip(label), "label": label} for place, label in enumerate(LABELS))
)


SEVEN_WORDS = Memory(tuple({**one, "caption": "red"} for one in SEVEN.examples))


def numbers(score: Score) -> tuple[float, float, float, float]:
    """(low, value, high, blind) of a score that has them all."""
    found = (score.low, score.value, score.high, score.blind)
    assert all(number is not None for number in found)
    return found  # pyright: ignore[reportReturnType]


def width(score: Score) -> float:
    low, _, high, _ = numbers(score)
    return high - low


# --- every example once


@pytest.mark.parametrize("batch", [2, 7, 100])
def test_every_example_is_scored_once_whatever_the_batch(batch, tmp_path):
    results = measured({"digit": Classification(data=SEVEN, batch=batch)}, predictions=tmp_path)
    score = results.tasks["digit"]
    assert (score.value, score.n, score.chance) == (1.0, 7, 1 / CLASSES)
    assert score.blind == 3 / 7  # class 3, the most frequent
    lines = [json.loads(line) for line in (tmp_path / "digit.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(10, 17))
    assert [line["prediction"] for line in lines] == [line["truth"] for line in lines] == list(LABELS)
    assert lines[0] == {"index": 10, "truth": 0, "prediction": 0, "correct": True, "type": ""}


def test_a_limit_takes_the_first_examples():
    assert measured({"digit": Classification(data=SEVEN)}, limit=3).tasks["digit"].n == 3


def test_results_have_their_form(tmp_path):
    results = measured({"digit": Classification(data=SEVEN)}, split="validation")
    results.save(tmp_path / "a" / "results.json")
    saved = json.loads((tmp_path / "a" / "results.json").read_text())
    assert {"recipe", "commit", "tasks"} <= set(saved)
    assert saved["recipe"] == "known" and saved["split"] == "validation"
    assert set(saved["tasks"]["digit"]) == {"metric", "value", "low", "high", "blind", "chance", "n"}
    text = Console(width=120, record=True, quiet=True)
    text.print(results.table())
    assert "digit" in str(results.tasks) and saved["tasks"]["digit"]["metric"] == "accuracy"


def test_an_unknown_evaluation_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match=r'no evaluation "digits".*did you mean "digit"'):
        measured({"digit": Classification(data=SEVEN)}, only=["digits"])


def test_a_missing_module_is_refused():
    with pytest.raises(RecipeError, match=r"captions composes .* missing \['decoder'\]"):
        measured({"caption": Captioning(data=SEVEN)})


# --- zero-shot and retrieval


def test_zero_shot_finds_the_class_whose_prompts_are_nearest():
    names = ("red", "two", "left", "nine")  # some words
    ids = [int(SentencePiece().encode(name, 4)[1]) for name in names]
    examples = tuple({"index": i, "clips": clip(id), "label": i % 4} for i, id in enumerate(ids + ids[:2]))
    zero_shot = ZeroShot(data=Memory(examples), classes=names, templates=("{} a", "{} b c"), length=8)
    score = measured({"zero_shot": zero_shot}).tasks["zero_shot"]
    assert (score.value, score.chance, score.n) == (1.0, 1 / 4, 6)


def test_a_template_without_a_place_for_the_class_is_refused():
    with pytest.raises(RecipeError, match="templates that hold {}"):
        ZeroShot(data=SEVEN, classes=("one",), templates=("a digit",))


def test_retrieval_counts_both_ways_and_states_its_gallery():
    words = ("red", "two", "left", "nine")
    ids = [int(SentencePiece().encode(word, 4)[1]) for word in words]
    pixels = [ids[0], ids[1], ids[3], ids[2]]  # the last two are mistaken for each other
    examples = tuple(
        {"index": i, "clips": clip(pixel, pixel), "caption": word}
        for i, (pixel, word) in enumerate(zip(pixels, words, strict=True))
    )
    tasks = measured({"find": Retrieval(data=Memory(examples), length=4, batch=3)}).tasks
    assert set(tasks) == {f"find/{way}@{k}" for way in ("text_to_video", "video_to_text") for k in (1, 5, 10)}
    first = tasks["find/text_to_video@1"]
    assert (first.value, first.chance, first.blind, first.metric) == (0.5, 0.25, 0.25, "R@1 of 4")
    assert tasks["find/video_to_text@5"].value is None  # of four, any ranking finds it
    assert "so small a gallery" in tasks["find/video_to_text@5"].why


# --- matching


@dataclass(frozen=True)
class Told(Memory):
    """Memory that knows which captions hold of which clips: those of the same first letter."""

    def source(self, split: str):
        return self

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int):
        return self.examples[index]

    def fits(self, index: int):
        first = self.examples[index]["caption"][0]
        return {one["caption"] for one in self.examples if one["caption"][0] == first}


def words_of(*words: str, mistaken: tuple[int, ...] = ()) -> tuple:
    ids = [int(SentencePiece().encode(word, 4)[1]) for word in words]
    pixels = [199 if place in mistaken else pixel for place, pixel in enumerate(ids)]
    return tuple({"index": i, "clips": clip(pixel), "caption": words[i]} for i, pixel in enumerate(pixels))


def test_matching_is_measured_on_true_and_near_false_pairs(tmp_path):
    examples = words_of("red", "two", "left", "nine", "red", mistaken=(3,))
    matching = Matching(data=Memory(examples), length=4, batch=2)
    told = measured({"match": matching}, predictions=tmp_path).tasks["match"]
    assert (told.value, told.blind, told.chance, told.n) == (0.9, 0.5, 0.5, 5)  # of "nine" the true pair
    lines = [json.loads(line) for line in (tmp_path / "match.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and [line["index"] for line in lines if not line["correct"]] == [3]
    assert sorted(line["text"] for line in lines[:5]) == sorted(line["text"] for line in lines[5:])
    assert all(line["text"] != examples[line["index"]]["caption"] for line in lines[5:])


def test_a_false_pair_begins_like_the_true_one_and_is_false():
    words = ("a red two", "a red one", "a blue one", "a red two")
    plain = Memory(words_of(*words))
    others = [Pairs([(plain.examples, place) for place in range(4)])[place]["other"] for place in range(4)]
    assert sorted(others) == sorted(words) and others[1] == "a red two" and others[0] != "a red two"
    told = Told(words_of("nine", "two", "no", "then", "red"))  # of one letter: they hold of each other's
    others = [Pairs([(told, place) for place in range(5)])[place]["other"] for place in range(5)]
    assert all(other[0] != one["caption"][0] for other, one in zip(others, told.examples, strict=True))


@pytest.mark.parametrize("words", [("red",), ("red", "red"), ("red", "red", "two")])
def test_captions_that_cannot_be_told_apart_are_no_pairs(words):
    places = [(words_of(*words), place) for place in range(len(words))]
    with pytest.raises(DataError, match='captions hold of the clip of "red"'):
        Pairs(places)


# --- answers and captions, with what the model says given


@dataclass
class Saying:
    """Stands for mplug2.inference: these texts were generated for these examples."""

    examples: Any
    said: Any

    def writer(self, search):
        return None

    def over(self, data, lengths, batch, outputs, *fixed, prepare=dict):
        return list(self.examples), self.said

    def texts(self, ids):
        return list(ids)


def test_answers_are_scored_by_type_beside_what_the_words_alone_are_worth():
    asked = [("count", "how many", "two"), ("count", "how many", "three"), ("size", "how large", "small")]
    examples = tuple(
        {"index": i, "type": type, "question": question, "answer": answer}
        for i, (type, question, answer) in enumerate([*asked, ("count", "how many", "two")])
    )
    said = Saying(examples, ["two", "Two", "small ", "one"])
    scores, lines = Answering(data=Memory(examples), length=8).measure(said)  # pyright: ignore
    assert {name: (score.value, score.blind, score.n) for name, score in scores.items()} == {
        "": (0.5, 0.75, 4),  # "two" is the usual answer to "how many", "small" to "how large"
        "/count": (1 / 3, 2 / 3, 3),
        "/size": (1.0, 1.0, 1),
    }
    assert scores[""].chance is None  # nobody knows this grammar
    assert lines[0]["question"] == "how many" and lines[2]["correct"]


def test_a_blind_reader_of_a_completion_does_not_see_the_description():
    examples = tuple(
        {"index": i, "type": "kind", "text": f"a {word} . which digit", "target": word}
        for i, word in enumerate(("two", "two", "nine"))
    )
    scores, lines = Completion(data=Memory(examples), length=8).measure(Saying(examples, ["two"] * 3))  # pyright: ignore
    assert scores[""].blind == 2 / 3 and lines[0]["question"] == "which digit"


def test_captions_are_scored_by_four_metrics():
    texts = ["a red two at the top left", "a blue nine at the top right", "a red two at the top left"]
    examples = tuple({"index": i, "caption": text} for i, text in enumerate(texts))
    said = Saying(examples, [texts[0].upper(), "a blue nine at the bottom right", texts[2]])
    scores, lines = Captioning(data=Memory(examples)).measure(said)  # pyright: ignore
    assert list(scores) == ["/exact", "/bleu4", "/rouge_l", "/cider"]
    assert (scores["/exact"].value, scores["/exact"].blind) == (2 / 3, 2 / 3)
    assert [line["correct"] for line in lines] == [True, False, True]
    for name in ("/bleu4", "/rouge_l", "/cider"):
        score = scores[name]
        low, value, high, baseline = numbers(score)
        assert low <= value <= high and 0 < baseline < value


SEVERAL = json.loads((Path(__file__).parent / "golden" / "metrics" / "captions.json").read_text())["002c_ptb"]


def test_published_scores_of_several_references_are_those_of_the_reference_implementation():
    texts = [item["references"] for item in SEVERAL["items"]]
    examples = tuple(
        {"index": i, "caption": references[0], "captions": tuple(references)}
        for i, references in enumerate(texts)
    )
    said = Saying(examples, [item["candidate"] for item in SEVERAL["items"]])
    scores, lines = Captioning(data=Memory(examples), form=CocoWords()).measure(said)  # pyright: ignore
    names = {"/bleu4": "BLEU_4", "/meteor": "METEOR_exact_stem", "/rouge_l": "ROUGE_L", "/cider": "CIDEr"}
    for ours, theirs in names.items():
        low, value, high, _ = numbers(scores[ours])
        assert value == pytest.approx(SEVERAL["corpus"][theirs], abs=1e-9), ours
        assert low <= value <= high
    assert scores["/meteor"].metric == "METEOR (exact+stem)" and isinstance(lines[0]["truth"], list | str)


# --- scores that there are not


@pytest.mark.parametrize(
    "captions, undefined",
    [
        (["a red two at the top"], {"/cider"}),  # one example: no word is rare
        (["a red two at the top"] * 3, {"/cider"}),  # three alike
        (["a red two", "a blue nine"], {"/bleu4"}),  # too short for its n-grams
        (["", ""], {"/exact", "/bleu4", "/rouge_l", "/cider"}),
    ],
)
def test_a_score_that_not_even_the_truth_could_reach_is_none(captions, undefined):
    examples = tuple({"index": i, "caption": text} for i, text in enumerate(captions))
    scores, _ = Captioning(data=Memory(examples)).measure(Saying(examples, captions))  # pyright: ignore
    assert {name for name, score in scores.items() if score.value is None} == undefined
    assert all(score.why for name, score in scores.items() if name in undefined)
    results = Results(recipe="r", tasks=scores)
    screen = Console(width=200, record=True, quiet=True)
    screen.print(results.table())
    saved = json.loads(json.dumps(results.as_json()))["tasks"]
    assert {name for name, one in saved.items() if one["value"] is None} == undefined


def test_a_perfect_caption_of_one_example_says_that_nothing_bounds_it(capsys):
    examples = ({"index": 0, "caption": "a red two at the top"},)
    scores, _ = Captioning(data=Memory(examples)).measure(Saying(examples, ["a red two at the top"]))  # pyright: ignore
    assert scores["/bleu4"].value == pytest.approx(1.0) and scores["/bleu4"].low is None
    Results(recipe="r", tasks=scores).show(Console(width=150))
    shown = capsys.readouterr().out
    assert "/cider: words weigh by how few" in shown and "/bleu4: no interval" in shown and "nan" not in shown


def test_logits_that_are_not_numbers_name_no_class():
    with pytest.raises(DataError, match="not a number"):
        _classes(SEVEN, SEVEN.examples, np.full((7, CLASSES), np.nan))


def test_the_judge_refuses_a_score_that_there_is_not():
    known = replace(recipe(find=Retrieval(data=SEVEN_WORDS, length=4)), best="find/text_to_image@10")
    network = Network(known.modules)
    with pytest.raises(RecipeError, match="no score find/text_to_image@10: .*so small a gallery"):
        Judge(known, network).score({}, network.init(0))


# --- blind baselines


class Ordered:
    """A train split in an order that repeats, whose labels can be told without pixels (or not)."""

    def __init__(self, count: int, told: bool):
        self.count, self.read = count, 0
        if told:
            self.texts = self.example

    def source(self, split: str):
        return self

    def example(self, index: int):
        # Each tenth is of class 1; of the others, the first half of the split is of class 2, the rest of 3.
        return {"label": 1 if index % 10 == 0 else 2 if index < self.count / 2.2 else 3}

    def __len__(self):
        return self.count

    def __getitem__(self, index: int):
        self.read += 1
        return self.example(index)


@pytest.mark.parametrize("told", [True, False])
def test_the_usual_class_is_that_of_the_whole_split(told):
    data = Ordered(100_000, told)
    labels = [example["label"] for example in blind.training_examples(data, "label")]
    assert blind.most_frequent(labels) == 3  # neither that of the first thousand, nor that of every tenth
    assert (data.read, len(labels)) == ((0, blind.SAMPLE) if told else (blind.SEEN, blind.SEEN))


def test_a_mixture_is_counted_in_all_its_parts():
    mixture = Mixture({Ordered(2, True): 0.9, Ordered(3, True): 0.1})
    assert [one["label"] for one in blind.training_examples(mixture, "label")] == [1, 3, 1, 2, 3]


def test_questions_about_one_video_are_resampled_together():
    def scored(videos):
        examples = tuple(
            {"index": i, "video": video, "question": "what", "answer": "yes" if i < 10 else "no"}
            for i, video in enumerate(videos)
        )
        scores, _ = Answering(data=Memory(examples), length=8).measure(Saying(examples, ["yes"] * 20))  # pyright: ignore
        return width(scores[""])

    assert scored("aaaaabbbbbcccccddddd") > 1.5 * scored("abcdefghijklmnopqrst")


def test_any_of_several_references_is_right_and_coco_drops_marks():
    examples = ({"index": 0, "caption": "a dog", "captions": ("a dog", "A cat.")},)
    for form, exact in ((CocoWords(), 1.0), (PlainWords(), 0.0)):
        scores, lines = Captioning(data=Memory(examples), form=form).measure(Saying(examples, ["a cat"]))  # pyright: ignore
        assert scores["/exact"].value == exact and lines[0]["truth"][0] == "a dog"
        assert ("/meteor" in scores) == form.meteor


def test_what_counts_as_an_answer_is_given():
    people = ("a dog",) * 9 + ("the cat",)
    rows = ((("a dog"), None), ("Dog", None), ("cat", people))
    examples = tuple(
        {"index": i, "question": "what", "answer": answer} | ({"answers": several} if several else {})
        for i, (answer, several) in enumerate(rows)
    )
    said = Saying(examples, ["A dog", "Dog", "dog"])
    for right, expected in ((exact_match, 2 / 3), (equal_strings, 1 / 3), (vqa_accuracy, 1.0)):
        scores, _ = Answering(data=Memory(examples), length=8, right=right).measure(said)  # pyright: ignore
        assert scores[""].value == pytest.approx(expected), right


def test_chance_of_handwriting_is_that_of_its_grammar():
    data = Handwriting("question", frames=4)
    assert blind.answer_chance(data, "motion") == grammar.chance("motion", 4) == 0.5
    assert blind.answer_chance(SEVEN, "motion") is None


# --- shuffled frames


def test_shuffling_keeps_the_frames_and_forgets_their_order():
    clips = np.stack([clip(0, 1, 2, 3)] * 4000)
    index = np.arange(4000)
    shuffled = _shuffled({"clips": clips, "index": index})["clips"][..., 0, 0, 0]
    assert (np.sort(shuffled, 1) == np.arange(4)).all()
    counts = np.array([(shuffled[:, place] == frame).mean() for place in range(4) for frame in range(4)])
    np.testing.assert_allclose(counts, 0.25, atol=0.03)
    again = _shuffled({"clips": clips[5:6], "index": index[5:6]})["clips"][..., 0, 0, 0]
    np.testing.assert_array_equal(again[0], shuffled[5])  # an example's order is its own, not its batch's


# --- intervals


def test_an_interval_of_a_mean_holds_it_and_narrows_with_more_examples():
    few, many = (mean_score("x", [0.0, 1.0] * count, blind=0, chance=0) for count in (10, 1000))
    low, value, high, _ = numbers(few)
    assert low < value == 0.5 < high and width(many) < width(few) / 5


def test_a_jackknife_of_a_mean_is_as_wide_as_its_bootstrap():
    values = np.random.default_rng(0).uniform(0, 1, 500)
    wanted = mean_score("x", values, blind=0, chance=0)
    found = corpus_score("x", lambda indices: float(values[list(indices)].mean()), 500, blind=0, chance=0)
    assert found.value == pytest.approx(wanted.value)
    assert width(found) == pytest.approx(width(wanted), rel=0.6)


# --- the command


def test_the_command_refuses_what_it_cannot_find():
    with pytest.raises(RecipeError, match='"pretrian" is no run directory.*did you mean "pretrain"'):
        tool.main(["pretrian"])
    with pytest.raises(RecipeError, match="expected one run, bundle or recipe, or cards .*pretrain is a"):
        tool.main(["small", "pretrain"])
    with pytest.raises(RecipeError, match="--limit is 0"):
        tool.main(["pretrain", "--limit", "0"])


def test_the_command_writes_results_and_predictions(tmp_path, monkeypatch, capsys):
    one = recipe(digit=Classification(data=SEVEN))
    network = Network(one.modules)
    found = (one, network, network.init(0), SentencePiece())
    monkeypatch.setattr(tool, "opened", lambda sources, changes, named, trusted: found)
    out = tmp_path / "results.json"
    assert tool.main(["--out", str(out), "--predictions", str(tmp_path), "--limit", "5"]) == 0
    assert json.loads(out.read_text())["tasks"]["digit"]["n"] == 5
    assert (tmp_path / "digit.jsonl").is_file() and "digit" in capsys.readouterr().out


def test_functions_are_compiled_once_for_all_evaluations():
    one = recipe()
    network = Network(one.modules)
    compiled = Compiled(network, network.init(0), one.preprocessing)
    inference = Inference(compiled=compiled, recipe=one, tokenizer=SentencePiece())
    other = replace(inference, limit=3)
    for which in (inference, other):
        Classification(data=SEVEN).measure(which)
    assert len(compiled) == 1


def test_the_judge_of_checkpoints_gives_the_score_that_the_recipe_names():
    known = replace(recipe(digit=Classification(data=SEVEN)), best="digit")
    network = Network(known.modules)
    judge = Judge(known, network)
    assert judge.score({"loss": 7.0}, network.init(0)) == judge.score({}, network.init(0)) == 1.0
    assert Judge(replace(known, best="loss"), network).score({"loss": 7.0}, network.init(0)) == 7.0
    with pytest.raises(RecipeError, match="best is digit/count, expected one of digit"):
        Judge(replace(known, best="digit/count"), network).score({}, network.init(0))


def test_examples_are_together_by_the_name_of_what_they_show_alone_otherwise():
    pixels = np.zeros((2, 2))
    named = [{"video": "1"}, {"video": "1"}, {"video": 1}, {"picture": 1}]
    seen = _seen([*named, {"video": ""}, {"video": pixels}])
    assert seen[0] == seen[1] and len(set(seen)) == 5
    assert _seen([{"video": 1}, {}])[0] != _seen([{}, {}])[1]
