"""Giving memory back: device caches, out-of-memory frames, the heap."""
