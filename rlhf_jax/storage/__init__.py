"""Files: reading and writing of JSON, URLs, hashes, file names of a run directory, reading of metrics. Imports no jax."""
