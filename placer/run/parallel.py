"""Running independent tasks on the cores of this machine, or on a Ray cluster."""

import multiprocessing
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, TypeVar, get_args

from placer.errors import PlacerError, UsageError, one_of

Item = TypeVar("Item")
Result = TypeVar("Result")
BackendName = Literal["processes", "ray"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)

# A task whose worker was lost is run again this many times.
_MAX_RETRIES = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Where tasks run.

    Attributes
    ----------
    name
        ``processes`` or ``ray``.
    address
        Of the Ray cluster; ``None`` joins the one of ``RAY_ADDRESS``, or starts one on
        this machine.
    """

    name: BackendName = "processes"
    address: str | None = None

    def __post_init__(self) -> None:
        one_of("--backend", self.name, BACKENDS)
        if self.address is not None and self.name != "ray":
            raise UsageError(
                f"--ray-address {self.address} is for Ray, not for {self.name}",
                "add --backend ray",
            )

    def map(
        self,
        task: Callable[[Item], Result],
        items: Sequence[Item],
        num_workers: int | None = None,
    ) -> Iterator[Result]:
        """Yield ``task(item)`` for every item, in order.

        ``num_workers`` processes run them, as many as there are items by default; a single
        one is this process.

        Task and items are sent to other processes, so they must be picklable; files that
        they name must be there for all of them.

        Raises
        ------
        PlacerError
            If a task raises it, a process was killed, or Ray is not installed.
        """
        if self.name == "ray":
            yield from _in_order(self.as_completed(task, items))
        elif len(items) == 1 or num_workers == 1:
            yield from map(task, items)
        else:
            yield from _map_processes(task, items, num_workers or len(items))

    def as_completed(
        self, task: Callable[[Item], Result], items: Sequence[Item]
    ) -> Iterator[tuple[int, Result]]:
        """Yield index and ``task(item)`` of every item as Ray completes them.

        Raises
        ------
        PlacerError
            If a task raises it, workers were lost again and again, or Ray is not installed.
        """
        return _on_ray(task, items, self.address)


def _in_order(found: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Yield results by their index, each as soon as those before it are there."""
    early: dict[int, Result] = {}
    wanted = 0
    for number, result in found:
        early[number] = result
        while wanted in early:
            yield early.pop(wanted)
            wanted += 1


def _map_processes(
    task: Callable[[Item], Result], items: Sequence[Item], num_workers: int
) -> Iterator[Result]:
    # A fork would copy the threads' locks of libraries that are already loaded.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
            yield from pool.map(task, items)
    except BrokenProcessPool as error:
        raise PlacerError(
            "a counting process was killed, perhaps because memory ran out",
            "count in one process: --workers 1",
        ) from error


def _join(address: str | None) -> None:
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    # Ray itself tries for minutes, and prints warnings meanwhile.
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address or "")
    try:
        if found is not None:
            socket.create_connection((found[1], int(found[2])), timeout=10).close()
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (OSError, OverflowError, ValueError) as error:
        raise PlacerError(
            f"no Ray cluster answers at {address}: {error}",
            "start one with: ray start --head, or leave out --ray-address",
        ) from error
    except RuntimeError as error:  # another version of Ray or Python, for one
        raise PlacerError(
            f"Ray cannot be joined: {' '.join(str(error).split())}",
            "use the cluster's versions of Python and Ray, or this machine only: "
            "--backend processes",
        ) from error


def _call(task: Callable[[Item], Result], item: Item) -> Result:
    return task(item)


def _queue_length(ray: Any) -> int:
    """Return how many tasks are given to Ray at once.

    Twice what the cluster runs: nothing idles, an autoscaler sees that more could run, and
    after a failure little is left to wait for.
    """
    return max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))


def _on_ray(
    task: Callable[[Item], Result], items: Sequence[Item], address: str | None
) -> Iterator[tuple[int, Result]]:
    try:
        import ray
    except ImportError as error:
        raise PlacerError(
            "--backend ray needs Ray, which is not installed", "pip install 'placer[ray]'"
        ) from error
    joined = ray.is_initialized()
    if not joined:
        _join(address)
    pending: dict[Any, int] = {}
    left = iter(enumerate(items))
    try:
        remote: Any = ray.remote(max_retries=_MAX_RETRIES)(_call)
        while True:
            free = max(0, _queue_length(ray) - len(pending))
            pending |= {remote.remote(task, item): n for n, item in islice(left, free)}
            if not pending:
                break
            for reference in ray.wait(list(pending))[0]:
                number = pending.pop(reference)
                result: Result = ray.get(reference)
                yield number, result
    except KeyboardInterrupt:
        pending.clear()  # Ray ends the tasks of a driver that leaves
        raise
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        raise cause if isinstance(cause, PlacerError) else error from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise PlacerError(
            f"a Ray worker was lost {_MAX_RETRIES + 1} times, perhaps because memory ran "
            "out",
            "give the workers more memory, or use this machine only: --backend processes",
        ) from error
    except ray.exceptions.RayError as error:
        raise PlacerError(
            f"Ray could not finish a task: {str(error).strip().splitlines()[0]}",
            "look at the cluster: ray status; or use this machine only: --backend "
            "processes",
        ) from error
    finally:
        # Not ray.cancel: where a task completes meanwhile, Ray 2.60 aborts this process
        # (task_manager.cc, CompletePendingTask).
        if pending:
            ray.wait(list(pending), num_returns=len(pending))
        if not joined:
            ray.shutdown()


PROCESSES = Backend()
