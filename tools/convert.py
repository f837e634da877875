"""`mplug2 convert FILE --from KIND --out DIR`: a checkpoint becomes modules with cards; `--to mplug2`: the
way back."""

from pathlib import Path

from mplug2.arguments import Parser, at_least

KINDS = ("mplug2", "mplug", "clip", "vit", "bert")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="mplug2 convert",
        description="Turn a checkpoint (.pth, .pt, .tar, .safetensors) into modules, or modules back.",
        epilog="DIR/conversion/report.json accounts for every key; one missing or unexplained is an error.",
    )
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="the checkpoint; with --to, a folder of converted modules"
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument(
        "--from", dest="source", metavar="KIND", help=f"what the checkpoint is: {', '.join(KINDS)}"
    )
    way.add_argument("--to", metavar="KIND", help="write official keys again: mplug2 or mplug")
    parser.add_argument(
        "--out", type=Path, required=True, help="a new folder; with --to, a new .safetensors file"
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="Hugging Face's, open_clip's or BERT's configuration (default: config.json or "
        "open_clip_config.json beside FILE)",
    )
    parser.add_argument("--name", help="what the cards' names end in (default: the name of FILE)")
    parser.add_argument(
        "--vocabulary",
        type=Path,
        help="a WordPiece vocabulary to travel with the cards (default: vocab.txt beside FILE)",
    )
    parser.add_argument(
        "--cased",
        action="store_true",
        help="the vocabulary keeps capitals and accents (default: as tokenizer_config.json beside it says)",
    )
    parser.add_argument(
        "--prompt", default="", help='what captions of a fine-tuned mplug2 began with: "a video of"'
    )
    parser.add_argument(
        "--licence", default="unknown", help="SPDX name of the weights' licence (default: %(default)s)"
    )
    parser.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="keys to leave out, e.g. 'head.*'"
    )
    parser.add_argument(
        "--drop-unused", action="store_true", help="do not keep dead tensors for the way back"
    )
    parser.add_argument(
        "--allow-non-finite", action="store_true", help="take NaN and infinite weights as they are"
    )
    parser.add_argument(
        "--fusion-stack",
        type=at_least(1),
        help="with --to: layers of the official fusion encoder, idle ones too",
    )
    asked = parser.parse_args(argv)

    # After the arguments are known to be right: these take seconds to import.
    from mplug2.convert import conversion
    from mplug2.convert.reversal import revert
    from mplug2.convert.shapes import reads_lowercase
    from mplug2.convert.stated import beside

    if asked.to:
        count = revert(asked.file, asked.to, asked.out, fusion_stack=asked.fusion_stack)
        print(f"{count} keys are in {asked.out}")
        return 0
    stated = beside(asked.file, asked.source, asked.config)
    vocabulary = asked.vocabulary or _beside(asked.file, "vocab.txt")
    options = conversion.Options(
        name=asked.name or conversion.default_name(asked.file),
        settings=stated.settings,
        stated=stated,
        skip=tuple(asked.skip),
        vocabulary=vocabulary,
        lowercase=not asked.cased and (vocabulary is None or reads_lowercase(vocabulary)),
        prompt=asked.prompt,
        keep_unused=not asked.drop_unused,
        allow_non_finite=asked.allow_non_finite,
        licence=asked.licence,
    )
    report = conversion.convert(asked.file, asked.source, asked.out, options)
    print(conversion.told(report))
    print(f"modules and cards are in {asked.out}, every key's account in {asked.out}/conversion/report.json")
    return 0


def _beside(file: Path, name: str) -> Path | None:
    """The file of that name in the folder of `file`, if there is one: as Hugging Face publishes models."""
    path = file.parent / name
    return path if path.is_file() else None
