"""One training step and one caption of a released recipe at the large size, with random weights, on a clip
of 16 frames: prints one JSON line with seconds and the peak memory of this process.

    python tests/large_step.py ROOT VOCABULARY
"""

import json
import resource
import sys
import time
from dataclasses import replace

import jax

from mplug2 import recipes
from mplug2.network import Network
from mplug2.overrides import apply
from mplug2.predict import Predictor
from mplug2.recipe import Recipe
from mplug2.step import Trainer
from mplug2.train import data_stream


def peak() -> float:
    """GB, of 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def large(root: str, vocabulary: str) -> Recipe:
    changes = (f"tokenizer.vocabulary={vocabulary}", f"objectives.video_caption.data.root={root}")
    small = ("objectives.video_caption.batch=1", "accumulate=1", "workers=0", "steps=1")
    return replace(apply(recipes.find("msrvtt_caption.large"), (*changes, *small)), modes={}, cards={})


def main(root: str, vocabulary: str) -> None:
    recipe = large(root, vocabulary)
    network = Network(recipe.modules, recipe.execution)
    trainer = Trainer(recipe, network)
    state = trainer.begin(jax.jit(network.init)(recipe.seed))
    batches = jax.tree.map(trainer.place_batch, next(data_stream(recipe)))
    began = time.perf_counter()
    state, metrics = trainer.step(state, {}, batches)
    loss = float(metrics["metrics"]["loss"])
    said = {"loss": loss, "step_s": round(time.perf_counter() - began, 1), "step_peak_gb": round(peak(), 1)}
    params = state["params"]
    del state, metrics  # the moments go with the state
    search = recipe.evaluations["video_caption"].search
    predictor = Predictor(network, params, recipe.tokenizer, recipe.preprocessing, search=search)
    clips = predictor.video(f"{root}/videos/video0.mp4")
    began = time.perf_counter()
    (text,) = predictor.caption(clips)
    said |= {"caption_s": round(time.perf_counter() - began, 1), "peak_gb": round(peak(), 1), "words": text}
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
