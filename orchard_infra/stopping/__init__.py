"""Signals that ask a run to stop."""
