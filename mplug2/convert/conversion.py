"""A checkpoint -> modules with cards, and back. Every key is accounted for, and nothing is half written.

A folder holds one safetensors file and one card a module, and `conversion/`: `report.json` (where every key
went, or the rule by which it is dead) and `unused.safetensors` (the dead tensors under their own names, so
that the way back is exact).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mplug2 import files
from mplug2.card_wording import questions_of
from mplug2.convert import writing
from mplug2.convert.families import FAMILIES, Model, canonical, likely, unwrapped
from mplug2.convert.shapes import Settings
from mplug2.convert.stated import Stated, check_whole
from mplug2.convert.tensors import StoredTensor, read_safetensors, same, stored
from mplug2.convert.torch_file import read_torch
from mplug2.data.pixels import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from mplug2.data.wording import Official
from mplug2.data.wordpiece import OfficialWordPiece, WordPiece
from mplug2.errors import CheckpointError, Mplug2Error, nearest
from mplug2.hub.card import Card, File, Tokens, interface
from mplug2.hub.card_tokenizer import stated
from mplug2.hub.mistaken import mistaken
from mplug2.hub.weights import FLOATS
from mplug2.network import Network, flat

LISTED = 12
SOURCES = {
    "mplug2": ("https://github.com/X-PLUG/mPLUG-2", "arXiv:2302.00402"),
    "mplug": ("https://github.com/X-PLUG/mPLUG", "arXiv:2205.12005"),
    "clip": ("https://github.com/openai/CLIP", "arXiv:2103.00020"),
    "vit": ("https://github.com/huggingface/pytorch-image-models", "arXiv:2010.11929"),
    "bert": ("https://github.com/google-research/bert", "arXiv:1810.04805"),
}


@dataclass(frozen=True)
class Options:
    """`name` ends the cards' names; `stated`: what files beside the checkpoint say of sizes and pixels;
    `skip`: patterns of keys that the user declares dead; `vocabulary`: a WordPiece file to travel with the
    cards; `lowercase`: whether it was made of texts in lower case; `prompt`: what official captions began
    with; `keep_unused`: dead tensors are kept for the way back; `allow_non_finite`: so are NaNs."""

    name: str
    settings: Settings | None = None
    stated: Stated = Stated()
    skip: tuple[str, ...] = ()
    vocabulary: Path | None = None
    lowercase: bool = True
    prompt: str = ""
    keep_unused: bool = True
    allow_non_finite: bool = False
    licence: str = "unknown"


def read_checkpoint(path: Path) -> tuple[dict[str, StoredTensor], str]:
    """The tensors of a .safetensors file, or of PyTorch's, and what they were wrapped in. Raises
    CheckpointError, for a part of a checkpoint as well."""
    if path.is_dir():
        held = [
            file.name
            for kind in ("*.safetensors", "*.pth", "*.pt", "*.tar", "*.bin")
            for file in path.glob(kind)
        ]
        hint = f"; it holds {_some(sorted(held))}" if held else ""
        raise CheckpointError(f"{path} is a folder: name the checkpoint's file in it{hint}")
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    with path.open("rb") as file:
        head = file.read(256)
    # The contents decide: either kind is found under the other's name. First comes what follows the length of
    # a safetensors header, since that may be any number: 0x80 begins PyTorch's files too, and 0x8b1f gzip's.
    safetensors = head[8:9] == b"{"
    if not safetensors and (what := mistaken(head)):
        raise CheckpointError(f"{path}: is {what}")
    is_torch = not safetensors and (head.startswith((b"PK", b"\x80")) or path.suffix != ".safetensors")
    tensors, wrapper = read_torch(path) if is_torch else (read_safetensors(path), "")
    check_whole(path, tensors)  # as the index beside it calls them
    names, wrappers = unwrapped(tensors)
    tensors = {name: tensors[key] for name, key in names.items()}
    return tensors, ".".join(filter(None, (wrapper, *wrappers)))


def convert(
    path: Path, family: str, folder: Path, options: Options, notes: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """Writes the modules of a checkpoint of FAMILIES into a new `folder`; returns the report. `notes`:
    further texts of its `conversion` folder, by file name. Raises CheckpointError or CardError, and leaves
    nothing behind then."""
    if family not in FAMILIES:
        raise CheckpointError(
            f'there is no kind "{family}"{nearest(family, FAMILIES)}; known are {sorted(FAMILIES)}'
        )
    tensors, wrapper = read_checkpoint(path)
    names = {canonical(key): key for key in tensors}
    if len(names) != len(tensors):
        raise CheckpointError(
            f"{path}: keys {sorted(set(tensors) - set(names.values()))[:LISTED]} repeat others"
        )
    tensors = {name: tensors[key] for name, key in names.items()}
    try:
        model = FAMILIES[family]({name: tensor.shape for name, tensor in tensors.items()}, options.settings)
        shapes = {module: flat(tree) for module, tree in Network(model.configs).shapes.items()}
        fates = account(model, tensors, options.skip)
        _check(model, tensors, shapes)
        options.stated.check(model.configs)
    except CheckpointError as error:
        kind = likely(tensors)
        hint = f"; its keys look like those of --from {kind}" if kind and kind != family else ""
        raise CheckpointError(f"{path}: {error}{hint}") from None
    finite = writing.Finite()
    with _new_folder(folder) as fresh:
        modules = {
            module: _write_module(fresh, module, model, tensors, shapes[module], finite, family, options)
            for module in model.configs
        }
        if finite.strange and not options.allow_non_finite:
            listed = [f"{key} ({count})" for key, count in sorted(finite.strange.items())]
            raise CheckpointError(
                f"{path}: not finite: {_some(listed)}; --allow-non-finite takes them as they are"
            )
        report = {
            "from": family,
            "file": path.name,
            "wrapper": wrapper,
            "fusion_stack": model.fusion_stack,
            "flat": model.flat,
            "modules": modules,
            "assumed": assumed(model, family, options),
            "not_finite": finite.strange,
            "keys": {names[name]: fate for name, fate in fates.items()},
        }
        _write_rest(fresh, report, tensors, names, options)
        for name, text in notes.items():
            files.write_text(fresh / "conversion" / name, text)
    return report


def _some(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:LISTED]) + (f" and {len(items) - LISTED} more" if len(items) > LISTED else "")


# -----------------------------------------------------------------------------------------------------------
# The account: every key has one fate


def account(
    model: Model, tensors: Mapping[str, StoredTensor], skip: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """{key: {"to": places} or {"same_as": key} or {"counts_to": number} or {"unused": rule}}. Raises
    CheckpointError."""
    places, fates, unexplained = model.keys.places(), {}, []
    for key in tensors:
        if key in places:
            to = [
                f"{module}:{name}" + ("" if layer is None else f"[{layer}]")
                for (module, name), layer, _ in places[key]
            ]
            fates[key] = {"to": to}
        elif key in model.keys.tied:
            fates[key] = {"same_as": model.keys.tied[key]}
        elif key in model.keys.counted:
            fates[key] = {"counts_to": model.keys.counted[key]}
        elif rule := model.why_dead(key) or next(
            (f"skipped by --skip {one}" for one in skip if fnmatchcase(key, one)), None
        ):
            fates[key] = {"unused": rule}
        else:
            unexplained.append(key)
    missing = sorted(set(places) - set(tensors))
    if unexplained or missing:
        raise CheckpointError(
            "; ".join(
                f"{len(keys)} keys {what}: {_some(keys)}"
                for keys, what in ((unexplained, "have no place and no rule"), (missing, "are missing"))
                if keys
            )
        )
    return fates


def _check(
    model: Model, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raises CheckpointError unless shapes and types fit, and what must be equal is."""
    wrong = []
    for (module, name), source in model.keys.sources.items():
        for piece in source.pieces:
            needed, tensor = (
                writing.foreign_shape(piece, source, shapes[module][name].shape),
                tensors[piece.key],
            )
            first = tensors[source.pieces[0].key]
            if tensor.shape != needed:
                wrong.append(f"{piece.key} has shape {tensor.shape}, expected {needed}")
            elif tensor.dtype not in FLOATS.values() or tensor.dtype != first.dtype:
                wrong.append(
                    f"{piece.key} is {tensor.dtype}; expected one of {sorted(FLOATS)}, alike in all layers"
                )
    for key, other in model.keys.tied.items():
        if key in tensors and not same(tensors[key], tensors[other]):
            wrong.append(f"{key} differs from {other}, to which it is tied")
    for key, length in model.keys.counted.items():
        if key in tensors and not np.array_equal(tensors[key].read().reshape(-1), np.arange(length)):
            wrong.append(f"{key} is not 0, 1, ... {length - 1}")
    if wrong:
        raise CheckpointError(_some(wrong))


# -----------------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its name when the block ends well and is gone when not."""
    if not files.is_free(folder):
        raise CheckpointError(f"{folder}: is there already, and not an empty folder")
    with files.refusing(CheckpointError, folder), files.new_folder(folder) as fresh:
        yield fresh


def _write_module(
    folder: Path,
    module: str,
    model: Model,
    tensors: Mapping[str, StoredTensor],
    shapes: Mapping[str, Any],
    finite: writing.Finite,
    family: str,
    options: Options,
) -> dict[str, Any]:
    """Weights and card; what the report says of them."""
    arrays = {
        name: writing.turned(model.keys.sources[module, name], shape.shape, tensors, finite)
        for name, shape in shapes.items()
    }
    kinds = {array.dtype for array in arrays.values()}
    dtype = next((name for name, kind in FLOATS.items() if kinds == {kind}), "float32")
    config: Any = model.configs[module]
    name = f"{module}-{options.name}"
    sha256, size = writing.stream(folder / f"{name}.safetensors", arrays, {"card": name})
    source, paper = SOURCES[family]
    card = Card(
        name=name,
        module=module,
        config=config,
        file=File(path=f"{name}.safetensors", sha256=sha256, bytes=size),
        interface=interface(module, config, dtype),
        licence=options.licence,
        source=f"converted from a checkpoint of {options.stated.source or source}",
        paper=paper,
        preprocessing=_preprocessing(module, config, family, options),
        tokenizer=_tokens(family, folder, options, config) if module in ("text", "decoder") else None,
        questions=questions_of(Official()) if module == "text" and family == "mplug2" else None,
        folder=folder,
    )
    card.write()
    return {"card": name, "arrays": len(arrays), "parameters": writing.parameters(
        {name: array.shape for name, array in arrays.items()}
    ), "bytes": size, "dtype": dtype}  # fmt: skip


def assumed(model: Model, family: str, options: Options) -> list[str]:
    """What neither keys nor the files beside them say, and the family's custom decides."""
    found = []
    if "vision" in model.configs and options.stated.pixels is None and family in ("clip", "vit"):
        found.append(f"{'ImageNet' if family == 'vit' else 'CLIP'}'s mean and deviation of pixels")
    if family == "clip" and options.settings is None:
        found.append("OpenAI's quick GELU, heads of 64")
    if "depth" not in (options.stated.sizes or {}) and family not in ("mplug2", "mplug"):
        found.append("as many layers as the keys have")
    return found


def _preprocessing(module: str, config: Any, family: str, options: Options) -> Preprocessing | None:
    """What pixels the weights are used to: as stated beside the file, else as is the family's custom."""
    if module != "vision":
        return None
    frames = options.settings.frames if options.settings else Settings(heads=1).frames
    height, width = config.image
    customary = (IMAGENET_MEAN, IMAGENET_STD) if family == "vit" else (CLIP_MEAN, CLIP_STD)
    mean, std = options.stated.pixels or customary
    return Preprocessing(height=height, width=width, frames=frames, mean=mean, std=std)


def _tokens(family: str, folder: Path, options: Options, config: Any) -> Tokens | None:
    """The vocabulary, copied beside the cards. Raises CheckpointError."""
    if options.vocabulary is None:
        return None
    try:
        with options.vocabulary.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise CheckpointError(f"vocabulary {options.vocabulary}: cannot be read ({error.strerror})") from None
    if what := mistaken(head):
        raise CheckpointError(f"vocabulary {options.vocabulary}: is {what}")
    tokenizer = WordPiece(str(options.vocabulary), options.lowercase)
    if family == "mplug2":  # whose questions have no [SEP], and whose captions spell theirs out
        tokenizer = OfficialWordPiece(str(options.vocabulary), options.lowercase, options.prompt)
    try:
        if tokenizer.size != config.vocabulary:
            raise CheckpointError(
                f"vocabulary {options.vocabulary} has {tokenizer.size} words, the checkpoint has "
                f"{config.vocabulary}; name the right one with --vocabulary"
            )
        return stated(tokenizer, folder)
    except Mplug2Error as error:
        raise CheckpointError(f"--vocabulary {options.vocabulary}: {error}") from None


def _write_rest(
    folder: Path,
    report: dict[str, Any],
    tensors: Mapping[str, StoredTensor],
    names: Mapping[str, str],
    options: Options,
) -> None:
    (folder / "conversion").mkdir()
    unused = {names[key]: tensors[key] for key in tensors if "unused" in report["keys"][names[key]]}
    report["unused_bytes"] = sum(tensor.nbytes for tensor in unused.values())
    if options.keep_unused and unused:
        arrays = {key: stored(tensor) for key, tensor in unused.items()}
        writing.stream(folder / "conversion" / "unused.safetensors", arrays, {})
    files.write_text(folder / "conversion" / "report.json", json.dumps(report, indent=1) + "\n")


def told(report: Mapping[str, Any]) -> str:
    """The report as text: a line a module, a line a rule."""
    lines = [
        f"{module:<12} {said['arrays']:>4} arrays {said['parameters']:>13,} parameters  {said['dtype']}  "
        f"{said['card']}"
        for module, said in report["modules"].items()
    ]
    fates = list(report["keys"].values())
    rules = [fate["unused"] for fate in fates if "unused" in fate]
    lines.append(f"{sum('to' in fate for fate in fates)} of {len(fates)} keys are in modules")
    checked = sum("same_as" in fate or "counts_to" in fate for fate in fates)
    lines.append(
        f"{checked:>5} keys repeat others or count positions: checked, and made again on the way back"
    )
    lines += [f"{rules.count(rule):>5} keys unused: {rule}" for rule in dict.fromkeys(rules)]
    if report["wrapper"]:
        lines.append(f"      keys stood under {report['wrapper']!r}, which is taken off")
    lines += [f"assumed, as nothing beside the file says: {what}" for what in report["assumed"]]
    lines += [
        f"warning: {key} has {count} numbers that are not finite"
        for key, count in report["not_finite"].items()
    ]
    return "\n".join(lines)


def default_name(path: Path) -> str:
    """What cards of a file are called after it: its stem, in letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", path.stem).strip("-.").lower() or "converted"
