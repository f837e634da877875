"""Overrides are typed by the recipe's annotations, take effect at once, and refuse with the nearest name."""

import pytest

from mplug2 import recipes
from mplug2.errors import RecipeError
from mplug2.overrides import apply
from mplug2.recipe import Recipe


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipes.find("video_qa.tiny")


def test_fields_are_reached_through_dataclasses_and_mappings(recipe):
    changed = apply(
        recipe,
        [
            "optimizer.learning_rate=3e-4",
            "modules.vision.depth=4",
            "modules.vision.stem.channels=4,12,16",
            "objectives.video_answer.weight=1",
            "objectives.video_answer.data.frames=2",
            "execution.dtype=bfloat16",
            "dropout=false",
            "name=mine",
        ],
    )
    vision, objective = changed.modules["vision"], changed.objectives["video_answer"]
    assert changed.optimizer.learning_rate == 3e-4
    assert vision.depth == 4 and vision.stem.channels == (4, 12, 16)
    assert objective.weight == 1.0 and isinstance(objective.weight, float)
    assert objective.data.frames == 2
    assert (changed.execution.dtype, changed.dropout, changed.name) == ("bfloat16", False, "mine")
    assert recipe.modules["vision"].depth == 2  # the recipe itself is as it was


def test_a_field_that_is_not_named_keeps_its_value(recipe):
    assert apply(recipe, []) is recipe
    assert apply(recipe, ["steps=20"]) == recipe


def test_overrides_take_effect_at_once(recipe):
    """A mode needs its card, in whatever order the two are given."""
    changed = apply(recipe, ["modes.vision=frozen", "cards.vision=here.json"])
    assert changed.mode("vision") == "frozen" and changed.cards == {"vision": "here.json"}


def test_none_removes_an_entry(recipe):
    assert "temporal" not in apply(recipe, ["modules.temporal=none"]).modules
    with pytest.raises(RecipeError, match="missing .*decoder"):
        apply(recipe, ["modules.decoder=none"])


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("optimiser.clip=1", r'optimiser: no such field.*did you mean "optimizer"'),
        ("modules.vison.depth=3", r'modules.vison: no such entry.*did you mean "vision"'),
        ("modules.vision.dept=3", r'did you mean "depth"'),
        ("modes.visoin=frozen", r'did you mean "vision"'),
        ("steps=1.5", r"steps expects an int, got '1.5'"),
        ("dropout=1", r"dropout expects true or false, got '1'"),
        ("optimizer.learning_rate=fast", r"expects a float, got 'fast'"),
        ("execution.dtype=float16", r'one of float32, bfloat16, got .*did you mean "bfloat16"'),
        ("modules.vision.image=32", r"2 values with commas between \(an int, an int\), got '32'"),
        ("modules.vision=base", r"holds a Config.*set one of its fields: image, stem"),
        ("objectives.video_answer.task=caption", r"holds a function, which text cannot spell"),
        ("objectives.image=none", r"objectives.image: no such entry; known are video_answer"),
        ("steps.more=1", r"steps is 20, which has no fields"),
        ("steps", r"not of the form field=value"),
    ],
)
def test_a_refusal_names_both_sides(recipe, override, reason):
    with pytest.raises(RecipeError, match=reason):
        apply(recipe, [override])


def test_an_override_cannot_replace_what_another_goes_into(recipe):
    for pair in (["mesh=1", "mesh.data=2"], ["mesh.data=2", "mesh=1"]):
        with pytest.raises(RecipeError, match="another override"):
            apply(recipe, pair)
