"""The Python of a recipe file: its source and that of the neighbours it imports, read once and loaded under a
name of its own.

A recipe file imports what lies beside it as a script does (`import helpers`, `from . import helpers`), yet
nothing is put on sys.path and no module takes a plain name: the files of one folder are the modules of one
package, `_recipe1`, and their `import` looks there first. So two folders with a `helpers.py` each are two
modules, and a process that is sent the package (`install`) can unpickle what a recipe defines.

Only the bytes that `Sources` holds are run; no compiled file beside them is.
"""

import ast
import builtins
import hashlib
import importlib
import importlib.abc
import importlib.util
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePosixPath
from types import CodeType, ModuleType
from typing import Any

from mplug2.errors import RecipeError

_PREFIX = "_recipe"
_NOT_NEIGHBOURS = {"mplug2", *sys.stdlib_module_names}
_number = itertools.count(1)


@dataclass(frozen=True)
class Sources:
    """Source files by their place below one folder ("helpers.py", "lib/views.py"); `main` is the recipe
    file's, `folder` where they were read, which tracebacks name."""

    main: str
    files: Mapping[str, bytes]
    folder: str

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each file."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(self.files.items())}


@dataclass
class Package:
    """The files of a folder as modules of one package. `folder` is read as they are asked for; with `fixed`,
    there are no others than `files`."""

    name: str
    main: str
    files: dict[str, bytes]
    folder: Path
    fixed: bool

    @property
    def main_module(self) -> str:
        return f"{self.name}.{_plain(PurePosixPath(self.main).stem)}"

    def place_of(self, module: str) -> tuple[str, bool] | None:
        """(the place of a module's file, whether it is a package); the place of a folder without an
        `__init__.py` is the folder's."""
        if module == self.main_module:
            return self.main, False
        place = module.partition(".")[2].replace(".", "/")
        for file, package in ((f"{place}/__init__.py", True), (f"{place}.py", False)):
            if self._has(file):
                return file, package
        return (place, True) if self._has_folder(place) else None

    def is_neighbour(self, name: str) -> bool:
        """Whether `import name` means a file of this folder."""
        if name in _NOT_NEIGHBOURS:
            return False
        found = self.place_of(f"{self.name}.{name}")
        if found is None:
            return False
        # As everywhere in Python, a mere folder comes after what is installed.
        return found[0].endswith(".py") or importlib.util.find_spec(name) is None

    def read(self, place: str) -> bytes:
        """Raises RecipeError."""
        if place not in self.files:
            path = self.folder / place
            try:
                self.files[place] = path.read_bytes()
            except OSError as error:
                raise RecipeError(f'recipe file "{path}" cannot be read: {error.strerror or error}') from None
        return self.files[place]

    def sources(self) -> Sources:
        """What was loaded, and what its import statements name and may load later."""
        waiting = list(self.files)
        while waiting:
            for name in _imported(waiting.pop(), self.files):
                for end in itertools.accumulate(name.split("."), "{}.{}".format):
                    found = self.place_of(f"{self.name}.{end}")
                    if found and found[0].endswith(".py") and self.is_neighbour(end.partition(".")[0]):
                        if found[0] not in self.files:
                            self.read(found[0])
                            waiting.append(found[0])
        return Sources(self.main, dict(self.files), str(self.folder))

    def _has(self, file: str) -> bool:
        return file in self.files or (not self.fixed and (self.folder / file).is_file())

    def _has_folder(self, place: str) -> bool:
        if not place:
            return True
        if self.fixed:
            return any(file.startswith(f"{place}/") for file in self.files)
        return any((self.folder / place).glob("**/*.py")) if (self.folder / place).is_dir() else False


_PACKAGES: dict[str, Package] = {}


def from_file(path: Path) -> Package:
    """The package of a recipe file, not yet loaded. Raises RecipeError where the file cannot be read."""
    path = Path(path).absolute()
    package = Package(f"{_PREFIX}{next(_number)}", path.name, {}, path.parent, fixed=False)
    package.read(path.name)
    install([package])
    return package


def from_sources(sources: Sources) -> Package:
    """The package of files that are at hand, not yet loaded; the folder is not read."""
    name = f"{_PREFIX}{next(_number)}"
    package = Package(name, sources.main, dict(sources.files), Path(sources.folder), fixed=True)
    install([package])
    return package


def load(package: Package) -> ModuleType:
    """The module of the recipe file. Raises whatever its code raises."""
    return importlib.import_module(package.main_module)


def install(packages: Iterable[Package]) -> None:
    """Makes packages importable in this process, under the names they have."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    _PACKAGES.update({package.name: package for package in packages})


def installed() -> list[Package]:
    """What another process needs to unpickle what recipe files define, each with all its files."""
    return [
        Package(package.name, package.main, dict(package.sources().files), package.folder, fixed=True)
        for package in _PACKAGES.values()
    ]


def is_of_recipe(module: str) -> bool:
    """Whether a module is of a recipe file, or its neighbour."""
    return module.partition(".")[0] in _PACKAGES


def name_in_settings(module: str) -> str:
    """The name of a module that does not depend on when, and from where, it was loaded."""
    return f"{_PREFIX}_{module.partition('.')[2]}" if is_of_recipe(module) else module


def readable(text: str) -> str:
    """`text` with the modules of recipe files called as their authors call them."""
    return re.sub(rf"\b{_PREFIX}\d+\.", "", text)


def _plain(stem: str) -> str:
    return re.sub(r"\W", "_", stem)


def _imported(place: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """The dotted names that a file's import statements name, at any depth, relative ones resolved."""
    try:
        tree = ast.parse(files[place])
    except (SyntaxError, ValueError):
        return  # whoever loads it says so
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = place.split("/")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ([base] if base else [])
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of `_PACKAGES`, and no others."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = _PACKAGES.get(fullname.partition(".")[0])
        found = package.place_of(fullname) if package else None
        if package is None or found is None:
            return None
        place, is_package = found
        origin = str(package.folder / place)
        spec = ModuleSpec(fullname, _Loader(package, place), origin=origin, is_package=is_package)
        spec.has_location = place.endswith(".py")
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, package: Package, place: str):
        self.package, self.place = package, place

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _importer(self.package)}
        if self.place.endswith(".py"):
            exec(self._code(), module.__dict__)

    def _code(self) -> CodeType:
        content = self.package.read(self.place)
        return compile(content, str(self.package.folder / self.place), "exec", dont_inherit=True)

    def get_source(self, fullname: str) -> str:
        """For tracebacks: what is run, whatever lies in the folder by now."""
        return importlib.util.decode_source(self.package.read(self.place))


def _importer(package: Package) -> Any:
    def import_neighbour_first(
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        if level or not package.is_neighbour(name.partition(".")[0]):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        full = f"{package.name}.{name}"
        if fromlist:
            return builtins.__import__(full, globals, locals, fromlist, 0)
        importlib.import_module(full)
        return sys.modules[f"{package.name}.{name.partition('.')[0]}"]

    return import_neighbour_first
