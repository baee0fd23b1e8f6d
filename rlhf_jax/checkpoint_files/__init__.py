"""What a checkpoint is on disk: its manifest and layout, how it is verified and read. `rundir` writes them."""
