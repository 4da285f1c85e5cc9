"""An arena for each test, the seed that it is played from, and how long."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

import attrs
import pytest

from chaos.arena import Arena


@attrs.frozen
class Extent:
    """How much a test plays: what `make chaos` asks for, or as much as a `make check` allows."""

    seed: int
    kills: int
    seconds: float
    is_long: bool


@pytest.fixture
def extent() -> Extent:
    kills = os.environ.get("ORCHARD_CHAOS_KILLS")
    seed = os.environ.get("ORCHARD_CHAOS_SEED") or str(time.time_ns() // 1_000_000 % 10**8)
    print(f"SEED={seed}")  # shown with a failure
    return Extent(
        seed=int(seed),
        kills=int(kills or 10**9),
        seconds=1e9 if kills else 60.0,
        is_long=int(kills or 0) >= 1000,
    )


@pytest.fixture
def arena(tmp_path, monkeypatch, extent) -> Iterator[Arena]:
    if sys.platform != "linux":
        pytest.skip("chaos is made with what Linux has; on others it needs Linux")
    # Short, and nobody else's: what is left in it was left by a contender.
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    arena = Arena(tmp_path, give_up_after=20 if extent.is_long else 1)
    try:
        yield arena
    finally:
        arena.close()
    arena.assert_no_violation()
