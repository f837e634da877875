"""Checkpoints as PyTorch itself writes them: what golden/torch/ holds, and how it was made.

    /path/to/a/venv/with/torch/bin/python tests/torch_files.py

wrote golden/torch/ with torch 2.13.0 (CPU). Only `make` needs torch; `EXPECTED` says in NumPy what must be
read.
"""

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "torch"
BASE = np.arange(48, dtype=np.float32).reshape(6, 8) / 7
WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) / 5

MODULE: dict[str, np.ndarray] = {
    "0.weight": WEIGHT,
    "0.bias": WEIGHT[:, 0],
    "1.weight": np.full(4, 2, np.float32),
    "1.bias": np.zeros(4, np.float32),
}
VIEWS: dict[str, np.ndarray] = {
    "turned": BASE.T,
    "part": BASE[1:4, 2:6],
    "steps": BASE[::2, ::3],
    "expanded": np.broadcast_to(np.arange(3, dtype=np.float32)[:, None], (3, 4)),
    "positions": np.arange(8)[None],
    "parameter": BASE[0],
    "number": BASE[2, 3],
    "nothing": BASE[:0],
    "half": BASE.astype(np.float16),
}
EXPECTED = MODULE | {"tied": WEIGHT} | VIEWS
"""Of state.pth; "brain" (bfloat16) is "half"'s numbers in another type."""


def make(torch: Any, folder: Path) -> None:
    """Writes state.pth (all that a training run saves), scripted.pt (as OpenAI's CLIP is published) and the
    files that are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    module.load_state_dict({name: torch.tensor(array) for name, array in MODULE.items()})
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    base = torch.tensor(BASE)
    state = module.state_dict()
    state |= {
        "tied": state["0.weight"],
        "turned": base.T,
        "part": base[1:4, 2:6],
        "steps": base[::2, ::3],
        "expanded": torch.arange(3.0)[:, None].expand(3, 4),
        "positions": torch.arange(8).expand((1, -1)),
        "parameter": torch.nn.Parameter(base[0].clone()),
        "number": base[2, 3],
        "nothing": base[:0],
        "half": base.half(),
        "brain": base.half().bfloat16(),
    }
    whole = {"model": state, "optimizer": optimizer.state_dict(), "config": {"eos": "[SEP]"}, "epoch": 3}
    torch.save(whole, folder / "state.pth")
    torch.jit.save(torch.jit.script(module), folder / "scripted.pt")


REFUSED: dict[str, tuple[Callable[[Any, Path], None], str]] = {
    "legacy": (
        lambda torch, path: torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        "legacy format of torch < 1.6",
    ),
    "namespace": (
        lambda torch, path: torch.save({"model": {"a": torch.ones(2)}, "args": argparse.Namespace()}, path),
        r"asks for argparse\.Namespace: only tensors .* save the state dict alone",
    ),
    "module": (
        lambda torch, path: torch.save(torch.nn.Linear(2, 2), path),
        r"asks for torch\.nn\.modules\.linear\.Linear",
    ),
    "quantised": (
        lambda torch, path: torch.save({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, path),
        r"asks for torch\._utils\._rebuild_tensor_v3",
    ),
    "sparse": (
        lambda torch, path: torch.save({"a": torch.eye(3).to_sparse()}, path),
        r"asks for torch\._utils\._rebuild_sparse_tensor",
    ),
    "complex": (
        lambda torch, path: torch.save({"a": torch.zeros(2, dtype=torch.complex64)}, path),
        r"asks for torch\.ComplexFloatStorage",
    ),
    "meta": (
        lambda torch, path: torch.save({"a": torch.ones(2, device="meta")}, path),
        r"asks for torch\._utils\._rebuild_meta_tensor_no_storage",
    ),
    "nameless": (lambda torch, path: torch.save(torch.ones(2), path), "holds no tensors by name"),
}
"""Real files that hold something else than named tensors, and why each is refused."""

KEPT = ("legacy", "namespace")
"""Of them, those in golden/torch/."""


if __name__ == "__main__":
    import torch  # pyright: ignore[reportMissingImports]

    assert OrderedDict is type(torch.nn.Linear(1, 1).state_dict())
    make(torch, GOLDEN)
    for name in KEPT:
        REFUSED[name][0](torch, GOLDEN / f"{name}.pth")
