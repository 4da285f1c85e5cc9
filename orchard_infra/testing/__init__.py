"""For tests of your own: whether a lock keeps its contract."""

from orchard_infra.testing.contract import LockContract as LockContract
from orchard_infra.testing.contract import check_lock as check_lock
