"""Loggers of any kind, as one of the standard library."""

from __future__ import annotations

import logging
from typing import Any

_METHODS = (
    (logging.ERROR, "error"),
    (logging.WARNING, "warning"),
    (logging.INFO, "info"),
    (logging.DEBUG, "debug"),
)


class _Forwarding(logging.Logger):
    """Passes finished messages on to an object with ``info``, ``warning`` and so on."""

    def __init__(self, target: Any) -> None:
        super().__init__("Infrastructure", logging.DEBUG)
        self._target = target

    def handle(self, record: logging.LogRecord) -> None:
        name = next((name for level, name in _METHODS if record.levelno >= level), "debug")
        try:
            getattr(self._target, name)(record.getMessage())
        except Exception:
            logging.getLogger("Infrastructure").debug("the logger failed", exc_info=True)


def as_logger(logger: Any) -> logging.Logger:
    """``logger``, or one that forwards to it: not everybody's takes ``extra=``, and one that fails
    must not make a release fail.
    """
    if logger is None:
        return logging.getLogger("Infrastructure")
    if isinstance(logger, logging.Logger):
        return logger
    return _Forwarding(logger)
