"""On PYTHONPATH of a run that a test wants to count the device-to-host reads of. Python imports it first.

A line of JSON in $READS for each: [kind, file, function], the innermost place in this repository. "explicit" is
`jax.device_get`; "implicit" everything that makes numbers of an array without saying so (float(x), np.asarray(x), a
comparison in an if). jax_transfer_guard does not see these on a CPU, where nothing is copied.
"""

import json
import os
import sys
import threading
from pathlib import Path

import jax
import numpy as np
from jax._src.array import ArrayImpl

ROOT = str(Path(__file__).resolve().parents[3])
_inside = threading.local()
_value, _asarray, _device_get = ArrayImpl._value, np.asarray, jax.device_get


def told(kind):
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(ROOT) and "site-packages" not in file:
            with open(os.environ["READS"], "a") as out:
                print(json.dumps([kind, os.path.relpath(file, ROOT), frame.f_code.co_name]), file=out)
            return
        frame = frame.f_back


def value(self):
    if not getattr(_inside, "reading", False):
        told("implicit")
    return _value.fget(self)


def asarray(a, *arguments, **named):
    if isinstance(a, ArrayImpl) and not getattr(_inside, "reading", False):
        told("implicit")
    return _asarray(a, *arguments, **named)


def device_get(x):
    if getattr(_inside, "reading", False):
        return _device_get(x)
    told("explicit")
    _inside.reading = True
    try:
        return _device_get(x)
    finally:
        _inside.reading = False


ArrayImpl._value, np.asarray, jax.device_get = property(value), asarray, device_get
