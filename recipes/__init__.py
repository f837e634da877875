"""The experiments: one file per task, each with `tiny()` (the twin for tests), `base()` and `large()` (the
official module sizes); those on handwriting have `small()`, those on public videos `large_official()`. This
table is the whole catalogue: `find("video_qa")`, `find("video_qa.tiny")`.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

from mplug2.errors import RecipeError, nearest
from mplug2.recipe import Recipe

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

    Raises RecipeError with the nearest name.
    """
    if ".py" in name:
        return _from_file(name)
    recipe, _, size = name.partition(".")
    if recipe not in RECIPES:
        raise RecipeError(
            f'there is no recipe "{recipe}"; known are {", ".join(RECIPES)}, or path/to/file.py:function'
            f"{nearest(recipe, RECIPES)}"
        )
    return _call(importlib.import_module(f"{__name__}.{recipe}"), size, recipe)


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


def _call(module: ModuleType, function: str, name: str) -> Recipe:
    variants = _variants(module)
    function = function or default_size(variants)
    if function not in variants:
        known = ", ".join(variants) or "none"
        raise RecipeError(f'recipe {name} has no "{function}"; it has {known}{nearest(function, variants)}')
    recipe = variants[function]()
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"{function}() of {name} gives a {type(recipe).__name__}, expected a Recipe")
    return recipe


def _from_file(name: str) -> Recipe:
    file, _, function = name.partition(":")
    path = Path(file)
    if not path.is_file():
        raise RecipeError(f'there is no recipe file "{file}"')
    spec = importlib.util.spec_from_file_location(f"_recipe_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RecipeError(f'"{file}" is not a Python file; expected path/to/file.py:function')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RecipeError(f'recipe file "{file}" cannot be read: {type(error).__name__}: {error}') from error
    return _call(module, function, file)
