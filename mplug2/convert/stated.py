"""What is written beside a checkpoint, for whatever its keys cannot tell or would tell wrongly: the stated
sizes, the activation, the pixels' mean and deviation, and whether the file is one of several.

Read are, of the folder of the checkpoint: `config.json` (Hugging Face's, or timm's), `open_clip_config.json`,
`preprocessor_config.json`, and `*.index.json` (the shards of a checkpoint).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mplug2.convert.shapes import CLIP_HEAD, Settings, read_object, read_settings
from mplug2.errors import CheckpointError

Pixels = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and deviation of each colour, of pixels in 0..1."""

OPEN_CLIP = "https://github.com/mlfoundations/open_clip"

SIZES_OF_HUGGING_FACE = {
    "num_hidden_layers": "depth",
    "hidden_size": "width",
    "intermediate_size": "hidden",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
    "image_size": "image",
    "patch_size": "patch",
}
SIZES_OF_OPEN_CLIP = {"layers": "depth", "width": "width", "image_size": "image", "patch_size": "patch"}
PLAIN_TOWER_OF_OPEN_CLIP = {
    "no_ln_pre": False,
    "pool_type": "tok",
    "global_average_pool": False,
    "ls_init_value": None,
    "attentional_pool": False,
    "pos_embed_type": "learnable",
    "final_ln_after_pool": False,
    "act_kwargs": None,
    "norm_kwargs": None,
    "mlp_ratio": 4.0,
}
"""Fields of a vision tower that change what it computes, and what they are in one that the zoo has."""

LARGEST_PIXEL = 1000.0
"""Beyond any mean and deviation of pixels in 0..1."""

DEPTHS_OF_VIT = {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32}

OF_SEVERAL = r"\d[-_]?of[-_]?0*([2-9]|[1-9]\d+)(?!\d)"
NUMBERED = r"(?:[mtp]p_rank|^rank|shard|part|consolidated)[-_.]?(\d+)"
"""Names of files that hold a part of a checkpoint, by how many there are and by its own number, which is 0 of
a whole one too (DeepSpeed's mp_rank_00, LLaMA's consolidated.00)."""


@dataclass(frozen=True, kw_only=True)
class Stated:
    """`sizes`: by the names of our configs' fields; `source`: who published it, where that shows; `places`:
    the files that said it."""

    settings: Settings | None = None
    sizes: Mapping[str, int] | None = None
    pixels: Pixels | None = None
    source: str = ""
    places: tuple[Path, ...] = ()

    def check(self, configs: Mapping[str, Any]) -> None:
        """Raises CheckpointError where the modules found in a file are of other sizes than stated."""
        config = configs.get("vision", configs.get("text"))
        for name, stated in (self.sizes or {}).items():
            found = _size(config, name)
            if found is not None and found != stated:
                raise CheckpointError(
                    f"its keys make a {name} of {found}, {self.places[0]} states {stated}: a part of it is "
                    "missing, or the configuration is another model's"
                )


def beside(file: Path, family: str, config: Path | None = None) -> Stated:
    """What the files beside the checkpoint `file` of a `family` say; `config` is read for the configuration
    instead of those. Raises CheckpointError."""
    named = config or _configuration(file, family)
    pixels_of = file.parent / "preprocessor_config.json"
    pixels = _pixels_of_hugging_face(pixels_of) if pixels_of.is_file() else None
    places = (pixels_of,) if pixels else ()
    if named is None:
        return Stated(pixels=pixels, places=places)
    given = read_object(named)
    if "model_cfg" in given:
        return _of_open_clip(named, given, family)
    if family == "vit" and ("architecture" in given or "pretrained_cfg" in given):
        return _of_timm(named, given, pixels)
    settings = read_settings(named, family)
    return Stated(
        settings=settings,
        sizes=_sizes(given.get("vision_config", given), SIZES_OF_HUGGING_FACE, family, named),
        pixels=pixels,
        source=OPEN_CLIP if settings.activation == "gelu" else "",
        places=(named, *places),
    )


def check_whole(file: Path, keys: Iterable[str]) -> None:
    """Raises CheckpointError where `file` holds a part of a checkpoint only: as an index beside it says, or
    its name."""
    keys = set(keys)
    for index in sorted(file.parent.glob("*.index.json")):
        listed = read_object(index).get("weight_map")
        if isinstance(listed, dict) and file.name in listed.values():
            if elsewhere := {key: where for key, where in listed.items() if key not in keys}:
                shards = len(set(map(str, listed.values())))
                raise CheckpointError(
                    f"{file}: holds {len(listed) - len(elsewhere)} of the {len(listed)} keys that "
                    f"{index.name} lists in {shards} file(s); join them to one file first"
                )
            return
    if re.search(OF_SEVERAL, file.name) or _has_others(file):
        raise CheckpointError(
            f"{file}: is by its name one of several files of a checkpoint, and no index beside it "
            "says that it is whole; join them to one file first"
        )


def _has_others(file: Path) -> bool:
    """Whether a file of a NUMBERED name is not the first of them, or not the only one in its folder."""
    if not (found := re.search(NUMBERED, file.name)):
        return False
    before, after = map(re.escape, (file.name[: found.start(1)], file.name[found.end(1) :]))
    alike = [one.name for one in file.parent.glob("*") if re.fullmatch(rf"{before}\d+{after}", one.name)]
    return int(found[1]) > 0 or len(alike) > 1


def _configuration(file: Path, family: str) -> Path | None:
    """The configuration in the folder of `file`: open_clip's own where the file is called after it."""
    there = [file.parent / name for name in ("config.json", "open_clip_config.json")]
    if family == "clip" and file.name.startswith("open_clip"):
        if not there[1].is_file():
            raise CheckpointError(
                f"{file}: is called as open_clip's, whose open_clip_config.json says the activation and "
                "the mean of pixels, and is not beside it: put it there, or name one with --config"
            )
        return there[1]
    return next((path for path in (there if family == "clip" else there[:1]) if path.is_file()), None)


def _of_open_clip(path: Path, given: Mapping[str, Any], family: str) -> Stated:
    model, pixels = given["model_cfg"], given.get("preprocess_cfg") or {}
    vision = model.get("vision_cfg") if isinstance(model, dict) else None
    if family != "clip" or not isinstance(vision, dict) or not isinstance(pixels, dict):
        raise CheckpointError(f"{path}: is a configuration of open_clip's, without the vision_cfg of a CLIP")
    if "timm_model_name" in vision or isinstance(vision.get("layers"), list):
        raise CheckpointError(
            f"{path}: its vision tower is {vision.get('timm_model_name', 'a ResNet')}, not a CLIP transformer"
        )
    for name, plain in PLAIN_TOWER_OF_OPEN_CLIP.items():
        if vision.get(name, plain) != plain:
            raise CheckpointError(
                f"{path}: its vision tower has {name} {vision[name]!r}; the zoo's CLIP has {plain!r}"
            )
    sizes = _sizes(vision, SIZES_OF_OPEN_CLIP, family, path)
    width, head = sizes.get("width", 0), vision.get("head_width", CLIP_HEAD)
    if type(head) is not int or not 0 < head <= width:
        raise CheckpointError(f"{path}: its vision tower of width {width} has heads of {head!r}")
    return Stated(
        settings=Settings(
            heads=width // head, activation="quick_gelu" if model.get("quick_gelu") else "gelu"
        ),
        sizes=sizes,
        pixels=_pixels(path, pixels.get("mean"), pixels.get("std")),
        source=OPEN_CLIP,
        places=(path,),
    )


def _of_timm(path: Path, given: Mapping[str, Any], pixels: Pixels | None) -> Stated:
    """timm's configuration says how a model is called, what sets it apart from others of that name, and what
    its pixels are."""
    said = given.get("pretrained_cfg", given)
    said = said if isinstance(said, dict) else {}
    made = given.get("model_args")
    made = made if isinstance(made, dict) else {}
    called = re.match(
        r"(?:vit|deit3?)_(tiny|small|base|large|huge)_(?:distilled_)?patch(\d+)_",
        str(given.get("architecture", "")),
    )
    sizes = {"depth": DEPTHS_OF_VIT[called[1]], "patch": int(called[2])} if called else {}
    sizes |= _sizes(given, {"num_features": "width"}, "vit", path)
    sizes |= _sizes(made, {"depth": "depth", "patch_size": "patch", "embed_dim": "width"}, "vit", path)
    size = said.get("input_size")
    if isinstance(size, list) and len(size) == 3 and isinstance(size[1], int):
        sizes["image"] = size[1]
    heads = made.get("num_heads", given.get("num_heads"))
    return Stated(
        settings=Settings(heads=heads) if isinstance(heads, int) else None,
        sizes=sizes,
        pixels=_pixels(path, said.get("mean"), said.get("std")) or pixels,
        places=(path,),
    )


def _sizes(given: Any, names: Mapping[str, str], family: str, path: Path) -> dict[str, int]:
    """The stated sizes of the family's one tower; of mPLUG's, which have several, what all of them share."""
    if not isinstance(given, dict):
        raise CheckpointError(f"{path}: its vision_config is no JSON object")
    if family in ("mplug2", "mplug"):
        return {}
    found = {ours: given[theirs] for theirs, ours in names.items() if given.get(theirs) is not None}
    for name, size in found.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise CheckpointError(f"{path}: states {size!r} for its {name}, expected a positive whole number")
    return found


def _size(config: Any, name: str) -> int | None:
    """A size of a module's config, None where it has none of that name."""
    if name == "image":
        return config.image[0] if hasattr(config, "image") else None
    return getattr(getattr(config, "stem", config) if name == "patch" else config, name, None)


def _pixels_of_hugging_face(path: Path) -> Pixels | None:
    given = read_object(path)
    if given.get("do_normalize") is False:
        return _pixels(path, [0.0] * 3, [1.0] * 3)
    return _pixels(path, given.get("image_mean"), given.get("image_std"))


def _pixels(path: Path, mean: Any, std: Any) -> Pixels | None:
    """None where nothing is said. Raises CheckpointError on what is no mean and deviation of three
    colours."""
    if mean is None and std is None:
        return None
    made = []
    for name, given, least in (("mean", mean, -LARGEST_PIXEL), ("std", std, 0.0)):
        numbers = [given] * 3 if isinstance(given, int | float) else given
        if (
            not isinstance(numbers, list)
            or len(numbers) != 3
            or not all(isinstance(one, int | float) and least < one < LARGEST_PIXEL for one in numbers)
        ):
            raise CheckpointError(f"{path}: its {name} of pixels is {given!r}, expected three numbers")
        made.append(tuple(map(float, numbers)))
    return made[0], made[1]
