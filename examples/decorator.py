"""One decorator for plain, async and generator functions.

The environment lasts as long as the body runs: until the function has returned, the coroutine has
finished, or the generator is exhausted or closed. Each call is a run of its own.
"""

import asyncio
from collections.abc import Iterator

from orchard_infra import EnvironmentConfig, managed_environment

config = EnvironmentConfig("decorator")


@managed_environment(config)
def train(epochs: int) -> float:
    """Train, and return the loss."""
    return 1.0 / epochs


@managed_environment(config)
async def evaluate(loss: float) -> str:
    """Evaluate without blocking the event loop, also while it waits for the lock."""
    await asyncio.sleep(0)
    return f"loss {loss:.2f}"


@managed_environment(config)
def checkpoints(count: int) -> Iterator[str]:
    """Yield the names of checkpoints. Between them the project stays locked."""
    for number in range(count):
        yield f"checkpoint-{number} (locked: {config.hardware.lock_file_path.exists()})"


if __name__ == "__main__":
    print(asyncio.run(evaluate(train(epochs=10))))
    print(*checkpoints(2), sep="\n")
    print(train.__name__, "is still called train; left behind:", end=" ")
    print(config.hardware.lock_file_path.exists())
