"""A strategy of your own: one generator function.

What stands before the ``yield`` is done when the environment is entered, what stands after it when
it is left. This strategy empties a cache that the program keeps in memory.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import attrs

from orchard_infra import Environment, InfrastructureManager, managed_environment


@functools.cache
def features(index: int) -> bytes:
    return bytes(1_000_000)


@attrs.frozen
class ForgetFeatures:
    @contextmanager
    def around(self, env: Environment) -> Iterator[None]:
        try:
            yield
        finally:
            features.cache_clear()


def main() -> None:
    manager = InfrastructureManager(extras=(ForgetFeatures(),))
    with managed_environment("own-strategy", manager=manager):
        for index in range(20):
            features(index)
        print("features in memory:", features.cache_info().currsize)
    print("features in memory after the run:", features.cache_info().currsize)


if __name__ == "__main__":
    main()
