"""AdamW with an optional exponential average of the weights, and learning-rate schedules.

The average lives in the optimizer's own state, so it is sharded, saved and loaded exactly as the moments are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW whose states exist from the start, plus state `ema` when `ema_decay` > 0.

    Groups with `is_muon` are left alone but for their average: engine/muon.py moves them. `gradient_scale`, when set,
    multiplies the gradients of the next update (clipping by the global norm). While `is_skipping`, a step changes
    nothing but the count of steps. The average warms up as min(decay, (1 + n) / (10 + n)) over the steps n.
    """

    def __init__(self, groups: list[dict], options: Any, ema_decay: float = 0.0):
        betas = (options.beta1, options.beta2)
        super().__init__(groups, lr=0.0, betas=betas, eps=options.eps, weight_decay=0.0, fused=True)
        self.ema_decay = ema_decay
        self.momentum, self.matrix_weight_decay = options.muon_momentum, options.weight_decay
        self.gradient_scale: torch.Tensor | None = None
        self.is_skipping = False

    def prepare(self, masters: Iterable[tuple[torch.Tensor, dict]], step: int) -> None:
        """(Re)create the state of the tensors to be updated, each given with its group: zero in every slot."""
        self.state.clear()
        for master, group in masters:
            slots = ("momentum",) if group.get("is_muon") else ("exp_avg", "exp_avg_sq")
            state = self.state[master]
            state["step"] = torch.tensor(float(step), device=master.device)
            for slot in slots + (("ema",) if self.ema_decay else ()):
                state[slot] = torch.zeros_like(master, memory_format=torch.preserve_format).detach()

    def slots_of(self, master: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors that a master has beside its value."""
        return {slot: tensor for slot, tensor in self.state[master].items() if slot != "step"}

    def skip(self) -> None:
        """Make the coming `step`, which DeepSpeed may call or not, change nothing. The step counts all the same, as it
        does where a run is resumed."""
        self.is_skipping = True
        for state in self.state.values():
            state["step"] += 1

    @torch.no_grad()
    def step(self, closure=None):
        if self.is_skipping:
            return None
        moved = [(p, p.grad) for group in self.param_groups if group.get("is_muon") for p in group["params"]]
        for parameter, _ in moved:
            parameter.grad = None
        self._scale_gradients()
        result = super().step(closure)
        for parameter, gradient in moved:  # an offloaded gradient is a buffer that DeepSpeed keeps
            parameter.grad = gradient
        for group in self.param_groups if self.ema_decay else ():
            for parameter in group["params"]:
                self._average(parameter, group)
        return result

    def _scale_gradients(self) -> None:
        for group in self.param_groups if self.gradient_scale is not None else ():
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.gradient_scale.to(parameter.grad))

    def _average(self, parameter: torch.Tensor, group: dict) -> None:
        state = self.state[parameter]
        if "ema" not in state:  # DeepSpeed takes trial steps before `prepare`
            return
        if group.get("is_muon"):
            state["step"] += 1
        updates = state["step"]
        decay = torch.clamp((1 + updates) / (10 + updates), max=self.ema_decay)
        state["ema"].lerp_(parameter.detach(), 1 - decay)


def parameter_groups(named: Iterable, table: dict, options: Any) -> list[dict]:
    """Matrices of the blocks, which decay (and which Muon takes if it is the optimizer), and the rest, which do not; of
    these the vocabulary tables apart, if they have a rate of their own. `rate` is AdamW's for a group, at full height.
    """
    muon, decaying, plain, tables = [], [], [], []
    for name, parameter in named:
        spec = table[name]
        is_muon = options.name == "muon" and spec.is_hidden_matrix
        is_apart = options.embedding_learning_rate is not None and spec.is_table
        (muon if is_muon else decaying if spec.decays else tables if is_apart else plain).append(parameter)
    rate = {"weight_decay": 0.0, "rate": options.learning_rate}
    groups = [{**rate, "params": decaying, "weight_decay": options.weight_decay}, {**rate, "params": plain},
              {**rate, "params": tables, "rate": options.embedding_learning_rate},
              {**rate, "params": muon, "is_muon": True}]
    return [group for group in groups if group["params"]]


def _cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def rate_factor(step: int, num_steps: int, config: Any) -> float:
    """What the configured learning rates are multiplied by for the update that follows `step` finished ones.

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
    return warmup * factor
