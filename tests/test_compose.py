"""Composing modules of different origin: what does not fit is refused with both sides and the route, before
any weights are here."""

import dataclasses
import json
from pathlib import Path

import pytest
from fresh import fresh

from mplug2 import hub
from mplug2.errors import CardError
from mplug2.hub import fit, publishing
from mplug2.modules import connector, decoder, fusion, heads, temporal, text, universal, vision
from mplug2.roles import Config
from mplug2.tools.main import main

MODULES: dict[str, Config] = {
    "vision": vision.tiny(),
    "universal": universal.tiny(),
    "decoder": decoder.tiny(),
}
ALL: dict[str, Config] = MODULES | {
    "temporal": temporal.tiny(),
    "text": text.tiny(),
    "fusion": fusion.tiny(),
    "contrastive": heads.ContrastiveConfig(width=32, space=8),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cards")
    wide = dataclasses.replace(vision.tiny(), width=64)
    for module, config in MODULES.items():
        publishing.publish(folder / module, f"{module}-a", module, config, fresh(MODULES)[module])
    publishing.publish(folder / "wide", "vision-b", "vision", wide, fresh({"vision": wide})["vision"])
    return folder


def command(published: Path, out: Path, **places: str) -> list[str]:
    chosen = {module: str(published / module) for module in MODULES} | places
    return ["compose", *(word for m, p in chosen.items() for word in (f"--{m}", p)), "--out", str(out)]


def test_joined_modules_are_a_directory_of_cards_with_an_account(published, tmp_path, capsys):
    out = tmp_path / "joined"
    assert main(command(published, out)) == 0
    assert set(hub.cards(out)) == set(MODULES)
    report = json.loads((out / "load_report.json").read_text())
    assert report["total"]["loaded"]["arrays"] > 0 and report["total"]["initialised"]["arrays"] == 0
    assert report["modules"]["vision"]["card"] == "vision-a"
    assert "vision-a" in capsys.readouterr().out and "universal-a" in (out / "README.md").read_text()
    network, _ = hub.compose(out)
    assert network.configs == MODULES
    assert main(command(published, out)) == 2


def test_a_family_means_its_card_of_the_role(tmp_path, capsys, monkeypatch):
    out = tmp_path / "joined"
    assert main(["compose", "--contrastive", "small", "--vision", "vision-small", "--out", str(out)]) == 0
    assert {card.name for card in hub.cards(out).values()} == {"contrastive-small", "vision-small"}
    assert hub.find("small", "text") == hub.find("text-small")  # as a recipe's cards.text=small
    refused = {
        ("--vision", "smal"): 'did you mean "small"',
        ("--connector", "small"): "small: expected one card of 'connector', it holds",
    }
    for words, said in refused.items():
        assert main(["compose", *words, "--out", str(tmp_path / "none")]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(CardError, match='no card "smal": .*did you mean "small"'):
        hub.find("smal", "text")
    publishing.publish(tmp_path / "small", "mine", "text", text.tiny(), fresh({"text": text.tiny()})["text"])
    monkeypatch.chdir(tmp_path)
    assert hub.find("small", "text").name == "mine"  # what is on the disk comes before families


def test_cards_that_would_write_over_each_other_are_refused_before_anything_is_written(
    published, tmp_path, capsys
):
    mine, other, out = tmp_path / "mine", tmp_path / "other", tmp_path / "joined"
    params = fresh(MODULES)
    publishing.publish(mine, "Mine", "universal", MODULES["universal"], params["universal"])
    publishing.publish(other, "mine", "decoder", MODULES["decoder"], params["decoder"])
    assert main(command(published, out, universal=str(mine), decoder=str(other))) == 2
    assert "universal and decoder would both write mine.json" in capsys.readouterr().err
    publishing.publish(tmp_path / "report", "load_report", "decoder", MODULES["decoder"], params["decoder"])
    assert main(command(published, out, decoder=str(tmp_path / "report" / "load_report.json"))) == 2
    assert "decoder and the network would both write load_report.json" in capsys.readouterr().err
    assert not out.exists()


def test_unequal_widths_are_refused_with_the_route_until_a_connector_is_asked_for(
    published, tmp_path, capsys
):
    wide = str(published / "wide")
    assert main(command(published, tmp_path / "a", vision=wide)) == 2
    said = capsys.readouterr().err
    assert "vision-b has width 64" in said and "universal-a has width 32" in said
    assert "route: clips → vision (64) ✗ universal (32) → decoder (32)" in said
    assert not (tmp_path / "a").exists()
    assert main([*command(published, tmp_path / "b", vision=wide), "--connector"]) == 0
    report = json.loads((tmp_path / "b" / "load_report.json").read_text())
    assert report["modules"]["connector"]["initialised"]["arrays"] == 4
    assert hub.find(tmp_path / "b", "connector").config == connector.Config(inputs=64, width=32)
    network, _ = hub.compose(tmp_path / "b")
    assert "connector" in network.configs


def test_nothing_is_downloaded_before_it_is_known_to_fit(published, tmp_path, monkeypatch):
    cards = [hub.find(published / module) for module in ("universal", "decoder")]
    elsewhere = dataclasses.replace(hub.find(published / "wide"), folder=tmp_path)

    def never(*_, **__):
        raise AssertionError("downloaded")

    monkeypatch.setattr(hub, "located", never)
    with pytest.raises(CardError, match="vision-b has width 64"):
        hub.compose(elsewhere, *cards)
    with pytest.raises(AssertionError, match="downloaded"):
        hub.compose(hub.find(published / "vision"), *cards)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"decoder": dataclasses.replace(decoder.tiny(), width=64)},
            "task .*width 32 .*width 64.*route: vision",
        ),
        ({"temporal": dataclasses.replace(temporal.tiny(), depth=5)}, "task .*depth"),
        ({"universal": dataclasses.replace(universal.tiny(), width=48)}, "task .*width 32 .*width 48"),
    ],
)
def test_what_cards_do_not_state_is_seen_by_tracing(change, said):
    with pytest.raises(CardError, match=said):
        fit.check_routes(ALL | change)


def test_every_module_that_a_task_can_play_is_traced():
    assert set(fit.check_routes(ALL)) >= {"answer", "contrast"}
    assert fit.check_routes({"vision": vision.tiny()}) == []


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (
            ["--vision", "decoder"],
            "--vision .*expected one card of 'vision'|card decoder-a is one of 'decoder'",
        ),
        (["--decoder", "decoder", "--connector"], "--connector stands between vision and others"),
        ([], "no card is given"),
    ],
)
def test_a_command_that_makes_no_sense_is_refused(places, said, published, tmp_path, capsys):
    words = [str(published / word) if word in MODULES else word for word in places]
    assert main(["compose", *words, "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert any(part.replace(".*", "") in error or part.split(".*")[-1] in error for part in said.split("|"))
