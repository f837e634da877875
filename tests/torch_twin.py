"""A PyTorch twin of vision, temporal, universal and decoder: the same mathematics on the same parameters, as
one writes it for speed there (SDPA, one fused AdamW; `torch.compile` takes it whole).

It is here to be compared with (test_torch_twin.py, compare_torch.py); the zoo needs no PyTorch. Names of
parts are those of the zoo's modules, which is how `Twin.load` finds their parameters.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

from mplug2.network import flat

KeysValues = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """`B N D` over itself or a context `B M D`; mask, True = may look."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.heads, self.dropout = heads, dropout

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def memory(self, context: Tensor) -> KeysValues:
        return self.split(self.key(context)), self.split(self.value(context))

    def attend(self, x: Tensor, memory: KeysValues, *, causal: bool = False) -> Tensor:
        rate = self.dropout if self.training else 0.0
        query = self.split(self.query(x))
        mixed = F.scaled_dot_product_attention(query, *memory, dropout_p=rate, is_causal=causal)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, context: Tensor | None = None, *, causal: bool = False) -> Tensor:
        return self.attend(x, self.memory(x if context is None else context), causal=causal)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Any):
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(width, hidden), nn.Linear(hidden, width), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class LocalTemporal(nn.Module):
    """Patches `B T N D` -> what to add to them."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, 1e-5)
        self.down, self.up = nn.Linear(width, width // 2), nn.Linear(width // 2, width)
        self.kernel, self.bias = (
            nn.Parameter(torch.zeros(3, width // 2)),
            nn.Parameter(torch.zeros(width // 2)),
        )

    def forward(self, patches: Tensor) -> Tensor:
        hidden = self.down(self.norm(patches))
        frames, padded = hidden.shape[1], F.pad(hidden, (0, 0, 0, 0, 1, 1))
        kernel = self.kernel.to(hidden.dtype)
        mixed = sum(kernel[i] * padded[:, i : i + frames] for i in range(3))
        return self.up(quick_gelu(mixed + self.bias.to(hidden.dtype)))


class Block(nn.Module):
    """`B T 1+N D`, with the temporal branches of a video."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width, 1e-5), nn.LayerNorm(width, 1e-5)
        self.attention, self.mlp = Attention(width, heads), MLP(width, 4 * width, quick_gelu)

    def forward(self, x: Tensor, before_attention: nn.Module, before_mlp: nn.Module) -> Tensor:
        x = _added(x, before_attention(x[:, :, 1:]))
        x = x + self.attention(self.attention_norm(x).flatten(0, 1)).unflatten(0, x.shape[:2])
        x = _added(x, before_mlp(x[:, :, 1:]))
        return x + self.mlp(self.mlp_norm(x))


def _added(x: Tensor, patches: Tensor) -> Tensor:
    return torch.cat([x[:, :, :1], x[:, :, 1:] + patches], 2)


class Stack(nn.Module):
    """Equal layers, which the zoo stores stacked."""

    layers: Any  # nn.ModuleList, whose items PyTorch says nothing of

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)


class PostNormLayer(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        width, rate = config.width, config.dropout
        self.attention, self.cross = (Attention(width, config.heads, rate) for _ in range(2))
        self.attention_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width, 1e-12) for _ in range(3))
        self.mlp, self.dropout = MLP(width, config.hidden, F.gelu), nn.Dropout(rate)

    def forward(self, x: Tensor, context: Tensor, *, causal: bool = False) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, causal=causal)))
        x = self.cross_norm(x + self.dropout(self.cross(x, context)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))

    def step(self, x: Tensor, past: KeysValues, place: int, context: KeysValues) -> Tensor:
        """One token a row, `B 1 D`; its key and value are written to `past`."""
        for whole, new in zip(past, self.attention.memory(x), strict=True):
            whole[:, :, place : place + 1] = new
        seen = (past[0][:, :, : place + 1], past[1][:, :, : place + 1])
        x = self.attention_norm(x + self.attention.attend(x, seen))
        x = self.cross_norm(x + self.cross.attend(x, context))
        return self.mlp_norm(x + self.mlp(x))


class Vision(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.patch = config.stem.patch
        places = 1 + config.grid[0] * config.grid[1]
        self.stem = nn.Linear(3 * self.patch**2, config.width, bias=False)
        self.class_token = nn.Parameter(torch.zeros(config.width))
        self.positions = nn.Parameter(torch.zeros(places, config.width))
        self.input_norm, self.output_norm = (nn.LayerNorm(config.width, 1e-5) for _ in range(2))
        self.blocks = Stack([Block(config.width, config.heads) for _ in range(config.depth)])

    def forward(self, clips: Tensor, temporal: "Temporal") -> Tensor:
        patches = clips.unflatten(3, (-1, self.patch)).unflatten(2, (-1, self.patch))  # b t h p w q c
        x = self.stem(patches.transpose(3, 4).flatten(4).flatten(2, 3))
        first = self.class_token.to(x.dtype).expand(*x.shape[:2], 1, -1)
        x = self.input_norm(torch.cat([first, x], 2) + self.positions.to(x.dtype))
        for block, branches in zip(self.blocks.layers, temporal.branches.layers, strict=True):
            x = block(x, branches.before_attention, branches.before_mlp)
        return self.output_norm(torch.cat([x[:, :, :1].mean(1), x[:, :, 1:].flatten(1, 2)], 1))


class Branches(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.before_attention, self.before_mlp = LocalTemporal(width), LocalTemporal(width)


class Temporal(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.branches = Stack([Branches(config.width) for _ in range(config.depth)])


class Universal(nn.Module):
    """What vision takes through it."""

    def __init__(self, config: Any):
        super().__init__()
        self.layers = Stack([PostNormLayer(config) for _ in range(config.depth)])
        self.latents = nn.Parameter(torch.zeros(config.latents, config.width))
        self.vision_norm = nn.LayerNorm(config.width, 1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        *gather, read = self.layers.layers
        latents = self.latents.to(tokens.dtype).expand(len(tokens), -1, -1)
        for layer in gather:
            latents = layer(latents, tokens)
        return self.dropout(self.vision_norm(tokens + read(tokens, latents)))


class Embedding(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.words = nn.Parameter(torch.zeros(config.vocabulary, config.width))
        self.positions = nn.Parameter(torch.zeros(config.positions, config.width))
        self.types = nn.Parameter(torch.zeros(2, config.width))
        self.norm, self.dropout = nn.LayerNorm(config.width, 1e-12), nn.Dropout(config.dropout)

    def forward(self, ids: Tensor, place: int = 0) -> Tensor:
        positions = self.positions[place : place + ids.shape[1]]
        return self.dropout(self.norm(F.embedding(ids, self.words) + positions + self.types[0]))


class Predictor(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.transform = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, 1e-12)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))

    def forward(self, tokens: Tensor, words: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.transform(tokens))), words, self.bias)


class Decoder(nn.Module):
    """Texts without padding."""

    def __init__(self, config: Any):
        super().__init__()
        self.embedding, self.predictor = Embedding(config), Predictor(config)
        self.layers = Stack([PostNormLayer(config) for _ in range(config.depth)])
        self.heads = config.heads

    def forward(self, ids: Tensor, memory: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers.layers:
            x = layer(x, memory, causal=True)
        return self.predictor(x, self.embedding.words)

    @torch.inference_mode()
    def greedy(self, memory: Tensor, length: int, begin: int, never: tuple[int, ...]) -> Tensor:
        """Exactly `length` ids after `begin`, none of `never`, `B length`, with a cache of keys and
        values."""
        ids = torch.full((len(memory), 1), begin, device=memory.device)
        context = [layer.cross.memory(memory) for layer in self.layers.layers]
        room = (len(memory), self.heads, length, memory.shape[2] // self.heads)
        past = [(memory.new_empty(room), memory.new_empty(room)) for _ in context]
        for place in range(length):
            x = self.embedding(ids[:, -1:], place)
            for layer, seen, own in zip(self.layers.layers, context, past, strict=True):
                x = layer.step(x, own, place, seen)
            logits = self.predictor(x, self.embedding.words)
            logits[..., never] = -torch.inf
            ids = torch.cat([ids, logits.argmax(-1)], 1)
        return ids[:, 1:]


class Twin(nn.Module):
    """The video captioner of these configs."""

    def __init__(self, configs: Mapping[str, Any]):
        super().__init__()
        self.vision, self.temporal = Vision(configs["vision"]), Temporal(configs["temporal"])
        self.universal, self.decoder = Universal(configs["universal"]), Decoder(configs["decoder"])

    def see(self, clips: Tensor) -> Tensor:
        return self.universal(self.vision(clips, self.temporal))

    def forward(self, clips: Tensor, caption: Tensor) -> Tensor:
        """Normalised clips `B T H W C`, ids `B S` -> the mean loss of their words."""
        logits = self.decoder(caption[:, :-1], self.see(clips))
        return F.cross_entropy(logits.float().flatten(0, 1), caption[:, 1:].flatten())

    @torch.no_grad()
    def load(self, params: Mapping[str, Any]) -> None:
        """The zoo's parameters, by name: all of them, and nothing else."""
        arrays, used = flat(params), set()
        for name, parameter in self.named_parameters():
            *path, last = (part for part in name.split(".") if not part.isdigit())
            owner = self.get_submodule(name.rpartition(".")[0])
            if last == "weight":
                last = "scale" if isinstance(owner, nn.LayerNorm) else "kernel"
            used.add(ours := ".".join([*path, last]))
            layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
            array = np.array(arrays[ours] if layer is None else arrays[ours][layer])
            parameter.copy_(torch.from_numpy(array.T if isinstance(owner, nn.Linear) else array))
        assert used == set(arrays), used ^ set(arrays)

    def optimizer(self, learning_rate: float, decay: float) -> torch.optim.Optimizer:
        """AdamW in one fused kernel; kernels and word tables decay."""
        named = dict(self.named_parameters())
        tables = ("positions", "types", "latents")
        decays = {name: p.ndim >= 2 and name.rpartition(".")[2] not in tables for name, p in named.items()}
        groups = [
            {"params": [p for name, p in named.items() if decays[name] == yes], "weight_decay": decay * yes}
            for yes in (True, False)
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
