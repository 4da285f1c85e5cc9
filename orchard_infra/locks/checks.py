"""What the settings of a lock may be, as validators of attrs."""

from __future__ import annotations

from typing import Any

import attrs


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_timeout(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not (is_number(value) and value >= 0):
        raise ValueError(f"timeout must be a number of seconds >= 0, or None; not {value!r}")


def check_seconds(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if not (is_number(value) and value > 0):
        raise ValueError(f"{attribute.name} must be a number of seconds > 0, not {value!r}")


def check_url(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    # The value is not shown: it may hold a password.
    if value is not None and not isinstance(value, str):
        raise TypeError(f"url must be a text or None, not {type(value).__name__}")


def check_lock_key(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not (isinstance(value, str) and value):
        raise ValueError(f"lock_key must be a text that is not empty, or None; not {value!r}")
