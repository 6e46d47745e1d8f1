"""A model as what samplers ask of: log-probabilities, and what its further heads say.

Shapes: B rows, L positions, N selected positions of the flattened batch, M of those, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Predict:
    """`predict(x_BL, rows_N) -> log_probs_NV` (docs/design.md, signature 3), and None where the model has no such head:

    critique(x_BL, rows_N) -> logits [N] float32, of the probability that the id at a position is wrong
    local(x_BL, rows_N) -> (log_probs_NV, again), where again(which_M, left_M, right_M) -> log_probs_MV of the candidates
    `which_M` (numbers below N) given the ids to their left and right, -1 where unknown; no further pass is needed

    `read(x_BL, rows_N, readout, attention=None, cache=None)` runs the network without gradients; `head` is its head.
    """

    def __init__(self, read: Callable, head: Any):
        self._read = read
        self.critique = self._critique if head.critic is not None else None
        self.local = self._local if head.sampler is not None else None

    def __call__(self, x_BL: Tensor, rows_N: Tensor, attention: Any = None, cache: Any = None) -> Tensor:
        return self._read(x_BL, rows_N, lambda view: view.log_probs(), attention, cache)

    def _critique(self, x_BL: Tensor, rows_N: Tensor) -> Tensor:
        return self._read(x_BL, rows_N, lambda view: view.critic())

    def _local(self, x_BL: Tensor, rows_N: Tensor) -> tuple[Tensor, Callable]:
        view = self._read(x_BL, rows_N, lambda view: view)

        @torch.no_grad()
        def again(which_M: Tensor, left_M: Tensor, right_M: Tensor) -> Tensor:
            return view.over(view.hidden_ND[which_M]).local(left_M, right_M).log_probs()

        with torch.no_grad():
            return view.log_probs(), again
