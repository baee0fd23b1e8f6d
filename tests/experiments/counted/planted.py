"""One read of each kind."""

import jax
import jax.numpy as jnp
import numpy as np


def as_a_number(x):
    return float(x[0])


def as_an_array(x):
    return np.asarray(x + 1)


def as_a_condition(x):
    return "yes" if x[1] > 1 else "no"


def as_text(x):
    return f"{x[2]}"


def explicit_read(x):
    return jax.device_get(x + 2)


if __name__ == "__main__":
    numbers = jnp.arange(3) + 1
    for read in (as_a_number, as_an_array, as_a_condition, as_text, explicit_read):
        read(numbers)
