"""Semi-autoregressive blocks: which block a row is in, how many steps it has there, and the window that is looked at.

Block k is positions [k size, (k+1) size) of the row, whatever is fixed in it; blocks without an open position are
passed over. Shapes: B rows, L positions, K blocks.
"""

import torch
from torch import Tensor


def block_of_L(length: int, block_size: int, device: torch.device) -> Tensor:
    """Number of the block that each position is in."""
    return torch.arange(length, device=device) // block_size


def block_ends(is_open_BL: Tensor, block_size: int, num_steps: int | Tensor) -> Tensor:
    """int64 [B, K]: the step at which each block ends, in proportion to its open positions, one step a block at least.

    num_steps: of all rows, or [B, 1] of each. The last is num_steps; with one step a position every block gets exactly as many as it has positions. num_steps
    must not be below the number of blocks with an open position.
    """
    num_rows, length = is_open_BL.shape
    num_blocks = -(-length // block_size)
    padded_BL = torch.nn.functional.pad(is_open_BL, (0, num_blocks * block_size - length))
    open_BK = padded_BL.view(num_rows, num_blocks, block_size).sum(2)
    done_BK, rank_BK = open_BK.cumsum(1), (open_BK > 0).cumsum(1)
    total_B1 = done_BK[:, -1:].clamp(min=1)
    even_BK = (2 * num_steps * done_BK + total_B1) // (2 * total_B1)
    at_least_one_BK = (even_BK - rank_BK).clamp(min=0).cummax(1).values + rank_BK
    return torch.minimum(at_least_one_BK, num_steps - (rank_BK[:, -1:] - rank_BK))


def num_open_blocks(is_open_BL: Tensor, block_size: int) -> int:
    """The most blocks with an open position that any row has."""
    length = is_open_BL.shape[1]
    starts = range(0, length, block_size)
    return int(torch.stack([is_open_BL[:, i : i + block_size].any(1) for i in starts]).sum(0).max())


def window_starts(block_B: Tensor, block_size: int, window: int, length: int) -> Tensor:
    """First position [B] of the `window` positions that a row in that block looks at.

    The row's beginning while the block lies in it, then the window that ends with the block.
    """
    end_B = ((block_B + 1) * block_size).clamp(min=window, max=length)
    return end_B - window
