"""Where: which of the masked positions a pass reveals.

A selector scores the N candidates (larger is revealed earlier; ties go to the earlier position) and may ask for more
positions than are due. Scores read the model's own log-probabilities, before temperature and truncation.
"""

from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

from dlm_scale.sampling.samplers import Sampler


@dataclass(frozen=True)
class Candidates:
    """What a score may look at: N masked positions of the rows in this pass.

    ids_N is None unless the selector reads the sampled tokens; remaining_N is the part of the steps still to come.
    """

    log_probs_NV: Tensor
    ids_N: "Tensor | None"
    uniform_N: Tensor
    remaining_N: Tensor


@dataclass(frozen=True)
class Selector:
    """score(candidates, sampler) -> float64 [N]; extent(sorted scores [B, L], sampler) -> how many at least [B].

    No score: the positions whose own slot is due. No extent: exactly as many as are due.
    """

    score: "Callable[[Candidates, Sampler], Tensor] | None" = None
    extent: "Callable[[Tensor, Sampler], Tensor] | None" = None
    reads_tokens: bool = False


def max_prob(candidates: Candidates, sampler: Sampler) -> Tensor:
    """Log-probability of the best id."""
    return candidates.log_probs_NV.amax(-1).double()


def negative_entropy(candidates: Candidates, sampler: Sampler) -> Tensor:
    """Minus the entropy in nats."""
    return -torch.special.entr(candidates.log_probs_NV.exp()).sum(-1, dtype=torch.float64).clamp(min=0.0)


def margin(candidates: Candidates, sampler: Sampler) -> Tensor:
    """Probability of the best id minus that of the second."""
    best_N2 = candidates.log_probs_NV.topk(min(2, candidates.log_probs_NV.shape[1]), dim=-1).values.double().exp()
    return best_N2[:, 0] - best_N2[:, -1]


def sampled_confidence(candidates: Candidates, sampler: Sampler) -> Tensor:
    """Log-probability of the id just drawn, plus annealed Gumbel noise where the sampler has some."""
    score_N = candidates.log_probs_NV.gather(1, candidates.ids_N[:, None])[:, 0].double()
    if sampler.gumbel == 0:
        return score_N
    gumbel_N = -(-candidates.uniform_N.clamp(min=2.0**-54).log()).log()
    return score_N + sampler.gumbel * candidates.remaining_N * gumbel_N


def within_entropy_bound(score_BL: Tensor, sampler: Sampler) -> Tensor:
    """Longest prefix whose entropies, without the largest, add up to gamma at most (EB-sampler)."""
    entropy_BL = torch.where(score_BL.isinf(), 0.0, -score_BL)
    bound_BL = torch.nn.functional.pad(entropy_BL.cumsum(1)[:, :-1], (1, 0))  # of those before, which are smaller
    return ((bound_BL <= sampler.gamma) & ~score_BL.isinf()).sum(1)


def above_threshold(score_BL: Tensor, sampler: Sampler) -> Tensor:
    """All whose best id has at least the threshold's probability (Fast-dLLM)."""
    return (score_BL.exp() >= sampler.threshold).sum(1)


def within_factor(score_BL: Tensor, sampler: Sampler) -> Tensor:
    """The largest n whose n-th best id has at least probability 1 - factor/(n + 1) (Fast-dLLM)."""
    count_L = torch.arange(1, score_BL.shape[1] + 1, device=score_BL.device)
    # Scores fall and bounds rise: those that hold are the first ones.
    return ((score_BL.exp() >= 1 - sampler.factor / (count_L + 1)) & ~score_BL.isinf()).sum(1)


def indifferent(candidates: Candidates, sampler: Sampler) -> Tensor:
    """No preference."""
    return torch.zeros(len(candidates.log_probs_NV), dtype=torch.float64, device=candidates.log_probs_NV.device)


def everything(score_BL: Tensor, sampler: Sampler) -> Tensor:
    """All candidates."""
    return (~score_BL.isinf()).sum(1)


SELECTORS = {
    "due": Selector(),
    "all": Selector(indifferent, extent=everything),
    "max_prob": Selector(max_prob),
    "entropy": Selector(negative_entropy),
    "margin": Selector(margin),
    "sampled_confidence": Selector(sampled_confidence, reads_tokens=True),
    "entropy_bounded": Selector(negative_entropy, extent=within_entropy_bound),
    "threshold": Selector(max_prob, extent=above_threshold),
    "factor": Selector(max_prob, extent=within_factor),
}
