"""`mplug2 predict`: say what is in an image or a video, answer a question about it, or weigh classes against
each other."""

import argparse
import json
import sys

from mplug2.card_wording import wording_of
from mplug2.errors import DataError
from mplug2.hub import bundle
from mplug2.opening import BUNDLES, CARDS, Kind, opened
from mplug2.predict import Predictor
from mplug2.recipes import runs
from mplug2.run import read_run
from mplug2.trained import restore


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    classes = [name.strip() for name in arguments.classes.split(",")] if arguments.classes is not None else []
    if "" in classes:
        raise DataError(
            f'--classes "{arguments.classes}": expected names separated by commas, such as "two,three"'
        )
    predictor = open_predictor(arguments.source, trusted=arguments.trust)
    path = arguments.image or arguments.video
    clips = predictor.image(path) if arguments.image else predictor.video(path)
    for text in [arguments.question or "", *classes]:
        if words := predictor.unknown(text):
            print(f"mplug2: warning: the tokenizer does not know {', '.join(words)}", file=sys.stderr)
    if classes:
        said = dict(zip(classes, map(float, predictor.classify(clips, classes)[0]), strict=True))
        said = dict(sorted(said.items(), key=lambda item: -item[1]))
        found = {"classes": said}
    elif arguments.question is not None:
        found = {"question": arguments.question, "answer": predictor.answer(clips, arguments.question)[0]}
    else:
        found = {"caption": predictor.caption(clips)[0]}
    print(json.dumps({"file": path, **found}) if arguments.json else _readable(found))


def open_predictor(source: list[str], *, trusted: bool = False) -> Predictor:
    """Of a run directory, of a bundle, or of cards: shelf names, families, files, directories; nothing is the
    shelf's default."""
    taken = (Kind.RUN, *BUNDLES, *CARDS) if len(source) == 1 else CARDS
    words = [opened(word, "predict", *taken) for word in source]
    first = words[0].kind if words else None
    if first is Kind.RUN:
        run = read_run(source[0])
        recipe = runs.recipe_of(run, trusted=trusted)
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
        carried = bundle.load(words[0].path)
        return Predictor(
            carried.network,
            carried.params,
            carried.tokenizer,
            carried.lock.preprocessing,
            wording=carried.wording,
        )
    return Predictor.of(*source)


def _readable(found: dict) -> str:
    if "classes" in found:
        width = max(map(len, found["classes"]))
        return "\n".join(
            f"{name:<{width}}  {share:6.1%}  {'#' * round(40 * share)}"
            for name, share in found["classes"].items()
        )
    return found.get("answer", found.get("caption", "")) or "(nothing)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mplug2 predict", description=__doc__.partition(": ")[2] if __doc__ else ""
    )
    parser.add_argument(
        "source",
        nargs="*",
        help="a run directory, a bundle, or cards: shelf names, files, directories (default: the shelf)",
    )
    seen = parser.add_mutually_exclusive_group(required=True)
    seen.add_argument("--image", metavar="FILE", help="a picture: PNG, JPEG, WebP, GIF, TIFF and others")
    seen.add_argument("--video", metavar="FILE", help="a video: mp4, mkv, webm, avi, gif and others")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--question", metavar="TEXT", help="answer this (default: caption)")
    asked.add_argument("--classes", metavar="A,B,C", help="weigh these classes, without training on them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    runs.add_option(parser)
    return parser
