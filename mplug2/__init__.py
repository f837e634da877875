"""mplug2: a zoo of multimodal modules for JAX and the network that composes them (mPLUG-2, arXiv:2302.00402).

The public names below load on first use (PEP 562), so that `import mplug2` alone costs milliseconds and
pulls in neither JAX nor Flax; torch and TensorFlow are never imported.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mplug2 import errors as errors
    from mplug2 import tasks as tasks
    from mplug2.errors import CardError as CardError
    from mplug2.errors import CheckpointError as CheckpointError
    from mplug2.errors import DataError as DataError
    from mplug2.errors import Mplug2Error as Mplug2Error
    from mplug2.errors import RecipeError as RecipeError
    from mplug2.network import Network as Network
    from mplug2.recipe import AdamW as AdamW
    from mplug2.recipe import Objective as Objective
    from mplug2.recipe import OfficialAdamW as OfficialAdamW
    from mplug2.recipe import Recipe as Recipe
    from mplug2.roles import Execution as Execution
    from mplug2.sharding import Mesh as Mesh

__version__ = "0.1.0"

# public name -> the module that defines it; a name that is a module itself stands for its own file
_HOMES = {
    "AdamW": "mplug2.recipe",
    "CardError": "mplug2.errors",
    "CheckpointError": "mplug2.errors",
    "DataError": "mplug2.errors",
    "Execution": "mplug2.roles",
    "Mesh": "mplug2.sharding",
    "Mplug2Error": "mplug2.errors",
    "Network": "mplug2.network",
    "Objective": "mplug2.recipe",
    "OfficialAdamW": "mplug2.recipe",
    "Recipe": "mplug2.recipe",
    "RecipeError": "mplug2.errors",
    "errors": "mplug2.errors",
    "tasks": "mplug2.tasks",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
