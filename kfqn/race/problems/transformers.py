"""Small transformers with pre-norm blocks: one over patches of an image, one over characters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 4
BLOCKS = 3


class Attention(nn.Module):
    """Self-attention, its queries, keys and values from one `Linear`; x and the result are (m, t, width)."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(width, 3 * width), nn.Linear(width, width), causal

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (3, m, heads, t, d)
        q, k, v = heads.unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) with GELU and a hidden layer four times as wide."""

    def __init__(self, width: int, *, causal: bool) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, causal=causal))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        out: Tensor = x + self.mlp(x)
        return out


class Positions(nn.Module):
    """A learned vector for every position, added to x, (m, t, width)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight


class VisionTransformer(nn.Module):
    """A transformer over patches of 2×2 pixels (Dosovitskiy et al. 2020), its outputs averaged over them.

    ``x`` is (m, channels, side, side), the result (m, classes). `Linear` and patches as torch initialises.
    """

    def __init__(self, classes: int, channels: int = 3, width: int = 64, side: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, 2, 2)
        self.positions = Positions((side // 2) ** 2, width)
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.positions(self.patches(x).flatten(2).mT)
        output: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return output


class CharacterGPT(nn.Module):
    """A decoder over characters: the logits of the next one at every place.

    ``x`` is (m, t) of characters' numbers, the result (m, t, classes). The head is not tied to the embedding,
    which is normal with deviation 0.02; `Linear` layers are as torch initialises.
    """

    def __init__(self, classes: int, width: int = 96, context: int = 64) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(classes, width), Positions(context, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width, causal=True) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.norm(self.blocks(self.positions(self.embedding(x)))))
        return output
