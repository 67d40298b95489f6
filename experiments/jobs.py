"""A grid's jobs: the runs of each seed, what each still needs, and what earlier reports remember of them."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path

import yaml
from grid_file import Grid, RunSpec

from config import Config
from preprocessing.examples import load_examples
from trainer.files import file_digest, write_whole
from trainer.logger import read_log
from trainer.run_folder import checkpoints, has_ended, resolve
from utils import UserError, as_json, read_object

ROOT = Path(__file__).resolve().parent.parent
NOTE = "grid.json"  # in a run's folder: the digest of what it was trained on
# keys that decide what an evaluation says, though not the weights
OF_EVALUATION = ("max_new_tokens", "answer_match", "max_eval_examples", "mode", "eval_latents")
OF_EVALUATION += ("eval_latents_from_steps",)


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

    @cached_property
    def goes_on(self) -> bool:
        """Whether the job that it begins with is a part of its own curriculum, and not a lesson on other data."""
        if self.begin is None:
            return False
        own = Config.from_file(self.base, [*self.spec.overrides, *self.more], needs_files=False)
        return self.begin.config.train_path == own.train_path

    @property
    def source(self) -> str:
        """The checkpoint that is tested, and that others begin with, as load_model_path spells it."""
        return f"{self.folder}@best" if self.grid.checkpoint == "best" else str(self.folder)

    @cached_property
    def overrides(self) -> list[str]:
        """All that it sets on top of the base file; of each key the last counts."""
        texts = [f"save_path={self.grid.save_path}", f"name={self.name}", f"seed={self.seed}"]
        if self.begin is not None:
            texts += [f"load_model_path={self.begin.source}", "from_scratch=false"]
            texts.append(f"resume={self.begin.config.num_epochs if self.goes_on else 0}")
        texts += [*self.spec.overrides, *self.more]
        return list({text.partition("=")[0]: text for text in texts}.values())

    @property
    def base(self) -> Path:
        return ROOT / (self.spec.base or self.grid.base)

    @cached_property
    def config(self) -> Config:
        """Raises UserError, that names the run, where its keys are wrong."""
        try:
            return Config.from_file(self.base, self.overrides, needs_files=False)
        except UserError as error:
            raise UserError(f"run {self.run!r} of grid {self.grid.name}: {error}") from None

    def check_keys(self) -> None:
        """Raises UserError, that names the run, where its keys are wrong, with data or without."""
        problems = self.config.problems(self.n_gpus, needs_files=False)
        if self.config.train_path is None:
            problems.append(f"{self.base} lacks train_path")
        if self.config.debug:
            problems.append(f"{self.base} has debug set, which leaves no checkpoints")
        if problems:
            raise UserError(f"run {self.run!r} of grid {self.grid.name}: {'; '.join(problems)}")

    def problems(self) -> list[str]:
        """What is impossible about it now that there are data. The weights that it begins with may still be missing."""
        config = replace(self.config, load_model_path=None) if self.begin is not None else self.config
        return [f"run {self.run!r} of grid {self.grid.name}: {text}" for text in config.problems(self.n_gpus)]

    @property
    def is_trained(self) -> bool:
        found = checkpoints(self.folder)
        return bool(found) and has_ended(found[-1], self.config.num_epochs)

    @property
    def is_done(self) -> bool:
        return self.is_trained and (self.run in self.grid.beginnings or self.is_evaluated)

    @property
    def is_evaluated(self) -> bool:
        """Whether there is an evaluation, a whole one, of its last checkpoint, or its best, on the questions that are
        now in test_path, with the keys that are now set."""
        folder = self.folder / "eval"
        try:
            metrics = read_object(folder / "metrics.json")
            keys = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            answered = [prediction["question"] for prediction in self.predictions()]
            tested = resolve(self.source).name
            if any(keys[name] != getattr(self.config, name) for name in OF_EVALUATION if name in keys):
                return False
            whole = isinstance(metrics["accuracy"], float) and Path(metrics["checkpoint"]).name == tested
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError, RecursionError):
            return False  # there is none, or it was killed while it wrote
        return whole and answered == [example["question"] for example in self.test_examples()]

    def predictions(self) -> list[dict]:
        """Of its evaluation, in the order of the questions. Raises OSError and ValueError where it is not whole."""
        text = (self.folder / "eval/predictions.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.removesuffix("\n").split("\n")]  # an output may hold U+2028

    def test_examples(self) -> list[dict]:
        return load_examples(self.grid.test_path, self.config.max_eval_examples)

    def commands(self) -> list[list[str]]:
        """What is still to do: to train, and to evaluate on the test split, at the stage of the checkpoint."""
        start = [*self.launcher, str(ROOT / "run.py"), str(self.base), *self.overrides]
        of_training = ("from_scratch", "load_model_path", "resume", "val_path")
        of_test = [text for text in start if text.partition("=")[0] not in of_training]
        of_test += ["only_eval=true", "from_scratch=false", "resume=0", f"load_model_path={self.source}"]
        of_test.append(f"val_path={self.grid.test_path}")
        commands = [] if self.is_trained else [start]
        return commands if self.run in self.grid.beginnings or self.is_done else [*commands, of_test]

    @property
    def launcher(self) -> list[str]:
        if self.n_gpus <= 1:
            return [sys.executable]
        return ["bash", str(ROOT / "slurm/launch.sh"), "--standalone", "--nproc_per_node", str(self.n_gpus)]

    @cached_property
    def _of_files(self) -> list[str]:
        """Digests of what decides its weights beside its keys: data, the model's shape, the weights that it starts
        from."""
        found = [_content(self.config.train_path), _content(str(Path(self.config.model_id) / "config.json"))]
        if self.begin is not None:
            found.append(self.begin.of_training)
        elif not self.config.from_scratch:
            found += [_content(self.config.model_id), _content(self.config.load_model_path)]
        return found

    @cached_property
    def of_training(self) -> str:
        """A digest of all that decides its weights."""
        values = asdict(self.config)
        free = {key.name for key in fields(Config) if key.metadata["free"]}
        free |= {key.name for key in fields(Config) if key.metadata["later"] and values[key.name] == key.default}
        keys = {name: value for name, value in values.items() if name not in free}
        keys["method"] = self.config.rules.variant_of or self.config.method  # as it was before it had a name
        return _digest(json.dumps(keys, sort_keys=True), *self._of_files)

    @cached_property
    def digest(self) -> str:
        """Of all that decides its result: the above, the test split, and how it is evaluated."""
        keys = {name: getattr(self.config, name) for name in OF_EVALUATION} | {"checkpoint": self.grid.checkpoint}
        return _digest(self.of_training, _content(self.grid.test_path), json.dumps(keys, sort_keys=True))

    def note(self) -> None:
        """Notes in its folder, before the first step, what it is trained on. Raises UserError."""
        if not checkpoints(self.folder):
            write_whole(self.folder / NOTE, as_json({"digest": _digest(*self._of_files)}))

    @property
    def others(self) -> list[str]:
        """In what its folder's run is another than this one; empty where there is none yet."""
        from trainer.checkpoint import changes  # which waits for torch

        found = list(changes(self.config, self.folder).values())
        if found or not checkpoints(self.folder):
            return found
        try:
            noted = read_object(self.folder / NOTE)
        except UserError:
            return []  # trained by hand, or before there were notes
        same = noted.get("digest") == _digest(*self._of_files)
        return [] if same else ["trained on other data, or from other weights"]

    def epochs(self) -> list[dict]:
        """What metrics.jsonl says of its epochs; a restarted run repeats those that it had lost."""
        records = [record for record in read_log(self.folder / "metrics.jsonl") if record["event"] == "epoch"]
        return list({record["epoch"]: record for record in records}.values())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _content(path: str | None) -> str:
    """A digest of a file, or of a folder's weights; where they are not here, their name has to do."""
    where = Path(path or "")
    files = sorted([*where.glob("*.safetensors"), *where.glob("*.bin")]) if path and where.is_dir() else [where]
    digests = [_cached_digest(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return _digest(*digests) if digests else str(path)


@cache
def _cached_digest(file: Path, _size: int, _changed: int) -> str:
    """Many jobs share a file, which may be made anew under way."""
    return file_digest(file)


def read_results(grid: Grid, out: Path) -> dict[str, list[dict]]:
    """What results/NAME.json remembers. Raises UserError where it is damaged."""
    path = out / f"{grid.name}.json"
    return read_object(path) if path.is_file() else {}


def by_digest(results: dict[str, list[dict]]) -> dict[str, dict]:
    """Digest of a job -> its row."""
    return {row["digest"]: row for rows in results.values() for row in rows}


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
    """Raises UserError where a job's folder holds another run, whose results would be taken for this grid's."""
    for job in jobs:
        if others := job.others:
            raise UserError(f"{job.folder} holds another run ({'; '.join(others)}); move it away")


def left_of(jobs: list[Job], recorded: dict[str, dict]) -> list[Job]:
    """What is to be run: jobs that are neither done nor recorded, and what they begin with."""
    runs = [job for job in jobs if job.run in job.grid.runs and not job.is_done and job.digest not in recorded]
    needed = {job.name for job in runs} | {job.begin.name for job in runs if job.begin and not job.is_trained}
    return [job for job in jobs if job.name in needed and not job.is_done]
