"""On PYTHONPATH of a run that a test wants to stop midway: every step then lasts a little longer. Python imports it first.

The script, its command line and everything it computes are the real ones.
"""

import os
import time

from rlhf_jax.loop import run as loop

_log = loop.Run.log


def log(self, *arguments, **keywords):
    is_good = _log(self, *arguments, **keywords)
    time.sleep(float(os.environ["SECONDS_A_STEP"]))
    return is_good


loop.Run.log = log
