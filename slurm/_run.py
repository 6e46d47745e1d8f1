"""`python _run.py MODULE ARGUMENTS`: runs a module of the code that stands beside this folder.

`python -m` would look in the working folder first, where a newer state of the code may lie.
"""

import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
