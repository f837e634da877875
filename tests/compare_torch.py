"""A train step and greedy captions beside PyTorch, on the same parameters and batch, in one run:

    python tests/compare_torch.py [--size base] [--dtype float32] [--unroll] [--no-compile] [--json]

Ours is the very step of training. Theirs is the twin (torch_twin.py): SDPA, a fused AdamW, compiled by
`torch.compile`, and autocast where the type is bfloat16; on a GPU where both have one. It prints medians, the
spread, FLOP/s, tokens/s and the ratio. Needs PyTorch (the extra `compare`), and g++ to compile.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch_twin import Twin

from mplug2 import AdamW, Execution, Objective, modules, tasks
from mplug2.benchmark import threads
from mplug2.data.pixels import Preprocessing
from mplug2.flops import step_flops
from mplug2.generate import Greedy, decode
from mplug2.network import Network, Parameters
from mplug2.roles import PAD, Array
from mplug2.routes import see
from mplug2.step import Trainer
from mplug2.tools.bench import official_work

Batch = Mapping[str, np.ndarray]
NAMES = ("vision", "temporal", "universal", "decoder")
BEGIN, END = 101, 102
SIDES = ("ours", "theirs")
RATE, DECAY = 1e-3, 0.02


def work(configs: Mapping[str, Any], *, batch: int, frames: int, words: int) -> Batch:
    """Clips of noise and captions of which `words` words are learned."""
    random = np.random.default_rng(0)
    shape = (batch, frames, *configs["vision"].image, 3)
    ids = random.integers(1, configs["decoder"].vocabulary, (batch, words + 1), np.int32)
    return {"clips": random.integers(0, 256, shape, np.uint8), "caption": ids}


class Ours:
    """The zoo's step and captions."""

    def __init__(self, network: Network, params: Parameters, batch: Batch, *, dropout: bool):
        count, frames, height, width = batch["clips"].shape[:4]
        recipe = replace(
            official_work(),
            modules=network.configs,
            objectives={"caption": Objective(task=tasks.caption, data=None, batch=count)},
            preprocessing=Preprocessing(height=height, width=width, frames=frames),
            optimizer=AdamW(learning_rate=RATE, weight_decay=DECAY, warmup=1, final=1.0, clip=0.0),
            execution=network.execution,
            dropout=dropout,
            log_every=1,
        )
        self.network, self.trainer = network, Trainer(recipe, network)
        self.state = self.trainer.begin(params)
        self.batches = jax.tree.map(self.trainer.place_batch, {"caption": dict(batch)})
        self.flops = step_flops(recipe, jax.eval_shape(lambda: self.batches))

    def step(self) -> float:
        """The loss that the step began with."""
        self.state, metrics = self.trainer.step(self.state, {}, self.batches)
        return float(metrics["metrics"]["loss"])

    def captions(self, length: int) -> np.ndarray:
        """Ids `B length`, none of them special."""
        return np.asarray(self._generate(self.state["params"], length))

    @functools.partial(jax.jit, static_argnums=(0, 2))
    def _generate(self, params: Parameters, length: int) -> Array:
        clips = self.trainer.recipe.preprocessing.to_float(self.batches["caption"]["clips"])
        parts = self.network.bind(params)
        seen = see(clips, **{name: parts[name] for name in ("vision", "temporal", "universal")})
        search = Greedy(length=length, least=length)
        return decode(parts["decoder"], seen, None, search, begin=BEGIN, end=END).ids[:, 0, 1:]


class Theirs:
    """The twin's. `compiled`: by torch.compile."""

    def __init__(
        self, network: Network, params: Parameters, batch: Batch, *, dropout: bool, compiled: bool = False
    ):
        size = Preprocessing()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.twin = Twin(network.configs)
        self.twin.load(params)
        self.twin.to(self.device).train(dropout)
        self.dropout, self.dtype = dropout, getattr(torch, network.execution.dtype)
        self.optimizer = self.twin.optimizer(RATE, DECAY)
        self.loss = torch.compile(self.twin) if compiled else self.twin
        self.clips = torch.from_numpy(np.array(size.to_float(jnp.asarray(batch["clips"])))).to(self.device)
        self.ids = torch.from_numpy(batch["caption"].astype(np.int64)).to(self.device)

    def _exactness(self) -> torch.autocast:
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def step(self) -> float:
        """The loss that the step began with."""
        with self._exactness():
            loss = self.loss(self.clips, self.ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def captions(self, length: int) -> np.ndarray:
        self.twin.eval()
        with torch.inference_mode(), self._exactness():
            memory = self.twin.see(self.clips)
            ids = self.twin.decoder.greedy(memory, length, BEGIN, never=(PAD, BEGIN, END))
        self.twin.train(self.dropout)
        return ids.cpu().numpy()


def timed(go: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of each repeat, after one that is not counted."""
    go()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        go()
        seconds.append(time.perf_counter() - began)
    return seconds


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=("base", "large"), default="base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--words", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="timed ones of each side in a round")
    parser.add_argument("--rounds", type=int, default=2, help="a round is a process of each side, in turns")
    parser.add_argument("--no-compile", action="store_true", help="PyTorch as it runs eagerly")
    parser.add_argument("--remat", default="dots", help="our execution.remat (default: dots)")
    parser.add_argument("--attention", default="written", help="our execution.attention (cudnn on GPUs)")
    parser.add_argument("--unroll", action="store_true", help="our execution.scan=false")
    parser.add_argument("--side", choices=SIDES, help="time this one alone")
    parser.add_argument("--json", action="store_true")
    return parser


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process."""
    configs = {name: modules.sizes(name)[asked.size]() for name in NAMES}
    execution = Execution(
        dtype=asked.dtype, remat=asked.remat, scan=not asked.unroll, attention=asked.attention
    )
    network = Network(configs, execution)
    params = jax.jit(network.init, static_argnums=0)(0)
    batch = work(configs, batch=asked.batch, frames=asked.frames, words=asked.words)
    torch.set_num_threads(threads())
    if asked.side == "ours":
        side = Ours(network, params, batch, dropout=True)
        flops, device = side.flops, jax.devices()[0].device_kind
    else:
        side = Theirs(network, params, batch, dropout=True, compiled=not asked.no_compile)
        flops, device = 0.0, side.device
    del params
    seconds = timed(side.step, asked.steps)
    texts = timed(functools.partial(side.captions, asked.words), asked.steps)
    return {"device": device, "flops": flops, "step": seconds, "captions": texts}


def main() -> int:
    asked = options().parse_args()
    if asked.side:
        print(json.dumps(measure(asked)))
        return 0
    # A process of its own for each side: neither's threads or memory get in the other's way.
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(asked.rounds):
        for side in SIDES:
            command = [sys.executable, *sys.argv, "--side", side]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rounds[side].append(json.loads(done.stdout.splitlines()[-1]))
    found = {
        "asked": vars(asked),
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "devices": [rounds[side][0]["device"] for side in SIDES],
        "gflop_a_step": rounds["ours"][0]["flops"] / 1e9,
        **{
            what: {side: [it for one in rounds[side] for it in one[what]] for side in SIDES}
            for what in ("step", "captions")
        },
    }
    print(json.dumps(found)) if asked.json else show(found)
    return 0


def show(found: Mapping[str, Any]) -> None:
    asked = found["asked"]
    print(
        f"{asked['size']}, {asked['dtype']}, batch {asked['batch']}, {found['devices']}, {found['versions']}"
    )
    tokens = asked["batch"] * asked["words"]
    for what, amount, unit in (("step", found["gflop_a_step"], "GFLOP/s"), ("captions", tokens, "tokens/s")):
        for side, seconds in found[what].items():
            middle = statistics.median(seconds)
            spread = f"{min(seconds):.3f} to {max(seconds):.3f} s"
            print(f"{what:<9} {side:<7} median {middle:.3f} s ({spread}), {amount / middle:.1f} {unit}")
        ours, theirs = (statistics.median(found[what][side]) for side in SIDES)
        print(f"{what:<9} theirs takes {theirs / ours:.2f} times as long as ours")


if __name__ == "__main__":
    sys.exit(main())
