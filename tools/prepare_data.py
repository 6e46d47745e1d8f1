"""`dlm prepare` as a program of its own: python tools/prepare_data.py SOURCE --tokenizer T --out DIR."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dlm_scale.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
