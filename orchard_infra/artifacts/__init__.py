"""Temporary files: what a run makes, and what dead runs left."""
