"""The experiments: one file per task, each with `tiny()` (the twin for tests), `base()` and `large()` (the
official module sizes); those on handwriting have `small()`, those on public videos `large_official()`. This
table is the whole catalogue: `find("video_qa")`, `find("video_qa.tiny")`.
"""

import importlib
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from mplug2 import source
from mplug2.errors import RecipeError, nearest
from mplug2.fields import said
from mplug2.mistakes import in_words
from mplug2.recipe import Recipe
from mplug2.source import Sources

# name -> what it teaches, in a line
RECIPES = {
    "pretrain": "text, images and videos together: every task at once, one network",
    "text_classify": "does a statement follow from a description? (entailment)",
    "text_complete": "a text model: prefix language modelling and masked words",
    "image_classify": "which digit is in the picture?",
    "image_caption": "say what is in a picture",
    "image_qa": "answer a question about a picture",
    "image_retrieval": "find the picture of a text and the text of a picture",
    "minilm_retrieval": "the same with a pretrained sentence encoder, frozen",
    "video_classify": "which digit moves through the video?",
    "video_caption": "say what happens in a video",
    "video_qa": "answer a question about a video",
    "video_retrieval": "find the video of a text and the text of a video",
    "msrvtt_caption": "MSR-VTT: say what happens in a web video",
    "msvd_caption": "MSVD: say what happens in a short clip",
    "msrvtt_qa": "MSRVTT-QA: answer a question about a web video",
    "msvd_qa": "MSVD-QA: answer a question about a short clip",
    "tgif_qa": "TGIF-QA, FrameQA: answer a question about an animated GIF",
}

DEFAULT_SIZES = ("small", "large")
"""A recipe's name alone means the first of these that it has."""


def find(name: str) -> Recipe:
    """The recipe called `video_qa` (its default size), `video_qa.tiny`, or `path/to/file.py:function`.

    Raises RecipeError with the nearest name, or with the line of a file that is wrong.
    """
    return found(name)[0]


def found(name: str) -> tuple[Recipe, Sources | None]:
    """The same, and of a recipe that is a file the sources that it came from."""
    if is_file(name):
        return _from_file(name)
    if (Path(name) / "run.json").is_file():
        raise RecipeError(f"{name} is a run, expected a recipe: a name, or path/to/file.py:function")
    recipe, _, size = name.partition(".")
    if recipe not in RECIPES:
        raise RecipeError(
            f'there is no recipe "{recipe}"; known are {", ".join(RECIPES)}, or path/to/file.py:function'
            f"{nearest(recipe, RECIPES)}"
        )
    return _variant(importlib.import_module(f"{__name__}.{recipe}"), size, recipe)(), None


def is_file(name: str) -> bool:
    """Whether a recipe's name means a file, whose code finding it would run."""
    return ".py" in name


def sizes(name: str) -> dict[str, Callable[[], Recipe]]:
    """The sizes of a recipe in this package: function by name, in the order of its file."""
    return _variants(importlib.import_module(f"{__name__}.{name}"))


def default_size(variants: Iterable[str]) -> str:
    """The size that is meant where none is named."""
    return next((size for size in DEFAULT_SIZES if size in set(variants)), DEFAULT_SIZES[0])


def _variants(module: ModuleType) -> dict[str, Callable[[], Recipe]]:
    def makes_recipe(member: object) -> bool:
        return (
            inspect.isfunction(member)
            and member.__module__ == module.__name__
            and not member.__name__.startswith("_")
            and not inspect.signature(member).parameters
        )

    found = [member for _, member in inspect.getmembers(module, makes_recipe)]
    return {
        member.__name__: member for member in sorted(found, key=lambda member: member.__code__.co_firstlineno)
    }


def _variant(module: ModuleType, function: str, name: str) -> Callable[[], Recipe]:
    variants = _variants(module)
    if not function and len(variants) == 1:
        return next(iter(variants.values()))
    function = function or default_size(variants)
    if function in variants:
        return variants[function]
    known = ", ".join(variants) or "none"
    told = f'recipe {name} has no "{function}"; it has {known}{nearest(function, variants)}'
    if function in vars(module):
        told += f"; its {function} is {said(vars(module)[function])}, expected a function without arguments"
    raise RecipeError(told)


def _from_file(name: str) -> tuple[Recipe, Sources]:
    file, _, function = name.partition(":") if not name.endswith(".py") else (name, "", "")
    if not Path(file).is_file():
        raise RecipeError(f'there is no recipe file "{file}"')
    if Path(file).suffix != ".py":
        raise RecipeError(f'"{file}" is not a Python file; expected path/to/file.py:function')
    package = source.from_file(Path(file))
    recipe = of_package(package, function, file)
    return recipe, package.sources()


def of_package(package: source.Package, function: str, name: str) -> Recipe:
    """What a function of a recipe file, which is called `name`, gives. Raises RecipeError with the line that
    is wrong."""
    with in_words(f'recipe file "{name}"'):
        module = source.load(package)
    make = _variant(module, function, name)
    with in_words(f'recipe file "{name}"'):
        recipe = make()
    if not isinstance(recipe, Recipe):
        hint = " (does it lack a return?)" if recipe is None else ""
        raise RecipeError(f"{make.__name__}() of {name} gives {said(recipe)}, expected a Recipe{hint}")
    return recipe
