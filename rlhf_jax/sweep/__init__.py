"""Sweeps: settings times seeds, a name for each run, and what the finished runs measured."""
