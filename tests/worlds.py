"""Worlds of processes for tests of collectives: each starts once, runs every case, and is judged where pytest runs."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from rpp_kernels.backends import triton

dist = torch.distributed
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo to start a world with"
)

# A collective that nobody joins; a world, in seconds.
HANG, LIMITS = timedelta(seconds=60), {"native": 180, "reference": 180, "triton": 1200}


def attempt(function: Callable[[], Any]) -> Any:
    """What it returns, or a string that says why it does not."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


Cases = Callable[[str, int, int, Callable[[str], None]], dict[str, Any]]


def _rank(rank: int, cases: Cases, backend: str, world: int, folder: str):
    torch.set_num_threads(1)
    if backend == "triton" and triton.INTERPRETED:
        import interpreter

        interpreter.prepare()
    rendezvous = f"file://{folder}/rendezvous"
    limit = timedelta(seconds=LIMITS[backend])
    dist.init_process_group("gloo", rendezvous, limit, world_size=world, rank=rank)
    results = cases(backend, world, rank, lambda name: Path(folder, f"{rank}.now").write_text(name))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start(cases: Cases, backend: str, world: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank's `cases(backend, world, rank, at)` returns; it calls `at` with the name of what it comes to."""
    processes = torch.multiprocessing.spawn(_rank, (cases, backend, world, str(folder)), nprocs=world, join=False)
    deadline = time.monotonic() + LIMITS[backend]
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, f"it did not end within {LIMITS[backend]} s"
    except Exception as error:  # gloo aborts a process whose peer sends what it does not expect
        at = [path.read_text() for path in sorted(folder.glob("*.now"))]
        raise AssertionError(
            f"the {backend} world of {world} broke down when its ranks were at {at}: {error}"
        ) from None
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def once(cases: Cases, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[Any]]:
    """`worlds(backend, world)` gives what each rank returned; a world starts when it is first asked for, only then."""
    started: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def ranks(backend: str, world: int) -> list[dict[str, Any]]:
        key = backend, world
        if key not in started:
            started[key] = []  # once, should it fail
            started[key] = start(cases, backend, world, tmp_path_factory.mktemp(f"{backend}-world{world}"))
        assert started[key], f"the {backend} world of {world} failed to start or to end, in the first test that asked"
        return started[key]

    return ranks


def of_each_rank(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    results = [results[name] for results in ranks]
    failed = [f"rank {rank}: {x}" for rank, x in enumerate(results) if isinstance(x, str)]
    assert not failed, "\n".join(failed)
    return results
