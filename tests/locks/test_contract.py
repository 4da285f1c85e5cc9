"""One contract for every lock, and locks that break it."""

from __future__ import annotations

import os

from orchard_infra.locks.all_of import AllOf
from orchard_infra.locks.base import Lease, Lock, LockKey
from orchard_infra.locks.file import FileLock
from orchard_infra.testing import LockContract


class TestFileLock(LockContract):
    def make_lock(self) -> Lock:
        return FileLock()

    def lose(self, lock: Lock, key: LockKey, lease: Lease) -> None:
        os.unlink(key.path)


class TestAllOfOneFile(LockContract):
    def make_lock(self) -> Lock:
        return AllOf(FileLock())

    def lose(self, lock: Lock, key: LockKey, lease: Lease) -> None:
        os.unlink(key.path)
