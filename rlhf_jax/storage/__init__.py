"""Files: JSON read and written in one way, URLs, hashes, file names of a run directory, metrics read back. Imports no jax."""
