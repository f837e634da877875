"""The house holds: what ships, who imports whom, what `import mplug2` costs, every command answers."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mplug2
from mplug2.errors import CheckpointError
from mplug2.tools import main as dispatcher

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "mplug2": "mplug2",
    "modules": "mplug2.modules",
    "recipes": "mplug2.recipes",
    "tools": "mplug2.tools",
}
CONSTRAINTS = sorted((ROOT / "constraints").glob("*.txt"))
MAKE = ("env", "-u", "MAKEFLAGS", "-u", "PYTHON", "make", "--dry-run")  # whatever `make test` was given
SHELF = (".json", ".model", ".safetensors")


def sources(folder: str) -> list[Path]:
    """The Python files of a folder, those behind mplug2's links left out."""
    rooms = [ROOT / "mplug2" / link for link in ("modules", "recipes", "checkpoints", "tools")]
    found = sorted((ROOT / folder).rglob("*.py"))
    return [path for path in found if not any(path.is_relative_to(room) for room in rooms)]


def tree() -> set[str]:
    """The files that the wheel must hold, by their place in it."""
    files = {"mplug2/py.typed"}
    for folder in ("mplug2", "modules", "recipes", "tools", "checkpoints"):
        place = "" if folder == "mplug2" else "mplug2/"
        files |= {place + path.relative_to(ROOT).as_posix() for path in sources(folder)}
    shelf = (ROOT / "checkpoints").iterdir()
    return files | {f"mplug2/checkpoints/{path.name}" for path in shelf if path.suffix in SHELF}


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import at any depth; `from a import b` counts as `a` and `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), path.name)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def run(*command: str | Path, cwd: Path) -> str:
    """Output of a command in a clean environment; a failure shows what it said."""
    environ = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    environ["MPLUG2_CACHE"] = os.environ["MPLUG2_CACHE"]
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- what ships


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, links kept, without what git ignores: builds write beside the sources."""
    copy = tmp_path_factory.mktemp("house") / "checkout"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "quickstart")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="session")
def built(checkout: Path) -> tuple[Path, Path]:
    """(sdist, the wheel built from that sdist)."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", ".", cwd=checkout)
    (sdist,), (wheel,) = (checkout / "dist").glob("*.tar.gz"), (checkout / "dist").glob("*.whl")
    return sdist, wheel


def wheel_files(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_built_from_the_sdist_holds_the_tree_and_nothing_else(built):
    assert wheel_files(built[1]) == tree()


@pytest.mark.slow
def test_the_wheel_built_from_the_checkout_is_the_same(built, checkout):
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", "direct", ".", cwd=checkout)
    (wheel,) = (checkout / "direct").glob("*.whl")
    assert wheel_files(wheel) == wheel_files(built[1])


def test_the_sdist_holds_every_source_once_and_no_link(built):
    with tarfile.open(built[0]) as archive:
        members = archive.getmembers()
    names = [member.name.partition("/")[2] for member in members if member.isfile()]
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert len(names) == len(set(names))
    links = ("mplug2/modules/", "mplug2/recipes/", "mplug2/checkpoints/", "mplug2/tools/")
    assert {name.removeprefix("mplug2/") if name.startswith(links) else name for name in tree()} <= set(names)
    assert not [name for name in names if name.startswith(links)]
    assert {"pyproject.toml", "LICENSE", "Makefile", "tests/conftest.py"} <= set(names)
    assert {str(path.relative_to(ROOT)) for path in CONSTRAINTS} <= set(names)


@pytest.mark.parametrize(
    "version, chosen",
    [("3.11", "3.11"), ("3.12", "3.12"), ("3.13", "3.12"), ("3.14", "3.12")],
)
def test_the_makefile_installs_the_set_that_is_tested_on_this_python(version, chosen, tmp_path):
    """Read off what `make` would run, by a Python that only tells such a version."""
    told = tmp_path / "python"
    told.write_text(f"#!/bin/sh\necho {version}\n")
    told.chmod(0o755)
    said = run(*MAKE, "--always-make", "setup", f"PYTHON={told}", cwd=ROOT)
    assert re.findall(r"-c (constraints\S+)", said) == [f"constraints/python{chosen}.txt"] * 2
    assert ("no set is tested on Python 3.14" in said) == (version == "3.14")


def test_an_environment_is_made_anew_for_another_python_that_is_asked_for(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / ".venv").mkdir()
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for made, asked, remade in ((here, True, False), ("3.10", True, True), ("3.10", False, False)):
        (tmp_path / ".venv" / ".ready").write_text(f"{made}\n")
        words = [f"PYTHON={sys.executable}"] if asked else []
        assert ("-m venv" in run(*MAKE, "setup", *words, cwd=tmp_path)) == remade


def test_the_wheel_has_floors_and_no_upper_pins(built):
    archive = zipfile.ZipFile(built[1])
    (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    requirements = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.M)
    assert len(requirements) > 20
    assert not [line for line in requirements if re.search(r"<|==|~=|!=", line.partition(";")[0])]


@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=lambda path: path.stem)
def test_every_requirement_is_pinned_in_the_constraints(constraints):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    pins = [line for line in constraints.read_text().splitlines() if not line.startswith("#")]

    def name(line: str) -> str:
        return re.split(r"[^A-Za-z0-9._-]", line)[0].lower().replace("_", "-")

    assert not [pin for pin in pins if "==" not in pin]
    assert {name(line) for line in wanted} <= {name(pin) for pin in pins}


# --- three ways to install, one package

PROBE = (
    "import mplug2, mplug2.modules, mplug2.recipes, mplug2.checkpoints, mplug2.tools.main as m; "
    "print(mplug2.__file__, m.main(['--version']))"
)


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A new environment's Python that sees this one's packages, but not this checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=tmp_path)
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    packages = [path for path in map(Path, sys.path) if path.name == "site-packages"]
    # a plain path, so that this environment's own .pth files (our editable install) are not followed
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in packages))
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, *what, cwd=cwd)


def test_the_wheel_imports_and_answers(built, python, tmp_path):
    install(python, built[1], cwd=tmp_path)
    assert str(tmp_path) in run(python, "-c", PROBE, cwd=tmp_path)
    assert run(python.with_name("mplug2"), "--version", cwd=tmp_path) == f"mplug2 {mplug2.__version__}\n"


@pytest.mark.parametrize("mode", ["compat", "lenient"])
def test_an_editable_install_imports_the_checkout(mode, checkout, python, tmp_path):
    install(python, "--config-settings", f"editable_mode={mode}", "-e", checkout, cwd=tmp_path)
    assert str(checkout / "mplug2") in run(python, "-c", PROBE, cwd=tmp_path)


def test_a_bare_checkout_imports(checkout, python):
    assert str(checkout / "mplug2") in run(python, "-c", PROBE, cwd=checkout)


def test_the_rooms_are_links_into_the_checkout():
    for room in ("modules", "recipes", "checkpoints", "tools"):
        link = ROOT / "mplug2" / room
        assert link.is_symlink() and link.readlink() == Path("..") / room


def packages(name: str) -> set[str]:
    """`"a.b.c"` -> `a`, `a.b`."""
    return {name[:end] for end, letter in enumerate(name) if letter == "."}


# --- who imports whom


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("mplug2", ("mplug2.modules", "mplug2.recipes", "mplug2.tools")),
        ("recipes", ("mplug2.tools",)),
    ],
)
def test_no_room_imports_the_rooms_above_it(folder, banned):
    assert not {
        (path.name, name) for path in sources(folder) for name in imports(path) if within(name, *banned)
    }


def test_no_file_is_imported_in_a_circle():
    """By what is imported while a file is read: not in functions, nor for type checkers alone."""
    paths = {path for folder in ("mplug2", *ROOMS) for path in sources(folder)}
    names = {}
    for path in paths:
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if parts[0] == "mplug2" else ("mplug2", *parts))
        names[name.removesuffix(".__init__")] = path
    needs = {}
    for name, path in names.items():
        found: set[str] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        # Packages are read before what lies in them, which for their own files has then begun.
        found |= {package for other in found for package in packages(other)}
        needs[name] = (found & names.keys()) - packages(name) - {name}
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    TopologicalSorter(needs).prepare()


def test_modules_know_only_modules_roles_sharding_and_errors():
    allowed = ("mplug2.modules", "mplug2.roles", "mplug2.sharding", "mplug2.errors")
    ours = {(p.name, name) for p in sources("modules") for name in imports(p) if within(name, "mplug2")}
    assert not {(file, name) for file, name in ours if name != "mplug2" and not within(name, *allowed)}


def test_nothing_imports_tests_or_a_second_copy_of_a_room():
    paths = [path for folder in (*ROOMS, "checkpoints") for path in sources(folder)]
    second = ("modules", "recipes", "checkpoints", "tools")
    assert not {
        (path.name, name) for path in paths for name in imports(path) if within(name, "tests", *second)
    }
    paths = sources("tests")
    assert not {(path.name, name) for path in paths for name in imports(path) if within(name, *second)}


# --- what `import mplug2` costs


def test_import_is_light_and_loads_neither_torch_nor_tensorflow():
    heavy = ("torch", "tensorflow", "jax", "flax", "orbax", "grain", "sklearn", "av", "PIL")
    code = f"import sys, mplug2; print([name for name in {heavy} if name in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT) == "[]\n"


def test_the_command_line_settles_what_jax_reads_as_it_starts():
    code = (
        "import sys; from mplug2.tools import main; assert 'jax' not in sys.modules; main.programs.keep()\n"
        "import jax; print(jax.config.jax_compilation_cache_dir)"
    )
    folder = run(sys.executable, "-c", code, cwd=ROOT).strip()
    assert Path(folder).parent == Path(os.environ["MPLUG2_CACHE"]) / "compiled"


def test_every_public_name_loads_without_torch_or_tensorflow():
    code = (
        "import sys, time, jax, flax.nnx, optax, mplug2\n"
        "start = time.perf_counter()\n"
        "[getattr(mplug2, name) for name in mplug2._HOMES]\n"
        "print(f'every public name: {time.perf_counter() - start:.2f} s after jax, flax and optax')\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)\n"
    )
    print(run(sys.executable, "-c", code, cwd=ROOT))


def test_type_checkers_and_run_time_see_the_same_public_names():
    (block,) = [
        node for node in ast.parse((ROOT / "mplug2/__init__.py").read_text()).body if isinstance(node, ast.If)
    ]
    typed = {
        alias.name: f"mplug2.{alias.name}" if node.module == "mplug2" else node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == mplug2._HOMES
    assert set(typed) <= set(dir(mplug2))


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Netwrok'"):
        mplug2.Netwrok  # type: ignore[attr-defined]  # noqa: B018


# --- the shelf, and what is tracked


def test_no_tracked_file_names_a_place_on_somebodys_machine():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = run("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", cwd=ROOT).split("\0")
    # an absolute path below one of these, not a part of an address or of a longer path
    places = "|".join(["work", "home", "root", "tmp", "Users", "mnt", "scratch"])
    pattern = re.compile(rf"(?<![\w.:/~$}})\]-])/(?:{places})/\w")
    found = []
    for name in filter(None, names):
        path = ROOT / name
        if (
            path.is_symlink()
            or not path.is_file()
            or path.suffix in (".safetensors", ".model", ".npz", ".png", ".pth", ".pt")
        ):
            continue
        found += [f"{name}: {line}" for line in path.read_text().splitlines() if pattern.search(line)]
    assert not found


# --- the commands


@pytest.mark.parametrize("command", dispatcher.COMMANDS)
def test_every_command_explains_itself(command, capsys):
    tool = importlib.import_module(f"mplug2.tools.{dispatcher.COMMANDS[command][0]}")
    with pytest.raises(SystemExit) as stop:
        tool.main(["--help"])
    assert not stop.value.code
    assert f"mplug2 {command}" in capsys.readouterr().out


def test_help_lists_every_command_and_version_is_the_packages(capsys):
    assert dispatcher.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in dispatcher.COMMANDS)
    assert dispatcher.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mplug2 {mplug2.__version__}\n"


def test_an_unknown_command_is_refused_with_the_nearest_name(capsys):
    assert dispatcher.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith('mplug2: error: there is no command "trian" (did you mean "train"?)')


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (CheckpointError("no run\nin this folder"), 2, "mplug2: error: no run in this folder\n"),
        (KeyboardInterrupt(), 130, "mplug2: interrupted\n"),
    ],
)
def test_a_refusal_is_one_line_and_a_status(raised, status, said, monkeypatch, capsys):
    class Tool:
        @staticmethod
        def main(argv: list[str]) -> int | None:
            raise raised

    monkeypatch.setitem(sys.modules, "mplug2.tools.train", Tool)
    assert dispatcher.main(["train", "anything"]) == status
    assert capsys.readouterr().err == said


def test_a_reader_that_leaves_early_is_no_error():
    command = f"set -o pipefail; {sys.executable} -m mplug2.tools.main --help | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
