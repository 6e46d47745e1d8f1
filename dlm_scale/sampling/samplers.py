"""The samplers, each a row of names and numbers: how many, where, what, and what is undone.

The names are keys of four small tables of pure functions:
    schedule       how many positions are revealed at each step      schedules.SCHEDULES
    mask_ratio     the curve m(t) that the schedule follows          schedules.CURVES
    selector       which masked positions are revealed               selectors.SELECTORS
    token_sampler  which id a revealed position gets                 tokens.TOKEN_SAMPLERS
    reviser        which revealed positions are masked again         schedules.REVISERS
A new member of a table is one function and one line.

With an exact denoiser and one token a pass, an order that looks only at the state (`first_hitting`, `random`,
`margin`, `entropy`, `entropy_bounded` with gamma 0) samples the exact law. An order that looks at the SAMPLED token
does not: it prefers tokens that happen to be likely. On a chain of 4 tokens over 3 symbols, `low_confidence` is 0.54
in total variation from the exact law and `maskgit` 0.09 to 0.11; on text both show as repetition. `ancestral`, the
`remdm` family and all others with several tokens a pass treat these as independent; for `ancestral` that error falls
as 1/num_steps.
"""

from dataclasses import dataclass, replace

LEFT_TO_RIGHT = "left_to_right"
CACHES = ("none", "prefix", "dual")  # caches.py
GAUSSIAN_SAMPLERS = {"ddim": 0.0, "ddpm": 1.0}  # of Gaussian checkpoints (gaussian.py): their eta
HEADS = {  # what a sampler may need of a model (predict.py): the head that gives it
    "critique": "a model with a critic (model.critic=true, trained with objective.critic_alpha)",
    "local": "a model with a sampler head (model.sampler_head=true, trained with objective.sampler_alpha)",
}


@dataclass(frozen=True)
class Sampler:
    """One sampler: the names of its parts, and the numbers that they read.

    gumbel      MaskGIT's noise on the order, times the part of the steps still to come (tau; 0 = none)
    gamma       nats that an entropy-bounded pass may reveal beyond its most uncertain position
    threshold   probability from which a position is revealed at once
    factor      n positions are revealed at once where the n-th best id has at least 1 - factor/(n+1)
    eta         ReMDM's strength of masking again, in [0, 1)
    edit_rate   a visible token is drawn anew with this probability a step, times the part of the steps still to come
    edit_below  and where the model gives it less than this (edits.py; both only for models with an edit stage)
    one_token_a_step   where nobody names a number of steps, take as many as there are tokens
    is_left_to_right   fills one position a step after the other, whatever the block size and the number of steps
    """

    schedule: str = "even"
    mask_ratio: str = "linear"
    selector: str = "due"
    token_sampler: str = "inverse_cdf"
    reviser: str = "none"
    gumbel: float = 0.0
    gamma: float = 0.0
    threshold: float = 0.9
    factor: float = 1.0
    eta: float = 0.0
    edit_rate: float = 0.0
    edit_below: float = 0.0
    one_token_a_step: bool = False
    is_left_to_right: bool = False

    @property
    def needs(self) -> "str | None":
        """What `predict` must offer beside log-probabilities (predict.py)."""
        if self.reviser == "critic":
            return "critique"
        return "local" if self.token_sampler == "local_waves" else None

    def __post_init__(self):
        parts = self.reviser, self.selector, self.schedule
        if (self.reviser == "critic" or self.selector == "all") and parts != ("critic", "all", "even"):
            raise ValueError(
                "reviser 'critic', selector 'all' and schedule 'even' belong together (a critic judges texts without "
                f"holes), not {self.reviser!r}, {self.selector!r} and {self.schedule!r}"
            )
        if self.needs == "local" and (self.reviser != "none" or self.selector == "sampled_confidence"):
            raise ValueError(
                f"token_sampler 'local_waves' needs reviser 'none' and an order by the state, not {self.reviser!r} and "
                f"{self.selector!r}: its ids are drawn after the positions are chosen"
            )
        if self.reviser not in ("none", "critic") and (self.schedule, self.selector) != ("independent", "due"):
            raise ValueError(
                f"reviser {self.reviser!r} needs schedule 'independent' and selector 'due', "
                f"not {self.schedule!r} and {self.selector!r}: only these know when a position comes back"
            )
        if not (0 <= self.eta < 1 or (self.eta == 1 and self.reviser == "confidence")):
            raise ValueError(f"eta is a probability below 1 (or 1 with reviser 'confidence'), not {self.eta}")
        if not (0 <= self.edit_rate <= 1 and 0 <= self.edit_below <= 1):
            raise ValueError(f"edit_rate and edit_below lie in [0, 1], not {self.edit_rate} and {self.edit_below}")
        if self.edits and self.is_left_to_right:
            raise ValueError("edits need a network that looks both ways, not one that fills from left to right")
        if self.edits and self.reviser != "none":
            raise ValueError(f"reviser {self.reviser!r} masks again what edits would draw anew: choose one of them")
        if self.edits and self.needs == "local":
            raise ValueError("token_sampler 'local_waves' knows masked positions alone: it cannot edit")
        if min(self.gamma, self.gumbel, self.factor) < 0:
            raise ValueError(
                f"gamma, gumbel and factor are not negative, but are {self.gamma}, {self.gumbel} and {self.factor}"
            )
        if (self.reviser == "loop") != (self.mask_ratio == "plateau"):
            raise ValueError("reviser 'loop' and mask_ratio 'plateau' belong together: it revises on the plateau")

    @property
    def edits(self) -> bool:
        """Whether visible tokens may change."""
        return self.edit_rate > 0 or self.edit_below > 0


EDIT_RATE = 0.1  # Seed Diffusion's

SAMPLERS = {
    # MDLM (arXiv 2406.07524): every position has its own reveal time; steps in which a row is silent cost no pass.
    "ancestral": Sampler(schedule="independent"),
    # Zheng et al. (arXiv 2409.02908): positions in random order, one a pass if the steps allow.
    "first_hitting": Sampler(one_token_a_step=True),
    # LLaDA (arXiv 2502.09992) `random` remasking: the same order and counts as first_hitting, in the given steps.
    "random": Sampler(),
    # MaskGIT (arXiv 2202.04200): cosine counts, sampled confidence with annealed Gumbel noise.
    "maskgit": Sampler(mask_ratio="cosine", selector="sampled_confidence", gumbel=4.5),
    # LLaDA's low-confidence remasking: even counts, confidence of the token just drawn. Biased, see above.
    "low_confidence": Sampler(selector="sampled_confidence"),
    # Dream's state-only orders: gap of the two best ids; entropy.
    "margin": Sampler(selector="margin"),
    "entropy": Sampler(selector="entropy"),
    # EB-sampler (arXiv 2505.24857): as many positions a pass as their joint uncertainty allows.
    "entropy_bounded": Sampler(selector="entropy_bounded", gamma=0.1, one_token_a_step=True),
    # Fast-dLLM (arXiv 2505.22618): all positions whose best id is sure enough.
    "threshold": Sampler(selector="threshold", threshold=0.9, one_token_a_step=True),
    # Fast-dLLM's second rule: the more positions at once, the surer each must be.
    "factor": Sampler(selector="factor", factor=1.0, one_token_a_step=True),
    # ReMDM (arXiv 2503.00307): ancestral, and revealed tokens are masked again, here with eta a step at most.
    "remdm": Sampler(schedule="independent", reviser="cap", eta=0.008),
    # eta times the largest probability that keeps the marginals.
    "remdm_rescale": Sampler(schedule="independent", reviser="rescale", eta=0.015),
    # The least probable tokens first: one position a step on average, at most.
    "remdm_conf": Sampler(schedule="independent", reviser="confidence", eta=1.0),
    # Nine tenths are revealed early, then rewritten at a constant mask ratio, then the rest follows.
    "remdm_loop": Sampler(schedule="independent", mask_ratio="plateau", reviser="loop", eta=0.02),
    # Ancestral, and visible tokens are drawn anew now and then (the editing of seed-diffusion models).
    "edit": Sampler(schedule="independent", edit_rate=EDIT_RATE),
    # Ancestral, and visible tokens that the model no longer believes are drawn anew.
    "edit_gated": Sampler(schedule="independent", edit_below=0.1),
    # Token-critic (arXiv 2209.04439): everything is drawn, and what the critic doubts most is masked again; two passes.
    "critic": Sampler(selector="all", reviser="critic"),
    # The positions of a pass of `ancestral` one after the other where they touch (waves.py); needs a sampler head.
    "local_waves": Sampler(schedule="independent", token_sampler="local_waves"),
}

# Of autoregressive checkpoints, which know no other order: the law of the model itself. Not in the table of the above.
AUTOREGRESSIVE_SAMPLERS = {LEFT_TO_RIGHT: Sampler(one_token_a_step=True, is_left_to_right=True)}
SAMPLERS_OF = {"autoregressive": AUTOREGRESSIVE_SAMPLERS, "gaussian": GAUSSIAN_SAMPLERS}  # objective.kind; else SAMPLERS


def resolve(sampler: "str | Sampler", allow_edits: bool = False) -> Sampler:
    """The sampler of that name, or the one given; with allow_edits one that edits, by EDIT_RATE if not of itself.

    Raises ValueError on an unknown name, and where the sampler cannot edit.
    """
    if not isinstance(sampler, Sampler):
        known = SAMPLERS | AUTOREGRESSIVE_SAMPLERS
        if sampler not in known:
            raise ValueError(f"unknown sampler {sampler!r}; choose one of: {', '.join(known)}")
        sampler = known[sampler]
    return replace(sampler, edit_rate=EDIT_RATE) if allow_edits and not sampler.edits else sampler
