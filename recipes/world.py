"""The world that all recipes share: handwriting at four sizes, and what can be learned and measured in it.

A `Size` holds what recipes of one size have in common; a recipe file names the modules and objectives that
it picks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mplug2 import tasks
from mplug2.data.grammar import NUMBERS
from mplug2.data.handwriting import Handwriting
from mplug2.data.pixels import Preprocessing
from mplug2.data.scenes import COLOURS, CORNERS
from mplug2.evaluations import (
    Answering,
    Captioning,
    Classification,
    Completion,
    Evaluation,
    Matching,
    Retrieval,
    TextClassification,
    ZeroShot,
)
from mplug2.modules import decoder, fusion, heads, temporal, text, universal, vision
from mplug2.modules.forms import Lora
from mplug2.recipe import AdamW, Objective, Recipe
from mplug2.roles import Config, Execution

VOCABULARY = 96
"""The number of ids of the zoo's own tokenizer, `handwriting.model`."""

# Ids that hold the longest text of each kind, `begin` and `end` included: no text is cut.
CAPTION = {"caption": 16}
MASKED = {"masked": 18}
DESCRIPTION = {"text": 18, "fits": 137}  # and all that grammar.truths may say of three digits
QUESTION = {"question": 12, "answer": 4}
STATEMENT = {"text": 24}
TEXT_QUESTION = {"text": 24, "target": 4}


@dataclass(frozen=True)
class Lesson:
    """An objective in words: a task on a view of handwriting, as images or as videos, and the text fields it
    reads."""

    task: Callable[..., Any]
    view: str
    lengths: Mapping[str, int] = field(default_factory=dict)
    video: bool = False


# What can be learned. A name begins with what it is about; `text` lessons see no pixels.
LESSONS = {
    "text_classify": Lesson(tasks.classify_text, "entail", STATEMENT),
    "text_complete": Lesson(tasks.complete, "text_question", TEXT_QUESTION),
    "text_unmask": Lesson(tasks.unmask, "text", MASKED),
    "image_classify": Lesson(tasks.classify_vision, "digit"),
    "image_caption": Lesson(tasks.caption, "scene", CAPTION),
    "image_answer": Lesson(tasks.answer, "scene", QUESTION),
    "image_contrast": Lesson(tasks.contrast, "scene", DESCRIPTION),
    "image_match": Lesson(tasks.match, "describe", DESCRIPTION),
    "image_unmask": Lesson(tasks.unmask, "describe", MASKED),
    "video_classify": Lesson(tasks.classify_vision, "digit", video=True),
    "video_caption": Lesson(tasks.caption, "scene", CAPTION, video=True),
    "video_answer": Lesson(tasks.answer, "scene", QUESTION, video=True),
    "video_contrast": Lesson(tasks.contrast, "scene", DESCRIPTION, video=True),
    "video_match": Lesson(tasks.match, "scene", DESCRIPTION, video=True),
}


@dataclass(frozen=True)
class Measure:
    """An evaluation in words: its kind on a view of handwriting, as images or videos, and further fields."""

    kind: Callable[..., Evaluation]
    view: str
    more: Mapping[str, Any] = field(default_factory=dict)
    video: bool = False


# Prompts for a class of digits, worded as the captions that contrast learns from.
PLACES = ("", *(f" at the {corner}" for corner in CORNERS))
PROMPTS = tuple(f"a {colour} {{}}{place}" for colour in COLOURS for place in PLACES)

# What can be measured, by the name of what it tests.
MEASURES = {
    "text_classify": Measure(TextClassification, "entail", {"length": STATEMENT["text"]}),
    "text_complete": Measure(Completion, "text_question", {"length": STATEMENT["text"]}),
    "image_classify": Measure(Classification, "digit"),
    "image_zero_shot": Measure(
        ZeroShot, "digit", {"classes": NUMBERS, "templates": PROMPTS, "length": CAPTION["caption"]}
    ),
    "image_caption": Measure(Captioning, "caption"),
    "image_answer": Measure(Answering, "question", {"length": QUESTION["question"]}),
    "image_retrieval": Measure(Retrieval, "retrieval", {"length": CAPTION["caption"]}),
    "image_match": Measure(Matching, "caption", {"length": CAPTION["caption"]}),
    "video_classify": Measure(Classification, "digit", video=True),
    "video_caption": Measure(Captioning, "caption", video=True),
    "video_answer": Measure(Answering, "question", {"length": QUESTION["question"]}, video=True),
    "video_answer_shuffled": Measure(
        Answering, "question", {"length": QUESTION["question"], "shuffled": True}, video=True
    ),
    "video_retrieval": Measure(Retrieval, "retrieval", {"length": CAPTION["caption"]}, video=True),
    "video_match": Measure(Matching, "caption", {"length": CAPTION["caption"]}, video=True),
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """`modules`: every module at this size; `canvas`: pixels high and wide; `frames` of a video; `batch`:
    examples an objective sees in a step; `settings`: the other fields of a Recipe."""

    name: str
    modules: Mapping[str, Config]
    canvas: int
    frames: int
    batch: int
    settings: Mapping[str, Any]

    def objective(self, name: str, *, share: float = 1.0, weight: float = 1.0) -> Objective:
        """The lesson `name` on `share` of the batch."""
        lesson = LESSONS[name]
        return Objective(
            task=lesson.task,
            data=self.handwriting(lesson.view, video=lesson.video),
            batch=max(1, round(self.batch * share)),
            lengths=lesson.lengths,
            weight=weight,
        )

    def evaluation(self, name: str) -> Evaluation:
        """The measure `name`."""
        measure = MEASURES[name]
        return measure.kind(data=self.handwriting(measure.view, video=measure.video), **measure.more)

    def handwriting(self, view: str, *, video: bool = False) -> Handwriting:
        return Handwriting(view, frames=self.frames if video else 1, canvas=self.canvas)

    def recipe(
        self,
        name: str,
        modules: tuple[str, ...],
        objectives: Mapping[str, Objective],
        evaluations: tuple[str, ...],
    ) -> Recipe:
        """A recipe that picks modules and evaluations by name."""
        picked = {module: self.modules[module] for module in modules}
        rates = self.settings.get("learning_rates", {})
        settings: dict[str, Any] = dict(self.settings)
        settings["learning_rates"] = {part: rates[part] for part in rates if part in picked}
        return Recipe(
            name=f"{name}.{self.name}",
            modules=picked,
            objectives=objectives,
            evaluations={name: self.evaluation(name) for name in evaluations},
            delta=Lora(),
            preprocessing=Preprocessing(height=self.canvas, width=self.canvas, frames=self.frames),
            **settings,
        )


def modules(size: str, space: int) -> dict[str, Config]:
    """Every module at one size (`tiny` ... `large`); heads read what `universal` and `fusion` give."""
    width = getattr(universal, size)().width
    return {
        "vision": getattr(vision, size)(),
        "temporal": getattr(temporal, size)(),
        "text": replace(getattr(text, size)(), vocabulary=VOCABULARY),
        "universal": getattr(universal, size)(),
        "fusion": getattr(fusion, size)(),
        "decoder": replace(getattr(decoder, size)(), vocabulary=VOCABULARY),
        "contrastive": heads.ContrastiveConfig(width=width, space=space),
        "matching": heads.ClassifierConfig(width=width, classes=2),
        "vision_classifier": heads.ClassifierConfig(width=width, classes=10),
        "text_classifier": heads.ClassifierConfig(width=width, classes=2),
        "unmasker": heads.UnmaskerConfig(width=width, vocabulary=VOCABULARY),
    }


TINY = Size(
    name="tiny",
    modules=modules("tiny", space=16),
    canvas=32,
    frames=4,
    batch=8,
    settings={
        "steps": 20,
        "optimizer": AdamW(learning_rate=3e-3, warmup=5),
        "log_every": 5,
        "checkpoint_every": 10,
    },
)

SMALL = Size(
    name="small",
    modules=modules("small", space=64),
    canvas=32,
    frames=4,
    batch=48,
    settings={
        "steps": 2000,
        "optimizer": AdamW(learning_rate=1e-3, warmup=100, beta2=0.98),
        "learning_rates": {"vision": 3.0},  # convolutions bear, and want, more than attention does
        "dropout": False,  # every training scene is new
        "execution": Execution(scan=False),
    },
)

# The published fine-tuning of mPLUG-2 for videos: 10 epochs, 2e-5 for language and 2e-6 for vision, 16
# frames, 224 px, 200 steps of warm-up, down to 1e-6; 4 clips on each of 8 devices, in 16-bit.
BASE = Size(
    name="base",
    modules=modules("base", space=256),
    canvas=224,
    frames=4,
    batch=32,
    settings={
        "steps": 10_000,
        "optimizer": AdamW(learning_rate=2e-5, warmup=200, final=0.05),
        "learning_rates": {"vision": 0.1, "temporal": 0.1},
        "execution": Execution(dtype="bfloat16", remat="dots"),
    },
)

LARGE = replace(
    BASE,
    name="large",
    modules=modules("large", space=256),
    frames=16,
    settings=dict(BASE.settings) | {"execution": Execution(dtype="bfloat16", remat="full")},
)
