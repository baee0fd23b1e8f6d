"""The format of checkpoints on disk: manifest, layout, verification and reading. `rundir` writes them."""
