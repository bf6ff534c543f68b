"""The engine "ray": actors on the machines of a Ray cluster take parts. Ray restarts one that dies, and its part is done again.
All machines read the inputs and write the folder under the same paths. Needs the extra ray."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

from ...files import require
from ..progress import Progress
from .local import MakeEncoder
from .parts import Done, Job, Worker
from .plan import Part

RETRIES = 3  # of a part whose worker died
PATIENCE = 60.0  # seconds without a result after which idle workers take the parts of silent ones


class Cluster(NamedTuple):
    """``engine`` is an ``Engine``. ``address``: of a running cluster; None: RAY_ADDRESS, else one is started on this machine.
    ``workers``, and ``gpus`` of each: None takes what the cluster has."""

    make: MakeEncoder
    address: str | None = None
    workers: int | None = None
    gpus: float | None = None
    say: Callable[[str], None] = print

    def engine(self, job: Job, parts: Sequence[Part], progress: Progress) -> Generator[Done, None, None]:
        """Raises RuntimeError if there is no cluster, a worker cannot be made, or one dies again and again."""
        ray = require("ray", "ray", "ray")
        mine = not ray.is_initialized()
        try:
            if mine:
                ray.init(self.address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
            for done in self._run(ray, job, parts):
                progress.advance(done.rows, done.tokens)
                yield done
        except (ConnectionError, ray.exceptions.RayError) as error:
            raise RuntimeError(f"Ray: {str(error).strip().splitlines()[-1]}") from error
        finally:
            if mine:
                ray.shutdown()

    def _run(self, ray: Any, job: Job, parts: Sequence[Part]) -> Iterator[Done]:
        there = ray.cluster_resources()
        gpus = (1.0 if there.get("GPU") else 0.0) if self.gpus is None else self.gpus
        count = self.workers or max(1, int(there.get("GPU", 0) / gpus if gpus else there.get("CPU", 1)))
        options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": RETRIES}
        actor = ray.remote(**options)(_Actor)
        workers = [actor.remote(job, self.make, "cuda" if gpus else "cpu") for _ in range(min(count, len(parts)))]
        # A worker gets a part when it has begun: those for which there is no room would keep theirs forever.
        running: dict[Any, tuple[Any, Part | None]] = {worker.ready.remote(): (worker, None) for worker in workers}
        todo, left, idle = iter(parts), {part.number for part in parts}, []
        while left:
            finished, _ = ray.wait(list(running), timeout=PATIENCE)
            for ref in finished:
                worker, part = running.pop(ref)
                done = ray.get(ref)
                idle.append(worker)
                if part is not None and part.number in left:
                    left.remove(part.number)
                    yield done
            for part in todo if idle else ():
                worker = idle.pop()
                running[worker.part.remote(part)] = (worker, part)
                if not idle:
                    break
            if not finished:
                self.say(
                    f"Ray: no part was finished in {PATIENCE:.0f} s; {len(idle)} of {len(workers)} workers are idle"
                )
                silent = [part for _, part in running.values() if part is not None and part.number in left]
                for part in silent[: len(idle)]:  # twice does no harm: the part is there once
                    worker = idle.pop()
                    running[worker.part.remote(part)] = (worker, part)
        for worker in workers:
            ray.kill(worker)


class _Actor:
    def __init__(self, job: Job, make: MakeEncoder, device: str) -> None:
        self.worker = Worker(job, make(device))

    def ready(self) -> None:
        """Returns once the encoder is made."""

    def part(self, part: Part) -> Done:
        return self.worker.part(part)
