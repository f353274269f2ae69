"""Works a grid off: what is done stays, what was killed goes on, what others work on is left to them."""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pastina.bench.apart import Died, run_apart
from pastina.bench.execute import execute, failure, tested
from pastina.bench.grid import Cell, Grid, Job
from pastina.bench.results import (
    Record,
    best_rate,
    check_grid,
    read_of,
    read_twin,
    result_path,
    write_record,
    write_summary,
)
from pastina.errors import PastinaError, RecipeError
from pastina.training.events import Event as TrainingEvent

WORK = ".work"
_WAIT = 2.0  # seconds between two looks at what other processes do


@dataclass(frozen=True, slots=True)
class JobBegin:
    """A job begins, or goes on; left: jobs of the grid that are not done, as far as is known."""

    job: Job
    left: int


@dataclass(frozen=True, slots=True)
class JobEnd:
    """A job is done; its record may tell of a failure."""

    job: Job
    record: Record


@dataclass(frozen=True, slots=True)
class Waiting:
    """Nothing is free; other processes work on the rest."""

    left: int


Event = JobBegin | JobEnd | Waiting | TrainingEvent
OnEvent = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do: a job, and whether its test part is to be looked at."""

    job: Job
    with_test: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """How a grid stands: runs with a result, and the records of those that failed."""

    done: int
    failed: tuple[Record, ...]


def run_grid(
    grid: Grid,
    out: str | Path,
    *,
    only: Sequence[str] = (),
    shard: tuple[int, int] = (1, 1),
    retry: bool = False,
    keep: bool = False,
    on_event: OnEvent = lambda event: None,
) -> Finished:
    """Run every job of the grid that is not done; several processes may share `out`.

    Args:
        only: data sets, methods or data/method.
        shard: (i, n): only every n-th cell, from the i-th, counted from 1.
        retry: run again what failed.
        keep: leave the runs with their adapters in out/.work.

    Raises:
        RecipeError: only or shard names nothing. PastinaError: out holds another grid.
        Stopped: Ctrl-C; the same command goes on.
    """
    cells, out = pick_cells(grid, only, shard), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    write_summary(out, grid)
    work = _Work(grid, cells, out, keep, on_event)
    if retry:
        work.forget_failures()
    work.go()
    if not keep:
        work.clean()
    return finished(grid, cells, out)


def pick_cells(grid: Grid, only: Sequence[str], shard: tuple[int, int]) -> list[Cell]:
    """The cells that a process is to see to."""
    part, parts = shard
    if not 1 <= part <= parts:
        raise RecipeError(f"--shard {part}/{parts}: the first number goes from 1 to the second.")
    return grid.choose(only)[part - 1 :: parts]


def finished(grid: Grid, cells: Sequence[Cell], out: Path) -> Finished:
    """How these cells stand."""
    records = [r for cell in cells for _, r in cell_jobs(grid, cell, out) if r is not None]
    failed = tuple(record for record in records if "error" in record)
    return Finished(len(records) - len(failed), failed)


def listing(
    grid: Grid, out: str | Path, *, only: Sequence[str] = (), shard: tuple[int, int] = (1, 1)
) -> list[dict[str, str]]:
    """Each known job with its state: done, failed (and why), to do; runs that wait for a choice last.

    Raises:
        RecipeError: only or shard names nothing. PastinaError: out holds another grid.
    """
    rows, cells = [], pick_cells(grid, only, shard)
    check_grid(Path(out), grid)
    for cell in cells:
        jobs = cell_jobs(grid, cell, Path(out))
        rows += [{"run": job.name, "id": job.id, "state": _state(record)} for job, record in jobs]
        waiting = len(grid.search(cell)) + len(grid.spec.seeds) - 1 - len(jobs)
        if waiting and any(record is None for _, record in jobs):
            seeds = ", ".join(str(seed) for seed in grid.spec.seeds[1:])
            rows.append(
                {
                    "run": f"{cell}, seeds {seeds}",
                    "id": "",
                    "state": "waits for the choice of a rate",
                }
            )
    return rows


def _state(record: Record | None) -> str:
    if record is None:
        return "to do"
    return f"failed: {record['error']}" if "error" in record else "done"


def cell_jobs(grid: Grid, cell: Cell, out: Path) -> list[tuple[Job, Record | None]]:
    """The jobs of a cell that are known so far, the search first, each with its result."""
    search = [(job, read_of(out, job)) for job in grid.search(cell)]
    best = _chosen([record for _, record in search])
    if best is None:
        return search
    rest = [job for job in grid.final(cell, best) if job.seed != grid.spec.seeds[0]]
    return search + [(job, read_of(out, job)) for job in rest]


def steps(grid: Grid, cell: Cell, out: Path) -> list[Step]:
    """What can be done for a cell now; each step is independent of the others."""
    jobs = cell_jobs(grid, cell, out)
    search, rest = jobs[: len(grid.search(cell))], jobs[len(grid.search(cell)) :]
    missing = [Step(job, len(search) == 1) for job, record in search if record is None]
    best = _chosen([record for _, record in search])
    if best is None:
        return missing
    winner, record = search[best]
    assert record is not None
    first = [] if "test" in record or "error" in record else [Step(winner, True)]
    return first + [Step(job, True) for job, record in rest if record is None]


def _chosen(search: Sequence[Record | None]) -> int | None:
    """The rate that won, once all have been tried and one did not fail."""
    records = [record for record in search if record is not None]
    return best_rate(records) if len(records) == len(search) else None


class _Work:
    """One process on its way through a grid."""

    def __init__(
        self, grid: Grid, cells: Sequence[Cell], out: Path, keep: bool, on_event: OnEvent
    ) -> None:
        self.grid, self.cells, self.out = grid, list(cells), out
        self.keep, self.on_event = keep, on_event
        self.open = list(cells)  # those that are not known to be done

    def go(self) -> None:
        """Until every job is done, here or elsewhere."""
        is_told = False
        while left := self._left():
            if self._take_one(left):
                is_told = False
                continue
            if not is_told:
                self.on_event(Waiting(len(left)))
                is_told = True
            time.sleep(_WAIT)

    def _left(self) -> list[Step]:
        by_cell = {cell: steps(self.grid, cell, self.out) for cell in self.open}
        self.open = [cell for cell, todo in by_cell.items() if todo]
        return [step for todo in by_cell.values() for step in todo]

    def _take_one(self, left: Sequence[Step]) -> bool:
        """Do the first step that nobody works on; False: others work on all of them."""
        for step in left:
            with alone(self.out, step.job) as is_free:
                pass
            if is_free and self._do(step, len(left)):
                return True
        return False

    def _do(self, step: Step, left: int) -> bool:
        """Whether nobody else was at it."""
        self.on_event(JobBegin(step.job, left))
        record = self._in_its_process(step)
        if record is not None:
            self._after(step, record)
        return record is not None

    def _in_its_process(self, step: Step) -> Record | None:
        """A process that is killed is given a second chance."""
        try:
            return run_apart(_do_alone, step, self.out, self.keep, on_event=self.on_event)
        except Died:
            pass
        try:
            return run_apart(_do_alone, step, self.out, self.keep, on_event=self.on_event)
        except Died as error:
            record = failure(step.job, error)
        write_record(result_path(self.out, step.job), record)
        shutil.rmtree(self._folder(step.job), ignore_errors=True)
        return record

    def _after(self, step: Step, record: Record) -> None:
        if read_of(self.out, step.job) is None:
            path = result_path(self.out, step.job)
            raise PastinaError(f"{path} does not read back as it was written.")
        if not self.keep and step.with_test and step.job.seed == self.grid.spec.seeds[0]:
            wanted = {
                job.id
                for cell in self.open
                if cell != step.job.cell
                for job in self.grid.search(cell)
            }
            for other in self.grid.search(step.job.cell):  # the rates that were not chosen
                if other.id in wanted:  # its twin may be
                    continue
                with alone(self.out, other) as is_mine:  # not under a twin that is tested
                    if is_mine:
                        shutil.rmtree(self._folder(other), ignore_errors=True)
        self.on_event(JobEnd(step.job, record))

    def _folder(self, job: Job) -> Path:
        return self.out / WORK / job.id

    def forget_failures(self) -> None:
        """Take the records of failures away, so that their jobs are to be done again."""
        for cell in self.cells:
            for job, record in cell_jobs(self.grid, cell, self.out):
                if record is not None and "error" in record:
                    result_path(self.out, job).unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what is left of work that is done; locks that others hold stay."""
        for cell in self.cells:
            for job, _ in cell_jobs(self.grid, cell, self.out):
                with alone(self.out, job) as is_mine:
                    if is_mine:
                        shutil.rmtree(self._folder(job), ignore_errors=True)
                        (self.out / WORK / f"{job.id}.lock").unlink(missing_ok=True)


def _do_alone(step: Step, out: Path, keep: bool, on_event: OnEvent) -> Record | None:
    """Do a step and write its result; None: somebody else is at it or has done it by now."""
    job, folder = step.job, out / WORK / step.job.id
    with alone(out, job) as is_mine:
        record = read_of(out, job) if is_mine else None
        if not is_mine or _is_whole(record, step):
            return None
        twin = read_twin(out, job)
        if _is_whole(twin, step):
            record = twin
        elif record is not None and (folder / "adapter").is_dir():
            record = tested(record, folder / "adapter")
        else:
            record = execute(job, folder, on_event, with_test=step.with_test)
        assert record is not None
        write_record(result_path(out, job), record)
        if not keep and ("test" in record or "error" in record):
            shutil.rmtree(folder, ignore_errors=True)
        return record


def _is_whole(record: Record | None, step: Step) -> bool:
    """Whether nothing of the step is left to do."""
    return record is not None and ("error" in record or not step.with_test or "test" in record)


@contextmanager
def alone(out: Path, job: Job) -> Iterator[bool]:
    """Whether this job is ours; the lock goes with the process, however it ends."""
    path = out / WORK / f"{job.id}.lock"
    path.parent.mkdir(exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
