"""Ray, protected: tasks and an actor of a local cluster, over several environments.

    python examples/frameworks/ray_tasks.py

Ray is started before the environments, and shut down after them. It takes SIGTERM for itself: the
environment is released all the same, and the exit status is 15, or that of an abort.
"""

import logging

import ray

from orchard_infra import managed_environment


@ray.remote
def square(number: int) -> int:
    return number * number


@ray.remote(num_cpus=0)
class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


def main() -> None:
    ray.init(num_cpus=1, include_dashboard=False, logging_level=logging.ERROR)
    counter = Counter.remote()  # type: ignore[attr-defined]
    for step in range(2):
        with managed_environment("ray"):
            print(f"step {step}:", ray.get(square.remote(step + 2)), ray.get(counter.add.remote()))
    print("after it:", ray.get(square.remote(5)), ray.get(counter.add.remote()))
    ray.shutdown()


if __name__ == "__main__":
    main()
