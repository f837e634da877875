"""What the authors released, as recipes: captions of videos and questions about them, on public data sets.

A `Benchmark` is a data set and where it lies; a `Setting` is what recipes of one size have in common.
`OFFICIAL` is `LARGE` as the official code does it, defects included, for numbers that came from it; README.md
has the table of what differs.

Folders (fields `root`) hold the annotations and, in `videos`, the files. They and BERT's vocabulary,
VOCABULARY, are looked for below `data/` where a command runs; `mplug2 show` says what is not there yet.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mplug2 import tasks
from mplug2.caption_scores import CocoWords
from mplug2.data.annotations import Annotations
from mplug2.data.augment import OfficialCrop, OfficialWhole, RandomCrop
from mplug2.data.pixels import CLIP_MEAN, CLIP_STD, Preprocessing
from mplug2.data.tokens import SentencePiece, Tokenizer
from mplug2.data.videos import Videos
from mplug2.data.wording import Official as OfficialWording
from mplug2.data.wording import Plain, Wording
from mplug2.data.wordpiece import OfficialWordPiece, WordPiece
from mplug2.evaluations import Answering, Captioning
from mplug2.generate import Beam, Greedy, Search
from mplug2.metrics import Metric, equal_strings, exact_match
from mplug2.modules import decoder, fusion, temporal, text, universal, vision
from mplug2.official_search import Official as OfficialSearch
from mplug2.recipe import AdamW, Objective, OfficialAdamW, Recipe
from mplug2.recipes import world
from mplug2.roles import Config, Execution

VOCABULARY = "data/bert-large-uncased-vocab.txt"
"""BERT's uncased vocabulary, 30522 lines; another place: tokenizer.vocabulary=FILE."""
PRETRAINED = "data/mplug2_pretrain"
"""`mplug2 download mplug2_pretrain`, or of the file
`mplug2 convert mPLUG2_Pretrain.pth --from mplug2 --out data/mplug2_pretrain`."""
PROMPT = "a video of"
EPOCHS = 10
FORWARD = 32
"""Videos of a forward pass in the published fine-tuning: 4 on each of 8 devices."""

CAPTION_MODULES = ("vision", "temporal", "universal", "decoder")
ANSWER_MODULES = ("vision", "temporal", "text", "universal", "fusion", "decoder")


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """`name` of its recipe; `root`: its folder; `examples`: captions or questions of the train split, which
    say how many steps an epoch has."""

    name: str
    root: str
    annotations: Annotations
    examples: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`modules`: every module at this size; `seen`: fields of `Videos` on how they are looked at;
    `tokenizer`, `wording`: made for a prompt; `captions`, `questions`: ids by text field; `captioner`,
    `answerer`: searches; `right`: which answers are; `optimizer`: (iterations a step, iterations an epoch) ->
    its settings; `settings`: other fields of a Recipe; `batch`: videos of an iteration, one forward pass;
    `start`: the cards that modules are loaded from ("": they begin afresh)."""

    name: str
    modules: Mapping[str, Config]
    preprocessing: Preprocessing
    tokenizer: Callable[[str], Tokenizer]
    wording: Callable[[str], Wording]
    captions: Mapping[str, int]
    questions: Mapping[str, int]
    captioner: Search
    answerer: Search
    right: Metric
    optimizer: Callable[[int, int], AdamW]
    seen: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    batch: int = FORWARD
    start: str = ""


def captioning(benchmark: Benchmark, setting: Setting) -> Recipe:
    """Two forward passes make a step, as published. (Its loss is the mean over the words of both; the
    official loop averages the two passes' means.)"""
    data = _videos(benchmark, setting, setting.wording(PROMPT))
    objective = Objective(task=tasks.caption, data=data, batch=2 * setting.batch, lengths=setting.captions)
    evaluation = Captioning(data=data, search=setting.captioner, form=CocoWords(), batch=setting.batch)
    return _recipe(
        benchmark,
        setting,
        CAPTION_MODULES,
        setting.tokenizer(PROMPT),
        accumulate=2,
        objectives={"video_caption": objective},
        evaluations={"video_caption": evaluation},
    )


def answering(benchmark: Benchmark, setting: Setting) -> Recipe:
    data = _videos(benchmark, setting, setting.wording(""))
    objective = Objective(task=tasks.answer, data=data, batch=setting.batch, lengths=setting.questions)
    evaluation = Answering(
        data=data,
        length=setting.questions["question"],
        search=setting.answerer,
        right=setting.right,
        batch=setting.batch,
    )
    return _recipe(
        benchmark,
        setting,
        ANSWER_MODULES,
        setting.tokenizer(""),
        accumulate=1,
        objectives={"video_answer": objective},
        evaluations={"video_answer": evaluation},
    )


def _videos(benchmark: Benchmark, setting: Setting, wording: Wording) -> Videos:
    return Videos(
        root=benchmark.root,
        annotations=benchmark.annotations,
        preprocessing=setting.preprocessing,
        wording=wording,
        passes=EPOCHS,  # every epoch looks at other frames, cut in another way
        **setting.seen,
    )


def _recipe(
    benchmark: Benchmark,
    setting: Setting,
    modules: tuple[str, ...],
    tokenizer: Tokenizer,
    accumulate: int,
    **parts: Any,
) -> Recipe:
    per_epoch = benchmark.examples // setting.batch
    fields: dict[str, Any] = {
        "steps": EPOCHS * per_epoch // accumulate,
        "accumulate": accumulate,
        "preprocessing": setting.preprocessing,
        "optimizer": setting.optimizer(accumulate, per_epoch),
        "modes": dict.fromkeys(modules, "full") if setting.start else {},
        "cards": dict.fromkeys(modules, setting.start) if setting.start else {},
    }
    return Recipe(
        name=f"{benchmark.name}.{setting.name}",
        modules={module: setting.modules[module] for module in modules},
        tokenizer=tokenizer,
        **fields | dict(setting.settings) | parts,
    )


# ------------------------------------------------------------------------------------------------------------
# Sizes


def _modules(size: str) -> dict[str, Config]:
    files = {"vision": vision, "temporal": temporal, "text": text, "universal": universal, "fusion": fusion}
    return {name: getattr(file, size)() for name, file in (files | {"decoder": decoder}).items()}


def _adamw(iterations: int, per_epoch: int) -> AdamW:
    return AdamW(learning_rate=2e-5, warmup=200 // iterations, final=0.05, clip=0.0)


def _official_adamw(iterations: int, per_epoch: int) -> AdamW:
    # Only captioning accumulates, and only its loop has the saw-tooth.
    sawtooth = per_epoch if iterations > 1 else 0
    return OfficialAdamW(iterations=iterations, sawtooth=sawtooth)


BASE = Setting(
    name="base",
    modules=_modules("base"),
    preprocessing=Preprocessing(height=224, width=224, frames=16, mean=CLIP_MEAN, std=CLIP_STD),
    tokenizer=lambda prompt: WordPiece(VOCABULARY),
    wording=lambda prompt: Plain(),
    captions={"caption": 32},
    questions={"question": 64, "answer": 16},
    captioner=Beam(length=20, least=4),
    answerer=Beam(length=10, least=1),
    right=exact_match,
    optimizer=_adamw,
    seen={"train_view": RandomCrop()},
    settings={
        "learning_rates": {"vision": 0.1},
        "execution": Execution(dtype="bfloat16", remat="full"),
        "workers": 8,
    },
)

LARGE = replace(
    BASE,
    name="large",
    modules=_modules("large"),
    # The branches come trained: with fresh ones (modes.temporal=init) they want the rate of the others.
    settings=dict(BASE.settings) | {"learning_rates": {"vision": 0.1, "temporal": 0.1}},
    start=PRETRAINED,
)


def official(setting: Setting, vocabulary: str = VOCABULARY) -> Setting:
    """A setting as the official code has it: its texts, frames, views, optimizer, search and accuracy."""
    return replace(
        setting,
        name=f"{setting.name}_official",
        tokenizer=lambda prompt: OfficialWordPiece(vocabulary, prompt=prompt),
        wording=lambda prompt: OfficialWording(prompt=prompt),
        captions={"caption": 20, "caption_target": 20},
        # Answers are never cut there, and questions only in training.
        questions={"question": 50, "answer": 32},
        captioner=OfficialSearch(),
        answerer=OfficialSearch(length=10, least=1),
        right=equal_strings,
        optimizer=_official_adamw,
        seen={
            "sampling": "middle",
            "train_sampling": "official_random",
            "view": OfficialWhole(),
            "train_view": OfficialCrop(),
        },
    )


OFFICIAL = official(LARGE)

TINY = replace(
    BASE,
    name="tiny",
    modules={name: world.TINY.modules[name] for name in ANSWER_MODULES},
    preprocessing=Preprocessing(),
    tokenizer=lambda prompt: SentencePiece(),
    captions=world.CAPTION,
    questions=world.QUESTION,
    captioner=Greedy(length=8),
    answerer=Greedy(length=4),
    optimizer=lambda iterations, per_epoch: AdamW(learning_rate=3e-3, warmup=5),
    settings={"steps": 20, "log_every": 5, "checkpoint_every": 10},
    batch=2,
)
