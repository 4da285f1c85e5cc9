"""Locks: the contract (`base`), and one module for each mechanism."""
