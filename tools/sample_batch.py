"""Offline batch sampling: python tools/sample_batch.py CKPT --input prompts.jsonl --output out.jsonl."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dlm_scale.cli import Command, exit_code, run_command

PROGRAM = "sample_batch.py"
COMMAND = Command("sample many prompts from a checkpoint; run it again to continue", "dlm_scale.sample_batch")

if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    sys.exit(exit_code(lambda: run_command(COMMAND, arguments, PROGRAM), PROGRAM))
