"""A recipe: everything that one experiment is, as one frozen value. Read it, `dataclasses.replace` it, run
it.

It checks itself while it is read, before any array exists: that each objective's task finds the modules it
composes, that they fit together (traced with abstract arrays), and that every name means something.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mplug2 import fields
from mplug2.data.pixels import Preprocessing
from mplug2.data.stream import Feed
from mplug2.data.tokens import SentencePiece, Tokenizer
from mplug2.errors import RecipeError, nearest
from mplug2.network import select
from mplug2.places import Place
from mplug2.roles import DELTA, Config, Execution, Form, base_of
from mplug2.sharding import Mesh

Mode = Literal["init", "full", "frozen", "lora"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One task on one source of examples. `lengths`: how many ids each text field is cut or padded to.

    Objectives of a recipe with equal `data` and `batch` get the same examples in a step. Without dropout,
    what their tasks compute alike (seeing the clips, most of all) is computed once; with it, each drops out
    by a key of its own.
    """

    task: Callable[..., Any]
    data: Any
    batch: int
    lengths: Mapping[str, int] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with linear warm-up and cosine decay. Norms, biases, tokens and positions are not decayed.

    `warmup` and the recipe's `steps` count optimizer steps; the rate falls to `final` times
    `learning_rate`; `clip` bounds the global norm of the gradient (0: no bound).
    """

    learning_rate: float = 1e-3
    warmup: int = 100
    final: float = 0.01
    weight_decay: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OfficialAdamW(AdamW):
    """AdamW with the learning rates of the official mPLUG-2 fine-tuning; the defaults are its released ones.

    The rate begins and ends at `final` times `learning_rate` whatever a module's own factor is, and follows
    an iteration late. An iteration is one forward pass of the official loops, of which `iterations` make an
    optimizer step: `warmup` and `sawtooth` count them. `sawtooth`: so many iterations at first where, after
    every 100th, the next one has the rate of a hundredth of the way, the official captioning's defect in its
    first epoch (0: without it). Norms of vision, class tokens, positions and latents decay as well.
    """

    learning_rate: float = 2e-5
    warmup: int = 200
    final: float = 0.05
    clip: float = 0.0
    sawtooth: int = 0
    iterations: int = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`modules`: configs by name; `modes`: `init` (fresh, the default), `full` (loaded, trained), `frozen`
    (loaded, kept) or `lora` (loaded, kept, and adapted by a delta that is trained), by module; `delta`:
    the form of the deltas of modules whose mode is `lora`, unless `deltas` has another for the module;
    `cards`: where loaded modules come from;
    `learning_rates`: factors by module, 1 where unsaid; `objectives`: what is learned, all of them in every
    step, losses summed by weight; `evaluations`: what is measured; `compiler`: XLA's own options for the
    training step, by name.

    Of the checkpoints the newest `keep` stay, and the best one if `best` says what that is: a loss ("loss",
    "loss/image_caption": the lowest mean since the last line of the log), or a score ("image_answer": the
    highest on the validation split, measured at every checkpoint). The best one then counts as what the run
    has learned, wherever it is evaluated, published or asked.

    In modes, cards and learning_rates, `universal_delta` is the delta of `universal`: a module of its own,
    fresh unless its mode says otherwise.
    """

    name: str
    modules: Mapping[str, Config]
    objectives: Mapping[str, Objective]
    evaluations: Mapping[str, Any] = field(default_factory=dict)
    modes: Mapping[str, Mode] = field(default_factory=dict)
    delta: Form | None = None
    deltas: Mapping[str, Form] = field(default_factory=dict)
    cards: Mapping[str, Place] = field(default_factory=dict)
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    tokenizer: Tokenizer = field(default_factory=SentencePiece)
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    optimizer: AdamW = field(default_factory=AdamW)
    steps: int = 1000
    accumulate: int = 1
    ema: float = 0.0
    dropout: bool = True
    execution: Execution = field(default_factory=Execution)
    compiler: Mapping[str, bool | int | float | str] = field(default_factory=dict)
    mesh: Mesh = field(default_factory=Mesh)
    seed: int = 0
    workers: int = 0
    log_every: int = 20
    checkpoint_every: int = 500
    keep: int = 2
    best: str = ""

    def __post_init__(self):
        if told := fields.mismatch(self):
            raise RecipeError(f"recipe {self.name}: {told}")
        for objective in self.objectives.values():
            select(objective.task, self.modules)
        for name in self.modules:
            if base_of(name) is not None:
                raise RecipeError(
                    f"recipe {self.name}: {name} is the name of a delta: give {base_of(name)} the mode lora"
                )
        if unformed := [
            name for name in self.modules if self.mode(name) == "lora" and name not in self.forms
        ]:
            raise RecipeError(
                f"recipe {self.name}: mode lora of {unformed[0]} needs the form of its delta (delta, or "
                f"deltas.{unformed[0]})"
            )
        for label, names in (
            ("modes", self.modes),
            ("cards", self.cards),
            ("learning_rates", self.learning_rates),
        ):
            for name in set(names) - set(self.parts):
                raise RecipeError(
                    f"recipe {self.name}: {label} names module {name!r}, "
                    f"the recipe selects {sorted(self.parts)}" + nearest(name, self.parts)
                )
        for name in ("steps", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise RecipeError(f"recipe {self.name}: {name} is {getattr(self, name)}, expected at least 1")
        known = ["loss", *(f"loss/{name}" for name in self.objectives), *self.evaluations]
        if self.best and self.best not in known and self.best.partition("/")[0] not in self.evaluations:
            raise RecipeError(
                f"recipe {self.name}: best is {self.best!r}, expected a loss or a score of an evaluation"
                + nearest(self.best, known)
            )
        if not 0 <= self.ema < 1:
            raise RecipeError(f"recipe {self.name}: ema is {self.ema}, expected from 0 to below 1")
        for name, mode in self.modes.items():
            if mode not in ("init", "full", "frozen", "lora"):
                raise RecipeError(
                    f"recipe {self.name}: mode of {name} is {mode!r}, expected init, full, frozen or lora"
                )
            if mode != "init" and name not in self.cards:
                raise RecipeError(
                    f"recipe {self.name}: mode {mode} of {name} needs a card to load it from (cards.{name})"
                )

    def mode(self, module: str) -> Mode:
        return self.modes.get(module, "init")

    @property
    def forms(self) -> dict[str, Form]:
        """The forms of the deltas that there are, by the module that each is of."""
        adapted = {
            name: self.deltas.get(name, self.delta) for name in self.modules if self.mode(name) == "lora"
        }
        return {name: form for name, form in adapted.items() if form is not None}

    @property
    def parts(self) -> dict[str, Config]:
        """What the network is made of: the modules, and the deltas of those whose mode is `lora`."""
        deltas = {name + DELTA: form.delta(self.modules[name]) for name, form in self.forms.items()}
        return {**self.modules, **deltas}

    def trains(self, module: str) -> bool:
        """Whether a part's own parameters change."""
        return self.mode(module) in ("init", "full")

    @property
    def feeds(self) -> dict[str, Feed]:
        """What a step reads, by the first objective that reads it: equal data and batch are one feed."""
        feeds: dict[str, Feed] = {}
        for name, objective in self.objectives.items():
            first = self.feed_of(name)
            lengths = {**feeds[first].lengths, **objective.lengths} if first in feeds else objective.lengths
            feeds[first] = Feed(objective.data, objective.batch, lengths)
        return feeds

    def feed_of(self, name: str) -> str:
        """The name of the feed that objective `name` reads."""
        mine = self.objectives[name]
        same = (
            first
            for first, it in self.objectives.items()
            if it.batch == mine.batch and _are_equal(it.data, mine.data)
        )
        return next(same)


def _are_equal(data: Any, other: Any) -> bool:
    """Whether two data sets are; those that hold arrays, which have no one answer, only if they are one."""
    if data is other:
        return True
    try:
        return bool(data == other)
    except ValueError:
        return False
