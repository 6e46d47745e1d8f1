"""AdamW with an optional exponential average of the weights, and learning-rate schedules.

The average lives in the optimizer's own state, so it is sharded, saved and loaded exactly as the moments are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW whose states exist from the start, plus state `ema` when `ema_decay` > 0.

    `gradient_scale`, when set, multiplies the gradients of the next update (clipping by the global norm).
    The average warms up as min(decay, (1 + n) / (10 + n)) over the updates n.
    """

    def __init__(self, params: Iterable, *, betas, eps: float, ema_decay: float = 0.0):
        super().__init__(params, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)
        self.ema_decay = ema_decay
        self.gradient_scale: torch.Tensor | None = None

    def prepare(self, masters: Iterable[torch.Tensor], step: int) -> None:
        """(Re)create the state of the tensors to be updated: zero in every slot, `step` updates done."""
        self.state.clear()
        for parameter in masters:
            state = self.state[parameter]
            state["step"] = torch.tensor(float(step), device=parameter.device)
            for slot in self.slots():
                state[slot] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()

    def slots(self) -> tuple[str, ...]:
        """Names of the tensors a parameter has beside its value."""
        return ("exp_avg", "exp_avg_sq", "ema") if self.ema_decay else ("exp_avg", "exp_avg_sq")

    @torch.no_grad()
    def step(self, closure=None):
        if self.gradient_scale is not None:
            for parameter in self._parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(self.gradient_scale.to(parameter.grad))
        result = super().step(closure)
        if self.ema_decay:
            for parameter in self._parameters():
                self._average(parameter)
        return result

    def _average(self, parameter: torch.Tensor) -> None:
        state = self.state[parameter]
        if "ema" not in state:  # DeepSpeed takes trial steps before `prepare`
            return
        updates = state["step"]
        decay = torch.clamp((1 + updates) / (10 + updates), max=self.ema_decay)
        state["ema"].lerp_(parameter.detach(), 1 - decay)

    def _parameters(self):
        return (p for group in self.param_groups for p in group["params"] if p.numel())


def parameter_groups(named: Iterable, table: dict, weight_decay: float) -> list[dict]:
    """Two groups: matrices of the blocks, which decay, and the rest (tables, gains), which do not."""
    decaying, plain = [], []
    for name, parameter in named:
        (decaying if table[name].decays else plain).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(step: int, num_steps: int, config) -> float:
    """The rate of the update that follows `step` finished ones.

    Linear warm-up over `warmup_steps`; then `cosine` down to `min_learning_rate_ratio`, `wsd` (constant, then linear
    down over the last `decay_fraction` of the run; Hu et al., 2024) or `constant`.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    floor = config.min_learning_rate_ratio
    after = max(0, step - config.warmup_steps)
    if config.schedule == "cosine":
        factor = _cosine(min(1.0, after / max(1, num_steps - config.warmup_steps)), floor)
    elif config.schedule == "wsd":
        decay_steps = max(1, round(config.decay_fraction * num_steps))
        remaining = min(1.0, (num_steps - step) / decay_steps)
        factor = floor + (1 - floor) * remaining
    else:
        factor = 1.0
    return config.learning_rate * warmup * factor
