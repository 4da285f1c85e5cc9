"""One rank of the job in which questions to all ranks are measured.

    python _ranks.py RANK RANKS STORE ROUNDS TIMES GROUP

All ranks take the same turns, since every question needs all of them; rank 0 prints the samples.
GROUP is a backend of `torch.distributed`. "cuda:gloo" stands for NCCL: such a group cannot reduce a
tensor in main memory, and gets one beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from _harness import keep_quiet, python, take_turns, timed

BARE = "all_reduce of one number"
WHOLE = "env.agree_to_stop"


def measured(
    ranks: int, group: str, rounds: int, times: int, directory: Path
) -> dict[str, list[float]]:
    """Measure them in fresh processes; the samples of each, in seconds."""
    store = directory / f"store-{group.replace(':', '-')}"
    words = [str(ranks), str(store), str(rounds), str(times), group]
    started = [
        subprocess.Popen(
            python(__file__, str(rank), *words),
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(ranks)
    ]
    try:
        output, _ = started[0].communicate()
        for rank in started:
            if rank.wait() != 0:
                raise RuntimeError("a rank has failed")
    finally:
        for rank in started:
            rank.kill()
    samples: dict[str, list[float]] = json.loads(output)
    return samples


def _be(rank: int, ranks: int, store: str, rounds: int, times: int, group: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    import torch
    import torch.distributed as dist

    from orchard_infra import InfrastructureManager, SignalStop, managed_environment

    torch.set_num_threads(1)
    dist.init_process_group(group, store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    # What is compared has to work in main memory, too.
    other = None if group == "gloo" else dist.new_group(backend="gloo")
    kept = torch.zeros(1, dtype=torch.int32)

    def bare() -> None:
        dist.all_reduce(kept, dist.ReduceOp.MAX, other)

    manager = InfrastructureManager(
        sanitizer=None, locker=None, flusher=None, cleaner=None, stopper=SignalStop("flag")
    )
    with managed_environment("agree", manager=manager) as env:

        def whole() -> None:
            if env.agree_to_stop():
                raise RuntimeError("nobody was asked to stop")

        contenders: dict[str, Callable[[], None]] = {BARE: bare, WHOLE: whole}
        samples = take_turns(
            {name: timed(work, times) for name, work in contenders.items()}, rounds
        )
        dist.barrier(other)
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(samples))


if __name__ == "__main__":
    keep_quiet()
    _rank, _count, _store, _rounds, _times, _group = sys.argv[1:]
    _be(int(_rank), int(_count), _store, int(_rounds), int(_times), _group)
