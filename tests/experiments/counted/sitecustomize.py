"""On PYTHONPATH of a run that a test wants to count the device-to-host reads of. Python imports it first.

A line of JSON in $READS for each: [kind, file, function], the innermost place in this repository. "explicit" is
`jax.device_get`; "implicit" everything that makes numbers of an array without saying so (float(x), np.asarray(x), a
comparison in an if). jax_transfer_guard does not see these on a CPU, where nothing is copied. So this wraps the ways that
Python and numpy have to ask an object for its numbers: the protocol methods of the class of arrays, and numpy's functions.
"""

import functools
import json
import os
import threading
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = str(Path(__file__).resolve().parents[3])
Array = type(jnp.zeros(()))
NUMBERS = ("__array__", "__bool__", "__complex__", "__float__", "__index__", "__int__", "item", "tolist", "tobytes")
TEXT = ("__format__", "__repr__", "__str__")
_inside = threading.local()


def tell(kind):
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(ROOT) and "site-packages" not in frame.filename and frame.filename != __file__:
            with open(os.environ["READS"], "a") as out:
                print(json.dumps([kind, os.path.relpath(frame.filename, ROOT), frame.name]), file=out)
            return


def counted(kind, read):
    """Return ``read`` with a record of every call; the calls that it makes are part of the same read."""

    @functools.wraps(read)
    def reading(x, *arguments, **keywords):
        if getattr(_inside, "reading", False) or (kind == "implicit" and not isinstance(x, Array)):
            return read(x, *arguments, **keywords)
        tell(kind)
        _inside.reading = True
        try:
            return read(x, *arguments, **keywords)
        finally:
            _inside.reading = False

    return reading


for name in NUMBERS + TEXT:
    setattr(Array, name, counted("implicit", getattr(Array, name)))
for name in ("asarray", "array"):
    setattr(np, name, counted("implicit", getattr(np, name)))
jax.device_get = counted("explicit", jax.device_get)
