"""Runs a grid of experiments, described by a YAML file, and writes its table, figure and numbers to results/.

    python experiments/grid.py experiments/table1_mini.yaml --dry-run       # commands, epochs, tokens, FLOPs, time
    python experiments/grid.py experiments/table1_mini.yaml --jobs 2        # two runs in parallel, one core each
    python experiments/grid.py experiments/table1_mini.yaml --only coconut pause_as_thought --seeds 0
    python experiments/grid.py experiments/table1_mini.yaml --report        # the table of the finished runs
    python experiments/grid.py experiments/paper_gsm.yaml --gpus 4 --slurm gsm.sbatch   # an array job on GPUs

Each run is a training by run.py and an evaluation on the test split. The same command, started again, skips finished
runs and resumes killed ones. A signal stops the runs after they have saved. A run counts as finished, even without its
checkpoint, if results/NAME.json has a row with the same keys and data (--anew runs it again). Rows with other keys stay
in that file, but not in the table.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing")]
from grid_file import Grid, read_grid
from jobs import Job, by_digest, check_folders, jobs_of, read_results, unfinished

from curriculum import stage_name
from trainer import commands
from trainer.distributed import StopSignal, allowed_cores
from trainer.files import writing
from utils import UserError, log, print_result


def make_data(grid: Grid) -> None:
    """Makes the missing files of the grid's `needs`. Raises UserError if a script fails."""
    for path, script in grid.needs.items():
        if not Path(path).exists():
            print_result(f"making {path}")
            name, *arguments = shlex.split(script)
            command = [sys.executable, str(ROOT / name), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not Path(path).exists():
                last_line = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
                raise UserError(f"{path} could not be made by {script}: {last_line}")


def run_jobs(jobs: list[Job], n_parallel: int | None) -> None:
    """Runs the jobs in parallel, each on one core or its share of the GPUs (see `gpu_slots`). They start in the given
    order, except that a job waits until its beginning has ended. Raises UserError that lists all failures at the end.
    """
    from tqdm import tqdm

    failures: list[str] = []
    waiting, n_printed = jobs, {job.name: len(job.epochs()) for job in jobs}
    free_slots = gpu_slots(n_parallel, jobs[0].n_gpus)
    running: dict[Future, tuple[Job, str | None]] = {}
    with ThreadPoolExecutor(len(free_slots)) as pool, tqdm(total=len(jobs), unit="run", desc=jobs[0].grid.name) as bar:
        while waiting or running:
            while free_slots and (job := next_startable(waiting, [job for job, _ in running.values()])):
                waiting = [other for other in waiting if other is not job]
                if job.is_trained or job.begin is None or job.begin.is_trained:
                    gpus = free_slots.pop(0)
                    running[pool.submit(run_commands, job, gpus)] = (job, gpus)
                # else its beginning has failed, which `failures` already says
            done, _ = wait(running, timeout=10, return_when=FIRST_COMPLETED)  # reading all logs again takes a while
            for task in done:
                free_slots.append(running.pop(task)[1])
                failures.extend(task.result())
                bar.update()
            for line in new_epochs(jobs, n_printed):
                tqdm.write(line, file=sys.stderr)
    if CHILDREN.stopping.is_set():
        if file := os.environ.get("INTERRUPTED_FILE"):  # a run creates it only while it trains
            with suppress(OSError):
                Path(file).touch()
        raise UserError("stopped by a signal; start the same command again to continue")
    if failures:
        raise UserError("; ".join(failures))


def next_startable(waiting: list[Job], running: list[Job]) -> Job | None:
    """Returns the first waiting job whose beginning neither waits nor runs."""
    pending = {job.name for job in (*waiting, *running)}
    return next((job for job in waiting if job.begin is None or job.begin.name not in pending), None)


def visible_gpus() -> list[str]:
    """Returns the visible GPUs by their names in CUDA_VISIBLE_DEVICES."""
    import torch

    chosen, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return chosen.split(",")[:count] if chosen else [str(number) for number in range(count)]


def gpu_slots(n_parallel: int | None, n_gpus: int) -> list[str | None]:
    """Returns the CUDA_VISIBLE_DEVICES of each parallel run, None on a machine without GPUs.

    Default for n_parallel: as many runs as have n_gpus GPUs of their own; without GPUs, one per allowed core. More runs
    share GPUs. Raises UserError if one run needs more GPUs than the machine has.
    """
    devices = visible_gpus()
    if n_gpus > max(1, len(devices)):
        raise UserError(f"--gpus {n_gpus}: this machine has {len(devices)}")
    n_parallel = n_parallel or (len(devices) // n_gpus if devices else allowed_cores())
    if not devices:
        return [None] * n_parallel
    firsts = range(0, n_parallel * n_gpus, n_gpus)
    return [",".join(devices[(first + gpu) % len(devices)] for gpu in range(n_gpus)) for first in firsts]


def new_epochs(jobs: list[Job], n_printed: dict[str, int]) -> Iterator[str]:
    """Yields a line per epoch that has ended since the last call; updates n_printed, the number of lines per job."""
    for job in jobs:
        epochs = job.epochs()
        for record in epochs[n_printed[job.name] :]:
            yield (
                f"{job.name}: epoch {record['epoch'] + 1} of {job.config.num_epochs}, stage "
                f"{stage_name(record['stage'])}, validation accuracy {record['accuracy']:.1%}"
            )
        n_printed[job.name] = len(epochs)


def run_commands(job: Job, gpus: str | None) -> list[str]:
    """Runs a job's remaining commands, with their output in logs/ beside the run's folder; returns what went wrong."""
    log = job.folder.parent / "logs" / f"{job.name}.log"
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    for command in job.commands():
        if CHILDREN.stopping.is_set():
            return []
        job.record_inputs()
        n_bytes_before = log.stat().st_size
        code = start(command, log, gpus)
        if code and not CHILDREN.stopping.is_set():
            output = log.read_bytes()[n_bytes_before:].decode(errors="replace").replace("\r", "\n")
            lines = [line for line in output.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("error: ")]
            return [f"{job.name} failed with exit code {code}: {(errors or lines or [''])[-1]} (see {log})"]
        if not job.is_trained:
            return [f"{job.name} was stopped; start the grid again to continue"]
    return []


def start(command: list[str], log: Path, gpus: str | None) -> int:
    """Runs a command on one core and the given GPUs and appends its output to a file; returns its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # finds torchrun
    if gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    with log.open("a", encoding="utf-8") as output:
        return CHILDREN.run(command, env=environment, stdout=output, stderr=output)


class Children:
    """The running child processes. It forwards the grid's signals to them, and they save; no further one is started.

    Each child has a session of its own, so that Ctrl-C in a terminal reaches it once, as a SIGTERM from the grid.
    """

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopping = threading.Event()

    def run(self, command: list[str], **options) -> int:
        process = subprocess.Popen(command, start_new_session=True, **options)
        self.running.add(process)
        if self.stopping.is_set():  # a signal came after the caller's check
            process.terminate()
        try:
            return process.wait()
        finally:
            self.running.discard(process)

    def forward(self, number: int, _frame) -> None:
        self.stopping.set()
        for process in list(self.running):
            process.send_signal(signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM)


CHILDREN = Children()


def make_parser() -> argparse.ArgumentParser:
    parser = commands.make_parser(__doc__)
    add = parser.add_argument
    add("grid", type=Path, help="a YAML file of experiments/")
    add("--only", nargs="+", metavar="RUN", help="run only these runs")
    add("--seeds", type=int, nargs="+", help="seeds of all runs, and of the report (default: the grid's)")
    add("--jobs", type=int, help="runs in parallel (default: one per allowed core, or per --gpus GPUs)")
    add("--set", nargs="+", default=[], metavar="key=value", help="set keys of every run")
    add("--gpus", type=int, default=1, help="GPUs of one run, on a machine with GPUs (default: 1)")
    add("--peak", type=float, help="--dry-run: a GPU's peak FLOP/s (default: an H100's for the keys bf16 and tf32)")
    add("--utilisation", type=float, default=0.3, help="--dry-run: share of the peak that is reached (default: 0.3)")
    add("--anew", action="store_true", help="train also the recorded runs whose checkpoint is not here")
    add("--out", type=Path, default=ROOT / "results", help="folder of the report (default: results/)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--dry-run", action="store_true", help="print the commands and their cost, run nothing but data scripts")
    add("--report", action="store_true", help="write the report of the finished runs, run nothing but data scripts")
    add("--slurm", type=Path, metavar="FILE", help="write a SLURM array script of the unfinished runs")
    return parser


@commands.command
def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    options = parser.parse_args(arguments)
    numbers = (options.jobs, options.gpus, options.peak, options.utilisation)
    if not all(number is None or number > 0 for number in numbers):
        parser.error("--jobs, --gpus, --peak and --utilisation must be above 0")
    if fixed := {"name", "seed", "debug", "test_path"} & {text.partition("=")[0] for text in options.set}:
        parser.error(f"--set cannot set {' and '.join(sorted(fixed))}: the grid sets them")
    try:
        grid = read_grid(options.grid)
        jobs = jobs_of(grid, options.only, options.seeds, tuple(options.set), options.gpus)
        for job in jobs:
            job.check_keys()  # before the data are made
        make_data(grid)
        results = read_results(grid, options.out)
        left = unfinished(jobs, {} if options.anew else by_digest(results))
        if (n_recorded := len(unfinished(jobs, {})) - len(left)) and not options.report:
            log.info(f"{options.out / grid.name}.json has {n_recorded} of these runs: --anew trains them here")
        if problems := dict.fromkeys(text for job in jobs for text in job.problems()):  # before the first run
            raise UserError(f"grid {grid.name}: {'; '.join(problems)}")
        check_folders(jobs)
        if options.dry_run:
            from costs import plan_of

            n_parallel = options.jobs or max(1, len(visible_gpus()) // options.gpus)
            print_result(plan_of(jobs, left, options.peak, options.utilisation, n_parallel))
            return
        if options.slurm is not None:
            from slurm_array import write_array

            print_result(write_array(left, options.grid, options.slurm))
            return
        try:
            if left and not options.report:
                for number in StopSignal.numbers():
                    signal.signal(number, CHILDREN.forward)
                run_jobs(left, options.jobs)
        finally:
            print_result(report_of(grid, options))
    except KeyboardInterrupt:  # while data are made
        raise UserError("stopped by Ctrl-C; start the same command again to continue") from None


def report_of(grid: Grid, options: argparse.Namespace) -> str:
    """Writes the report of all finished runs of the chosen seeds; returns its table."""
    from tables import write_report

    more = tuple(options.set)
    results = read_results(grid, options.out)  # again: another grid process may have written it
    shown = jobs_of(grid, None, options.seeds, more, options.gpus)
    seeds = {job.seed for job in shown} | {row["seed"] for row in by_digest(results).values()}
    every = jobs_of(grid, None, sorted(seeds), more, options.gpus)
    arguments = f" --seeds {' '.join(map(str, options.seeds))}" if options.seeds else ""
    arguments += f" --set {shlex.join(more)}" if more else ""
    return write_report(grid, every, results, {job.name for job in shown}, options.out, arguments)


if __name__ == "__main__":
    sys.exit(main())
