"""The recipes of what the authors released, on a small data set in the real formats: videos that are encoded
here, official jsonl, MSRVTT's json."""

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from converting import released as released_keys
from PIL import Image
from test_clips import write_video

from mplug2 import recipes
from mplug2.convert.families import mplug2 as official_model
from mplug2.convert.recorded import read_case, read_json
from mplug2.data.stream import collate
from mplug2.data.wording import Official
from mplug2.data.wordpiece import OfficialWordPiece
from mplug2.errors import DataError
from mplug2.hub import cards
from mplug2.hub.card_tokenizer import tokenizer_of
from mplug2.network import Network, flat, select
from mplug2.optim import officially_decayed, schedule
from mplug2.overrides import apply
from mplug2.recipe import OfficialAdamW
from mplug2.recipes import released
from mplug2.run import settings
from mplug2.tasks import caption
from mplug2.tools.main import main

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY = str(GOLDEN / "aux" / "vocab.txt")
NAMES = ("msrvtt_caption", "msvd_caption", "msrvtt_qa", "msvd_qa", "tgif_qa")
FIRST = {"video0": "train", "more/video1": "validate", "video2": "test", "tumblr_3": "test"}
LAST = {"tumblr_3": "train", "video2": "train", "more/video1": "test", "video0": "test"}


def lines(path: Path, *rows: dict) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder as a recipe wants it, for captions and questions alike: mp4, avi, webm and gif."""
    root = tmp_path_factory.mktemp("data")
    videos, grey = root / "videos", list(range(20, 240, 20))
    (videos / "more").mkdir(parents=True)
    write_video(videos / "video0.mp4", grey)
    write_video(videos / "more" / "video1.avi", grey, "mpeg4")
    write_video(videos / "video2.webm", grey, "libvpx")
    frames = [Image.new("RGB", (20, 10), (level, level, level)) for level in grey]
    frames[0].save(videos / "tumblr_3.gif", save_all=True, append_images=frames[1:], duration=100, loop=0)
    said = ("a red three", "a blue seven moves left")
    for file, parts in (("train_val", ("train", "validate")), ("test", ("test",))):
        known = [{"video_id": one, "split": part} for one, part in FIRST.items() if part in parts]
        told = [{"video_id": one["video_id"], "caption": text} for one in known for text in said]
        (root / f"{file}_videodatainfo.json").write_text(json.dumps({"videos": known, "sentences": told}))
    train, test = ([one for one, part in LAST.items() if part == split] for split in ("train", "test"))
    lines(
        root / "caption_train.jsonl",
        *({"video_id": one, "caption": text} for one in train for text in said),
    )
    lines(root / "caption_test.jsonl", *({"video_id": one, "golden_captions": list(said)} for one in test))
    for file, ids in (("qa_train", train), ("qa_test", test)):
        asked = {"question": "What colour is the three?", "answer": "red"}
        lines(root / f"{file}.jsonl", *({"video_id": one, **asked} for one in ids))
    return root


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory) -> Iterator[None]:
    """Recipes of one task are one program: what the first compiles, the others read. Compiling is what takes
    the time, so little is optimised."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def placed(name: str, root: Path) -> list[str]:
    """The overrides that lead a recipe to the data."""
    what = "video_caption" if "caption" in name else "video_answer"
    return [f"{of}.{what}.data.root={root}" for of in ("objectives", "evaluations")]


# --- end to end


@pytest.mark.parametrize("name", NAMES)
def test_a_released_recipe_trains_scores_and_predicts(name: str, root: Path, tmp_path: Path, capsys):
    run, out, short = tmp_path / "run", tmp_path / "out.json", ["steps=1", "dropout=false"]
    assert main(["train", f"{name}.tiny", *placed(name, root), *short, "--run-dir", str(run)]) == 0
    assert main(["eval", str(run), "--out", str(out), "--predictions", str(tmp_path)]) == 0
    tasks = json.loads(out.read_text())["tasks"]
    capsys.readouterr()
    ask = [] if "caption" in name else ["--question", "What colour is the THREE?"]
    video = root / "videos" / ("tumblr_3.gif" if name == "tgif_qa" else "more/video1.avi")
    assert main(["predict", str(run), "--video", str(video), "--json", *ask]) == 0
    said = json.loads(capsys.readouterr().out)
    if ask:
        assert tasks["video_answer"]["n"] == 2 and isinstance(said["answer"], str)
    else:
        assert {"video_caption/meteor", "video_caption/cider", "video_caption/bleu4"} < set(tasks)
        first = json.loads((tmp_path / "video_caption.jsonl").read_text().splitlines()[0])
        assert first["truth"] == ["a red three", "a blue seven moves left"]


OWN = f"""
from dataclasses import replace

from mplug2.recipes import msrvtt_caption, released

TINY = replace(
    released.official(released.TINY, {VOCABULARY!r}),
    modules={{
        name: replace(config, vocabulary=200) if hasattr(config, "vocabulary") else config
        for name, config in released.TINY.modules.items()
    }},
    captioner=replace(released.OFFICIAL.captioner, rows=2, length=6),
)


def captions():
    return replace(released.captioning(msrvtt_caption.BENCHMARK, TINY), name="mine.official", workers=1)
"""


@pytest.fixture(scope="module")
def official_run(root: Path, tmp_path_factory) -> Path:
    """One step of captions as the official code has them, read by a worker process."""
    folder = tmp_path_factory.mktemp("official")
    (folder / "mine.py").write_text(OWN)
    train = ["train", f"{folder / 'mine.py'}:captions", *placed("caption", root), "steps=1", "dropout=false"]
    assert main([*train, "--run-dir", str(folder / "run")]) == 0
    return folder


def test_the_official_behaviour_trains_and_scores(official_run: Path):
    out = official_run / "out.json"
    assert main(["eval", str(official_run / "run"), "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["decoding"]["video_caption"].startswith("Official(length=6")
    said = json.loads((official_run / "run" / "run.json").read_text())["settings"]
    assert said["tokenizer."] == "mplug2.data.wordpiece.OfficialWordPiece"
    assert said["tokenizer.prompt"] == "'a video of'" and said["optimizer.iterations"] == "2"


def test_the_vocabulary_travels_with_published_cards(official_run: Path, tmp_path: Path, root: Path, capsys):
    assert main(["publish", str(official_run / "run"), "--to", str(tmp_path / "cards")]) == 0
    found = cards(tmp_path / "cards").values()
    tokenizer = tokenizer_of(found)
    beside = tmp_path / "cards" / "vocab.txt"
    assert tokenizer == OfficialWordPiece(str(beside), prompt="a video of")
    assert beside.read_bytes() == Path(VOCABULARY).read_bytes()
    video = str(root / "videos" / "video0.mp4")
    assert main(["predict", str(tmp_path / "cards"), "--video", video]) == 0
    beside.write_text(beside.read_text().replace("man", "men"))
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "cards"), "--video", video]) == 2
    assert "vocab.txt has sha256" in capsys.readouterr().err


# --- the official behaviour


def test_the_caption_loss_of_texts_is_the_recorded_one():
    """From the text of a caption to the loss: wording, ids, what is learned of them."""
    folder = GOLDEN / "oracle"
    case = read_case(folder, "caption_tdown", read_json(folder / "caption_tdown.json"))
    prompt = case.said["config"]["prompt"]
    tokenizer, ids = OfficialWordPiece(VOCABULARY, prompt=prompt), case.given["in.caption_ids"]
    texts = [Official(prompt).caption(tokenizer.decode(row)) for row in ids]
    rows = [{"index": index, "caption": text} for index, text in enumerate(texts)]
    lengths = {"caption": ids.shape[1], "caption_target": ids.shape[1]}
    batch = collate(rows, lengths, tokenizer, seed=0)
    np.testing.assert_array_equal(batch["caption"], ids)
    batch["clips"] = case.given["in.video"].transpose(0, 2, 3, 4, 1)
    network = Network(case.model.configs)
    compute = jax.jit(lambda params, batch: caption(batch, **select(caption, network.bind(params))))
    learned = {name: case.params[name] for name in select(caption, case.params)}
    assert float(compute(learned, batch)) == pytest.approx(float(case.given["out.loss"][0]), abs=1e-4)
    whole = batch | {"caption_target": batch["caption"]}
    assert float(compute(learned, whole)) != pytest.approx(float(case.given["out.loss"][0]), abs=1e-3)


@pytest.mark.parametrize("name", ["caption_tdown", "qa_stride2"])
def test_the_official_decay_goes_by_the_official_names(name: str):
    folder = GOLDEN / "oracle"
    case = read_case(folder, name, read_json(folder / f"{name}.json"))
    ours = {
        (module, array): decays
        for module, tree in officially_decayed(Network(case.model.configs).axes).items()
        for array, decays in flat(tree).items()
    }
    compared = 0
    for place, source in case.model.keys.sources.items():
        keys = [piece.key for piece in source.pieces]
        assert ours[place] == (not any("bias" in key or "LayerNorm.weight" in key for key in keys)), place
        compared += 1
    assert compared == len(ours)


def test_the_rate_of_accumulated_steps_is_that_of_their_last_iterations():
    loop = next(one for one in read_json(GOLDEN / "aux" / "aux.json")["lr"] if one["loop"] == "caption")
    peak, iterations = loop["base"][0], loop["epochs"] * loop["iters_per_epoch"]
    official = OfficialAdamW(
        learning_rate=peak,
        warmup=loop["warmup"],
        final=loop["min_lr"] / peak,
        sawtooth=loop["iters_per_epoch"],
        iterations=2,
    )
    rate = jax.vmap(schedule(official, iterations // 2))(np.arange(iterations // 2))
    expected = np.array(loop["lr_group0_group2"])[1::2, 0]
    np.testing.assert_allclose(rate, expected, rtol=2e-5)
    assert (np.diff(expected[:100]) < -1e-5).any()  # the saw-tooth is met, as 100 is even


def test_the_released_checkpoints_modules_are_those_of_the_recipes():
    configs = official_model(released_keys()).configs
    assert {name: configs[name] for name in released.ANSWER_MODULES} == dict(released.LARGE.modules)


# --- settings


EXAMPLES = {"msvd_caption": 48_774, "msrvtt_qa": 158_581, "msvd_qa": 30_933, "tgif_qa": 39_392}


@pytest.mark.parametrize("name", NAMES)
def test_the_published_numbers_of_the_fine_tuning(name: str):
    recipe = recipes.find(f"{name}.large_official")
    optimizer = recipe.optimizer
    assert isinstance(optimizer, OfficialAdamW)
    assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.warmup) == (2e-5, 0.02, 200)
    assert optimizer.learning_rate * recipe.learning_rates["vision"] == pytest.approx(2e-6)
    assert (recipe.preprocessing.frames, recipe.preprocessing.height) == (16, 224)
    (objective,) = recipe.objectives.values()
    assert objective.batch // recipe.accumulate == 32
    examples = 140_200 if name == "msrvtt_caption" else EXAMPLES[name]
    assert recipe.steps * objective.batch == pytest.approx(10 * examples, rel=5e-3)
    assert all(recipe.mode(module) == "full" for module in recipe.modules)


def test_a_tokenizer_is_changed_by_its_fields_and_told_apart_in_a_run(tmp_path: Path):
    recipe = recipes.find("msvd_caption.large_official")
    changed = apply(recipe, [f"tokenizer.vocabulary={VOCABULARY}", "tokenizer.lowercase=false"])
    assert changed.tokenizer == OfficialWordPiece(VOCABULARY, False, "a video of")
    assert pickle.loads(pickle.dumps(changed.tokenizer)).size == 200
    differing = {key for key, text in settings(recipe).items() if settings(changed)[key] != text}
    assert differing == {"tokenizer.vocabulary", "tokenizer.lowercase"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("tokenizer.vocabluary=x", 'tokenizer.vocabluary: no such field.*did you mean "vocabulary"'),
        ("tokenizer.lowercase=maybe", "tokenizer.lowercase expects true or false"),
        ("tokenizer=vocab.txt", "tokenizer holds a WordPiece, which text cannot spell.*vocabulary"),
    ],
)
def test_a_slip_in_a_tokenizers_field_is_named(change: str, said: str):
    with pytest.raises(Exception, match=said):
        apply(recipes.find("msvd_caption.large"), [change])


def test_missing_data_and_vocabulary_are_said_before_anything_is_made(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "msvd_qa.tiny", "--run-dir", "run"]) == 2
    refusal = capsys.readouterr().err
    assert (
        'no folder "data/msvd"' in refusal and "qa_train.jsonl" in refusal and '"data/msvd/videos"' in refusal
    )
    assert refusal.count("\n") == 1 and not Path("run").exists()
    assert main(["train", "msvd_qa", "--run-dir", "run"]) == 2
    assert f'no vocabulary "{released.VOCABULARY}"' in capsys.readouterr().err
    with pytest.raises(DataError, match="no folder"):
        recipes.find("msvd_qa.tiny").objectives["video_answer"].data.source("train")


def test_show_explains_a_recipe_whose_data_is_elsewhere(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["show", "tgif_qa"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "tgif_qa.large" in said and "→ fusion → decoder" in said
    for missing in ("bert-large-uncased-vocab.txt", 'no folder "data/tgif"', "data/mplug2_pretrain"):
        assert missing in said.partition("Not here yet:")[2]


@pytest.mark.slow
def test_a_step_and_a_caption_at_the_large_size_fit_into_24_gigabytes(root: Path, tmp_path: Path):
    words = Path(VOCABULARY).read_text().split("\n")[:200]
    (tmp_path / "vocab.txt").write_text("\n".join(words + [f"word{i}" for i in range(200, 30_522)]) + "\n")
    write_video(root / "videos" / "video0.mp4", list(range(20, 240, 10)))  # as many frames as are asked for
    script = Path(__file__).parent / "large_step.py"
    done = subprocess.run(
        [sys.executable, str(script), str(root), str(tmp_path / "vocab.txt")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["peak_gb"] < 24 and said["loss"] > 0, said
