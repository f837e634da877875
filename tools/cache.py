"""`mplug2 cache list|verify|prune`: what has been downloaded, whether it is whole, and away with what is not
used."""

import argparse
import time

from mplug2.arguments import Parser
from mplug2.hub.cache import UNUSED_DAYS, Cache, Entry


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="mplug2 cache",
        description="The cache of downloaded files. MPLUG2_CACHE names its folder.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    actions.add_parser(
        "list", help="every file: size, sha256, name, last use; and what is pinned"
    ).set_defaults(act=show)
    actions.add_parser(
        "verify", help="read every file; remove those that are damaged (exit status 1)"
    ).set_defaults(act=verify)
    pruned = actions.add_parser("prune", help="remove unused files and what is left of broken downloads")
    pruned.add_argument(
        "--days", type=float, default=UNUSED_DAYS, help=f"unused for so long (default: {UNUSED_DAYS}; 0: all)"
    )
    pruned.set_defaults(act=prune)
    asked = parser.parse_args(argv)
    return asked.act(Cache.default(), asked)


def show(cache: Cache, asked: argparse.Namespace) -> int:
    entries = cache.entries()
    for entry in entries:
        print(f"{line(entry)}  used {time.strftime('%Y-%m-%d', time.localtime(entry.used))}")
    for name, sha256 in cache.pins().items():
        print(f"{'pinned':>13}  {sha256[:12]}  {name}  (remove {cache.pin_path(name)} to take another file)")
    print(f"{len(entries)} files, {total(entries)} in {cache.folder}")
    return 0


def verify(cache: Cache, asked: argparse.Namespace) -> int:
    checked = []
    for entry, right in cache.verify():
        checked.append(right)
        print(f"{line(entry)}  {'right' if right else 'damaged, removed'}", flush=True)
    print(f"{len(checked)} files, {len(checked) - sum(checked)} damaged, in {cache.folder}")
    return 0 if all(checked) else 1


def prune(cache: Cache, asked: argparse.Namespace) -> int:
    removed = cache.prune(asked.days)
    for entry in removed:
        print(f"{line(entry)}  removed")
    print(f"{len(removed)} files, {total(removed)}, removed from {cache.folder}")
    return 0


def line(entry: Entry) -> str:
    return f"{entry.bytes / 1e6:10.2f} MB  {entry.sha256[:12]}  {entry.name}"


def total(entries: list[Entry]) -> str:
    return f"{sum(entry.bytes for entry in entries) / 1e6:.2f} MB"
