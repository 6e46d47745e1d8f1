"""Chosen positions filled in waves after one pass of the network, each wave knowing the ids of those before it.

A wave draws, all in parallel, the chosen positions that touch a known id; where a stretch of neighbouring ones touches
none (a row that is masked throughout), its first position is drawn from the pass alone and starts it. Of two neighbours
in one wave the left one goes first, so that no pair is ever drawn as if it were independent. Every wave draws at least
one position of each stretch: a stretch of n takes at most n waves, about half of that between known ids.

Shapes: B rows, L positions, M chosen positions.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

UNKNOWN = -1


def fill_in_waves(
    local: Callable[[Tensor, Tensor, Tensor], Tensor], draw: Callable[[Tensor, Tensor], Tensor], x_BL: Tensor,
    is_masked_BL: Tensor, place_M: tuple[Tensor, Tensor], uniform_M: Tensor,
) -> Tensor:  # fmt: skip
    """Ids [M] for the masked positions `place_M` (rows and positions, ascending), each from its own uniform.

    local(which_K, left_K, right_K) -> log-probabilities [K, V] of the positions numbered `which` among the M, given the
    ids beside them, UNKNOWN where these are masked or outside the row. draw(log_probs_KV, uniform_K) -> ids [K].
    """
    number_BL = torch.full_like(x_BL, -1).index_put(place_M, torch.arange(len(uniform_M), device=x_BL.device))
    pending_BL, id_BL = number_BL >= 0, x_BL.masked_fill(is_masked_BL, UNKNOWN)
    while bool(pending_BL.any()):
        now_BL = next_wave(pending_BL, id_BL != UNKNOWN)
        which_K = number_BL[now_BL]
        left_K, right_K = (beside[now_BL] for beside in beside_BL(id_BL, UNKNOWN))
        id_BL = id_BL.index_put((now_BL,), draw(local(which_K, left_K, right_K), uniform_M[which_K]))
        pending_BL = pending_BL & ~now_BL
    return id_BL[place_M]


def next_wave(pending_BL: Tensor, is_known_BL: Tensor) -> Tensor:
    """Which of the pending positions are drawn now, bool [B, L]."""
    left_BL, right_BL = beside_BL(is_known_BL, False)
    touching_BL = pending_BL & (left_BL | right_BL)
    first_BL = pending_BL & ~beside_BL(pending_BL, False)[0]
    stretch_BL = first_BL.flatten().cumsum(0).view_as(first_BL) * pending_BL  # numbered from 1; 0 is outside all
    num_touching = torch.zeros(int(stretch_BL.max()) + 1, dtype=torch.long, device=pending_BL.device)
    num_touching = num_touching.index_add(0, stretch_BL.flatten(), touching_BL.long().flatten())
    now_BL = touching_BL | (first_BL & (num_touching[stretch_BL] == 0))
    return now_BL & ~beside_BL(now_BL, False)[0]


def beside_BL(x_BL: Tensor, edge: "int | bool") -> tuple[Tensor, Tensor]:
    """What stands to the left and to the right of each position; `edge` beyond the ends of a row."""
    return F.pad(x_BL[:, :-1], (1, 0), value=edge), F.pad(x_BL[:, 1:], (0, 1), value=edge)
