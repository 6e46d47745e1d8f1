"""Keys and values kept between the passes of a block (Fast-dLLM, arXiv 2505.22618): approximate, off by default.

Attention looks both ways, so the keys of a position change whenever any token does. Within a block this is ignored
for positions outside: `prefix` computes the block and what follows it, `dual` the block alone, both against the rest
as it stood at the row's last whole pass. Every block begins with a whole pass, `refresh_every` asks for more. Under
block-causal attention with the same blocks, both are exact.

Shapes: A rows of one pass, W positions of the window, S positions computed, G key/value heads, E head width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KeyValueCache:
    """What each of num_rows rows last computed, by layer [num_rows, W, G, E]; changed in place from pass to pass.

    block_B, age_B: the block of a row's last whole pass (-1: none yet), and the passes since.
    """

    kind: str
    refresh_every: int
    num_rows: int
    device: torch.device
    layers: "dict[int, tuple[Tensor, Tensor]]" = field(default_factory=dict)

    def __post_init__(self):
        self.block_B = torch.full((self.num_rows,), -1, device=self.device)
        self.age_B = torch.zeros_like(self.block_B)

    def is_stale(self, row_A: Tensor, block_A: Tensor) -> Tensor:
        """Which rows need a whole pass now; the count of passes goes on."""
        is_old_A = (self.age_B[row_A] + 1 >= self.refresh_every) if self.refresh_every else torch.zeros_like(row_A) > 0
        stale_A = is_old_A | (self.block_B[row_A] != block_A)
        self.block_B[row_A] = block_A
        self.age_B[row_A] = torch.where(stale_A, 0, self.age_B[row_A] + 1)
        return stale_A


@dataclass(frozen=True)
class WholePass:
    """Every position is computed, and kept. What the model sees of the cache (its `cache` argument)."""

    cache: KeyValueCache
    row_A: Tensor
    position_AS: None = None

    def join(self, layer: int, k_AWGE: Tensor, v_AWGE: Tensor) -> tuple[Tensor, Tensor]:
        """Keep the keys and values of a layer; give them back."""
        if layer not in self.cache.layers:
            self.cache.layers[layer] = tuple(
                tensor.new_zeros((self.cache.num_rows, *tensor.shape[1:])) for tensor in (k_AWGE, v_AWGE)
            )
        for kept, new in zip(self.cache.layers[layer], (k_AWGE, v_AWGE)):
            kept[self.row_A] = new
        return k_AWGE, v_AWGE


@dataclass(frozen=True)
class PartPass:
    """Only the positions position_AS of each row's window are computed; the keys of all others are the kept ones."""

    cache: KeyValueCache
    row_A: Tensor
    position_AS: Tensor

    def join(self, layer: int, k_ASGE: Tensor, v_ASGE: Tensor) -> tuple[Tensor, Tensor]:
        """Put the new keys and values of a layer in their places; all W positions of the rows."""
        is_whole_batch = len(self.row_A) == self.cache.num_rows  # rows ascend, so they are all of them, in order
        for kept, new in zip(self.cache.layers[layer], (k_ASGE, v_ASGE)):
            kept[self.row_A[:, None], self.position_AS] = new
        return tuple(kept if is_whole_batch else kept[self.row_A] for kept in self.cache.layers[layer])

    def rows_in_part(self, rows_N: Tensor, width: int) -> Tensor:
        """Flat indices [N] into the computed positions, of flat indices into the windows."""
        row_N, position_N = rows_N // width, rows_N % width
        return row_N * self.position_AS.shape[1] + position_N - self.position_AS[row_N, 0]


def cached_log_probs(
    predict: Callable[..., Tensor], cache: KeyValueCache, x_AW: Tensor, rows_N: Tensor, row_A: Tensor,
    block_A: Tensor, span_A2: Tensor,
) -> Tensor:  # fmt: skip
    """predict with `cache`: whole passes for the rows that need one, part passes of equal width for the others.

    row_A: the cache's rows, ascending; span_A2: first position of the window that a part pass computes, and the end.
    """
    width_A = torch.where(cache.is_stale(row_A, block_A), 0, span_A2[:, 1] - span_A2[:, 0])
    candidate_row_N, position_N = rows_N // x_AW.shape[1], rows_N % x_AW.shape[1]
    parts, places = [], []
    for width in width_A.unique().tolist():
        own_A = (width_A == width).nonzero()[:, 0]
        number_A = torch.zeros_like(row_A).index_copy(0, own_A, torch.arange(len(own_A), device=row_A.device))
        place = (width_A[candidate_row_N] == width).nonzero()[:, 0]
        view = WholePass(cache, row_A[own_A])
        if width:
            position_AS = span_A2[own_A, :1] + torch.arange(width, device=row_A.device)
            view = PartPass(cache, row_A[own_A], position_AS)
        rows = number_A[candidate_row_N[place]] * x_AW.shape[1] + position_N[place]
        parts.append(predict(x_AW[own_A], rows, cache=view))
        places.append(place)
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat(places).argsort()]
