"""Replace one job of the manager by your own.

A strategy is any object with the methods of its protocol; nothing needs to be inherited. This
flusher also empties the cache of features that the program keeps in memory.
"""

import functools

import attrs

from orchard_infra import FlushReport, InfrastructureManager, TorchCacheFlusher, managed_environment


@functools.cache
def features(index: int) -> bytes:
    return bytes(1_000_000)


@attrs.frozen
class FeatureCacheFlusher:
    """Forget the features, then do what is done by default."""

    default: TorchCacheFlusher = attrs.Factory(TorchCacheFlusher)

    def flush(self, error: BaseException | None = None) -> FlushReport:
        features.cache_clear()
        return self.default.flush(error)


def main() -> None:
    manager = InfrastructureManager(flusher=FeatureCacheFlusher())
    with managed_environment("own-strategy", manager=manager):
        for index in range(20):
            features(index)
        print("features in memory:", features.cache_info().currsize)
    print("features in memory after the run:", features.cache_info().currsize)


if __name__ == "__main__":
    main()
