"""How often a network writes exactly what is true, on data made for a test."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mplug2.generate import Greedy
from mplug2.inference import Compiled, Inference, answers, captions
from mplug2.network import Network
from mplug2.recipe import Recipe

OUTPUTS: Mapping[str, Callable[..., Any]] = {"answer": answers, "caption": captions}
EXAMPLES = 600


def scored(
    recipe: Recipe, network: Network, params: Any, data: Any, field: str = "answer", length: int = 16
) -> tuple[float, list[str]]:
    """(exact match, what was said) of the `field` of EXAMPLES examples of the test split."""
    compiled = Compiled(network, params, recipe.preprocessing)
    inference = Inference(compiled=compiled, recipe=recipe, tokenizer=recipe.tokenizer, limit=EXAMPLES)
    lengths = {"question": 16} if field == "answer" else {}
    examples, ids = inference.over(
        data, lengths, 100, OUTPUTS[field], inference.writer(Greedy(length=length))
    )
    said = inference.texts(ids)
    return float(np.mean([text == one[field] for text, one in zip(said, examples, strict=True)])), said
