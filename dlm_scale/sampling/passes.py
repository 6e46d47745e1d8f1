"""One look of the network at the rows that need it: the window, guidance, biases, caches.

Shapes: A rows of one pass, W positions of the window, N candidates, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dlm_scale.sampling.blocks import window_starts
from dlm_scale.sampling.caches import KeyValueCache, cached_log_probs


@dataclass(frozen=True)
class Look:
    """What stays the same from pass to pass, and the cache (None: nothing is kept)."""

    predict: Callable[..., Tensor]
    mask_id: int
    window: int
    block_size: int
    guidance: float
    logit_bias: Mapping[int, float]
    cache: "KeyValueCache | None"

    @property
    def nfe(self) -> int:
        """Passes of the network that a row needs for one look."""
        return 1 if self.guidance == 0 else 2

    def __call__(self, x_AL, is_fixed_AL, candidate_AL, batch_row_A, block_A) -> Tensor:
        """Log-probabilities [N, V] at the candidates, in their order; every row has at least one."""
        start_A = window_starts(block_A, self.block_size, self.window, x_AL.shape[1])
        x_AW, rows_N = self._seen(x_AL, candidate_AL, start_A)
        is_fixed_AW, span_A2 = self._windows(is_fixed_AL, start_A), self._spans(block_A, start_A)
        if self.guidance == 0:
            log_probs_NV = self._log_probs(x_AW, rows_N, batch_row_A, block_A, span_A2)
        else:
            blind_AW = x_AW.masked_fill(is_fixed_AW, self.mask_id)
            both_NV = self._log_probs(
                torch.cat([x_AW, blind_AW]),
                torch.cat([rows_N, rows_N + x_AW.numel()]),
                torch.cat([batch_row_A, batch_row_A + (self.cache.num_rows // 2 if self.cache else 0)]),
                block_A.repeat(2),
                span_A2.repeat(2, 1),
            )
            log_probs_NV = guided(*both_NV.chunk(2), self.guidance)
        return biased(log_probs_NV, self.logit_bias)

    def local(self, x_AL, candidate_AL, block_A) -> tuple[Tensor, Callable]:
        """The same, and what gives log-probabilities anew once ids beside a candidate are known (predict.py)."""
        start_A = window_starts(block_A, self.block_size, self.window, x_AL.shape[1])
        log_probs_NV, again = self.predict.local(*self._seen(x_AL, candidate_AL, start_A))
        return biased(log_probs_NV, self.logit_bias), lambda *known: biased(again(*known), self.logit_bias)

    def critique(self, x_AL, candidate_AL, block_A) -> Tensor:
        """Logits [N] of an error at the candidates, in their order."""
        start_A = window_starts(block_A, self.block_size, self.window, x_AL.shape[1])
        return self.predict.critique(*self._seen(x_AL, candidate_AL, start_A))

    def _seen(self, x_AL: Tensor, candidate_AL: Tensor, start_A: Tensor) -> tuple[Tensor, Tensor]:
        """The windows, and the candidates' flat positions in them."""
        return self._windows(x_AL, start_A), self._windows(candidate_AL, start_A).flatten().nonzero()[:, 0]

    def _windows(self, whole_AL: Tensor, start_A: Tensor) -> Tensor:
        if self.window == whole_AL.shape[1]:
            return whole_AL
        return whole_AL.gather(1, start_A[:, None] + torch.arange(self.window, device=start_A.device))

    def _spans(self, block_A: Tensor, start_A: Tensor) -> Tensor:
        """Which positions of the window a part pass computes."""
        first_A = block_A * self.block_size - start_A
        end_A = (first_A + self.block_size).clamp(max=self.window)
        if self.cache is not None and self.cache.kind == "prefix":
            end_A = torch.full_like(first_A, self.window)
        return torch.stack([first_A, end_A], 1)

    def _log_probs(self, x_AW, rows_N, row_A, block_A, span_A2) -> Tensor:
        if self.cache is None:
            return self.predict(x_AW, rows_N)
        return cached_log_probs(self.predict, self.cache, x_AW, rows_N, row_A, block_A, span_A2)


def guided(given_NV: Tensor, blind_NV: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: blind + (guidance + 1) (given - blind), normalised; impossible ids stay so."""
    mixed_NV = blind_NV + (guidance + 1) * (given_NV - blind_NV)
    return torch.where(given_NV == -torch.inf, -torch.inf, mixed_NV).log_softmax(-1)


def biased(log_probs_NV: Tensor, logit_bias: Mapping[int, float]) -> Tensor:
    """Log-probabilities with values added to some ids' logits."""
    if not logit_bias:
        return log_probs_NV
    bias_V = log_probs_NV.new_zeros(log_probs_NV.shape[1])
    bias_V[list(logit_bias)] = bias_V.new_tensor(list(logit_bias.values()))
    return (log_probs_NV + bias_V).log_softmax(-1)
