"""Sweeps: settings times seeds, a name for each run, and the metrics of the finished runs."""
