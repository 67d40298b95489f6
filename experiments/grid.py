"""Runs a grid of experiments, and writes its table and figures to results/. A YAML file says what the grid is.

    python experiments/grid.py experiments/table1_mini.yaml --dry-run       # commands, epochs, tokens, FLOPs, time
    python experiments/grid.py experiments/table1_mini.yaml --jobs 2        # two runs at once, one core each
    python experiments/grid.py experiments/table1_mini.yaml --only coconut pause_as_thought --seeds 0
    python experiments/grid.py experiments/table1_mini.yaml --report        # the table of what there is, nothing is run
    python experiments/grid.py experiments/paper_gsm.yaml --gpus 4 --slurm gsm.sbatch   # the paper's, as an array job

Every run is run.py's own: training, then an evaluation on the test split. Finished runs are not repeated, and killed
ones go on where they were: start the same command again. A signal stops the runs, which save first. A run that
results/NAME.json remembers, with the same keys and data, counts as finished where its checkpoint is gone (not so with
--anew). What it remembers of other keys stays there, and out of the table.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing")]
from grid_file import Grid, read_grid
from jobs import Job, by_digest, check_folders, jobs_of, left_of, read_results

from curriculum import stage_name
from trainer.distributed import allowed_cores
from trainer.files import writing
from utils import UserError, print_error, print_result


def prepare(grid: Grid) -> None:
    """Makes the files that the grid needs and that are not there. Raises UserError where a script fails."""
    for path, script in grid.needs.items():
        if not Path(path).exists():
            print_result(f"making {path}")
            name, *arguments = shlex.split(script)
            command = [sys.executable, str(ROOT / name), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not Path(path).exists():
                last_line = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
                raise UserError(f"{path} could not be made by {script}: {last_line}")


def work(waiting: list[Job], at_once: int | None) -> None:
    """Runs what is not done, so many at once, one core or a share of the GPUs each (see `shares`), in the order given,
    but that no place stands empty for a run whose beginning is still under way. Raises UserError that lists what
    failed, at the end."""
    from tqdm import tqdm

    failed: list[str] = []
    jobs, told = waiting, {job.name: len(job.epochs()) for job in waiting}
    places = shares(at_once, waiting[0].n_gpus)
    running: dict[Future, tuple[Job, str | None]] = {}
    with (
        ThreadPoolExecutor(len(places)) as pool,
        tqdm(total=len(waiting), unit="run", desc=waiting[0].grid.name) as bar,
    ):
        while waiting or running:
            while places and (job := next_of(waiting, [job for job, _ in running.values()])):
                waiting = [other for other in waiting if other is not job]
                if job.is_trained or job.begin is None or job.begin.is_trained:
                    devices = places.pop(0)
                    running[pool.submit(run_commands, job, devices)] = (job, devices)
                # else its beginning failed, of which there is a complaint already
            done, _ = wait(running, timeout=10, return_when=FIRST_COMPLETED)  # reading all logs again takes a while
            for task in done:
                places.append(running.pop(task)[1])
                failed.extend(task.result())
                bar.update()
            for line in news(jobs, told):
                tqdm.write(line, file=sys.stderr)
    if CHILDREN.stopping.is_set():
        raise UserError("stopped by a signal; start the same command again, and it goes on")
    if failed:
        raise UserError("; ".join(failed))


def next_of(waiting: list[Job], running: list[Job]) -> Job | None:
    """The first job whose beginning is not still to come."""
    to_come = {job.name for job in (*waiting, *running)}
    return next((job for job in waiting if job.begin is None or job.begin.name not in to_come), None)


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import torch

    chosen, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return chosen.split(",")[:count] if chosen else [str(number) for number in range(count)]


def shares(at_once: int | None, n_gpus: int) -> list[str | None]:
    """For each of the runs at once the GPUs that it sees, as CUDA_VISIBLE_DEVICES; None where there are none. By
    default there are as many runs as have GPUs of their own, or an allowed core where there are none.

    Runs share GPUs where there are more runs. Raises UserError where one run needs more than there are.
    """
    devices = visible_gpus()
    if n_gpus > max(1, len(devices)):
        raise UserError(f"--gpus {n_gpus}: this machine has {len(devices)}")
    at_once = at_once or (len(devices) // n_gpus if devices else allowed_cores())
    if not devices:
        return [None] * at_once
    places = range(0, at_once * n_gpus, n_gpus)
    return [",".join(devices[(place + gpu) % len(devices)] for gpu in range(n_gpus)) for place in places]


def news(jobs: list[Job], told: dict[str, int]) -> Iterator[str]:
    """A line for each epoch of the jobs beyond those told; counts them there."""
    for job in jobs:
        epochs = job.epochs()
        for record in epochs[told.get(job.name, 0) :]:
            yield (
                f"{job.name}: epoch {record['epoch'] + 1} of {job.config.num_epochs}, stage "
                f"{stage_name(record['stage'])}, validation accuracy {record['accuracy']:.1%}"
            )
        told[job.name] = len(epochs)


def run_commands(job: Job, devices: str | None) -> list[str]:
    """Runs what a job still needs, with its output in a file beside the run's folder; returns what went wrong."""
    log = job.folder.parent / "logs" / f"{job.name}.log"
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    for command in job.commands():
        if CHILDREN.stopping.is_set():
            return []
        job.note()
        before = log.stat().st_size
        code = start(command, log, devices)
        if code and not CHILDREN.stopping.is_set():
            said = log.read_bytes()[before:].decode(errors="replace").replace("\r", "\n").splitlines()
            lines = [line for line in said if line.strip()]
            errors = [line for line in lines if line.startswith("error: ")]
            return [f"{job.name} failed with exit code {code}: {(errors or lines or [''])[-1]} (see {log})"]
        if not job.is_trained:
            return [f"{job.name} was stopped; start the grid again, and it goes on"]
    return []


def start(command: list[str], log: Path, devices: str | None) -> int:
    """Runs a command on one core and the given GPUs, its output appended to a file; returns its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # of torchrun
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    with log.open("a", encoding="utf-8") as output:
        return CHILDREN.run(command, env=environment, stdout=output, stderr=output)


class Children:
    """The runs that are under way. A signal to the grid is handed to them, who then save; nothing more is started.

    They are in sessions of their own: a Ctrl-C of the terminal reaches them by the grid alone, as a SIGTERM.
    """

    def __init__(self) -> None:
        self.running: set[subprocess.Popen] = set()
        self.stopping = threading.Event()

    def run(self, command: list[str], **options) -> int:
        process = subprocess.Popen(command, start_new_session=True, **options)
        self.running.add(process)
        if self.stopping.is_set():  # since the caller looked
            process.terminate()
        try:
            return process.wait()
        finally:
            self.running.discard(process)

    def hand_on(self, number: int, _frame) -> None:
        self.stopping.set()
        for process in list(self.running):
            process.send_signal(signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM)


CHILDREN = Children()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="a YAML file of experiments/")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="some of its runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="of all runs, and in the report (default: the grid's)")
    parser.add_argument(
        "--jobs", type=int, help="runs at once (default: one an allowed core, or one for each --gpus GPUs)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="set keys of every run")
    parser.add_argument("--gpus", type=int, default=1, help="of one run, where there are GPUs (default: 1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="print commands and what they will cost, and stop")
    what.add_argument(
        "--report", action="store_true", help="write the report of what there is, and stop (data are made)"
    )
    what.add_argument("--slurm", type=Path, metavar="FILE", help="write a SLURM array script of the runs, and stop")
    parser.add_argument(
        "--peak", type=float, help="of a GPU, in FLOP/s, for --dry-run (default: an H100's for the keys bf16 and tf32)"
    )
    parser.add_argument("--utilisation", type=float, default=0.3, help="of that peak, for --dry-run (default: 0.3)")
    parser.add_argument("--anew", action="store_true", help="run again what only results/NAME.json remembers")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="(default: results/)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if (
        options.gpus < 1
        or (options.jobs is not None and options.jobs < 1)
        or not min(1 if options.peak is None else options.peak, options.utilisation) > 0
    ):
        parser.error("--jobs and --gpus must be at least 1, --peak and --utilisation more than 0")
    if fixed := {"name", "seed", "debug"} & {text.partition("=")[0] for text in options.set}:
        parser.error(f"--set cannot set {' and '.join(sorted(fixed))}: each run has its own")
    try:
        grid = read_grid(options.grid)
        jobs = jobs_of(grid, options.only, options.seeds, tuple(options.set), options.gpus)
        for job in jobs:
            job.check_keys()  # before data are made for them
        prepare(grid)
        results = read_results(grid, options.out)
        waiting = left_of(jobs, {} if options.anew else by_digest(results))
        if options.dry_run:
            from costs import plan_of

            at_once = options.jobs or max(1, len(visible_gpus()) // options.gpus)
            print_result(plan_of(jobs, waiting, options.peak, options.utilisation, at_once))
            return 0
        if problems := [text for job in jobs for text in job.problems()]:
            raise UserError("; ".join(problems))  # before the first run
        if options.slurm is not None:
            from slurm_array import write_array

            print_result(write_array(waiting, options.grid, options.slurm))
            return 0
        check_folders(jobs)
        try:
            if waiting and not options.report:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                    signal.signal(number, CHILDREN.hand_on)
                work(waiting, options.jobs)
        finally:
            print_result(report_of(grid, options))
    except UserError as error:
        return print_error(error)
    except KeyboardInterrupt:  # while data are made
        return print_error(UserError("stopped by Ctrl-C; start the same command again, and it goes on"))
    return 0


def report_of(grid: Grid, options: argparse.Namespace) -> str:
    """Writes the report of what there is by now, of all runs of the chosen seeds; returns its table."""
    from tables import write_report

    more = tuple(options.set)
    results = read_results(grid, options.out)  # again: another grid may have written it
    shown = jobs_of(grid, None, options.seeds, more, options.gpus)
    seeds = {job.seed for job in shown} | {row["seed"] for row in by_digest(results).values()}
    every = jobs_of(grid, None, sorted(seeds), more, options.gpus)
    arguments = f" --seeds {' '.join(map(str, options.seeds))}" if options.seeds else ""
    arguments += f" --set {shlex.join(more)}" if more else ""
    return write_report(grid, every, results, {job.name for job in shown}, options.out, arguments)


if __name__ == "__main__":
    sys.exit(main())
