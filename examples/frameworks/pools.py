"""Pools of processes that are used in one environment, in the next one, and after it.

    python examples/frameworks/pools.py

A release stops no worker. ``shield_worker`` keeps a Ctrl-C, and a signal of a launcher to the whole
process group, from the workers: the program decides when they end.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from joblib import Parallel, delayed

from orchard_infra import managed_environment, shield_worker


def square(number: int) -> int:
    return number * number


def main() -> None:
    numbers = range(4)
    with (
        multiprocessing.Pool(2, initializer=shield_worker) as pool,
        ProcessPoolExecutor(2, initializer=shield_worker) as executor,
    ):
        for project in ("pools-first", "pools-second"):
            with managed_environment(project) as env:
                print("Pool", pool.map(square, numbers))
                print("ProcessPoolExecutor", list(executor.map(square, numbers)))
                print("joblib", Parallel(n_jobs=2)(delayed(square)(n) for n in numbers))
            print(f"{project} is released, {len(env.report.leftovers.spared)} processes go on")
        print("after the blocks", pool.map(square, numbers))


if __name__ == "__main__":
    main()
