"""The hub: find published modules, load them verified, compose them, account for every array.

The shelf is the package's own folder of cards (checkpoints/). Parameters are nested dicts of float32 as in
mplug2.network, whatever type their file stores, and lie on this process's first device or, where a caller
names one, on a mesh (mplug2.hub.placing).
"""

import dataclasses
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from mplug2.errors import CardError, nearest
from mplug2.hub import gate, placing, reading
from mplug2.hub.cache import Cache
from mplug2.hub.card import Card, card_files, draft, read_card, read_cards
from mplug2.hub.download import fetch
from mplug2.hub.fit import check_base, check_fit, check_routes, differences
from mplug2.hub.gate import NONE, Rules
from mplug2.hub.loading import Line, Report
from mplug2.hub.meter import Bar, Meter
from mplug2.hub.reading import Republished as Republished
from mplug2.hub.reading import again as again
from mplug2.hub.reading import of_this_publication as of_this_publication
from mplug2.network import Network, Parameters, flat, nested
from mplug2.recipe import Mode, Recipe
from mplug2.roles import DELTA, Config, Execution, base_of

DEFAULT = "small"
"""The family of shelf cards (`vision-small`, `text-small`, ...) that commands use when told nothing."""


# --- Find


def _shelf_folder() -> Path:
    return Path(str(resources.files("mplug2.checkpoints")))


def shelf() -> list[str]:
    """The names of the cards that ship with the package."""
    return [path.stem for path in card_files(_shelf_folder())]


def families() -> list[str]:
    """The families of the shelf: what follows the module in the names of its cards."""
    return sorted({name.rpartition("-")[2] for name in shelf()})


def find(where: str | Path, module: str | None = None) -> Card:
    """One card: by its name on the shelf, by the path of its JSON file, or in a directory or a family of the
    shelf (the one of `module`, if it holds several). Raises CardError that names what there is."""
    path = Path(where)
    if str(where) in shelf():
        return read_card(_shelf_folder() / f"{where}.json")
    if path.is_dir() or _is_family(where):
        found = _cards_at(where)
        fitting = [card for card in found if module in (None, card.module)]
        if len(fitting) != 1:
            wanted = f"one card of {module!r}" if module else "one card"
            raise CardError(f"{where}: expected {wanted}, it holds {[card.name for card in found]}")
        return fitting[0]
    if path.suffix == ".json":
        if path.exists() or path in card_files(path.parent):
            return read_card(path)
        raise CardError(f"no card {path}: there is no such file")
    raise CardError(
        f'no card "{where}": the shelf holds {shelf()}{nearest(str(where), shelf() + families())}, '
        "and no file or directory has that name"
    )


def cards(*where: Card | str | Path) -> dict[str, Card]:
    """Cards by module, from cards, shelf names, families of the shelf ("small"), card files and directories;
    without an argument, the shelf's default family. Raises CardError where two cards are of one module."""
    found: dict[str, Card] = {}
    for place in where or (DEFAULT,):
        for card in [place] if isinstance(place, Card) else _cards_at(place):
            if card.module in found:
                raise CardError(
                    f"two cards of module {card.module!r}: {found[card.module].name} and {card.name}; "
                    "choose one"
                )
            found[card.module] = card
    return found


def _is_family(place: str | Path) -> bool:
    """What is on the disk comes before names."""
    return str(place) in families() and not Path(place).exists()


def _cards_at(place: str | Path) -> list[Card]:
    if _is_family(place):
        return [find(name) for name in shelf() if name.rpartition("-")[2] == str(place)]
    if Path(place).is_dir():
        _check_no_run(Path(place))
        if found := read_cards(Path(place)):
            return found
        raise CardError(f"{place}: this directory holds no card")
    return [find(place)]


def _check_no_run(folder: Path) -> None:
    if (folder / "run.json").is_file():
        raise CardError(
            f'{folder} is a run, not cards: "mplug2 publish {folder} --to DIR" writes its modules with cards'
        )


# --- Load


def load(card: Card) -> tuple[Config, Parameters]:
    """A module's config and parameters. Raises CardError unless the file is the card's own, by size and
    sha256, and holds the config's arrays and no other."""
    return card.config, _placed(_whole(card, _arrays(card)))


def stored(card: Card, *, verify: bool = True) -> dict[str, np.ndarray]:
    """A module's arrays by name as its file stores them, checked as by `load` (`verify=False` skips the
    sha256): read-only views of the mapped file, for what is done with them before anybody can have changed
    it."""
    return _whole(card, _mapped(card, verify))


def _whole(card: Card, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    gate.check(card, gate.shapes(card.config, f"card {card.name}"), arrays)
    return arrays


def load_onto(card: Card, mesh: jax.sharding.Mesh, *, verify: bool = True) -> Parameters:
    """A module's parameters on the devices of a mesh, by the table in mplug2.sharding. `verify=False` trusts
    that the file was verified when it was downloaded, and that nobody writes into it, so that each process of
    many reads its own slices only. Raises CardError, DownloadError."""
    axes = flat(Network({card.module: card.config}).axes[card.module])
    arrays = _arrays(card) if verify else _mapped(card, verify=False)
    return _placed(_whole(card, arrays), axes, mesh)


def is_here(card: Card) -> Path | None:
    """The card's weights, where they need not be downloaded: the file beside it, or one in the cache."""
    if card.weights.is_file():
        return card.weights
    return Cache.default().find(card.file.sha256, card.file.bytes)


def located(card: Card, meter: Meter | None = None) -> Path:
    """The card's weights: the file beside it, or one in the cache, downloaded on first use. Raises CardError
    where the card gives no address, DownloadError."""
    if found := is_here(card):
        return found
    if not card.file.urls:
        raise CardError(f"card {card.name}: its weights are not at {card.weights}, and it gives no address")
    if meter is not None:
        return fetch(card.file, meter=meter)
    with Bar() as bar:
        return fetch(card.file, meter=bar)


def _arrays(card: Card) -> dict[str, np.ndarray]:
    """A card's arrays, as mplug2.hub.reading.arrays gives them."""
    with of_this_publication(card):
        return reading.arrays(card, located(card))


def _mapped(card: Card, verify: bool = True) -> dict[str, np.ndarray]:
    with of_this_publication(card):
        return reading.mapped(card, located(card), verify)


def _placed(
    arrays: Mapping[str, np.ndarray],
    axes: Mapping[str, Any] = NONE,
    mesh: jax.sharding.Mesh | None = None,
) -> Parameters:
    """A module's arrays by name -> its parameters: on a mesh by their logical `axes`, or on this process's
    first device."""
    where = placing.on_first_device(arrays) if mesh is None else placing.on_mesh(mesh, axes, arrays)
    return _nested(placing.place(arrays, where))


def _nested(arrays: Mapping[str, Any]) -> Parameters:
    return nested({tuple(name.split(".")): array for name, array in arrays.items()})


# --- Compose


def on_shelf(recipe: Recipe) -> Recipe:
    """The recipe with every module loaded: from the card it names, else from the shelf's, and with
    the deltas that it names cards of. Raises CardError."""
    there = {module: card.name for module, card in cards().items()} if shelf() else {}
    there = {module: name for module, name in there.items() if module in recipe.modules}
    chosen = {**there, **recipe.cards}
    if missing := sorted(set(recipe.modules) - set(chosen)):
        raise CardError(
            f"recipe {recipe.name}: no card of {', '.join(missing)} is on the shelf, which holds "
            f"{shelf()}; train the recipe and use its run directory"
        )
    # A delta that no card is named for would be a fresh one, which changes nothing.
    modes = {module: "lora" if module + DELTA in chosen else "full" for module in recipe.modules}
    return dataclasses.replace(recipe, modes={**dict.fromkeys(chosen, "full"), **modes}, cards=chosen)


class _Source(NamedTuple):
    """Where a module comes from: its card, or without one its initialisation."""

    mode: Mode
    card: Card | None = None
    initialise: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


def loaded(
    recipe: Recipe,
    *,
    initialise: Rules = NONE,
    skip: Rules = NONE,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Parameters, Report]:
    """What a recipe's modes other than `init` load, arrays that are to be initialised left out, and the
    account of all.

    `initialise` and `skip` are the rules by which arrays of a network or of a file may be excused. `mesh`
    says where arrays lie (default: on this process's first device). Raises CardError.
    """
    parts = recipe.parts
    for name, rules in (("initialise", initialise), ("skip", skip)):
        for module in rules:
            if module not in parts or recipe.mode(module) == "init":
                loads = [other for other in parts if recipe.mode(other) != "init"]
                raise CardError(
                    f"rule {name}: module {module!r} is not loaded, {loads} are{nearest(module, loads)}"
                )
    sources = {}
    for module in parts:
        card = None if recipe.mode(module) == "init" else card_of(recipe, module)
        excused = tuple(initialise.get(module, ())), tuple(skip.get(module, ()))
        sources[module] = _Source(recipe.mode(module), card, *excused)
    return _loaded(Network(parts), sources, mesh)


def _loaded(
    network: Network, sources: Mapping[str, _Source], mesh: jax.sharding.Mesh | None = None
) -> tuple[Parameters, Report]:
    """What the sources' cards hold, through the gate, and the account of every array of the network."""
    params: Parameters = {}
    lines: list[Line] = []
    shapes, axes = network.shapes, network.axes
    for module, source in sources.items():
        expected, card = flat(shapes[module]), source.card
        if card is None:
            lines.append(Line.of(module, source.mode, initialised=expected))
            continue
        arrays = _arrays(card)
        passed = gate.check(card, expected, arrays, initialise=source.initialise, skip=source.skip)
        chosen = {key: arrays[key] for key in passed.loaded}
        params[module] = _placed(chosen, flat(axes[module]), mesh)
        lines.append(
            Line.of(
                module,
                source.mode,
                card=card.name,
                sha256=card.file.sha256,
                loaded={key: expected[key] for key in passed.loaded},
                initialised={key: expected[key] for key in passed.initialised},
                skipped={key: arrays[key] for key in passed.skipped},
            )
        )
    return params, Report(tuple(lines))


def _completed(network: Network, params: Parameters, report: Report, seed: int) -> Parameters:
    """With what the account calls initialised."""
    begun = {line.module: network.configs[line.module] for line in report.lines if line.initialised}
    fresh = jax.jit(Network(begun, network.execution).init)(seed)
    whole = {module: _nested(flat(tree) | flat(params.get(module, {}))) for module, tree in fresh.items()}
    return {module: whole[module] if module in whole else params[module] for module in network.configs}


def load_as(recipe: Recipe, module: str, mesh: jax.sharding.Mesh) -> Parameters:
    """The parameters of one module that a recipe loads, without exceptions, on a mesh. Raises CardError."""
    return load_onto(card_of(recipe, module), mesh)


def card_of(recipe: Recipe, module: str) -> Card:
    """The card that a recipe loads a module from, its config checked to be the recipe's own."""
    card = find(recipe.cards[module], module)
    if card.module != module:
        raise CardError(
            f"recipe {recipe.name}: module {module!r} is loaded from card {card.name}, one of {card.module!r}"
        )
    if differing := differences(card.config, recipe.parts[module]):
        raise CardError(
            f"recipe {recipe.name}: card {card.name} has another {module} than the recipe: "
            + gate.listing(differing)
        )
    if base := base_of(module):
        check_base(card, card_of(recipe, base))
    return card


def base_sha256(recipe: Recipe, module: str) -> str | None:
    """For a delta, the sha256 of the file that a recipe loads its base from. Raises CardError."""
    base = base_of(module)
    return card_of(recipe, base).file.sha256 if base else None


def deltas(bases: Mapping[str, Card], *where: Card | str | Path) -> dict[str, tuple[Config, Parameters]]:
    """Deltas by the name of the module that they adapt, loaded. Raises CardError unless `bases`, by module,
    are the very ones that they were trained on."""
    found = {module: card for module, card in cards(*where).items() if base_of(module)}
    for module, card in found.items():
        check_base(card, bases.get(base_of(module) or ""))
    return {base_of(module) or module: load(card) for module, card in found.items()}


def assemble(
    recipe: Recipe, *, initialise: Rules = NONE, skip: Rules = NONE
) -> tuple[Network, Parameters, Report]:
    """A recipe's network, its parameters by each module's mode, those of cards on its mesh, and the account
    of every array. Raises CardError."""
    network = Network(recipe.parts, recipe.execution)
    params, report = loaded(recipe, initialise=initialise, skip=skip, mesh=recipe.mesh.build())
    return network, _completed(network, params, report, recipe.seed), report


def compose(
    *chosen: Card | str | Path,
    execution: Execution = Execution(),
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Network, Parameters]:
    """A network of the given cards (or shelf names, families, paths), loaded onto a mesh or this process's
    first device. Raises CardError where two do not fit, before anything is downloaded or compiled."""
    return join(cards(*chosen), execution=execution, mesh=mesh)[:2]


def join(
    by_module: Mapping[str, Card],
    fresh: Mapping[str, Config] = NONE,
    *,
    seed: int = 0,
    execution: Execution = Execution(),
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Network, Parameters, Report]:
    """A network of cards by module and of `fresh` modules, begun from `seed`, with the account of every
    array. What cards hold is loaded onto `mesh` (default: this process's first device). Raises CardError
    where two do not fit, before anything is downloaded or compiled."""
    deltas = {module: card for module, card in by_module.items() if base_of(module)}
    drafts = {module: draft(f"{module}-new", module, config) for module, config in fresh.items()}
    check_fit({module: card for module, card in {**by_module, **drafts}.items() if module not in deltas})
    for module, card in deltas.items():
        check_base(card, by_module.get(base_of(module) or ""))
    configs = {module: card.config for module, card in {**by_module, **drafts}.items()}
    check_routes(
        configs, next((card.preprocessing for card in by_module.values() if card.preprocessing), None)
    )
    network = Network(configs, execution)
    sources = {module: _Source("full", by_module[module]) for module in by_module}
    sources |= {module: _Source("init") for module in fresh}
    params, report = _loaded(network, sources, mesh)
    return network, _completed(network, params, report, seed), report
