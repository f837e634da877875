"""Recipe files import their neighbours, whole and unmixed, and run nothing but what their sources hold."""

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from mplug2 import source
from mplug2.source import Sources, from_file, from_sources, load


def written(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "mine.py"


def test_two_recipe_files_with_neighbours_of_one_name_are_not_mixed_up(tmp_path):
    before, path = set(sys.modules), list(sys.path)
    text = (
        "import helpers\nfrom helpers import NAME\ndef name():\n    import helpers as h\n    return h.NAME\n"
    )
    modules = [
        load(from_file(written(tmp_path / name, mine=text, helpers=f"NAME = {name!r}\n"))) for name in "ab"
    ]
    assert [module.NAME for module in modules] == [module.name() for module in modules] == ["a", "b"]
    assert modules[0].helpers is not modules[1].helpers
    assert sys.path == path and "helpers" not in sys.modules
    assert all(name.startswith("_recipe") for name in set(sys.modules) - before)


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("import lib.views", "lib.views.X"),
        ("import lib.views as views", "views.X"),
        ("from lib import views", "views.X"),
        ("from lib.views import X", "X"),
        ("from .lib.views import X", "X"),
        ("from . import lib; from .lib import views", "lib.views.X"),
        ("from bare.deep import Y as X", "X"),
        ("from lib.views import *", "X"),
    ],
)
def test_neighbours_are_imported_in_every_way_that_python_knows(statement, value, tmp_path):
    mine = written(
        tmp_path,
        mine=f"{statement}\ngot = {value}\n",
        lib____init__="",
        lib__views="from .deeper import X\n",
        lib__deeper="X = 3\n",
        bare__deep="Y = 3\n",
    )
    (tmp_path / "lib" / "__init__.py").write_text("")
    package = from_file(mine)
    assert load(package).got == 3
    again = from_sources(package.sources())
    assert load(again).got == 3


def test_installed_packages_and_the_standard_library_stay_what_they_are(tmp_path):
    text = "import json, numpy\nfrom mplug2.recipe import Recipe\n"
    module = load(from_file(written(tmp_path, mine=text, json="1/0", mplug2____init__="1/0")))
    from mplug2.recipe import Recipe

    assert module.Recipe is Recipe and module.json is sys.modules["json"]


def test_what_is_imported_later_is_kept_too(tmp_path):
    mine = written(
        tmp_path,
        mine="def late():\n    from lazily import VALUE\n    return VALUE\n",
        lazily="import deeper\nVALUE = deeper.VALUE\n",
        deeper="VALUE = 5\n",
        unrelated="1/0\n",
    )
    package = from_file(mine)
    load(package)
    kept = package.sources()
    assert sorted(kept.files) == ["deeper.py", "lazily.py", "mine.py"]
    for file in tmp_path.glob("*.py"):
        file.unlink()
    assert load(from_sources(kept)).late() == 5


def test_only_the_bytes_at_hand_are_run(tmp_path):
    """A module or a compiled file that somebody puts beside kept sources is not imported."""
    written(tmp_path, helpers="1/0\n", other="1/0\n")
    cached = Path(importlib.util.cache_from_source(str(tmp_path / "helpers.py")))
    cached.parent.mkdir()
    cached.write_bytes(b"not even bytecode")
    files = {"mine.py": b"import helpers\ntry:\n    import other\nexcept ImportError:\n    other = 0\n"}
    module = load(from_sources(Sources("mine.py", {**files, "helpers.py": b"X = 1\n"}, str(tmp_path))))
    assert module.helpers.X == 1 and module.other == 0


def test_another_process_unpickles_what_a_recipe_file_defines(tmp_path):
    mine = written(
        tmp_path / "src",
        mine="import helpers\nclass Data(helpers.Base):\n    pass\n",
        helpers="class Base:\n    def late(self):\n        import lazily\n        return lazily.X\n",
        lazily="X = 7\n",
    )
    package = from_file(mine)
    data = load(package).Data()
    ours = [one for one in source.installed() if one.name == package.name]
    (tmp_path / "sent").write_bytes(pickle.dumps(ours) + pickle.dumps(data))
    (tmp_path / "src" / "lazily.py").unlink()
    code = (
        "import pickle, sys\nfrom mplug2.source import install\nfile = open(sys.argv[1], 'rb')\n"
        "install(pickle.load(file))\nprint(pickle.load(file).late())"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "sent"], cwd=root, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_settings_name_a_class_alike_wherever_and_whenever_its_file_was_loaded(tmp_path):
    names = [
        source.name_in_settings(load(from_file(written(tmp_path / f, mine="class A: ...\n"))).A.__module__)
        for f in "ab"
    ]
    assert names == ["_recipe_mine", "_recipe_mine"]
