"""The tasks: pure functions from a batch to a scalar loss. The keyword-only arguments name the modules a
task composes.

A batch is a flat dict of arrays: `clips` float `B T H W C` (an image is a clip of one frame), texts as ids
`B S` that begin with the first special token and end in padding (0), `label` `B`. Where only part of a text
is to be learned, a field `<text>_target` holds it, 0 elsewhere. With a `key`, modules drop out; without,
they do not.

Objectives as in the mPLUG family's released code (ALBEF, mPLUG, mPLUG-2): caption and answer exactly
mPLUG-2's.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

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
    """`clips`, `text` -> symmetric InfoNCE over the batch; equal texts are positives of each other."""
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
    return contrastive_loss(contrastive.similarity(seen, tokens), _same(batch["text"]))


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
    """`clips`, `text` -> cross-entropy of "they belong together" over B true pairs and 2 B hard false ones.

    The false partners are drawn by contrastive similarity, never with an equal text; without a key, the
    most similar.
    """
    see_key, read_key, fusion_key, head_key, text_key, vision_key = split_key(key, 6)
    ids = batch["text"]
    seen = see(
        batch["clips"],
        vision=vision,
        universal=universal,
        temporal=temporal,
        connector=connector,
        key=see_key,
    )
    tokens = read(ids, text=text, universal=universal, key=read_key)
    similarity = jax.lax.stop_gradient(contrastive.similarity(seen, tokens))
    similarity = jnp.where(_same(ids), -jnp.inf, similarity)
    false_text, false_vision = _draw(similarity, text_key), _draw(similarity.T, vision_key)
    all_seen = jnp.concatenate([seen, seen, seen[false_vision]])
    all_tokens = jnp.concatenate([tokens, tokens[false_text], tokens])
    all_ids = jnp.concatenate([ids, ids[false_text], ids])
    _, together = fusion(all_seen, all_tokens, padding_mask(all_ids), key=fusion_key)
    labels = (jnp.arange(len(all_ids)) < len(ids)).astype(jnp.int32)
    return cross_entropy(matching(together, key=head_key), labels).mean()


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


def _same(ids: Array) -> Array:
    """Which texts of a batch are equal: ids `B S` -> bool `B B`."""
    return (ids[:, None] == ids[None]).all(-1)


def _draw(similarity: Array, key: Array | None) -> Array:
    """One column of each row, `B B -> B`; by softmax with a key, the largest without."""
    return similarity.argmax(-1) if key is None else jax.random.categorical(key, similarity)
