"""`mplug2 publish`: write the modules of a run as safetensors files, each with a card, and a page for
people."""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from mplug2 import adapt, files, hub, places
from mplug2.arguments import Parser
from mplug2.card_wording import questions_of, wording_of
from mplug2.data.digest import digest
from mplug2.errors import CardError, DataError, nearest
from mplug2.hub import lock, publishing
from mplug2.hub.card import Parent, Parents, Score, Trained
from mplug2.hub.card_tokenizer import stated
from mplug2.hub.publication import check_free, publication
from mplug2.hub.remote import split_hub
from mplug2.hub.upload import upload
from mplug2.hub.weights import FLOATS
from mplug2.network import Network, Parameters
from mplug2.opening import Kind, opened
from mplug2.recipe import Recipe
from mplug2.recipes import runs
from mplug2.roles import DELTA, Form
from mplug2.run import Run, read_run
from mplug2.screen import note
from mplug2.trained import restore

LARGEST_SCORES = 10_000_000  # bytes


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    if "://" in arguments.to and not arguments.to.startswith("hf://"):
        raise CardError(f"--to is {arguments.to}, expected a directory or hf://OWNER/NAME")
    run = read_run(opened(arguments.run, "publish", Kind.RUN).path)
    recipe = runs.recipe_of(run, trusted=arguments.trust)
    step, network, params = restore(run, recipe)
    if arguments.merged:
        network, params = adapt.merge(network, params)
    # What was frozen or only adapted is published already: the lock and a delta's card name it.
    adapted = [name for name in network.configs if recipe.mode(name) == "lora" and arguments.merged]
    chosen = arguments.module or [name for name in network.configs if recipe.trains(name) or name in adapted]
    for module in chosen:
        if module not in network.configs:
            raise CardError(
                f"{run.path} has no module {module!r}; it has {list(network.configs)}"
                + nearest(module, network.configs)
            )
    if not arguments.to.startswith("hf://"):
        names = [card_name(module, arguments, recipe) for module in chosen]
        if not arguments.overwrite:
            check_free(Path(arguments.to), names, page="")  # refused before the work
        publish(Path(arguments.to), arguments, run, recipe, step, network, params, chosen)
        return
    address = arguments.to.rstrip("/")
    split_hub(address)  # refused before the work
    with tempfile.TemporaryDirectory(prefix="mplug2-") as folder:
        publish(Path(folder), arguments, run, recipe, step, network, params, chosen, address)
        print(upload(Path(folder), address))


def publish(
    folder: Path,
    arguments: argparse.Namespace,
    run: Run,
    recipe: Recipe,
    step: int,
    network: Network,
    params: Parameters,
    chosen: list[str],
    address: str = "",
) -> None:
    """Writes the chosen modules; `address` is where the folder will be found, if it is elsewhere."""
    scores = read_scores(arguments.scores) if arguments.scores else {}
    how, questions = trained(run, recipe, step), questions_of(wording_of(recipe))
    with publication(folder, overwrite=arguments.overwrite, page=address) as new:
        tokens = stated(recipe.tokenizer, new.staged)
        for module in chosen:
            config, name = network.configs[module], card_name(module, arguments, recipe)
            publishing.write(
                new.staged,
                name,
                module,
                config,
                params[module],
                dtype=arguments.dtype,
                licence=arguments.licence,
                source=arguments.source,
                paper="arXiv:2302.00402",
                trained=how,
                parents=trained_from(run, module, recipe.forms.get(module) if arguments.merged else None),
                scores=scores,
                urls=(f"{address}/{name}.safetensors",) if address else (),
                preprocessing=recipe.preprocessing if module in ("vision", "temporal") else None,
                tokenizer=tokens if hasattr(config, "vocabulary") else None,
                questions=questions if module == "text" else None,
                base=hub.base_sha256(recipe, module),
            )
    for card in new.cards.values():
        print(f"{card.weights}  {card.file.bytes / 1e6:.2f} MB  sha256 {card.file.sha256[:12]}")
    total = sum(card.file.bytes for card in new.cards.values()) / 1e6
    print(f"{len(new.cards)} modules, {total:.2f} MB, {arguments.dtype}, from step {step} of {run.path}")


def card_name(module: str, arguments: argparse.Namespace, recipe: Recipe) -> str:
    return f"{module}-{arguments.family or recipe.name.rpartition('.')[2]}"


def read_scores(path: str) -> dict[str, Score]:
    """What `mplug2 eval --out` wrote -> scores for cards: those with an interval; which have none is noted.
    Raises CardError if it is something else."""
    try:
        tasks = json.loads(files.read_regular(Path(path), LARGEST_SCORES))["tasks"]
        scores = {
            name: Score(**{key: one[key] for key in ("metric", "value", "low", "high", "n")})
            for name, one in tasks.items()
            if one["low"] is not None
        }
    except OSError as error:
        raise CardError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise CardError(f'{path}: not the results of "mplug2 eval --out"') from None
    if left := [name for name in tasks if name not in scores]:
        note(f"{path}: no interval, so cards are without the score of {', '.join(left)}")
    return scores


def trained(run: Run, recipe: Recipe, step: int) -> Trained:
    machine: dict[str, Any] = dict(run.sessions[-1].get("machine", {})) if run.sessions else {}
    # Where data lies on this machine is nobody's business; what it is called there is.
    told = places.nameless(recipe)
    data = sorted({str(objective.data) for objective in told.objectives.values()})
    return Trained(
        recipe=" ".join([run.recipe, *run.overrides]),
        commit=run.commit,
        steps=step,
        seed=recipe.seed,
        data="; ".join(data),
        # The name of the host is nobody's business; what it is made of is.
        machine=", ".join(
            str(machine[fact]) for fact in ("processor", "cores", "devices") if fact in machine
        ),
        data_sha256=data_sha256(recipe),
    )


def data_sha256(recipe: Recipe) -> str | None:
    """Of the train splits that a recipe learns from; None where one is not here."""
    try:
        found = sorted({digest(objective.data) for objective in recipe.objectives.values()})
    except DataError:
        return None
    return hashlib.sha256(" ".join(found).encode()).hexdigest() if found else None


def trained_from(run: Run, module: str, form: Form | None = None) -> Parents | None:
    """The published module that a run began this one from, as its lock says; with `form`, that of the delta
    that is merged into it, and the delta's own card where the run began from one. Raises CardError."""
    path = run.path / lock.FILE
    parts = lock.read(path).modules if path.is_file() else {}
    base, delta = (
        Parent(name=part.card, sha256=part.file.sha256) if part and part.file else None
        for part in (parts.get(module), parts.get(module + DELTA))
    )
    if base is None:
        return None
    if form is None:
        return Parents(method="train", base=base)
    settings = {name: float(value) for name, value in vars(form).items() if isinstance(value, int | float)}
    return Parents(
        method=type(form).__name__.lower(),
        base=base,
        merged=(delta,) if delta else (),
        settings=settings,
    )


def _parser() -> Parser:
    parser = Parser(prog="mplug2 publish", description=__doc__.partition(": ")[2] if __doc__ else "")
    parser.add_argument("run", help="a run directory")
    parser.add_argument("--to", metavar="DIR|hf://OWNER/NAME", required=True, help="where files and cards go")
    parser.add_argument(
        "--module",
        metavar="NAME",
        action="append",
        help="publish this one (may be repeated; default: all that were trained)",
    )
    parser.add_argument(
        "--family", metavar="NAME", help="cards are called MODULE-NAME (default: the recipe's size)"
    )
    parser.add_argument(
        "--dtype", choices=list(FLOATS), default="bfloat16", help="the type of the files (default: bfloat16)"
    )
    parser.add_argument(
        "--merged", action="store_true", help="publish adapted modules with their deltas merged into them"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace cards of these names, and the page, that are there"
    )
    parser.add_argument("--scores", metavar="FILE", help='what "mplug2 eval --out" wrote')
    parser.add_argument("--licence", default="Apache-2.0", help="SPDX name of the weights' licence")
    runs.add_option(parser)
    parser.add_argument("--source", default="", help="where the weights come from: an address or a sentence")
    return parser
