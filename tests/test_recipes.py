"""Every recipe is whole: its modules fit, its tiny twin has a known loss and can learn, and bad ones are
refused.

Golden losses are those of fresh parameters on batches made here. After an intended change of maths:
`python tests/test_recipes.py` writes tests/golden/losses.json again; say why in the commit.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fresh import compiled, fresh
from jax.flatten_util import ravel_pytree

from mplug2 import anatomy, modules, recipes
from mplug2.composition import check, check_modules
from mplug2.data.handwriting import Handwriting
from mplug2.data.tokens import SentencePiece
from mplug2.data.videos import Videos
from mplug2.errors import RecipeError
from mplug2.network import Network, parts_of, select
from mplug2.overrides import apply
from mplug2.recipe import Objective, Recipe
from mplug2.recipes import world
from mplug2.roles import Execution
from mplug2.tools import main as command

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
TOKENIZER = SentencePiece()
RELEASED = {"msrvtt_caption", "msvd_caption", "msrvtt_qa", "msvd_qa", "tgif_qa"}


@cache
def tiny(name: str) -> Recipe:
    return recipes.find(f"{name}.tiny")


def frames_of(objective: Objective) -> int:
    data = objective.data
    return data.preprocessing.frames if isinstance(data, Videos) else data.frames


def batch_of(name: str, objective: Objective, size: int = 4) -> dict[str, Any]:
    """A fixed batch with the objective's fields, drawn here: golden losses do not move with the data."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    frames = frames_of(objective)

    def ids(length: int) -> np.ndarray:
        text = rng.integers(5, TOKENIZER.size, (size, length))
        ends = rng.integers(2, length, size)
        text[:, 0] = 2
        text[np.arange(size), ends] = 3
        return np.where(np.arange(length) > ends[:, None], 0, text).astype(np.int32)

    # Without `fits`, of which the texts here have none.
    batch = {field: ids(length) for field, length in objective.lengths.items() if field != "fits"}
    if "masked" in batch:
        batch["masked_target"] = np.where(batch["masked"] > 3, ids(batch["masked"].shape[1]), 0)
    if not name.startswith("text"):
        batch["clips"] = rng.normal(size=(size, frames, 32, 32, 3)).astype(np.float32)
    return batch | {"label": rng.integers(0, 2, size).astype(np.int32)}


def batches(recipe: Recipe) -> dict[str, dict[str, Any]]:
    return {name: batch_of(name, objective) for name, objective in recipe.objectives.items()}


def loss_of(network: Network, objective: Objective, params: Any, batch: Mapping[str, Any]) -> jax.Array:
    return objective.task(batch, **select(objective.task, network.bind(params)))


@cache
def golden_loss(
    name: str, task: Any, lengths: tuple[Any, ...], frames: int, configs: tuple[Any, ...]
) -> float:
    """The first loss of an objective; recipes that hold the same one share the compiling."""
    modules = dict(configs)
    objective = Objective(
        task=task, data=Handwriting("caption", frames=frames), batch=4, lengths=dict(lengths)
    )
    network = Network(modules)
    compute = compiled(lambda params, batch: loss_of(network, objective, params, batch))
    return float(compute(fresh(modules), batch_of(name, objective)))


def first_losses(name: str) -> dict[str, float]:
    recipe, found = tiny(name), {}
    for label, objective in recipe.objectives.items():
        needed = [part for part, required in parts_of(objective.task).items() if required]
        optional = [
            part for part in parts_of(objective.task) if part in recipe.modules and part not in needed
        ]
        frames = frames_of(objective)
        # Temporal plays no part in images, and nothing optional plays one in text.
        optional = [
            part for part in optional if not label.startswith("text") and (part != "temporal" or frames > 1)
        ]
        configs = tuple((part, recipe.modules[part]) for part in needed + optional)
        lengths = tuple(objective.lengths.items())
        found[label] = golden_loss(label, objective.task, lengths, frames, configs)
    return found


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_first_loss_is_the_golden_one(name):
    golden = json.loads(GOLDEN.read_text())[name]
    assert first_losses(name) == pytest.approx(golden, rel=1e-5)


# Of these, other recipes of the fast suite learn the same tasks.
TWICE = ("pretrain", "image_retrieval", "minilm_retrieval", "video_qa")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in TWICE else ()) for name in recipes.RECIPES],
)
def test_a_tiny_recipe_overfits_a_fixed_batch(name):
    # Recipes that differ in their data alone are one program, and see one batch.
    recipe, same = tiny(name), ("caption", "qa")
    if name in RELEASED:
        twin = tiny("video_" + next(task for task in same if name.endswith(task)))
        assert (recipe.modules, batches(recipe).keys()) == (twin.modules, batches(twin).keys())
        for task, fixed in batches(recipe).items():
            jax.tree.map(np.testing.assert_array_equal, fixed, batches(twin)[task])
            assert recipe.objectives[task].task is twin.objectives[task].task
        return
    network, fixed = Network(recipe.modules, recipe.execution), batches(recipe)
    start, unravel = ravel_pytree(fresh(recipe.modules))
    adam = optax.adam(5e-3)

    def total(flat: jax.Array, fixed: Any) -> jax.Array:
        params = unravel(flat)
        losses = [loss_of(network, it, params, fixed[name]) for name, it in recipe.objectives.items()]
        return jnp.stack(losses).sum()

    @compiled
    def step(flat: Any, moments: Any, fixed: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(total)(flat, fixed)
        updates, moments = adam.update(gradient, moments)
        return optax.apply_updates(flat, updates), moments, loss

    # Without a key, matching meets the hardest negatives there are at each step: its loss falls slowly.
    goal = 0.9 if name == "video_retrieval" else 0.5
    flat, moments, losses = start, adam.init(start), []
    while len(losses) < 400 and (not losses or losses[-1] > goal * losses[0]):
        flat, moments, loss = step(flat, moments, fixed)
        losses.append(float(loss))
    assert losses[-1] <= goal * losses[0]


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_size_names_itself_and_states_its_number(name):
    made = {size: make() for size, make in recipes.sizes(name).items()}
    assert {"tiny", "base", "large", "large_official" if name in RELEASED else "small"} <= set(made)
    for size, recipe in made.items():
        assert recipe.name == f"{name}.{size}"
        assert list(recipe.modules) == list(made["tiny"].modules)
    doc = __import__(f"mplug2.recipes.{name}", fromlist=["x"]).__doc__
    assert ("ours is not measured." if name in RELEASED else "Number (handwriting, test split):") in doc
    assert "Number (" in doc and "test split" in doc


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_modules_of_a_recipe_fit_together(name):
    check(tiny(name))
    check_modules(recipes.find(name))  # BERT's vocabulary is not at hand


def test_only_recipes_with_videos_own_temporal():
    owners = {name for name in recipes.RECIPES if "temporal" in tiny(name).modules}
    assert owners - RELEASED == {"pretrain", "video_classify", "video_caption", "video_qa", "video_retrieval"}
    assert owners > RELEASED


def test_a_text_recipe_owns_no_vision():
    assert all("vision" not in tiny(name).modules for name in ("text_classify", "text_complete"))


def test_official_sizes_learn_at_the_published_rates():
    recipe = recipes.find("video_qa.large")
    assert recipe.optimizer.learning_rate * recipe.learning_rates["vision"] == pytest.approx(2e-6)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == (2e-5, 0.02)
    assert (recipe.optimizer.warmup, recipe.preprocessing.height) == (200, 224)
    assert recipe.objectives["video_answer"].data.frames == 16


@pytest.mark.parametrize("name", world.LESSONS)
def test_no_text_of_the_world_is_cut(name):
    objective = world.SMALL.objective(name)
    source = Handwriting(objective.data.view, frames=objective.data.frames).source("train")
    for index in range(300):
        for field, text in source.texts(index).items():
            if field in objective.lengths:
                assert TOKENIZER.decode(TOKENIZER.encode(text, objective.lengths[field])) == text


# What is refused


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["modules.universal.width=64"], "vision gives width 32 and universal.vision reads width 64"),
        (["modules.text.width=64"], "text gives width 64 and universal.text reads width 32"),
        (["modules.fusion.width=64"], "universal.text gives width 32 and fusion reads width 64"),
        (["modules.temporal.depth=4"], "vision .*depth 2.* and temporal .*depth 4.* do not fit"),
        (["modules.temporal.width=64"], "vision .*width 32.* and temporal .*width 64.* do not fit"),
        (["modules.decoder.vocabulary=99"], "text has 96, decoder has 99, SentencePiece.* has 96"),
        (["objectives.video_answer.lengths.question=90"], "90 ids goes to text, which has 64 positions"),
        (["objectives.video_answer.lengths.question=none"], 'reads "question", .*give .*answer'),
        (["objectives.video_answer.data.view=caption"], 'video_answer: no text field "question"'),
    ],
)
def test_modules_that_do_not_fit_are_named_with_their_numbers(overrides, reason):
    with pytest.raises(RecipeError, match=reason):
        check(apply(tiny("video_qa"), overrides))


def test_stacks_of_unequal_depth_do_not_fit_unrolled_either():
    recipe = replace(tiny("video_qa"), execution=Execution(scan=False))
    with pytest.raises(RecipeError, match="do not fit"):
        check(apply(recipe, ["modules.temporal.depth=4"]))


def test_a_missing_module_is_named_while_the_recipe_is_read():
    with pytest.raises(RecipeError, match="missing .*decoder"):
        replace(tiny("image_caption"), modules={"vision": modules.find("vision")})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vidoe_qa", 'no recipe "vidoe_qa".*did you mean "video_qa"'),
        ("video_qa.smal", 'did you mean "small"'),
        ("absent.py:tiny", 'no recipe file "absent.py"'),
    ],
)
def test_an_unknown_recipe_is_refused_with_the_nearest_name(name, reason):
    with pytest.raises(RecipeError, match=reason):
        recipes.find(name)


def test_a_recipe_of_ones_own_is_found_in_its_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from mplug2.recipes import image_caption\ndef short():\n    return image_caption.tiny()\n"
    )
    assert recipes.find(f"{file}:short") == tiny("image_caption")
    with pytest.raises(RecipeError, match='did you mean "short"'):
        recipes.find(f"{file}:shart")
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(RecipeError, match="mine.py.*, line 1: ModuleNotFoundError"):
        recipes.find(f"{file}:short")


# Anatomy


def test_a_route_is_read_off_the_trace():
    part = anatomy.dissect(tiny("video_qa"))["video_answer"]
    assert anatomy.diagram(part).splitlines() == [
        "[clips] → vision (+ temporal) → universal.vision → fusion → decoder.tokens → decoder.predict → loss",
        "[question] → text → universal.text → fusion",
        "[answer] → decoder.tokens",
        "[answer] → loss",
        "universal.vision → decoder.tokens",
    ]
    assert set(part.flops) == {"vision", "temporal", "universal", "text", "fusion", "decoder"}


def test_flops_count_every_layer_and_multiply_add():
    """The text route of tiny by hand: per token and layer 8 D D + 4 D hidden, and scores and sums 4 S D."""
    part = anatomy.dissect(tiny("text_classify"))["text_classify"]
    config: Any = tiny("text_classify").modules["text"]
    length = world.STATEMENT["text"]
    layer = length * (8 * config.width**2 + 4 * config.width * config.hidden + 4 * length * config.width)
    assert part.flops["text"] == config.depth * layer
    assert part.flops["universal"] == 2 * layer
    assert part.flops["text_classifier"] == 2 * config.width * 2


@pytest.mark.parametrize(
    "words", [["recipes"], ["modules"], ["show", "image_caption.tiny"], ["show", "text"]]
)
def test_the_catalogue_commands_answer(words, capsys):
    assert command.main(words) == 0
    said = capsys.readouterr().out
    expected = {"recipes": recipes.RECIPES, "modules": modules.MODULES}.get(
        words[0], ["decoder", "parameters"]
    )
    assert all(name in said for name in (expected if words[-1] != "text" else ["positions", "parameters"]))


def test_show_refuses_an_unknown_name(capsys):
    assert command.main(["show", "visoin"]) == 2
    assert 'did you mean "vision"' in capsys.readouterr().err


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: first_losses(name) for name in recipes.RECIPES}, indent=2) + "\n")
