"""`mplug2 predict`: say what is in an image or a video, answer a question about it, or weigh classes against
each other."""

import json
import os
from dataclasses import replace

import jax
import numpy as np

from mplug2.arguments import Parser
from mplug2.card_wording import wording_of
from mplug2.errors import DataError
from mplug2.hub import bundle
from mplug2.opening import BUNDLES, CARDS, Kind, opened
from mplug2.predict import Predictor
from mplug2.recipes import runs
from mplug2.run import read_run
from mplug2.screen import note, printable
from mplug2.sharding import Mesh, mesh_of
from mplug2.trained import restore


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    question, classes = arguments.question, _classes(arguments.classes)
    paths = arguments.image or arguments.video
    for path in paths:  # before a network is opened
        if not os.path.exists(path):
            raise DataError(f"there is no file {path}")
    mesh = mesh_of(arguments.mesh) if arguments.mesh else None
    predictor = open_predictor(arguments.source, mesh=mesh, trusted=arguments.trust)
    read = predictor.image if arguments.image else predictor.video
    clips = np.concatenate([read(path) for path in paths])  # all, before anything is said
    for text in [question or "", *classes]:
        if words := predictor.unknown(text):
            note(f"warning: the tokenizer does not know {', '.join(words)}")
        if predictor.is_cut(text):
            note(f'warning: only {predictor.length} tokens are read of "{text[:40]}..."')
    if classes:
        found = [{"classes": _likeliest(classes, shares)} for shares in predictor.classify(clips, classes)]
    elif question is not None:
        found = [{"question": question, "answer": said} for said in predictor.answer(clips, question)]
    else:
        found = [{"caption": said} for said in predictor.caption(clips)]
    for path, one in zip(paths, found, strict=True):
        if arguments.json:
            print(json.dumps({"file": path, **one}))
        else:
            print(*([f"{printable(path)}:"] if len(paths) > 1 else []), *_readable(one), sep="\n")


def _classes(said: str | None) -> list[str]:
    """Raises DataError for a class without a name, or named twice."""
    classes = [name.strip() for name in said.split(",")] if said is not None else []
    if "" in classes:
        raise DataError(f'--classes "{said}": expected names separated by commas, such as "two,three"')
    if twice := [name for name in classes if classes.count(name) > 1]:
        raise DataError(f'--classes "{said}": "{twice[0]}" is named twice')
    return classes


def _likeliest(classes: list[str], shares: np.ndarray) -> dict[str, float]:
    said = zip(classes, map(float, shares), strict=True)
    return dict(sorted(said, key=lambda item: -item[1]))


def open_predictor(source: list[str], *, mesh: Mesh | None = None, trusted: bool = False) -> Predictor:
    """Of a run directory, of a bundle, or of cards: shelf names, families, files, directories; nothing is the
    shelf's default. It is spread over `mesh` (default: a run's own, where its devices are here, else one
    device); raises RecipeError for one of more devices than there are."""
    devices = None if mesh is None else mesh.build(jax.local_devices())
    taken = (Kind.RUN, *BUNDLES, *CARDS) if len(source) == 1 else CARDS
    words = [opened(word, "predict", *taken) for word in source]
    first = words[0].kind if words else None
    if first is Kind.RUN:
        run = read_run(source[0])
        recipe = runs.recipe_of(run, trusted=trusted)
        recipe = recipe if mesh is None else replace(recipe, mesh=mesh)
        _, network, params = restore(run, recipe)
        return Predictor(
            network,
            params,
            recipe.tokenizer,
            recipe.preprocessing,
            wording=wording_of(recipe),
            mesh=recipe.mesh.of_process(),
        )
    if first in BUNDLES:
        carried = bundle.load(words[0].path, devices)
        return Predictor(
            carried.network,
            carried.params,
            carried.tokenizer,
            carried.lock.preprocessing,
            wording=carried.wording,
            mesh=devices,
        )
    return Predictor.of(*source, mesh=mesh)


def _readable(found: dict) -> list[str]:
    """Lines, one for each class."""
    if "classes" not in found:
        return [printable(found.get("answer", found.get("caption", ""))) or "(nothing)"]
    shares = {printable(name): share for name, share in found["classes"].items()}
    width = max(map(len, shares))
    return [f"{name:<{width}}  {share:6.1%}  {'#' * round(40 * share)}" for name, share in shares.items()]


def _parser() -> Parser:
    parser = Parser(prog="mplug2 predict", description=__doc__.partition(": ")[2] if __doc__ else "")
    parser.add_argument(
        "source",
        nargs="*",
        help="a run directory, a bundle, or cards: shelf names, files, directories (default: the shelf)",
    )
    seen = parser.add_mutually_exclusive_group(required=True)
    seen.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        help="a picture: PNG, JPEG, WebP, GIF, TIFF and others; may be repeated",
    )
    seen.add_argument(
        "--video",
        metavar="FILE",
        action="append",
        help="a video: mp4, mkv, webm, avi, gif and others; may be repeated",
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--question", metavar="TEXT", help="answer this (default: caption)")
    asked.add_argument("--classes", metavar="A,B,C", help="weigh these classes, without training on them")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line and file")
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="spread it over devices, fsdp=2,tensor=2 (default: a run's own mesh, else one device)",
    )
    runs.add_option(parser)
    return parser
