"""Models in and out: python tools/convert_checkpoint.py SRC DST --to hf|dlm|safetensors (docs/conversion.md)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dlm_scale.cli import Command, exit_code, run_command

CONVERT = Command("convert a model to or from other programs' formats", "dlm_scale.convert.cli")

if __name__ == "__main__":
    sys.exit(exit_code(lambda: run_command(CONVERT, sys.argv[1:], "convert_checkpoint"), "convert_checkpoint"))
