"""Merging: one module made of several of the same config, tensor by tensor, module by module.

Parents are memory-mapped and verified by sha256; one tensor of one layer of each is worked on at a time, and
written before the next: whatever the modules' size, the host holds a few tensors. What is merged must be of
one config, tokenizer and preprocessing; a method that works on differences takes the base that all parents
were trained from, which is checked wherever a parent's card states it. The merged card names its parents by
sha256. The same parents and settings give the same bytes.
"""

import dataclasses
import math
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import filter as matching
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from mplug2 import files, hub
from mplug2.errors import CardError, nearest
from mplug2.hub import weights
from mplug2.hub.card import Card, File, Parent, Parents, draft
from mplug2.hub.merge_methods import GreedySoup, Method, Tensor
from mplug2.hub.publication import publication
from mplug2.hub.typed_json import encode
from mplug2.network import Network, flat
from mplug2.roles import base_of

Place = Card | str | Path
Coefficients = Sequence[float] | Mapping[str, Sequence[float]] | None
"""One a parent, or by module one a parent; where unsaid, equal shares of 1."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One module's merge, checked and not begun."""

    method: Method
    parents: tuple[Card, ...]
    base: Card | None
    coefficients: tuple[float, ...]
    card: Card


def merge(
    folder: Path | str,
    method: Method,
    parents: Sequence[Place],
    *,
    base: Place | None = None,
    coefficients: Coefficients = None,
    modules: Iterable[str] = (),
    family: str = "",
    dtype: str = "",
    licence: str = "",
    page: str | None = None,
) -> dict[str, Card]:
    """Writes the merge of each module that the parents hold (or those in `modules`) into `folder`, as cards
    `MODULE-FAMILY`, and returns them by module. `page` is as for mplug2.hub.publication.

    A parent is a card, its file, or a directory or shelf family of several. `family` is the method's name
    where unsaid; `dtype` and `licence` are the parents' where these agree (else float32, and a refusal).
    Raises CardError with both sides where parents do not fit, before anything is written; DownloadError.
    """
    said = {"family": family or method.name, "dtype": dtype, "licence": licence}
    plans = planned(Path(folder), method, parents, base, coefficients, modules, **said)
    with publication(Path(folder), page=page) as new:
        names = {module: _write(plan, new.staged) for module, plan in plans.items()}
    return {module: new.cards[name] for module, name in names.items()}


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A score that greedy soup measured: of the soups so far with parent number `parent`, alone at first."""

    parent: int
    score: float
    kept: bool


def greedy(
    folder: Path | str,
    parents: Sequence[Place],
    score: Callable[[Mapping[str, Card]], float],
    *,
    modules: Iterable[str] = (),
    family: str = GreedySoup.name,
    dtype: str = "",
    licence: str = "",
    page: str | None = None,
) -> tuple[dict[str, Card], list[Trial]]:
    """Greedy soup (arXiv:2203.05482, recipe 1): parents by falling score, each kept if the soup with it
    scores no less. `score` gives a validation score (more is better) of cards by module, never that of a
    test split.

    Returns the cards, in which a parent that was left out has coefficient 0, and what was measured: each
    parent alone, then each soup that was tried. Raises CardError like `merge`.
    """
    modules = tuple(modules)
    said = {"modules": modules, "family": family, "dtype": dtype, "licence": licence}
    chosen = _chosen([hub.cards(place) for place in parents], modules)
    planned(Path(folder), GreedySoup(), parents, None, None, **said)  # refused before the work
    trials = [Trial(parent=i, score=_finite(score(cards)), kept=False) for i, cards in enumerate(chosen)]
    first, *others = sorted(range(len(chosen)), key=lambda i: -trials[i].score)
    best, kept = trials[first].score, [first]
    trials[first] = dataclasses.replace(trials[first], kept=True)
    for i in others:
        with tempfile.TemporaryDirectory(prefix="mplug2-") as trial:
            shares = [float(j in (*kept, i)) for j in range(len(chosen))]
            found = _finite(score(merge(trial, GreedySoup(), parents, coefficients=shares, **said)))
        trials.append(Trial(parent=i, score=found, kept=found >= best))
        if found >= best:
            best, kept = found, [*kept, i]
    shares = [float(i in kept) / len(kept) for i in range(len(chosen))]
    return merge(folder, GreedySoup(), parents, coefficients=shares, page=page, **said), trials


# --- Checks


def planned(
    folder: Path,
    method: Method,
    parents: Sequence[Place],
    base: Place | None,
    coefficients: Coefficients,
    modules: Iterable[str],
    family: str,
    dtype: str,
    licence: str,
) -> dict[str, Plan]:
    """What `merge` would do, by module. Raises CardError where it would."""
    least, most = method.parents
    if not least <= len(parents) <= most:
        expected = f"{least}" if least == most else f"at least {least}"
        raise CardError(f"{method.name} of {len(parents)} parent(s), expected {expected}")
    if method.based != (base is not None):
        needs = "needs the base that its parents were trained from" if method.based else "has no base"
        raise CardError(f"{method.name} {needs}, and {base or 'none'} is given")
    chosen = _chosen([hub.cards(place) for place in parents], modules)
    bases = hub.cards(base) if base is not None else {}
    if method.based and (missing := [module for module in chosen[0] if module not in bases]):
        raise CardError(f"base {base} holds {', '.join(bases)}, the parents {', '.join(missing)} too")
    if isinstance(coefficients, Mapping) and (strange := [m for m in coefficients if m not in chosen[0]]):
        hint = nearest(strange[0], chosen[0])
        raise CardError(f"coefficients of {strange[0]!r}: merged are {', '.join(chosen[0])}{hint}")
    plans = {}
    for module in chosen[0]:
        if base_of(module):
            raise CardError(
                f"{chosen[0][module].name} is a delta: mplug2.adapt's add and average merge deltas, and its "
                "merge one with its base"
            )
        cards, origin = tuple(one[module] for one in chosen), bases.get(module)
        of_module = coefficients.get(module) if isinstance(coefficients, Mapping) else coefficients
        shares = _coefficients(method, cards, of_module)
        _check_alike(cards if origin is None else (origin, *cards))
        origins = _check_base(cards, origin)
        card = dataclasses.replace(
            draft(f"{module}-{family}", module, cards[0].config, cards[0].interface),
            licence=licence or _licence(cards),
            source=cards[0].source if len({card.source for card in cards}) == 1 else "",
            paper=cards[0].paper if len({card.paper for card in cards}) == 1 else "",
            parents=_parents(method, cards, shares, origins),
            preprocessing=next((one.preprocessing for one in cards if one.preprocessing), None),
            tokenizer=next((one.tokenizer for one in cards if one.tokenizer), None),
            questions=next((one.questions for one in cards if one.questions), None),
            folder=folder,
        )
        stored = {one.interface.dtype for one in cards}
        dtype_of = dtype or (stored.pop() if len(stored) == 1 else "float32")
        card = dataclasses.replace(card, interface=dataclasses.replace(card.interface, dtype=dtype_of))
        plans[module] = Plan(method=method, parents=cards, base=origin, coefficients=shares, card=card)
    _check_take(method, plans)
    return plans


def _chosen(found: Sequence[Mapping[str, Card]], modules: Iterable[str]) -> list[dict[str, Card]]:
    """Of each parent the modules to merge, which all of them must hold."""
    wanted = list(dict.fromkeys(modules))
    for cards in found:
        first, names = found[0], ", ".join(card.name for card in cards.values())
        if not wanted and set(cards) != set(first):
            raise CardError(
                f"parents hold different modules: {', '.join(card.name for card in first.values())} and "
                f"{names}; choose the modules to merge"
            )
        for module in wanted:
            if module not in cards:
                raise CardError(f"no parent's {module!r} among {names}{nearest(module, cards)}")
    return [{module: cards[module] for module in wanted or found[0]} for cards in found]


def _coefficients(method: Method, cards: tuple[Card, ...], said: Sequence[float] | None) -> tuple[float, ...]:
    given = tuple(float(x) for x in said) if said is not None else (1 / len(cards),) * len(cards)
    if len(given) != len(cards):
        names = ", ".join(card.name for card in cards)
        raise CardError(f"{len(given)} coefficients for {len(cards)} parents, {names}")
    if not all(abs(one) < 2**31 for one in given):
        raise CardError(f"coefficients {given}: expected finite numbers, as cards state them")
    if method.shares and (min(given) < 0 or not sum(given) > 0):
        raise CardError(f"coefficients {given}: {method.name} takes shares, none below 0 and one above")
    return given


def _check_alike(cards: Sequence[Card]) -> None:
    """Raises CardError, with both sides, unless all are of one module, config, interface, tokenizer and
    preprocessing; what one of them does not state is not compared."""
    first = cards[0]
    for other in cards[1:]:
        for fact in ("module", "config", "interface", "tokenizer", "questions", "preprocessing"):
            said = [encode(getattr(card, fact)) for card in (first, other)]
            if None in said:
                continue
            one, two = (flat({fact: value}) for value in said)
            differing = [
                f"{name} ({first.name} {one.get(name, 'absent')}, {other.name} {two.get(name, 'absent')})"
                for name in sorted({*one, *two} - {"interface.dtype"})
                if one.get(name) != two.get(name)
            ]
            if differing:
                raise CardError(
                    f"{first.name} and {other.name} cannot be merged, they differ in {', '.join(differing)}"
                )


def _check_base(cards: tuple[Card, ...], base: Card | None) -> Parent | None:
    """The base as the merged card will state it: the given one, else the one that all parents state. Raises
    CardError where a parent states another than the given one."""
    stated = {card.name: card.parents.base for card in cards if card.parents and card.parents.base}
    if base is None:
        origins = {origin.sha256: origin for origin in stated.values()}
        return next(iter(origins.values())) if len(origins) == 1 and len(stated) == len(cards) else None
    for name, origin in stated.items():
        if origin.sha256 != base.file.sha256:
            raise CardError(
                f"{name} was trained from {origin.name}, sha256 {origin.sha256}; the base is {base.name}, "
                f"sha256 {base.file.sha256}"
            )
    return Parent(name=base.name, sha256=base.file.sha256)


def _licence(cards: tuple[Card, ...]) -> str:
    licences = {card.licence: card.name for card in cards}
    if len(licences) > 1:
        said = ", ".join(f"{name} has {licence}" for licence, name in licences.items())
        raise CardError(f"licences differ: {said}; state the merged module's licence")
    return cards[0].licence


def _parents(
    method: Method, cards: tuple[Card, ...], coefficients: tuple[float, ...], base: Parent | None
) -> Parents:
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    return Parents(
        method=method.name,
        merged=tuple(
            Parent(name=card.name, sha256=card.file.sha256, coefficient=coefficient)
            for card, coefficient in zip(cards, coefficients, strict=True)
        ),
        base=dataclasses.replace(base, coefficient=1.0) if base else None,
        settings={name: float(value) for name, value in fields.items() if isinstance(value, int | float)},
        take=fields.get("take", ()),
    )


def _check_take(method: Method, plans: Mapping[str, Plan]) -> None:
    if take := getattr(method, "take", ()):
        shapes = Network({module: plan.card.config for module, plan in plans.items()}).shapes
        names = list(flat(shapes))
        for pattern in take:
            if not matching(names, pattern):
                raise CardError(f'take "{pattern}" matches no array{nearest(pattern, names)}')


def _finite(score: float) -> float:
    if not math.isfinite(score):
        raise CardError(f"a score is {score}, expected a finite number")
    return float(score)


# --- One tensor at a time


def _write(plan: Plan, folder: Path) -> str:
    """Writes a module and its card into `folder`, each tensor as it is made; the card's name."""
    card = dataclasses.replace(plan.card, folder=folder)
    sources = (*plan.parents, *([plan.base] if plan.base else []))
    dtype = weights.FLOATS[card.interface.dtype]
    axes = flat(Network({card.module: card.config}).axes[card.module])
    with weights.unchanged([hub.located(one) for one in sources]):
        parts = [hub.stored(one) for one in sources]
        kinds = {name: SimpleNamespace(shape=array.shape, dtype=dtype) for name, array in parts[0].items()}

        def pieces(name: str) -> Iterator[np.ndarray]:
            arrays = [file[name] for file in parts]
            stacked = axes[name][:1] == ("layers",)
            for layer in range(len(arrays[0])) if stacked else (-1,):
                tensors = [array[layer] if stacked else array for array in arrays]
                yield _merged(plan, name, layer, tensors, dtype)

        sha256, size = weights.write_each(card.weights, kinds, pieces, {"card": card.name})
    card = dataclasses.replace(card, file=File(path=card.file.path, sha256=sha256, bytes=size))
    stating = next((one for one in plan.parents if one.tokenizer), None)
    if stating and stating.tokenizer and (beside := stating.folder / stating.tokenizer.file).is_file():
        files.copy(beside, folder / beside.name)
    card.write()
    return card.name


def _merged(plan: Plan, name: str, layer: int, tensors: list[np.ndarray], dtype: Any) -> np.ndarray:
    """One tensor of the merge, in the type it is stored in. Raises CardError where a number is not finite."""
    whole, count = f"{plan.card.module}.{name}", len(plan.parents)
    where = zlib.crc32(whole.encode()), layer + 1
    tensor = Tensor(
        name=whole,
        parents=tuple(tensors[:count]),
        coefficients=plan.coefficients,
        base=tensors[count] if plan.base else None,
        keys=tuple((*where, int(card.file.sha256, 16)) for card in plan.parents),
    )
    cards = [*plan.parents, *([plan.base] if plan.base else [])]
    for card, array in zip(cards, tensors, strict=True):
        if not np.isfinite(array).all():
            raise CardError(f"card {card.name}: array {name!r} has numbers that are not finite")
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, which is refused with its name
        found = plan.method(tensor).astype(np.float32).astype(dtype, copy=False)
    if not np.isfinite(found).all():
        raise CardError(f"module {plan.card.module}: not finite as {np.dtype(dtype)}: {name}")
    return found
