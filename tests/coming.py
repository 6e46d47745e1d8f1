"""What the documents and configs name before it is there. An entry that has come must go: a test says so."""

from __future__ import annotations

from pathlib import Path

CONFIG_FOLDER = Path(__file__).resolve().parents[1] / "configs"
COMING = (
    "configs/char_critic.yaml", "configs/char_sampler_head.yaml", "configs/char_loss_modifiers.yaml",
    "configs/nanochat_llm.yaml", "configs/tinystories_edit.yaml",
    *("diffusion." + key for key in "anneal_corruption corruption_prob deletion_corruption edit_stage_start "
      "insertion_corruption num_diffusion_steps time_loss_weighting visible_subsample".split()),
    *("objective." + key for key in "critic_alpha critic_end critic_every critic_start critic_weighting "
      "entropy_threshold judge label_smoothing mask_ratio_power sampler_alpha sampler_start".split()),
    *("objective.kind=" + kind for kind in ("sequence_scoring", "token_classification")),
    "model.sampler_head", "model.labels", "model.score", "data.answer_padding",
    "--sampler critic", "--sampler local_waves", "--allow_edits",
    "dlm sample runs/sft --chat",
)  # fmt: skip
AFTER_IT = ("configs/sft.yaml", "runs/sft", 'model="export"')  # goes on from a run that waits
CONFIGS = [path for path in sorted(CONFIG_FOLDER.glob("*.yaml")) if f"configs/{path.name}" not in COMING]


def waits(text: str) -> bool:
    """Whether a command or an inline code names what is still to come."""
    return any(entry in text for entry in COMING)


def cannot_run(command: str) -> bool:
    """Whether it waits, or goes on from a run of a config that waits."""
    runs = [entry.replace("configs/", "runs/").removesuffix(".yaml") for entry in COMING if entry.endswith(".yaml")]
    return waits(command) or any(entry in command for entry in (*runs, *(AFTER_IT if runs else ())))
