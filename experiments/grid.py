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
import difflib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import typing
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from types import NoneType, UnionType

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "preprocessing")]
from config import Config
from curriculum import stage_name
from examples import load_examples
from utils import UserError, read_log, report, tell, writing

# ---------------------------------------------------------------------------------------------------------------
# What a grid is
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSpec:
    """A row of a grid: one run for each seed."""

    keys: dict = field(default_factory=dict)  # of run.py, on top of the grid's base file
    base: str | None = None  # where it has another file than the grid
    begins_with: str | None = None  # the beginning or run whose weights it takes; it starts after that one's epochs,
    # or, where that one was trained on other data, at epoch 0
    seeds: tuple[int, ...] | None = None  # where it has others than the grid
    label: str | None = None  # in tables and figures; default its name
    paper: str | None = None  # what the paper has for it

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={_spelled(value)}" for key, value in self.keys.items()]


@dataclass(frozen=True)
class Grid:
    """A grid's YAML file, read by `read_grid`."""

    name: str
    title: str
    base: str  # a file of args/
    save_path: str
    runs: dict[str, RunSpec]
    test_path: str
    needs: dict[str, str] = field(default_factory=dict)  # file -> the script, with its arguments, that makes it
    beginnings: dict[str, RunSpec] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    controls: tuple[str, ...] = ()  # runs that the others are compared with, question by question
    chance: float | None = None  # accuracy of guessing
    prediction: str = ""  # written before the runs
    about: str = ""  # a paragraph for the report


def _spelled(value) -> str:
    if isinstance(value, str) and not value.isprintable():  # YAML's own spelling of a newline is two lines
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def read_grid(path: Path) -> Grid:
    """Reads a grid. Raises UserError that lists what is wrong with it."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a grid: `key: value` lines")
    problems: list[str] = []
    known = _known(Grid, values, str(path), problems)
    for name in ("title", "base", "save_path", "runs", "test_path"):
        if name not in values:
            problems.append(f"{path} lacks {name!r}")
    for name in ("runs", "beginnings"):
        specs = known.get(name) or {}
        known[name] = {
            run: RunSpec(**_known(RunSpec, spec or {}, f"{path}: {name}: {run}", problems))
            for run, spec in specs.items()
        }
    for run, spec in known["runs"].items():
        begin = (known["beginnings"] | known["runs"]).get(spec.begins_with)
        if spec.begins_with is not None and (begin is None or begin.begins_with is not None):
            problems.append(
                f"{path}: run {run!r} begins with {spec.begins_with!r}, but there is no such beginning, nor a run that "
                "begins with nothing"
            )
    for control in known.get("controls", ()):
        if control not in known["runs"]:
            problems.append(f"{path}: control {control!r} is no run of the grid")
    if problems:
        raise UserError("; ".join(problems))
    return Grid(**{"name": path.stem, **known})


def _known(cls, values, where: str, problems: list[str]) -> dict:
    """The fields of a class that are set; what is no field of it, or of another type, is a problem."""
    kinds = typing.get_type_hints(cls)
    if not isinstance(values, dict):
        problems.append(f"{where} must hold `key: value` lines")
        return {}
    found = {}
    for name, value in values.items():
        if name not in kinds:
            close = difflib.get_close_matches(str(name), kinds, 1)
            problems.append(f"{where}: unknown key {name!r}" + (f": did you mean {close[0]!r}?" if close else ""))
        elif not _is_of(value, kinds[name]):
            problems.append(f"{where}: {name!r} must be {_in_words(kinds[name])}, not {value!r}")
        else:
            found[name] = tuple(value) if isinstance(value, list) else value
    return found


def _options(kind) -> list:
    return list(typing.get_args(kind)) if isinstance(kind, UnionType) else [kind]


def _is_of(value, kind) -> bool:
    """Whether what YAML has read is of the annotated type of a field."""
    for option in _options(kind):
        plain, inner = typing.get_origin(option) or option, typing.get_args(option)
        if plain is tuple and isinstance(value, list) and all(isinstance(item, inner[0]) for item in value):
            return True
        if plain is not tuple and isinstance(value, (int, float) if plain is float else plain):
            return True
    return False


def _in_words(kind) -> str:
    words = {dict: "`key: value` lines", str: "text", float: "a number", tuple[int, ...]: "a list of whole numbers"}
    words |= {tuple[str, ...]: "a list of texts"}
    known = [option for option in _options(kind) if option is not NoneType]
    return " or ".join(words[option if option in words else typing.get_origin(option)] for option in known)


# ---------------------------------------------------------------------------------------------------------------
# Its jobs
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Job:
    """One run of one seed."""

    grid: Grid
    run: str
    seed: int
    more: tuple[str, ...] = ()  # key=value from the command line
    n_gpus: int = 1

    @property
    def spec(self) -> RunSpec:
        return (self.grid.beginnings | self.grid.runs)[self.run]

    @property
    def name(self) -> str:
        return f"{self.run}-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def begin(self) -> Job | None:
        """The job whose weights this one takes."""
        return replace(self, run=self.spec.begins_with) if self.spec.begins_with else None

    @property
    def goes_on(self) -> bool:
        """Whether the job that it begins with is a part of its own curriculum, and not a lesson on other data."""
        return self.begin is not None and "train_path" not in self.begin.spec.keys

    @cached_property
    def overrides(self) -> list[str]:
        """All that it sets on top of the base file; of each key the last counts."""
        texts = [f"save_path={self.grid.save_path}", f"name={self.name}", f"seed={self.seed}"]
        if self.begin is not None:
            texts += [f"load_model_path={self.begin.folder}", "from_scratch=false"]
            if self.goes_on:
                texts.append(f"resume={self.begin.config.num_epochs}")
        texts += [*self.spec.overrides, *self.more]
        return list({text.partition("=")[0]: text for text in texts}.values())

    @property
    def base(self) -> Path:
        return ROOT / (self.spec.base or self.grid.base)

    @cached_property
    def config(self) -> Config:
        return Config.from_file(self.base, self.overrides, needs_files=False)

    @property
    def is_trained(self) -> bool:
        return (self.folder / f"checkpoint_{self.config.num_epochs}").is_dir()

    @property
    def is_done(self) -> bool:
        return self.is_trained and (self.run in self.grid.beginnings or self.is_evaluated)

    @property
    def is_evaluated(self) -> bool:
        """Whether there is an evaluation, a whole one, on the questions that are now in test_path."""
        if not (self.folder / "eval/metrics.json").is_file():
            return False
        try:
            answered = [prediction["question"] for prediction in self.predictions()]
        except (OSError, ValueError):
            return False  # the evaluation was killed while it wrote
        return answered == [example["question"] for example in self.test_examples()]

    def predictions(self) -> list[dict]:
        """Of its evaluation, in the order of the questions. Raises OSError and ValueError where it is not whole."""
        text = (self.folder / "eval/predictions.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.removesuffix("\n").split("\n")]  # an output may hold U+2028

    def test_examples(self) -> list[dict]:
        return load_examples(self.grid.test_path, self.config.max_eval_examples)

    def commands(self) -> list[list[str]]:
        """What is still to do: to train, and to evaluate on the test split."""
        start = [*self.launcher, str(ROOT / "run.py"), str(self.base), *self.overrides]
        of_training = ("from_scratch", "load_model_path", "resume", "val_path")
        of_test = [text for text in start if text.partition("=")[0] not in of_training]
        of_test += ["only_eval=true", "from_scratch=false", f"load_model_path={self.folder}"]
        of_test.append(f"val_path={self.grid.test_path}")
        commands = [] if self.is_trained else [start]
        return commands if self.run in self.grid.beginnings or self.is_done else [*commands, of_test]

    @property
    def launcher(self) -> list[str]:
        if self.n_gpus <= 1:
            return [sys.executable]
        return ["bash", str(ROOT / "slurm/launch.sh"), "--standalone", "--nproc_per_node", str(self.n_gpus)]

    @cached_property
    def digest(self) -> str:
        """Of all that decides its result: keys, data, the model's shape."""
        found = hashlib.sha256()
        values = asdict(self.config)
        free = {key.name for key in fields(Config) if key.metadata["free"]}
        free |= {key.name for key in fields(Config) if key.metadata["later"] and values[key.name] == key.default}
        keys = {name: value for name, value in values.items() if name not in free}
        found.update(json.dumps(keys, sort_keys=True).encode())
        for path in (self.config.train_path, self.grid.test_path, Path(self.config.model_id) / "config.json"):
            found.update(Path(path).read_bytes() if Path(path).is_file() else str(path).encode())
        return found.hexdigest()[:16] + (self.begin.digest if self.begin else "")

    def epochs(self) -> list[dict]:
        """What metrics.jsonl says of its epochs; a restarted run repeats those that it had lost."""
        records = [record for record in read_log(self.folder / "metrics.jsonl") if record["event"] == "epoch"]
        return list({record["epoch"]: record for record in records}.values())


def prepare(grid: Grid) -> None:
    """Makes the files that the grid needs and that are not there. Raises UserError where a script fails."""
    for path, script in grid.needs.items():
        if not Path(path).exists():
            print(f"making {path}", flush=True)
            done = subprocess.run([sys.executable, *shlex.split(script)], capture_output=True, text=True, check=False)
            if done.returncode or not Path(path).exists():
                last_line = next(reversed(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
                raise UserError(f"{path} could not be made by {script}: {last_line}")


def read_results(grid: Grid, out: Path) -> dict[str, list[dict]]:
    """The rows of each run in an earlier report; those of an old one lack the digest. Raises UserError where the file
    is damaged."""
    path = out / f"{grid.name}.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        by_digest(results)
        return results
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not what this program wrote ({error!r}); move it away") from None


def by_digest(results: dict[str, list[dict]]) -> dict[str, dict]:
    """Digest of a job -> its row, for the rows that say with which keys they were made."""
    return {row["digest"]: row for rows in results.values() for row in rows if "digest" in row and "seed" in row}


def jobs_of(
    grid: Grid, only: list[str] | None, seeds: list[int] | None, more: tuple[str, ...], n_gpus: int = 1
) -> list[Job]:
    """All jobs, seed by seed, so that an interrupted grid has whole seeds; a beginning before what needs it."""
    if unknown := set(only or ()) - grid.runs.keys():
        raise UserError(f"{grid.name} has no run {', '.join(sorted(unknown))}; there are {', '.join(grid.runs)}")
    found: dict[str, Job] = {}
    every_seed = sorted({seed for spec in grid.runs.values() for seed in spec.seeds or grid.seeds})
    for seed in every_seed if seeds is None else seeds:
        for run, spec in grid.runs.items():
            wanted = seeds is not None or seed in (spec.seeds or grid.seeds)
            if wanted and (only is None or run in only):
                job = Job(grid, run, seed, more, n_gpus)
                if job.begin is not None:
                    found.setdefault(job.begin.name, job.begin)
                found.setdefault(job.name, job)
    return list(found.values())


def check_folders(jobs: list[Job]) -> None:
    """Raises UserError where a job's folder holds a run with other keys: its results would be taken for this grid's."""
    from checkpoint import changes  # which waits for torch

    for job in jobs:
        if others := changes(job.config, job.folder):
            raise UserError(f"{job.folder} holds another run ({'; '.join(others.values())}); move it away")


# ---------------------------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------------------------


def left_of(jobs: list[Job], recorded: dict[str, dict]) -> list[Job]:
    """What is to be run: jobs that are neither done nor recorded, and what they begin with."""
    runs = [job for job in jobs if job.run in job.grid.runs and not job.is_done and job.digest not in recorded]
    needed = {job.name for job in runs} | {job.begin.name for job in runs if job.begin is not None}
    return [job for job in jobs if job.name in needed and not job.is_done]


def work(waiting: list[Job], at_once: int) -> None:
    """Runs what is not done, so many at once, one core or a share of the GPUs each. Raises UserError that lists what
    failed, at the end."""
    from tqdm import tqdm

    failed: list[str] = []
    news = News(waiting)
    places: SimpleQueue[str | None] = SimpleQueue()
    for devices in shares(at_once, waiting[0].n_gpus):
        places.put(devices)
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(waiting), unit="run", desc=waiting[0].grid.name) as bar:
        tasks: dict[str, Future] = {}

        def attend(job: Job) -> None:
            if job.begin is not None:
                if job.begin.name in tasks:
                    tasks[job.begin.name].result()
                if not job.begin.is_trained:
                    return  # of which there is a complaint already
            devices = places.get()
            try:
                failed.extend(run_commands(job, devices))
            finally:
                places.put(devices)
            bar.update()

        for job in waiting:
            tasks[job.name] = pool.submit(attend, job)
        left = set(tasks.values())
        while left:
            _, left = wait(left, timeout=10)  # reading all logs again takes a while
            for line in news.lines():
                tqdm.write(line, file=sys.stderr)
    for task in tasks.values():
        task.result()
    if CHILDREN.stopping.is_set():
        raise UserError("stopped by a signal; start the same command again, and it goes on")
    if failed:
        raise UserError("; ".join(failed))


def shares(at_once: int, n_gpus: int) -> list[str | None]:
    """For each of the runs at once the GPUs that it sees, as CUDA_VISIBLE_DEVICES; None where there are none.

    Runs share GPUs where there are more runs. Raises UserError where one run needs more than there are.
    """
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = chosen.split(",") if chosen else [str(number) for number in range(torch.cuda.device_count())]
    if n_gpus > max(1, len(devices)):
        raise UserError(f"--gpus {n_gpus}: this machine has {len(devices)}")
    if not devices:
        return [None] * at_once
    places = range(0, at_once * n_gpus, n_gpus)
    return [",".join(devices[(place + gpu) % len(devices)] for gpu in range(n_gpus)) for place in places]


class News:
    """What the epochs of jobs have come to since it was asked last."""

    def __init__(self, jobs: list[Job]):
        self.told = {job: len(job.epochs()) for job in jobs}

    def lines(self) -> list[str]:
        found = []
        for job, n_told in self.told.items():
            epochs = job.epochs()
            for record in epochs[n_told:]:
                found.append(
                    f"{job.name}: epoch {record['epoch'] + 1} of {job.config.num_epochs}, stage "
                    f"{stage_name(record['stage'])}, validation accuracy {record['accuracy']:.1%}"
                )
            self.told[job] = len(epochs)
        return found


def run_commands(job: Job, devices: str | None) -> list[str]:
    """Runs what a job still needs, with its output in a file beside the run's folder; returns what went wrong."""
    log = job.folder.parent / "logs" / f"{job.name}.log"
    with writing(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    for command in job.commands():
        if CHILDREN.stopping.is_set():
            return []
        code = start(command, log, devices)
        if code and not CHILDREN.stopping.is_set():
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            return [f"{job.name} failed with exit code {code}: {lines[-1] if lines else ''} (see {log})"]
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
            process.send_signal(signal.SIGTERM if number == signal.SIGINT else number)


CHILDREN = Children()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="a YAML file of experiments/")
    parser.add_argument("--only", nargs="+", metavar="RUN", help="some of its runs")
    parser.add_argument("--seeds", type=int, nargs="+", help="of all runs, and in the report (default: the grid's)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once (default: the number of cores)")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="set keys of every run")
    parser.add_argument("--gpus", type=int, default=1, help="of one run, where there are GPUs (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print commands and what they will cost, and stop")
    parser.add_argument(
        "--peak", type=float, default=989e12, help="of a GPU, in FLOP/s, for --dry-run (default: an H100)"
    )
    parser.add_argument("--utilisation", type=float, default=0.3, help="of that peak, for --dry-run (default: 0.3)")
    parser.add_argument("--slurm", type=Path, metavar="FILE", help="write a SLURM array script of the runs, and stop")
    parser.add_argument("--anew", action="store_true", help="run again what only results/NAME.json remembers")
    parser.add_argument("--report", action="store_true", help="write the report of what there is, and stop")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="(default: results/)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if min(options.jobs, options.gpus) < 1 or not min(options.peak, options.utilisation) > 0:
        parser.error("--jobs and --gpus must be at least 1, --peak and --utilisation more than 0")
    if fixed := {"name", "seed"} & {text.partition("=")[0] for text in options.set}:
        parser.error(f"--set cannot set {' and '.join(sorted(fixed))}: each run has its own")
    try:
        grid = read_grid(options.grid)
        jobs = jobs_of(grid, options.only, options.seeds, tuple(options.set), options.gpus)
        prepare(grid)
        results = read_results(grid, options.out)
        waiting = left_of(jobs, {} if options.anew else by_digest(results))
        if options.dry_run:
            from costs import print_plan

            print_plan(jobs, waiting, options.peak * options.utilisation)
            return 0
        for job in jobs:
            Config.from_file(job.base, [*job.spec.overrides, *job.more])  # mistakes are found before the first run
        if options.slurm is not None:
            from slurm_array import write_array

            tell(write_array(waiting, options.grid, options.slurm))
            return 0
        check_folders(jobs)
        try:
            if waiting and not options.report:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    signal.signal(number, CHILDREN.hand_on)
                work(waiting, options.jobs)
        finally:
            from tables import write_report

            results = read_results(grid, options.out)  # again: another grid may have written it
            shown = jobs_of(grid, None, options.seeds, tuple(options.set), options.gpus)
            seeds = {job.seed for job in shown} | {row["seed"] for row in by_digest(results).values()}
            every = jobs_of(grid, None, sorted(seeds), tuple(options.set), options.gpus)
            tell(write_report(grid, every, results, {job.name for job in shown}, options.out))
    except UserError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
