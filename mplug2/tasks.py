"""The tasks: pure functions from a batch to a scalar loss. The keyword-only arguments name the modules a
task composes.

A batch is a flat dict of arrays: `clips` float `B T H W C` (an image is a clip of one frame), texts as ids
`B S` that begin with the first special token and end in padding (0), `label` `B`. Where only part of a text
is to be learned, a field `<text>_target` holds it, 0 elsewhere. With a `key`, modules drop out; without,
they do not.

A batch may be computed in parts (mplug2.accumulation). A task whose loss is a mean over examples need not
know; one whose loss is any other takes `everywhere` what it joins of several examples.

Objectives as in the mPLUG family's released code (ALBEF, mPLUG, mPLUG-2): caption and answer exactly
mPLUG-2's.
"""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange

from mplug2 import accumulation
from mplug2.accumulation import everywhere, own
from mplug2.errors import RecipeError
from mplug2.losses import contrastive_loss, cross_entropy, mean_of_words, predicted_losses
from mplug2.roles import (
    Array,
    Connector,
    Contrastive,
    Decoder,
    Fusion,
    Head,
    Temporal,
    Text,
    Universal,
    Unmasker,
    Vision,
    padding_mask,
    split_key,
    sum_dtype,
)
from mplug2.routes import fused_memory, read, see

Batch = Mapping[str, Array]


def classify_text(
    batch: Batch, key: Array | None = None, *, text: Text, universal: Universal, text_classifier: Head
) -> Array:
    """`text`, `label` -> cross-entropy."""
    route_key, head_key = split_key(key, 2)
    logits = text_classifier(read(batch["text"], text=text, universal=universal, key=route_key), key=head_key)
    return cross_entropy(logits, batch["label"]).mean()


def classify_vision(
    batch: Batch,
    key: Array | None = None,
    *,
    vision: Vision,
    universal: Universal,
    vision_classifier: Head,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips`, `label` -> cross-entropy."""
    route_key, head_key = split_key(key, 2)
    seen = see(
        batch["clips"],
        vision=vision,
        universal=universal,
        temporal=temporal,
        connector=connector,
        key=route_key,
    )
    return cross_entropy(vision_classifier(seen, key=head_key), batch["label"]).mean()


def caption(
    batch: Batch,
    key: Array | None = None,
    *,
    vision: Vision,
    universal: Universal,
    decoder: Decoder,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips`, `caption` -> mean negative log-likelihood of a caption's words."""
    route_key, decoder_key = split_key(key, 2)
    seen = see(
        batch["clips"],
        vision=vision,
        universal=universal,
        temporal=temporal,
        connector=connector,
        key=route_key,
    )
    words = decoder.tokens(batch["caption"][:, :-1], seen, key=decoder_key)
    targets = batch.get("caption_target", batch["caption"])[:, 1:]
    return mean_of_words(*predicted_losses(words, decoder.predict, targets))


def answer(
    batch: Batch,
    key: Array | None = None,
    *,
    vision: Vision,
    text: Text,
    universal: Universal,
    fusion: Fusion,
    decoder: Decoder,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips`, `question`, `answer` [, `answer_weight` `B`] -> an answer's negative log-likelihood, summed
    over its words, weighted, averaged over the batch."""
    see_key, read_key, fusion_key, decoder_key = split_key(key, 4)
    seen = see(
        batch["clips"],
        vision=vision,
        universal=universal,
        temporal=temporal,
        connector=connector,
        key=see_key,
    )
    tokens = read(batch["question"], text=text, universal=universal, key=read_key)
    memory, mask = fused_memory(seen, tokens, batch["question"], fusion=fusion, key=fusion_key)
    words = decoder.tokens(batch["answer"][:, :-1], memory, mask, key=decoder_key)
    targets = batch.get("answer_target", batch["answer"])[:, 1:]
    losses, _ = predicted_losses(words, decoder.predict, targets)
    return (losses.sum(-1) * batch.get("answer_weight", jnp.ones(losses.shape[0]))).mean()


def contrast(
    batch: Batch,
    key: Array | None = None,
    *,
    vision: Vision,
    text: Text,
    universal: Universal,
    contrastive: Contrastive,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips`, `text` [, `fits`] -> symmetric InfoNCE over the whole batch; all texts that hold of a clip are
    its positives (`_fits`). Raises RecipeError for a batch of one."""
    see_key, read_key = split_key(key, 2)
    seen = see(
        batch["clips"],
        vision=vision,
        universal=universal,
        temporal=temporal,
        connector=connector,
        key=see_key,
    )
    tokens = read(batch["text"], text=text, universal=universal, key=read_key)
    _with_others(batch["text"])
    similarity = contrastive.similarity(everywhere(seen[:, :1]), everywhere(tokens[:, :1]))
    return contrastive_loss(similarity, _fits(batch))


def match(
    batch: Batch,
    key: Array | None = None,
    *,
    vision: Vision,
    text: Text,
    universal: Universal,
    fusion: Fusion,
    contrastive: Contrastive,
    matching: Head,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`clips`, `text` [, `fits`] -> cross-entropy of "they belong together" over B true pairs and up to 2 B
    hard false ones.

    The false partners are drawn from the whole batch by contrastive similarity, never a text that holds of
    the clip (`_fits`); without a key, the most similar. What has no false partner in its batch does not
    count. Raises RecipeError for a batch of one.
    """
    see_key, read_key, fusion_key, head_key, text_key, vision_key = split_key(key, 6)
    see_clips = partial(
        see, vision=vision, universal=universal, temporal=temporal, connector=connector, key=see_key
    )
    read_text = partial(read, text=text, universal=universal, key=read_key)
    ids = batch["text"]
    seen, tokens = see_clips(batch["clips"]), read_text(ids)
    _with_others(ids)
    similarity = contrastive.similarity(everywhere(seen[:, :1]), everywhere(tokens[:, :1]))
    fits = _fits(batch)
    similarity = jnp.where(fits, -jnp.inf, jax.lax.stop_gradient(similarity))
    false_text, false_clip = _draw(own(similarity), text_key), _draw(own(similarity.T), vision_key)
    false_ids = everywhere(ids)[false_text]
    if accumulation.divided():  # a false partner may be of another part: it is seen, or read, once more
        false_tokens, false_seen = read_text(false_ids), see_clips(everywhere(batch["clips"])[false_clip])
    else:
        false_tokens, false_seen = _taken(tokens, false_text), _taken(seen, false_clip)
    all_ids = jnp.concatenate([ids, false_ids, ids])
    _, together = fusion(
        jnp.concatenate([seen, seen, false_seen]),
        jnp.concatenate([tokens, false_tokens, tokens]),
        padding_mask(all_ids),
        key=fusion_key,
    )
    labels = (jnp.arange(len(all_ids)) < len(ids)).astype(jnp.int32)
    losses = cross_entropy(matching(together, key=head_key), labels)
    # Where every text of the batch holds of a clip, what was drawn is no false one; so with a text's clips.
    no_text, no_clip = fits.all(1), fits.all(0)
    counted = 1.0 - jnp.stack([no_text & no_clip, no_text, no_clip], 1)  # of the whole batch, by example
    share = jnp.maximum(counted.sum() * len(ids) / len(fits), 1.0)
    return (rearrange(losses, "(kind b) -> b kind", kind=3) * own(counted)).sum() / share


def unmask(
    batch: Batch,
    key: Array | None = None,
    *,
    text: Text,
    universal: Universal,
    unmasker: Unmasker,
    vision: Vision | None = None,
    fusion: Fusion | None = None,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """`masked`, `masked_target` [, `clips`: then the words are also looked up in the picture] -> mean over
    hidden words."""
    see_key, read_key, fusion_key = split_key(key, 3)
    ids = batch["masked"]
    tokens = read(ids, text=text, universal=universal, key=read_key)
    if "clips" in batch and vision is not None and fusion is not None:
        seen = see(
            batch["clips"],
            vision=vision,
            universal=universal,
            temporal=temporal,
            connector=connector,
            key=see_key,
        )
        _, tokens = fusion(seen, tokens, padding_mask(ids), key=fusion_key)
    targets = batch["masked_target"]
    return mean_of_words(*predicted_losses(tokens, lambda part: unmasker(part, text.words), targets))


def complete(
    batch: Batch,
    key: Array | None = None,
    *,
    text: Text,
    universal: Universal,
    decoder: Decoder,
    vision: Vision | None = None,
    fusion: Fusion | None = None,
    temporal: Temporal | None = None,
    connector: Connector | None = None,
) -> Array:
    """Prefix language model: `text` is read [, with `clips`: while looking at them], `target` is its
    continuation -> mean negative log-likelihood of the target's words."""
    see_key, read_key, fusion_key, decoder_key = split_key(key, 4)
    ids = batch["text"]
    memory, mask = read(ids, text=text, universal=universal, key=read_key), padding_mask(ids)
    if "clips" in batch and vision is not None and fusion is not None:
        seen = see(
            batch["clips"],
            vision=vision,
            universal=universal,
            temporal=temporal,
            connector=connector,
            key=see_key,
        )
        memory, mask = fused_memory(seen, memory, ids, fusion=fusion, key=fusion_key)
    words = decoder.tokens(batch["target"][:, :-1], memory, mask, key=decoder_key)
    return mean_of_words(*predicted_losses(words, decoder.predict, batch["target"][:, 1:]))


def _fits(batch: Batch) -> Array:
    """Which texts of the whole batch hold of which clips: bool `B B`, row = clip, column = text. A clip's own
    text does, one equal to it, and, where the batch has `fits` (mplug2.data.stream), any that it names."""
    same = _same(everywhere(batch["text"]))
    if "fits" not in batch:
        return same
    fits = everywhere(batch["fits"])
    return same | (fits[:, None] == fits[None, :, :1]).any(-1)


def _same(ids: Array) -> Array:
    """Which texts are equal: ids `B S` -> bool `B B`."""
    return (ids[:, None] == ids[None]).all(-1)


def _with_others(ids: Array) -> None:
    if len(everywhere(ids)) < 2:
        raise RecipeError(
            "its task learns from what tells an example from the others of its batch, and a batch of 1 has "
            "no others: expected at least 2 (objectives.NAME.batch)"
        )


def _taken(tokens: Array, index: Array) -> Array:
    """Tokens `B ...` of the examples of that index, `B`. Gradients of one that is taken many times are summed
    in float32."""
    return tokens.astype(sum_dtype(tokens))[index].astype(tokens.dtype)


def _draw(similarity: Array, key: Array | None) -> Array:
    """One column of each row, `B B -> B`; by softmax with a key, the largest without."""
    return similarity.argmax(-1) if key is None else jax.random.categorical(key, similarity)
