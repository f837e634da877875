"""The language of scenes: captions, partial descriptions, questions with answers, true and false statements.

Lower case words without punctuation; " . " separates two sentences of one text. `caption` is canonical: one
sentence per scene, made for exact match. Questions and statements are drawn so that a reader of the words
alone scores exactly at `chance(type)`: whatever the question, each of its possible answers is equally likely
(kinds, colours and places are uniform and exchangeable within a scene; where they are not, the answer is
drawn first and the scene composed for it).
"""

import itertools
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from mplug2.data.scenes import COLOURS, CORNERS, SIZES, Digit, Scene, draw_sizes, pixels
from mplug2.errors import DataError, nearest

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = {"row": "left of", "column": "above"}
_OPPOSITE = {"left of": "right of", "above": "below", "left": "right", "up": "down"}
_OPPOSITE |= {there: back for back, there in _OPPOSITE.items()}
_ENDS = {"row": ("on the left", "on the right"), "column": ("at the top", "at the bottom")}

Compose = Callable[..., Scene]  # scenes.compose with everything given but the keyword pins


class Question(NamedTuple):
    """A scene, what is asked about it, and the one answer."""

    type: str
    scene: Scene
    question: str
    answer: str


def caption(scene: Scene) -> str:
    """The canonical caption: kind, colour and place or relation of every digit, never its size."""
    return _sentence(scene, [f"a {digit.colour} {NUMBERS[digit.kind]}" for digit in scene.digits])


def describe(scene: Scene, rng: Random) -> str:
    """A true but partial description: attributes, and the place of a digit alone, are dropped at random."""
    nouns = [_noun(digit, rng) for digit in scene.digits]
    if scene.layout == "corner" and rng.random() < 0.5:
        return nouns[0]
    return _sentence(scene, nouns)


def truths(scene: Scene) -> frozenset[str]:
    """Every description, partial or not, that holds of the scene, whichever scenes it was made for: each
    digit named alone, a digit alone in a quadrant at its corner, and what is said of all digits or, of a row
    or column, of some of them in their order."""
    nouns = [_nouns(digit) for digit in scene.digits]
    said = set(itertools.chain(*nouns))
    if scene.frames == 1:
        for digit, its in zip(scene.digits, nouns, strict=True):
            said |= {f"{noun} at the {corner}" for corner in _corners(scene, digit) for noun in its}
    of_some = range(2, len(nouns) + 1) if scene.layout in RELATIONS else [len(nouns)]
    for count in of_some:
        for some in itertools.combinations(nouns, count):
            said |= {_sentence(scene, list(chosen)) for chosen in itertools.product(*some)}
    return frozenset(said)


def _corners(scene: Scene, digit: Digit) -> list[str]:
    """The corner that a digit of a picture stands at, if its box keeps to one quadrant."""
    (spot,), half = digit.path, scene.canvas // 2
    assert spot is not None
    ends = [start + pixels(digit.size, scene.canvas) for start in spot]
    rows = "top" if ends[0] <= half else "bottom" if spot[0] >= half else ""
    columns = "left" if ends[1] <= half else "right" if spot[1] >= half else ""
    return [f"{rows} {columns}"] if rows and columns else []


def article(noun: str) -> str:
    """The noun with its article: "a red eight", "an eight"."""
    return f"an {noun}" if noun.startswith("eight") else f"a {noun}"


def words() -> tuple[str, ...]:
    """Every word that the grammar can say, sorted."""
    said = [*NUMBERS, *COLOURS, *SIZES, *CORNERS, *RELATIONS.values(), *_OPPOSITE, *sum(_ENDS.values(), ())]
    said += [
        "a an . at the moves then appears vanishes beside still yes no is are there digit digits how many"
    ]
    said += ["what colour which sum of where does move or appear vanish comes first"]
    return tuple(sorted({word for text in said for word in text.split()}))


def _noun(digit: Digit, rng: Random) -> str:
    size, colour = rng.random() < 0.25, rng.random() < 0.55
    return _nouns(digit)[2 * size + colour]


def _nouns(digit: Digit) -> list[str]:
    """What a digit may be called: without and with its colour, then the same with its size before."""
    adjectives = itertools.product(("", f"{digit.size} "), ("", f"{digit.colour} "))
    return [article(f"{size}{colour}{NUMBERS[digit.kind]}") for size, colour in adjectives]


def _sentence(scene: Scene, nouns: list[str]) -> str:
    match scene.layout:
        case "corner":
            return f"{nouns[0]} at the {scene.where}"
        case "motion":
            return f"{nouns[0]} moves {scene.where}"
        case "order":
            return " then ".join(nouns)
        case "appear" | "vanish":
            verb = "appears" if scene.layout == "appear" else "vanishes"
            return f"{nouns[0]} {verb} beside a still {nouns[1].split(' ', 1)[1]}"
        case _:
            return f" {RELATIONS[scene.layout]} ".join(nouns)


# Questions


def _count(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    scene = compose()
    return scene, "how many digits are there", NUMBERS[len(scene.digits)]


def _video_count(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    scene = compose(layout=rng.choice(("motion", rng.choice(("order", "appear", "vanish")))))
    return scene, "how many digits are there", NUMBERS[len(scene.digits)]


def _colour(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    scene = compose()
    digit = rng.choice(scene.digits)
    return scene, f"what colour is the {NUMBERS[digit.kind]}", digit.colour


def _kind(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    scene = compose()
    digit = rng.choice(scene.digits)
    return scene, f"which digit is {digit.colour}", NUMBERS[digit.kind]


def _size(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    count, answer = rng.randint(1, 3), rng.choice(SIZES)
    slot = rng.randrange(count)
    sizes = draw_sizes(rng, count)
    while sizes[slot] != answer:
        sizes = draw_sizes(rng, count)
    scene = compose(count=count, sizes=sizes)
    return scene, f"is the {NUMBERS[scene.digits[slot].kind]} small or large", answer


def _place(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    scene = compose(count=1)
    return scene, f"where is the {NUMBERS[scene.digits[0].kind]}", scene.where


def _side(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    scene = compose(count=rng.randint(2, 3))
    end = rng.randrange(2)
    return scene, f"which digit is {_ENDS[scene.layout][end]}", NUMBERS[scene.digits[-end].kind]


def _relation(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    scene, clause, holds = _relate(rng, compose)
    return scene, "is " + clause.replace(" is", "", 1), "yes" if holds else "no"


def _sum(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    total = rng.randint(1, 9)
    first = rng.choice([k for k in range(total + 1) if 2 * k != total])
    return compose(kinds=(first, total - first)), "what is the sum of the digits", NUMBERS[total]


def _motion(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    scene = compose(layout="motion")
    ways = "left or right" if scene.where in ("left", "right") else "up or down"
    return scene, f"does the {NUMBERS[scene.digits[0].kind]} move {ways}", scene.where


def _order(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    scene = compose(layout="order")
    one, other = (NUMBERS[digit.kind] for digit in rng.sample(scene.digits, 2))
    return scene, f"which digit comes first the {one} or the {other}", NUMBERS[scene.digits[0].kind]


def _event(rng: Random, compose: Compose) -> tuple[Scene, str, str]:
    answer = rng.choice(("appear", "vanish"))
    scene = compose(layout=answer)
    return scene, f"does the {NUMBERS[scene.digits[0].kind]} appear or vanish", answer


# Type of question -> how it is drawn, and its number of equally likely answers.
IMAGE_QUESTIONS = {
    "count": (_count, 3),
    "colour": (_colour, 4),
    "kind": (_kind, 10),
    "size": (_size, 2),
    "place": (_place, 4),
    "side": (_side, 10),
    "relation": (_relation, 2),
    "sum": (_sum, 9),  # one to nine: kinds within a scene are distinct, so no two digits sum to zero
}
VIDEO_QUESTIONS = {
    "motion": (_motion, 2),
    "order": (_order, 2),
    "event": (_event, 2),
    "count": (_video_count, 2),
    "colour": (_colour, 4),
    "kind": (_kind, 10),
}


def questions(frames: int) -> dict[str, tuple[Callable[[Random, Compose], tuple[Scene, str, str]], int]]:
    """The question types of images (1 frame) or of videos (more)."""
    return IMAGE_QUESTIONS if frames == 1 else VIDEO_QUESTIONS


def chance(type: str, frames: int = 1) -> float:
    """The exact score of a reader of the words alone: one over the number of possible answers to such a
    question."""
    known = questions(frames)
    if type not in known:
        raise DataError(f'unknown question type "{type}"; known are {", ".join(known)}{nearest(type, known)}')
    return 1 / known[type][1]


def ask(rng: Random, compose: Compose, frames: int = 1, unless: tuple[str, ...] = ()) -> Question:
    """A question of a uniformly drawn type (none of `unless`) and a scene that answers it."""
    known = questions(frames)
    type = rng.choice([name for name in known if name not in unless])
    return Question(type, *known[type][0](rng, compose))


# Statements


def _relate(rng: Random, compose: Compose) -> tuple[Scene, str, bool]:
    """Two digits of a row or column, and a clause whose wording says nothing about whether it holds."""
    scene, holds = compose(count=rng.randint(2, 3)), rng.random() < 0.5
    first, second = sorted(rng.sample(range(len(scene.digits)), 2))
    relation = RELATIONS[scene.layout]
    if rng.random() < 0.5:
        first, second, relation = second, first, _OPPOSITE[relation]
    if not holds:
        across = RELATIONS["column" if scene.layout == "row" else "row"]
        relation = rng.choice((_OPPOSITE[relation],) * 2 + (across, _OPPOSITE[across]))
    one, other = NUMBERS[scene.digits[first].kind], NUMBERS[scene.digits[second].kind]
    return scene, f"the {one} is {relation} the {other}", holds


def _says_colour(rng: Random, compose: Compose) -> tuple[Scene, str, bool]:
    scene, holds = compose(), rng.random() < 0.5
    digit = rng.choice(scene.digits)
    colour = digit.colour if holds else rng.choice([name for name in COLOURS if name != digit.colour])
    return scene, f"the {NUMBERS[digit.kind]} is {colour}", holds


def _says_kind(rng: Random, compose: Compose) -> tuple[Scene, str, bool]:
    scene, holds = compose(), rng.random() < 0.5
    shown = [digit.kind for digit in scene.digits]
    kind = rng.choice(shown if holds else [kind for kind in range(10) if kind not in shown])
    return scene, f"there is {article(NUMBERS[kind])}", holds


def _says_place(rng: Random, compose: Compose) -> tuple[Scene, str, bool]:
    scene, holds = compose(count=1), rng.random() < 0.5
    where = scene.where if holds else rng.choice([corner for corner in CORNERS if corner != scene.where])
    return scene, f"the {NUMBERS[scene.digits[0].kind]} is at the {where}", holds


def _says_motion(rng: Random, compose: Compose) -> tuple[Scene, str, bool]:
    scene, holds = compose(layout="motion"), rng.random() < 0.5
    where = scene.where if holds else _OPPOSITE[scene.where]
    return scene, f"the {NUMBERS[scene.digits[0].kind]} moves {where}", holds


def _says_first(rng: Random, compose: Compose) -> tuple[Scene, str, bool]:
    scene, holds = compose(layout="order"), rng.random() < 0.5
    return scene, f"the {NUMBERS[scene.digits[not holds].kind]} comes first", holds


def _says_event(rng: Random, compose: Compose) -> tuple[Scene, str, bool]:
    verb, holds = rng.choice(("appears", "vanishes")), rng.random() < 0.5
    scene = compose(layout="appear" if (verb == "appears") == holds else "vanish")
    return scene, f"the {NUMBERS[scene.digits[0].kind]} {verb}", holds


_IMAGE_STATEMENTS = (_says_colour, _says_kind, _says_place, _relate)
_VIDEO_STATEMENTS = (_says_colour, _says_kind, _says_motion, _says_first, _says_event)


def state(rng: Random, compose: Compose, frames: int = 1) -> tuple[Scene, str, int]:
    """A scene, a statement on it, and 1 if the statement is true or 0 if it is false; each is equally likely,
    and neither the statement alone nor the scene alone tells which."""
    statement = rng.choice(_IMAGE_STATEMENTS if frames == 1 else _VIDEO_STATEMENTS)
    scene, clause, holds = statement(rng, compose)
    return scene, clause, int(holds)
