"""How the modules behave: images and videos, free sizes, decoding step by step, masks, sizes, and what they
refuse."""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import FLOAT64, RTOL, in_float64, widened
from flax import nnx
from fresh import compiled

from mplug2 import modules
from mplug2.errors import RecipeError
from mplug2.modules import connector, decoder, fusion, heads, temporal, text, universal, vision
from mplug2.modules.functions import gelu, quick_gelu
from mplug2.network import Network
from mplug2.roles import Config


@pytest.fixture(autouse=True)
def exactly():
    with in_float64():
        yield


@cache
def build(config: Any) -> Any:
    """A module with fresh parameters, in float64."""

    def split() -> Any:
        return nnx.split(config.build(rngs=nnx.Rngs(0), execution=FLOAT64))

    graph, _ = nnx.split(nnx.eval_shape(lambda: nnx.merge(*split())))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, widened(compiled(lambda: split()[1])())))


def clips(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).normal(size=(*shape, 3)))


def moved(module: Any, by: float = 0.1) -> Any:
    """The module away from its zeros, in random directions: norms remove what is constant."""
    graph, state = nnx.split(module)
    rng = np.random.default_rng(0)
    return nnx.merge(graph, jax.tree.map(lambda leaf: leaf + by * rng.normal(size=leaf.shape), state))


def close(one: Any, other: Any, atol: float = RTOL) -> None:
    np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=atol)


# vision and temporal


def test_a_video_network_with_fresh_temporal_branches_is_the_image_network_frame_by_frame():
    eye, branches = build(vision.tiny()), build(temporal.tiny())
    video = clips(2, 3, 32, 32)
    together = compiled(lambda video: eye(video, branches))(video)
    frames = compiled(eye)(video.reshape(6, 1, 32, 32, 3)).reshape(2, 3, 17, 32)
    close(together[:, 1:].reshape(2, 3, 16, 32), frames[:, :, 1:])
    assert not np.allclose(together, compiled(lambda video: eye(video, moved(branches)))(video), atol=1e-3)


def test_the_class_token_of_a_video_is_the_mean_over_its_frames_before_the_norm():
    eye = build(vision.tiny())
    frame = clips(1, 1, 32, 32)
    close(eye(jnp.repeat(frame, 3, axis=1))[:, 0], eye(frame)[:, 0])


def test_temporal_branches_mix_neighbouring_frames_only():
    eye, branches = build(replace(vision.tiny(), depth=1)), moved(build(replace(temporal.tiny(), depth=1)))
    video = clips(1, 8, 32, 32)
    changed = video.at[:, 0].add(1.0)
    difference = jnp.abs(eye(video, branches) - eye(changed, branches))[0, 1:].reshape(8, 16, 32).max((1, 2))
    assert (difference[:3] > 1e-4).all()  # two branches in a block, one frame further each
    assert (difference[3:] < 1e-5).all()


def test_a_plain_vit_differs_from_clip_in_norms_activation_and_bias():
    """What a recording of tiny towers cannot tell, the norms' epsilon, and what it can."""
    stem = vision.BiasedPatches(patch=8)
    clip = build(replace(vision.tiny(), stem=vision.Patches(patch=8)))
    plain = build(replace(vision.tiny(), stem=stem, blocks=vision.Plain()))
    assert (clip.output_norm.epsilon, plain.output_norm.epsilon) == (1e-5, 1e-6)
    layers = (clip.blocks[0], plain.blocks[0])
    assert [(it.mlp_norm.epsilon, it.attention_norm.epsilon) for it in layers] == [(1e-5,) * 2, (1e-6,) * 2]
    names = [
        {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(it))} for it in (clip, plain)
    ]
    assert names[0] - names[1] == {"input_norm.scale", "input_norm.bias"}
    assert names[1] - names[0] == {"stem.bias"}
    assert all(layer.mlp.activation is kind for layer, kind in zip(layers, (quick_gelu, gelu), strict=True))


@pytest.mark.parametrize(
    "stem", [vision.Patches(patch=8), vision.Convolutions(patch=8)], ids=["patches", "convolutions"]
)
def test_non_square_inputs_work(stem):
    wide = build(replace(vision.tiny(), stem=stem, image=(32, 64)))
    assert wide(clips(1, 1, 32, 64)).shape == (1, 1 + 4 * 8, 32)
    square = build(replace(vision.tiny(), stem=stem))
    assert square(clips(1, 2, 48, 32)).shape == (1, 1 + 2 * 6 * 4, 32)


def test_rows_and_columns_are_not_mistaken_for_each_other():
    eye = build(replace(vision.tiny(), image=(32, 64)))
    picture = clips(1, 1, 32, 64)
    lower = picture.at[:, :, 24:].add(3.0)
    difference = jnp.abs(eye.stem(picture) - eye.stem(lower))[0, 0].max(-1)
    assert (difference[3] > 1e-3).all() and (difference[:2] < 1e-6).all()


def test_a_picture_that_does_not_divide_into_patches_is_refused():
    with pytest.raises(RecipeError, match=r"divide by 8, got shape \(1, 1, 30, 32, 3\)"):
        build(vision.tiny())(clips(1, 1, 30, 32))
    with pytest.raises(RecipeError, match=r"\(30, 32\) pixels does not divide into 8 px"):
        replace(vision.tiny(), image=(30, 32))
    with pytest.raises(RecipeError, match="width 32 does not divide into 5 heads"):
        replace(vision.tiny(), heads=5)


def test_drop_path_needs_a_key():
    eye = build(replace(vision.tiny(), drop_path=0.5))
    picture = clips(4, 1, 32, 32)
    close(eye(picture), eye(picture), atol=0)
    assert not np.allclose(eye(picture), eye(picture, key=jax.random.key(0)), atol=1e-3)


# text, universal, fusion


def test_padding_changes_nothing():
    reader, shared = build(text.tiny()), build(universal.tiny())
    ids = jnp.array([[2, 9, 7, 3]])
    longer = jnp.pad(ids, ((0, 0), (0, 3)))

    def read(ids: jax.Array) -> jax.Array:
        return shared.text(reader(ids), ids != 0)

    close(read(ids), read(longer)[:, :4])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_universal_works_at_any_depth(depth):
    shared = build(replace(universal.tiny(), depth=depth))
    tokens = jnp.array(np.random.default_rng(0).normal(size=(2, 6, 32)))
    assert shared.text(tokens, jnp.ones((2, 6), bool)).shape == shared.vision(tokens).shape == (2, 6, 32)
    other = tokens.at[:, 5].add(jnp.linspace(-1, 1, 32))  # unlike a constant, not removed by a norm
    reaches_the_first = jnp.abs(shared.vision(tokens) - shared.vision(other))[:, 0].max()
    assert reaches_the_first > 1e-6


def test_latents_carry_what_one_vision_token_tells_another():
    """One layer reads from the latents as learned, and attends over tokens; the latents matter to every
    token."""
    shared = build(universal.tiny())
    tokens = jnp.array(np.random.default_rng(0).normal(size=(1, 6, 32)))
    graph, state = nnx.split(shared)
    state["latents"] = jax.tree.map(jnp.zeros_like, state["latents"])
    assert (jnp.abs(shared.vision(tokens) - nnx.merge(graph, state).vision(tokens)).max(-1) > 1e-5).all()


def test_fusion_leaves_vision_as_it_is_unless_it_is_connected():
    seen, said = (
        jnp.ones((1, 5, 32)),
        jnp.array(np.random.default_rng(0).normal(size=(1, 3, 32))),
    )
    mask = jnp.ones((1, 3), bool)
    vision_out, text_out = build(fusion.tiny())(seen, said, mask)
    assert (vision_out == seen).all() and text_out.shape == said.shape
    vision_out, _ = build(replace(fusion.tiny(), depth=2, connected_at=(1,)))(seen, said, mask)
    assert not np.allclose(vision_out, seen)
    with pytest.raises(RecipeError, match=r"layers \[2\], there are layers 0 to 1"):
        replace(fusion.tiny(), depth=2, connected_at=(2,))


# decoder


@pytest.mark.parametrize("masked", [False, True], ids=["whole memory", "masked memory"])
def test_decoding_step_by_step_equals_the_full_decoder(masked):
    writer = moved(build(replace(decoder.tiny(), depth=2)))
    rng = np.random.default_rng(0)
    memory = jnp.array(rng.normal(size=(2, 5, 32)))
    mask = jnp.arange(5)[None] < jnp.array([[5], [3]]) if masked else None
    rows = jnp.array(rng.integers(4, 128, (2, 3, 6)))  # three rows to each memory

    full = [writer(rows[:, row], memory, mask) for row in range(3)]
    step, cache = compiled(writer.step), writer.start(memory, mask, rows=3, length=6)
    for position in range(6):
        logits, cache = step(rows[:, :, position], jnp.array(position), cache)
        for row in range(3):
            close(logits[:, row], full[row][:, position])


def test_a_decoder_does_not_look_ahead():
    writer, memory = build(decoder.tiny()), jnp.ones((1, 4, 32))
    one, other = jnp.array([[2, 8, 9, 10]]), jnp.array([[2, 8, 20, 30]])
    close(writer(one, memory)[:, :2], writer(other, memory)[:, :2])
    assert not np.allclose(writer(one, memory)[:, 2:], writer(other, memory)[:, 2:])


# heads


def test_contrastive_gives_unit_vectors_and_a_bounded_temperature():
    head = build(heads.ContrastiveConfig(width=32, space=8))
    tokens = 5 * jnp.array(np.random.default_rng(0).normal(size=(3, 4, 32)))
    for vectors in (head.vision(tokens), head.text(tokens)):
        close(jnp.linalg.norm(vectors, axis=-1), jnp.ones(3))
    assert float(head.temperature()) == pytest.approx(0.07)
    hot = build(heads.ContrastiveConfig(width=32, space=8, temperature=9.0))
    assert float(hot.temperature()) == 0.5


def test_heads_read_the_first_token_alone():
    head = build(heads.ClassifierConfig(width=32, classes=5))
    tokens = jnp.ones((2, 4, 32))
    close(head(tokens), head(tokens.at[:, 1:].set(7.0)), atol=0)
    assert head(tokens).shape == (2, 5)


def test_a_connector_changes_the_width():
    assert build(replace(connector.tiny(), width=48))(jnp.ones((1, 3, 32))).shape == (1, 3, 48)


# the catalogue


@pytest.mark.parametrize("name", modules.MODULES)
def test_every_module_of_the_catalogue_has_a_config_that_builds(name):
    config = modules.find(name)
    assert hasattr(config, "build")
    for make in modules.sizes(name).values():
        made = make()
        assert isinstance(made, config) and isinstance(made, Config)
        assert Network({name: made}).shapes[name]


def test_an_unknown_module_is_refused_with_the_nearest_name():
    with pytest.raises(RecipeError, match='did you mean "universal"'):
        modules.find("univresal")


def test_the_official_sizes_have_the_official_numbers_of_parameters():
    """CLIP ViT-B/16 and ViT-L/14 without the input projection's bias, pooling and text tower."""

    def count(config: Any) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(Network({"module": config}).shapes))

    assert count(vision.base()) == 85_799_424
    assert count(vision.large()) == 303_179_776
