"""Mistakes in a recipe file are one sentence each: the file and its line, the field, what was given and what
was expected."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipe_files import MINE, write

from mplug2 import recipes
from mplug2.composition import check_modules
from mplug2.data.inventory import inventories
from mplug2.data.stream import check_data, stream
from mplug2.data.tokens import SentencePiece
from mplug2.errors import DataError, Mplug2Error, RecipeError
from mplug2.recipe import Recipe
from mplug2.tools.main import main


def edited(folder: Path, old: str, new: str) -> str:
    assert old in MINE
    return f"{write(folder, MINE.replace(old, new))}:mine"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "steps=2",
            "stepz=2",
            r'mine.py", line 18: Recipe has no field "stepz"; known.*mean "steps"',
        ),
        ("steps=2", "steps='ten'", r"line 18: recipe mine.bright: steps is 'ten', expected a whole number$"),
        ("steps=2", "steps=True", r"steps is True, expected a whole number"),
        ("log_every=1", "mesh='data'", r"mesh is 'data', expected a Mesh"),
        (
            "log_every=1",
            "tokenizer='words'",
            r"tokenizer is 'words', expected a Tokenizer \(it has no ",
        ),
        ("log_every=1", "modes=['frozen']", r"modes is \['frozen'\], expected a mapping"),
        ("log_every=1", "modes={'vision': 'frozn'}", r"modes.vision is 'frozn', expected one of.*\"frozen\""),
        ("log_every=1", "learning_rates={'vision': '3'}", r"learning_rates.vision is '3', expected a number"),
        ("height=8", "height='8'", r"preprocessing.height is '8', expected a whole number"),
        ("frames=1", "mean=(0.1, 0.2)", r"preprocessing.mean is \(0.1, 0.2\), expected a tuple of 3"),
        ("batch=2)}", "batch='two')}", r"objectives.bright.batch is 'two', expected a whole number"),
        ("tasks.classify_vision", "'caption'", r"objectives.bright.task is 'caption', expected a function"),
        (
            "modules=MODULES",
            "modules=list(MODULES)",
            r"modules is \['vision', .*expected a mapping of a Config",
        ),
        (
            "modules=MODULES",
            "modules={'vision': 3}",
            r"modules.vision is 3, expected a Config \(it has no build",
        ),
        ('name="mine.bright", ', "", r"line 18: Recipe needs a value for 'name'"),
        ("tasks.classify_vision", "tasks.caption", r"line 18: task caption composes .*missing \['decoder'\]"),
        ("batch=2)}", "batchs=2)}", r'Objective has no field "batchs"; known.*did you mean "batch"'),
        ("return bright()", "return", r"mine\(\) of .*mine.py gives None, expected a Recipe .*lack a return"),
        ("return bright()", "return {}", r"gives {}, expected a Recipe$"),
        ("return bright()", "return 1 / 0", r'mine.py", line 21: ZeroDivisionError: division by zero'),
        ("return bright()", "raise SystemExit(3)", r"line 21: it ends the program"),
        ("def mine():", "def mine(:", r'mine.py", line 20: SyntaxError: invalid syntax: def mine\(:'),
        (
            "import dots",
            "import nothing_here",
            r"line 8: ModuleNotFoundError: No module named 'nothing_here'",
        ),
        ("import dots", "import dotz", r"line 8: ModuleNotFoundError: No module named 'dotz'"),
        ("def mine", "def mime", r'has no "mine"; it has mime \(did you mean "mime"\?\)'),
        (
            "def mine():",
            "def mine(x):",
            r'has no "mine".*its mine is the function mine, expected.*without arg',
        ),
        ("def mine():\n    return bright()", "mine = bright()", r"its mine is a Recipe, expected a function"),
    ],
)
def test_a_mistake_in_a_recipe_file_names_line_and_field(old, new, said, tmp_path):
    with pytest.raises(RecipeError, match=said) as refused:
        recipes.find(edited(tmp_path, old, new))
    assert not re.search(r"_recipe\d|\n", str(refused.value))


def test_a_mistake_in_a_neighbour_names_the_neighbour(tmp_path):
    name = edited(tmp_path, "import dots", "import dots")
    (tmp_path / "dots.py").write_text("x = 1\nclass Dots(:\n")
    with pytest.raises(RecipeError, match='mine.py", dots.py, line 2: SyntaxError'):
        recipes.find(name)


def test_the_only_recipe_of_a_file_needs_no_name(tmp_path):
    file = tmp_path / "one.py"
    file.write_text(
        "from mplug2.recipes import image_caption\ndef short():\n    return image_caption.tiny()\n"
    )
    assert recipes.find(str(file)).name == "image_caption.tiny"


# --- data


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    return recipes.find(f"{write(tmp_path_factory.mktemp('mine'))}:mine")


EXAMPLE = {"index": 0, "clips": np.zeros((1, 8, 8, 3), np.uint8), "label": 1, "caption": "a dot"}


@dataclasses.dataclass(frozen=True)
class Data:
    gives: Any

    def source(self, split: str) -> Any:
        if isinstance(self.gives, Exception):
            raise self.gives
        return self.gives


class Broken(list):
    def __getitem__(self, index: Any) -> Any:
        raise KeyError("colour")


def without(field: str, **more: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in EXAMPLE.items() if name != field} | more]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([EXAMPLE], r"its data is .*\(a list\), expected an object with a method source\(split\)"),
        (Data, r"its data is the class Data, expected an object"),
        (Data(None), r'its data: source\("train"\) gives None, expected examples by index'),
        (Data(ValueError("no disk")), r"its data, its train split: ValueError: no disk"),
        (Data([]), r"its data is empty: its train split holds no example"),
        (Data(Broken([1])), r"its data, example 0: KeyError: 'colour'"),
        (Data([(1, 2)]), r"example 0: it is \(1, 2\), expected a mapping of fields"),
        (Data(without("index")), r'example 0: it has no "index", the number .* it has clips, label, caption'),
        (Data(without("index", index="a")), r"its \"index\" is 'a', expected a whole number"),
        (Data(without("label", label=1.5)), r'its "label" is 1.5, expected a whole number'),
        (
            Data(without("clips", clips=EXAMPLE["clips"][0])),
            r"are an array uint8 \(8, 8, 3\), expected.*T, H,",
        ),
        (Data(without("clips", clips=EXAMPLE["clips"] / 255)), r"array float64 .*expected an array uint8"),
        (Data(without("clips")), r'its task reads "clips", its data and lengths give'),
        (Data(without("caption")), r'no text field "caption" in the data'),
    ],
)
def test_data_that_is_not_as_it_should_be_is_refused_before_training(data, said, recipe):
    lengths = {"caption": 8} if "caption" in said else {}
    (objective,) = recipe.objectives.values()
    objectives = {"bright": dataclasses.replace(objective, data=data, lengths=lengths)}
    with pytest.raises(Mplug2Error, match=said) as refused:
        check_modules(dataclasses.replace(recipe, objectives=objectives))
    assert "objective bright" in str(refused.value)


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (without("index")[0], r'the data of one: it has no "index"'),
        (without("label")[0] | {"index": 2}, r'"label" is in some examples and not in others'),
        (without("caption")[0] | {"index": 2}, r'no text field "caption"|"caption" is None, expected a text'),
    ],
)
def test_an_example_that_is_wrong_midway_is_named(last, said):
    from mplug2.data.stream import Feed

    feeds = {"one": Feed(Data([EXAMPLE, last]), 2, {"caption": 8})}
    check_data(feeds)
    with pytest.raises(DataError, match=said):
        next(stream(feeds, tokenizer=SentencePiece(), threads=0))


def test_what_the_code_of_a_recipe_file_raises_in_a_task_or_a_source_is_one_sentence(tmp_path, capsys):
    name = edited(tmp_path, "tasks.classify_vision", "classify").replace(":mine", "")
    text = Path(name).read_text()
    Path(name).write_text(
        text + "\ndef classify(batch, key=None, *, vision, vision_classifier):\n    return batch.colour\n"
    )
    assert main(["show", f"{name}:mine"]) == 2
    assert "objective bright: mine.py, line 24: " in (told := capsys.readouterr().err)
    assert "AttributeError" in told and told.count("\n") == 1
    name = f"{write(tmp_path)}:mine"
    (tmp_path / "lazily.py").write_text("def picture(index):\n    return 1 / index\n")
    assert main(["show", name]) == 2
    said = "its data, its train split, lazily.py, line 2: ZeroDivisionError: division by zero"
    assert said in (told := capsys.readouterr().err) and told.count("\n") == 1


def test_data_of_a_users_own_is_counted_and_looked_at(recipe):
    (found,) = inventories(recipe.feeds)["bright"]
    assert found.examples == 6 and len(found.seen) == 64
