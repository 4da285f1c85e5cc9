"""Dask, protected: one cluster on this machine, used in several environments.

    python examples/frameworks/dask_cluster.py

The workers outlive each environment, and end with the ``with`` of the cluster.
"""

from distributed import Client, LocalCluster

from orchard_infra import managed_environment


def square(number: int) -> int:
    return number * number


def main() -> None:
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        for step in range(2):
            with managed_environment("dask"):
                print(f"step {step}:", client.gather(client.map(square, range(4))))
        print("after it:", client.submit(square, 5).result())


if __name__ == "__main__":
    main()
