"""A grid's jobs: the runs of each seed, what each still needs, and what earlier reports remember of them."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

from grid_file import Grid, RunSpec

from config import Config
from examples import load_examples
from utils import UserError, read_log

ROOT = Path(__file__).resolve().parent.parent


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


def left_of(jobs: list[Job], recorded: dict[str, dict]) -> list[Job]:
    """What is to be run: jobs that are neither done nor recorded, and what they begin with."""
    runs = [job for job in jobs if job.run in job.grid.runs and not job.is_done and job.digest not in recorded]
    needed = {job.name for job in runs} | {job.begin.name for job in runs if job.begin is not None}
    return [job for job in jobs if job.name in needed and not job.is_done]
