"""Runs: the record, the registry, and which process belongs to which run."""
