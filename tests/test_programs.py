"""Compiled programs on disk: damaged ones are compiled again and replaced, and a folder that cannot be used
is said once."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src import compilation_cache

from mplug2 import programs

JAX_OWN = {name: getattr(compilation_cache, name) for name in programs.FUNCTIONS}  # no command has run yet
OPTIONS = {
    "jax_compilation_cache_dir": None,
    "jax_compilation_cache_max_size": 1 << 30,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_enable_compilation_cache": True,
}


@pytest.fixture
def folder(tmp_path):
    """An empty folder of programs that JAX uses in this test alone."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, value in (OPTIONS | {"jax_compilation_cache_dir": str(tmp_path / "programs")}).items():
        jax.config.update(name, value)
    fresh_process()
    yield tmp_path / "programs"
    for name, value in before.items():
        jax.config.update(name, value)
    fresh_process()


def fresh_process() -> None:
    compilation_cache.reset_cache()
    for name, own in JAX_OWN.items():
        setattr(compilation_cache, name, own)
    programs._mended = None
    programs.mend()


def computed(factor: int = 3) -> None:
    """Compiles anew, or reads what was kept."""
    found = jax.jit(lambda x: factor * x + 1)(np.arange(4.0))
    np.testing.assert_array_equal(found, factor * np.arange(4.0) + 1)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


def as_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "cut to its mark": lambda path: path.write_bytes(path.read_bytes()[:9]),
    "empty": lambda path: path.write_bytes(b""),
    "another byte": lambda path: path.write_bytes(
        path.read_bytes()[:200] + bytes([path.read_bytes()[200] ^ 1]) + path.read_bytes()[201:]
    ),
    "other bytes": lambda path: path.write_bytes(b"no program"),
    "a folder": as_folder,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_program_is_compiled_again_and_replaced(damage, folder, capsys):
    computed()
    ((path), before) = entries(folder)[0], entries(folder)[0].read_bytes()
    for one in entries(folder):
        damage(one)
    fresh_process()
    computed()
    assert capsys.readouterr().err == (
        f"mplug2: warning: {folder}: damaged programs are removed, and compiled again\n"
    )
    assert path.is_file() and len(path.read_bytes()) == pytest.approx(len(before), rel=0.1)
    fresh_process()
    computed()
    assert capsys.readouterr().err == ""  # and is right from then on


def test_a_program_without_its_time_is_no_obstacle_for_others(folder, capsys):
    computed()
    for path in folder.glob("*-atime"):
        path.unlink()
    computed(factor=5)
    assert "damaged programs are removed" in capsys.readouterr().err
    assert any(entries(folder))


def test_whole_programs_are_read_and_those_of_before_too(folder, capsys, monkeypatch):
    read = []
    unpack = compilation_cache.decompress_executable
    computed()
    for path in entries(folder):  # as JAX alone writes them
        path.write_bytes(path.read_bytes()[len(programs.MARK) + 32 :])
    monkeypatch.setattr(
        compilation_cache, "decompress_executable", lambda entry: read.append(len(entry)) or unpack(entry)
    )
    compilation_cache.reset_cache()
    computed()
    assert read and capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["a file", "gone"])
def test_a_folder_that_cannot_be_used_is_said_once_and_ends_nothing(kind, folder, capsys):
    if kind == "gone":
        computed()
        shutil.rmtree(folder)
        folder.write_text("a file now")
    else:
        folder.write_text("no folder")
        fresh_process()
    for factor in range(7, 10):
        computed(factor)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{folder}: compiled programs cannot be kept there" in said


def test_a_program_is_known_by_its_sha256_whatever_packs_it():
    mended = programs._Mended(lambda x: x, lambda x: x, lambda *_: None, lambda *_: None)
    entry = mended.pack(b"machine code")
    assert mended.unpack(entry) == b"machine code" == mended.unpack(b"machine code")
    with pytest.raises(ValueError, match="sha256"):
        mended.unpack(entry[:-1] + b"f")


def test_a_full_disk_leaves_no_half_program(folder, capsys, monkeypatch):
    def full(key: str, *_: object) -> None:
        folder.mkdir(exist_ok=True)
        (folder / f"{key}-cache").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    mended = programs._Mended(lambda x: x, lambda x: x, lambda *_: (None, None), full)
    for key in ("a", "b"):
        mended.put(key)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left on device" in said and not entries(folder)
