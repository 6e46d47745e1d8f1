"""On the path of a job's processes (by a site.sh of the tests): makes the steps of training slow, or one of them fail."""

import os
import sys
import time

SLEEP, CRASH = float(os.environ.get("DLM_TEST_SLEEP", "0")), int(os.environ.get("DLM_TEST_CRASH", "-1"))


def _is_rank() -> bool:
    words = sys.orig_argv
    at = next((i for i, word in enumerate(words) if word.endswith("/_run.py")), len(words))
    return words[at + 1 : at + 2] == ["dlm_scale.train"] and not any("deepspeed" in w or w == "-m" for w in words[:at])


if (SLEEP or CRASH >= 0) and _is_rank():
    from dlm_scale.engine import loop

    train_step = loop.train_step

    def changed(trainer, batch, state, *hooks):
        time.sleep(SLEEP)
        if state.step == CRASH:
            raise RuntimeError(f"injected at step {CRASH}")
        return train_step(trainer, batch, state, *hooks)

    loop.train_step = changed
