"""Samplers of masked diffusion over a `predict` callable: Schedule x Selector x TokenSampler x Reviser."""

from dlm_scale.sampling.samplers import SAMPLERS, Sampler

__all__ = ["SAMPLERS", "Generated", "Sampler", "State", "generate", "stream"]


def __getattr__(name: str):
    """The engine, loaded when it is first asked for: listing the samplers must not import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dlm_scale.sampling import engine

    return getattr(engine, name)
