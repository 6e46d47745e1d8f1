"""The mathematics of masked diffusion: pure functions of tensors, ignorant of ranks, configs and models."""
