"""Worlds of processes for tests of collectives: each starts once, runs every case, and is judged where pytest runs."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

dist = torch.distributed
needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo to start a world with"
)

HANG, LIMIT = timedelta(seconds=10), 180  # a collective that nobody joins; a world, in seconds


def attempt(function: Callable[[], Any]) -> Any:
    """What it returns, or a string that says why it does not."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _rank(rank: int, cases: Callable[[int, int, Callable[[str], None]], dict[str, Any]], world: int, folder: str):
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", rendezvous, timedelta(seconds=LIMIT), world_size=world, rank=rank)
    results = cases(world, rank, lambda name: Path(folder, f"{rank}.now").write_text(name))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def start(cases: Callable[..., dict[str, Any]], world: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank's `cases(world, rank, at)` returns; it calls `at` with the name of what it comes to."""
    processes = torch.multiprocessing.spawn(_rank, (cases, world, str(folder)), nprocs=world, join=False)
    deadline = time.monotonic() + LIMIT
    try:
        while not processes.join(timeout=5):
            assert time.monotonic() < deadline, f"it did not end within {LIMIT} s"
    except Exception as error:  # gloo aborts a process whose peer sends what it does not expect
        at = [path.read_text() for path in sorted(folder.glob("*.now"))]
        raise AssertionError(f"a world of {world} broke down when its ranks were at {at}: {error}") from None
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def once(cases: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """`worlds(world)` gives what each rank returned; a world starts when it is first asked for, and only then."""
    started: dict[int, list[dict[str, Any]]] = {}

    def ranks(world: int) -> list[dict[str, Any]]:
        if world not in started:
            started[world] = []  # once, should it fail
            started[world] = start(cases, world, tmp_path_factory.mktemp(f"world{world}"))
        assert started[world], f"the world of {world} failed to start or to end, in the first test that asked for it"
        return started[world]

    return ranks


def of_each_rank(ranks: list[dict[str, Any]], name: str) -> list[Any]:
    results = [results[name] for results in ranks]
    failed = [f"rank {rank}: {x}" for rank, x in enumerate(results) if isinstance(x, str)]
    assert not failed, "\n".join(failed)
    return results
