"""Prompt tokens stand before a module's own wherever it reads tokens, and are neither merged nor added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import compiled, fresh

from mplug2 import adapt
from mplug2.data.pixels import Preprocessing
from mplug2.errors import RecipeError
from mplug2.inference import Compiled
from mplug2.modules import connector, decoder, delta, fusion, universal, vision
from mplug2.modules.forms import BitFit, Bottleneck, Lora
from mplug2.modules.prompt import Prompt
from mplug2.network import Network
from mplug2.recipes.world import TINY

rng = np.random.default_rng(0)
TOKENS, MEMORY = rng.normal(size=(2, 2, 5, 32)).astype(np.float32)
MASK = np.array([[True] * 5, [True] * 3 + [False] * 2])
LONG = np.pad(MASK, ((0, 0), (3, 0)), constant_values=True)
OURS = rng.normal(size=(3, 32)).astype(np.float32)
BEFORE = np.concatenate([np.broadcast_to(OURS, (2, 3, 32)), TOKENS], axis=1)
CONFIGS = {"universal": universal.tiny(), "fusion": fusion.tiny(), "decoder": decoder.tiny()}


def prompted(module: str):
    """The network with a prompt beside it, its parameters, and the bare network's."""
    config = CONFIGS[module]
    network = Network({module: config, f"{module}_delta": Prompt(length=3).delta(config)})
    bare = fresh({module: config})
    return network, bare | {f"{module}_delta": {"prompt": OURS}}, bare


@pytest.mark.parametrize(
    ("module", "ask", "by_hand"),
    [
        ("universal", lambda m: m.text(TOKENS, MASK), lambda m: m.text(BEFORE, LONG)[:, 3:]),
        ("universal", lambda m: m.vision(TOKENS), lambda m: m.vision(BEFORE)[:, 3:]),
        ("fusion", lambda m: m(MEMORY, TOKENS, MASK)[1], lambda m: m(MEMORY, BEFORE, LONG)[1][:, 3:]),
        (
            "decoder",
            lambda m: m(np.ones((2, 4), np.int32), TOKENS, MASK),
            lambda m: m(np.ones((2, 4), np.int32), BEFORE, LONG),
        ),
    ],
)
def test_a_prompt_is_read_before_a_modules_own_tokens_and_taken_off_again(module, ask, by_hand):
    network, params, bare = prompted(module)
    applied = compiled(lambda params: ask(network.bind(params)[module]))(params)
    expected = compiled(lambda params: by_hand(network.bind(params)[module]))(bare)
    without = compiled(lambda params: ask(network.bind(params)[module]))(bare)
    np.testing.assert_allclose(applied, expected, atol=1e-5)
    assert applied.shape == without.shape and np.abs(applied - without).max() > 0.01


def test_a_decoder_reads_its_prompt_with_a_cache_as_without():
    network, params, _ = prompted("decoder")
    ids = np.array([[2, 7, 9], [2, 5, 4]], np.int32)

    def both(params):
        module = network.bind(params)["decoder"]
        cache, steps = module.start(TOKENS, MASK, rows=1, length=3), []
        for at in range(3):
            logits, cache = module.step(jnp.asarray(ids[:, at : at + 1]), jnp.int32(at), cache)
            steps.append(logits[:, 0])
        return module(ids, TOKENS, MASK), jnp.stack(steps, 1)

    whole, stepped = compiled(both)(params)
    np.testing.assert_allclose(whole, stepped, atol=1e-4)


def outputs(batch, *, universal):
    return universal.vision(batch["tokens"])


def test_requests_switch_between_prompts_and_none():
    network, params, bare = prompted("universal")
    plain = Compiled(Network({"universal": CONFIGS["universal"]}), bare, Preprocessing())
    mine = plain.on(network, params)
    batch = {"tokens": TOKENS}
    before = plain(outputs)(batch)
    assert np.abs(mine(outputs)(batch) - before).max() > 0.01
    np.testing.assert_array_equal(plain(outputs)(batch), before)
    again = mine.on(Network({"universal": CONFIGS["universal"]}), bare)
    np.testing.assert_array_equal(again(outputs)(batch), before)


def test_the_gradient_reaches_the_prompt():
    network, params, _ = prompted("universal")
    loss = compiled(jax.grad(lambda own: (network.bind(params | own)["universal"].vision(TOKENS) ** 2).sum()))
    assert np.abs(loss({"universal_delta": params["universal_delta"]})["universal_delta"]["prompt"]).min() > 0


def test_what_a_prompt_cannot_do_is_refused_with_the_reason():
    network, params, _ = prompted("universal")
    with pytest.raises(RecipeError, match="no parameter of the base can say them: it cannot be merged"):
        adapt.merge(network, params)
    own = network.configs["universal_delta"], params["universal_delta"]
    with pytest.raises(RecipeError, match="attention is not linear in the tokens"):
        adapt.average([own, own])
    with pytest.raises(RecipeError, match="length is 0, expected at least 1"):
        Prompt(length=0)
    kept = adapt.without(network, params)[1]["universal"]
    assert kept is params["universal"]


# --- every module kind

MLPS = ("vision", "temporal", "text", "universal", "fusion", "decoder")
KINDS = dict(TINY.modules) | {"connector": connector.tiny()}


@pytest.mark.parametrize("module", KINDS)
def test_every_module_takes_a_form_or_is_refused_in_a_sentence(module):
    config, taken = KINDS[module], set()
    for form in (Lora(rank=1), BitFit(), Bottleneck(width=2), Prompt(length=2)):
        try:
            network = Network({module: config, f"{module}_delta": form.delta(config)})
        except RecipeError as error:
            assert "\n" not in str(error)
            continue
        taken.add(type(form))
        if form.merges and (not isinstance(form, Bottleneck) or hasattr(config, "hidden")):
            shapes = jax.eval_shape(network.adapted, network.shapes)[module]
            merged = Network({module: form.merged(config)})
            assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, merged.shapes[module])
    expected = {Lora, BitFit}
    expected |= {Bottleneck} if module in MLPS else set()
    expected |= {Prompt} if module in CONFIGS else set()
    assert taken == expected


def test_a_config_that_takes_no_such_delta_is_refused_where_it_is_made():
    with pytest.raises(RecipeError, match="vision.Config is given no tokens .* universal, fusion, decoder"):
        delta.Config(of=vision.tiny(), form=Prompt())
    with pytest.raises(RecipeError, match="vision.Config does not say how many hidden units it has"):
        _ = Bottleneck().delta(vision.tiny()).merged
