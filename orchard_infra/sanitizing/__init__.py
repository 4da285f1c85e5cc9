"""Ghosts: who they are, and how they are stopped."""
