"""A clean start and a graceful stop for training runs."""
