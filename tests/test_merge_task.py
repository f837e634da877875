"""What merging is for: a soup of fine-tunes. Slow: three short trainings of the shelf's small modules."""

from dataclasses import replace

import numpy as np
import pytest

from mplug2 import hub
from mplug2.hub import merge, publishing
from mplug2.hub.merge_methods import Soup
from mplug2.network import Network
from mplug2.run import read_run
from mplug2.trained import restore


@pytest.mark.slow
def test_a_soup_of_three_fine_tunes_is_at_least_as_good_as_their_mean(tmp_path):
    """Image questions on handwriting, from the shelf's modules, with a rate at which three seeds part."""
    from mplug2.evaluate import evaluate
    from mplug2.recipes import image_qa
    from mplug2.train import train

    shelf = hub.on_shelf(image_qa.small())
    network = Network(shelf.modules, shelf.execution)

    def score(params: dict) -> float:
        only = ["image_answer"]
        results = evaluate(network, params, shelf, shelf.tokenizer, only=only, limit=400)
        return results.value("image_answer")

    places, scores = [], []
    for seed in (1, 2, 3):
        optimizer = replace(shelf.optimizer, learning_rate=1e-3, warmup=10)
        recipe = replace(shelf, name="tuned", seed=seed, steps=60, optimizer=optimizer)
        run, place = tmp_path / f"run-{seed}", tmp_path / f"cards-{seed}"
        train(recipe, run)
        _, _, params = restore(read_run(run), recipe)
        for module, config in shelf.modules.items():
            publishing.publish(place, f"{module}-{seed}", module, config, params[module])
        places.append(place)
        scores.append(score(params))
    cards = merge.merge(tmp_path / "soup", Soup(), places)
    soup = score({module: hub.load(card)[1] for module, card in cards.items()})
    print(f"fine-tunes {scores}, mean {np.mean(scores):.4f}, soup {soup}")
    assert soup >= np.mean(scores)
