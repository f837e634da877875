"""`mplug2 train RECIPE [field=value ...]`: train a recipe, or continue its run."""

from mplug2 import composition, overrides, processes, recipes
from mplug2.arguments import Parser
from mplug2.data.stream import check_data
from mplug2.run import default_folder


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="mplug2 train",
        description="Train a recipe. The same command again continues where the run stopped, exactly.",
        epilog="example: mplug2 train image_caption.tiny steps=200 optimizer.learning_rate=3e-4",
    )
    parser.add_argument(
        "recipe", help='a name such as "pretrain.small" (mplug2 recipes lists them), or file.py:function'
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="a field of the recipe, by dotted path"
    )
    parser.add_argument("--run-dir", help="where the run is kept (default: runs/RECIPE-FINGERPRINT)")
    parser.add_argument("--steps", type=int, help="short for steps=N")
    processes.add_options(parser)
    asked = parser.parse_intermixed_args(argv)
    changes = [*asked.overrides, *([] if asked.steps is None else [f"steps={asked.steps}"])]
    with processes.joined(asked.coordinator, asked.processes, asked.process, asked.patience):
        recipe = overrides.apply(recipes.find(asked.recipe), changes)

        composition.check(recipe)
        check_data(recipe.feeds)

        from mplug2.train import train  # after the recipe is known to be right: it takes seconds to import

        train(recipe, asked.run_dir or default_folder(recipe), source=asked.recipe, overrides=changes)
    return 0
