"""Locks: the same lock composes the same network; what is no longer what was locked is refused with both
sides."""

import dataclasses
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import referencing
from fresh import drawn

from mplug2 import hub, overrides, recipes
from mplug2.errors import CardError
from mplug2.hub import lock, publishing
from mplug2.network import flat
from mplug2.roles import Execution
from mplug2.tools.main import main

SHELF = Path(__file__).parent.parent / "checkpoints"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with a card of every module of image_caption.tiny, but the decoder."""
    folder = tmp_path_factory.mktemp("cards")
    modules = recipes.find("image_caption.tiny").modules
    for module in ("vision", "universal"):
        publishing.publish(
            folder, f"{module}-a", module, modules[module], drawn({module: modules[module]}, seed=5)[module]
        )
    return folder


@pytest.fixture
def changes(published) -> list[str]:
    return [f"modes.{module}={mode}" for module, mode in (("vision", "frozen"), ("universal", "full"))] + [
        f"cards.{module}={published}" for module in ("vision", "universal")
    ]


@pytest.fixture
def locked(changes, tmp_path) -> Path:
    command = ["lock", "image_caption.tiny", *changes, "--out", str(tmp_path / "a.lock.json")]
    assert main(command) == 0
    return tmp_path / "a.lock.json"


def identical(one, other) -> None:
    one, other = flat(one), flat(other)
    assert set(one) == set(other)
    for name in one:
        assert np.asarray(one[name]).tobytes() == np.asarray(other[name]).tobytes(), name


def test_a_lock_comes_back_from_its_file(locked, changes):
    recipe = overrides.apply(recipes.find("image_caption.tiny"), changes)
    found = lock.read(locked)
    assert found == lock.of(recipe, "image_caption.tiny", changes)
    assert {name: part.mode for name, part in found.modules.items()} == {
        name: recipe.mode(name) for name in recipe.modules
    }
    part = found.modules["vision"]
    assert part.file is not None and len(part.file.sha256) == 64 and part.card == "vision-a"


def test_a_flipped_byte_of_a_file_is_no_longer_what_was_locked(published, locked, tmp_path, capsys):
    path = published / "vision-a.safetensors"
    content = bytearray(path.read_bytes())
    assert main(["lock", str(locked)]) == 0
    try:
        content[-1] ^= 1
        path.write_bytes(content)
        assert main(["lock", str(locked)]) == 2
    finally:
        content[-1] ^= 1
        path.write_bytes(content)
    assert "vision-a.safetensors: sha256 is" in capsys.readouterr().err


def test_locks_follow_the_schema(locked):
    schemas = {
        name: json.loads((SHELF / name).read_text()) for name in ("lock.schema.json", "card.schema.json")
    }
    registry = referencing.Registry().with_resources(
        (name, referencing.Resource.from_contents(schema)) for name, schema in schemas.items()
    )
    valid = jsonschema.Draft202012Validator(schemas["lock.schema.json"], registry=registry)
    value = json.loads(locked.read_text())
    valid.validate(value)
    fields = {f.name for f in dataclasses.fields(lock.Lock)} - {"folder"}
    assert set(schemas["lock.schema.json"]["properties"]) == fields
    value["modules"]["vision"]["file"]["sha256"] = "no"
    assert not valid.is_valid(value)


def test_the_same_lock_composes_the_same_network_as_its_recipe(locked, changes):
    recipe = overrides.apply(recipes.find("image_caption.tiny"), changes)
    _, assembled, _ = hub.assemble(recipe)
    network, composed = lock.compose(lock.read(locked))
    assert network.configs == recipe.modules
    identical(composed, assembled)


def test_kernels_that_are_not_here_are_no_hindrance_to_use_what_was_trained_with_them(locked):
    elsewhere = dataclasses.replace(lock.read(locked), execution=Execution(attention="splash"))
    assert lock.compose(elsewhere)[0].execution.attention == "xla"


def test_a_lock_is_checked_and_never_changed(locked, capsys):
    assert main(["lock", str(locked), "--out", str(locked)]) == 2
    assert "is a lock, which is checked: field=value and --out are for recipes" in capsys.readouterr().err


def test_a_file_that_became_another_is_refused_with_both_sides(locked, published, capsys):
    assert main(["lock", str(locked)]) == 0
    assert "holds: 2 modules are what was locked, 1 begin by seed 0" in capsys.readouterr().out
    modules = recipes.find("image_caption.tiny").modules
    old = hub.find(published, "vision")
    kept = (old.weights.read_bytes(), (published / "vision-a.json").read_bytes())
    try:
        new = publishing.publish(
            published,
            "vision-a",
            "vision",
            modules["vision"],
            drawn({"vision": modules["vision"]}, seed=6)["vision"],
        )
        assert main(["lock", str(locked)]) == 2
        said = capsys.readouterr().err
        assert f"was locked as card vision-a of sha256 {old.file.sha256}" in said
        assert f"has sha256 {new.file.sha256}" in said
        with pytest.raises(CardError, match="was locked as"):
            lock.compose(lock.read(locked))
    finally:
        old.weights.write_bytes(kept[0])
        (published / "vision-a.json").write_bytes(kept[1])


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("modules", "vision", "file", "sha256"), "x", "modules.vision.file.sha256"),
        (("modules", "vision", "mode"), "frosen", 'did you mean "frozen"'),
        (("modules", "vision", "mode"), "init", "there is a file"),
        (("modules", "vision", "config", "type"), "os:System", "a dataclass of the zoo"),
        (("tokenizer", "file"), "../x", "a plain file name"),
        (("seed",), "zero", "seed: is 'zero'"),
        (("extra",), 1, "no such field"),
    ],
)
def test_a_malformed_lock_is_refused_with_its_field(path, value, said, locked):
    content = json.loads(locked.read_text())
    place = content
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    locked.write_text(json.dumps(content))
    with pytest.raises(CardError, match=said) as refused:
        lock.read(locked)
    assert str(refused.value).startswith(f"lock {locked}: ")


def test_what_a_run_is_composed_of_may_not_change_while_it_goes_on(changes, published, tmp_path):
    recipe = overrides.apply(recipes.find("image_caption.tiny"), changes)
    lock.keep(tmp_path, lock.of(recipe))
    lock.keep(tmp_path, lock.of(recipe))
    changed, file = lock.of(recipe), hub.find(published, "vision").file
    part = dataclasses.replace(changed.modules["vision"], file=dataclasses.replace(file, sha256="0" * 64))
    changed = dataclasses.replace(changed, modules={**changed.modules, "vision": part}, seed=4)
    with pytest.raises(CardError, match=f"vision sha256 was locked as .* and is {'0' * 64}; seed was locked"):
        lock.keep(tmp_path, changed)


@pytest.mark.slow
def test_a_run_keeps_its_lock_and_is_not_continued_with_other_files(changes, published, tmp_path, capsys):
    folder, command = tmp_path / "run", ["train", "image_caption.tiny", "steps=1", *changes]
    assert main([*command, "--run-dir", str(folder)]) == 0
    kept = lock.read(folder / "lock.json")
    assert kept.recipe == "image_caption.tiny" and "steps=1" in kept.overrides
    value = json.loads((folder / "lock.json").read_text())
    other = value["modules"]["vision"]["file"]["sha256"] = "0" * 64
    (folder / "lock.json").write_text(json.dumps(value))
    assert main([*command, "--run-dir", str(folder)]) == 2
    said = capsys.readouterr().err
    assert f"vision sha256 was locked as {other} and is {hub.find(published, 'vision').file.sha256}" in said


def test_without_a_file_the_lock_goes_to_the_standard_output(capsys):
    assert main(["lock", "image_caption.tiny"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["recipe"] == "image_caption.tiny" and value["modules"]["vision"]["mode"] == "init"


@pytest.mark.slow
def test_modules_that_begin_by_the_seed_begin_alike():
    recipe = dataclasses.replace(recipes.find("image_caption.tiny"), seed=9)
    identical(lock.compose(lock.of(recipe))[1], hub.assemble(recipe)[1])
