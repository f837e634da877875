"""Captions, questions and statements: unambiguous, right, and silent about the answer."""

import functools
from collections import Counter, defaultdict
from random import Random

import pytest

from mplug2.data import grammar, scenes
from mplug2.errors import DataError


def drawn(frames: int, seed: int = 0) -> tuple[Random, grammar.Compose]:
    rng = Random(seed)
    return rng, functools.partial(scenes.compose, rng, "train", frames)


def digit(kind: int, colour: str, size: str = "small") -> scenes.Digit:
    return scenes.Digit(kind, 0, 0, colour, size, ((0, 0),))


@pytest.mark.parametrize(
    "layout, where, sentence",
    [
        ("corner", "top left", "a red three at the top left"),
        ("row", "", "a red three left of a blue eight"),
        ("column", "", "a red three above a blue eight above a green two"),
        ("motion", "left", "a red three moves left"),
        ("order", "", "a red three then a blue eight"),
        ("appear", "", "a red three appears beside a still blue eight"),
        ("vanish", "", "a red three vanishes beside a still blue eight"),
    ],
)
def test_a_canonical_caption_says_kind_colour_and_place(layout, where, sentence):
    digits = (digit(3, "red"), digit(8, "blue"), digit(2, "green"))
    shown = digits[: 1 if where else 3 if layout == "column" else 2]
    assert grammar.caption(scenes.Scene("train", 32, layout, where, shown, 0)) == sentence


def test_the_article_fits_the_noun():
    assert [grammar.article(noun) for noun in ("eight", "red eight", "one")] == [
        "an eight",
        "a red eight",
        "a one",
    ]


@pytest.mark.parametrize("frames", [1, 4])
def test_descriptions_are_true_and_often_plain(frames):
    rng, compose = drawn(frames)
    plain = 0
    for _ in range(1000):
        scene = compose(count=1) if frames == 1 else compose()
        words = grammar.describe(scene, rng).split()
        attributes = {
            word for one in scene.digits for word in (one.colour, one.size, grammar.NUMBERS[one.kind])
        }
        said = {word for word in words if word in {*scenes.COLOURS, *scenes.SIZES, *grammar.NUMBERS}}
        assert said <= attributes
        plain += len(words) == 2
    assert plain > 100 or frames > 1


@pytest.mark.parametrize("frames", [1, 4])
def test_every_word_said_is_in_the_list_and_every_word_of_the_list_is_said(frames):
    said = set()
    for count in (1, 4):
        rng, compose = drawn(count)
        for _ in range(4000):
            asked = grammar.ask(rng, compose, count)
            scene, statement, _ = grammar.state(rng, compose, count)
            texts = (
                grammar.describe(scene, rng),
                grammar.caption(scene),
                asked.question,
                asked.answer,
                statement,
            )
            said |= {word for text in texts for word in text.split()}
    assert said | {"."} == set(grammar.words())


def test_answers_are_right_by_an_independent_reading_of_the_scene():
    """Reads the answer off the boxes and the digits, not off the draw."""
    for frames in (1, 4):
        rng, compose = drawn(frames, seed=3)
        for _ in range(4000):
            type, scene, question, answer = grammar.ask(rng, compose, frames)
            named = {grammar.NUMBERS[one.kind]: one for one in scene.digits}
            first = {name: next(spot for spot in one.path if spot is not None) for name, one in named.items()}
            words = question.split()
            about = [word for word in words if word in named]
            match type:
                case "count":
                    right = grammar.NUMBERS[len(named)]
                case "colour":
                    right = named[about[0]].colour
                case "kind":
                    (right,) = (name for name, one in named.items() if one.colour == words[-1])
                case "size":
                    right = named[about[0]].size
                case "place":
                    row, column = first[about[0]]
                    right = f"{'top' if row < 16 else 'bottom'} {'left' if column < 16 else 'right'}"
                case "side":
                    axis = 0 if words[-1] in ("top", "bottom") else 1
                    order = sorted(first, key=lambda name: first[name][axis])
                    right = order[0] if words[-1] in ("top", "left") else order[-1]
                case "relation":
                    one, other = (first[name] for name in about)
                    side = [scenes.pixels(named[name].size, 32) for name in about]
                    gap = {
                        "left": other[1] - one[1] - side[0],
                        "right": one[1] - other[1] - side[1],
                        "above": other[0] - one[0] - side[0],
                        "below": one[0] - other[0] - side[1],
                    }
                    (relation,) = (word for word in words if word in gap)
                    right = "yes" if gap[relation] > 0 else "no"
                case "sum":
                    right = grammar.NUMBERS[sum(one.kind for one in scene.digits)]
                case "motion":
                    boxes = scene.boxes()[0]
                    start, end = boxes[0], boxes[-1]
                    axis = 1 if "left" in words else 0
                    ways = ("left", "right") if axis else ("up", "down")
                    right = ways[int(end[axis] > start[axis])]
                case "order":
                    (right,) = (name for name in about if named[name].path[0] is not None)
                case _:
                    right = "vanish" if named[about[0]].path[0] is not None else "appear"
            assert answer == right, (scene, question)


@pytest.mark.parametrize("frames", [1, 4])
def test_a_blind_reader_of_questions_scores_at_chance(frames):
    """The best guess for each question, learned from many, is worth 1 / (number of possible answers) on
    others."""
    for type, (draw, answers) in grammar.questions(frames).items():
        rng, compose = drawn(frames, seed=11)
        learned: dict[str, Counter] = defaultdict(Counter)
        everything = Counter()
        for _ in range(5000):
            _, question, answer = draw(rng, compose)
            learned[question][answer] += 1
            everything[answer] += 1
        right = 0
        for _ in range(2000):
            _, question, answer = draw(rng, compose)
            guesses = learned[question] or everything
            right += answer == guesses.most_common(1)[0][0]
        assert grammar.chance(type, frames) == 1 / answers
        spread = 4 * (1 / answers * (1 - 1 / answers) / 2000) ** 0.5
        assert abs(right / 2000 - 1 / answers) < spread, type


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("part", ["statement", "caption"])
def test_a_reader_of_half_an_entailment_pair_scores_at_chance(frames, part):
    rng, compose = drawn(frames, seed=5)

    def pair() -> tuple[str, int]:
        scene, statement, label = grammar.state(rng, compose, frames)
        # Of a caption, what carries over to unseen ones: its form without kinds and colours.
        said = {*scenes.COLOURS, *grammar.NUMBERS}
        form = " ".join("x" if word in said else word for word in grammar.caption(scene).split())
        return (statement if part == "statement" else form), label

    learned: dict[str, Counter] = defaultdict(Counter)
    for _ in range(12000):
        text, label = pair()
        learned[text][label] += 1
    right = 0
    for _ in range(4000):
        text, label = pair()
        right += label == (learned[text].most_common(1)[0][0] if learned[text] else 1)
    assert abs(right / 4000 - 0.5) < 0.035


@pytest.mark.parametrize("frames", [1, 4])
def test_statements_are_true_exactly_when_labelled_so(frames):
    rng, compose = drawn(frames, seed=6)
    for _ in range(3000):
        scene, statement, label = grammar.state(rng, compose, frames)
        named = {grammar.NUMBERS[one.kind]: one for one in scene.digits}
        words = statement.split()
        if words[0] == "there":
            true = words[-1] in named
        elif words[-1] in scenes.COLOURS:
            true = named[words[1]].colour == words[-1]
        elif words[2] == "moves":
            true = scene.where == words[-1]
        elif words[2] == "comes":
            true = named[words[1]].path[0] is not None
        elif words[2] in ("appears", "vanishes"):
            true = (named[words[1]].path[0] is None) == (words[2] == "appears")
        elif words[-1] in named:
            names, relation = list(named), words[3]
            ahead = names.index(words[1]) < names.index(words[-1])
            axis = "row" if relation in ("left", "right") else "column"
            true = scene.layout == axis and ahead == (relation in ("left", "above"))
        else:
            true = " ".join(words[-2:]) == scene.where
        assert true == bool(label), (scene, statement)


def test_an_unknown_question_type_names_the_nearest():
    with pytest.raises(DataError, match='unknown question type "colours".*did you mean "colour"'):
        grammar.chance("colours")


@pytest.mark.parametrize("frames", [1, 4])
def test_what_is_said_of_a_scene_is_true_of_it_and_of_another_where_it_names_what_is_there(frames):
    """Of other scenes by an independent reading of the words, off the boxes and the digits."""
    rng, compose = drawn(frames, seed=5)
    made = [compose() for _ in range(250)]
    said = [
        (scene, text) for scene in made for text in (grammar.caption(scene), grammar.describe(scene, rng))
    ]
    other = {True: 0, False: 0}
    for scene in made:
        truths = grammar.truths(scene)
        for of, text in said:
            assert (text in truths) == holds(text, scene), (text, scene)
            assert of is not scene or text in truths
            other[text in truths] += of is not scene
    assert other[True] > 100 < other[False]


def holds(text: str, scene) -> bool:
    """Whether a description is true: every digit that it names is there as it says, in the relation that it
    says."""

    def named(words: str):
        kind = words.split()[-1]
        for one in scene.digits:
            rest = {one.colour, one.size, "a", "an", "still"}
            if grammar.NUMBERS[one.kind] == kind and set(words.split()[:-1]) <= rest:
                return one
        return None

    for word, layout in ((" left of ", "row"), (" above ", "column"), (" then ", "order")):
        if word in text:
            digits = [named(part) for part in text.split(word)]
            order = [scene.digits.index(one) for one in digits if one is not None]
            return scene.layout == layout and len(order) == len(digits) and order == sorted(order)
    for verb, layout in (("appears", "appear"), ("vanishes", "vanish")):
        if verb in text:
            first, second = (named(part) for part in text.split(f" {verb} beside "))
            return scene.layout == layout and (first, second) == scene.digits
    if " moves " in text:
        noun, where = text.split(" moves ")
        return scene.layout == "motion" and named(noun) is not None and scene.where == where
    if " at the " in text:
        noun, where = text.split(" at the ")
        one = named(noun)
        if one is None or scene.frames > 1:
            return False
        top, left, bottom, right = scene.boxes()[scene.digits.index(one), 0]
        rows = bottom <= 0.5 if where.startswith("top") else top >= 0.5
        return rows and (right <= 0.5 if where.endswith("left") else left >= 0.5)
    return named(text) is not None
