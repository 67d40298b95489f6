"""The jobs of a grid: what each still has to do, and which recorded results count as finished runs."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, cached_property
from pathlib import Path

from grid_file import Grid, RunSpec

from config import GENERATION_KEYS, Config
from preprocessing.examples import load_examples
from trainer.files import file_digest, write_whole
from trainer.logger import latest, read_log
from trainer.run_folder import checkpoints, has_ended, read_config, resolve
from utils import UserError, as_json, read_object

ROOT = Path(__file__).resolve().parent.parent
INPUTS = "grid.json"  # in a run's folder: the digest of the files that it is trained on
EVALUATION_KEYS = ("max_new_tokens", "answer_match", "max_eval_examples", "mode", "eval_latents")
EVALUATION_KEYS += ("eval_latents_from_steps",)


@dataclass(frozen=True, eq=False)
class Job:
    """One run with one seed."""

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
        """The job whose weights this job starts from."""
        return replace(self, run=self.spec.begins_with) if self.spec.begins_with else None

    @cached_property
    def shares_curriculum(self) -> bool:
        """Whether `begin` has the same training data: its epochs are then the first ones of this job's curriculum."""
        if self.begin is None:
            return False
        own = Config.from_file(self.base, _last_of_each_key([*self.spec.overrides, *self.more]), needs_files=False)
        return self.begin.config.train_path == own.train_path

    @property
    def checkpoint(self) -> str:
        """The checkpoint that is tested and that other jobs start from, as a value of load_model_path."""
        return f"{self.folder}@best" if self.grid.checkpoint == "best" else str(self.folder)

    @cached_property
    def overrides(self) -> list[str]:
        """The key=value arguments on top of the base file, each key once: the last one of a key wins."""
        texts = [f"save_path={self.grid.save_path}", f"name={self.name}", f"seed={self.seed}"]
        if self.begin is not None:
            texts += [f"load_model_path={self.begin.checkpoint}", "from_scratch=false"]
            texts.append(f"resume={self.begin.config.num_epochs if self.shares_curriculum else 0}")
        return _last_of_each_key([*texts, *self.spec.overrides, *self.more])

    @property
    def base(self) -> Path:
        return ROOT / (self.spec.base or self.grid.base)

    @cached_property
    def config(self) -> Config:
        """Raises UserError that names the run if its keys are wrong."""
        try:
            return Config.from_file(self.base, self.overrides, needs_files=False)
        except UserError as error:
            raise UserError(f"run {self.run!r} of grid {self.grid.name}: {error}") from None

    def check_keys(self) -> None:
        """Raises UserError that names the run if its keys are wrong; needs no data."""
        problems = self.config.problems(self.n_gpus, needs_files=False)
        if self.config.train_path is None:
            problems.append(f"{self.base} lacks train_path")
        if self.config.debug:
            problems.append(f"{self.base} has debug set, which leaves no checkpoints")
        if problems:
            raise UserError(f"run {self.run!r} of grid {self.grid.name}: {'; '.join(problems)}")

    def problems(self) -> list[str]:
        """Returns the configuration's problems, with data present; the weights of `begin` may still be missing."""
        config = replace(self.config, load_model_path=None) if self.begin is not None else self.config
        return config.problems(self.n_gpus)

    @property
    def is_trained(self) -> bool:
        found = checkpoints(self.folder)
        return bool(found) and has_ended(found[-1], self.config.num_epochs)

    @property
    def is_done(self) -> bool:
        return self.is_trained and (self.run in self.grid.beginnings or self.is_evaluated)

    @property
    def is_evaluated(self) -> bool:
        """Whether its folder has a complete evaluation of `checkpoint` with the current test file and keys."""
        folder = self.folder / "eval"
        try:
            metrics = read_object(folder / "metrics.json")
            keys, notes = read_config(folder / "config.yaml")
            is_same = notes.get("SHA-256 of val_path") == file_digest(Path(self.grid.test_path))
            tested = resolve(self.checkpoint).name
            names = [name for name in (*EVALUATION_KEYS, *GENERATION_KEYS) if name in keys]
            if any(keys[name] != getattr(self.config, name) for name in names):
                return False
            is_whole = isinstance(metrics["accuracy"], float) and len(self.predictions()) == metrics["examples"]
            return is_same and is_whole and Path(metrics["checkpoint"]).name == tested
        except (OSError, ValueError, KeyError, TypeError):
            return False  # there is none, or the evaluation was killed while it wrote

    def predictions(self) -> list[dict]:
        """Returns the predictions of its evaluation in the order of the questions. Raises OSError and ValueError if the
        file is incomplete."""
        text = (self.folder / "eval/predictions.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.removesuffix("\n").split("\n")]  # an output may hold U+2028

    def test_examples(self) -> list[dict]:
        return load_examples(self.grid.test_path, self.config.max_eval_examples)

    def commands(self) -> list[list[str]]:
        """Returns the commands that are left: training, and the evaluation of the checkpoint on the test split."""
        train = [*self.launcher, str(ROOT / "run.py"), str(self.base), *self.overrides]
        training_keys = ("from_scratch", "load_model_path", "resume", "val_path")
        test = [text for text in train if text.partition("=")[0] not in training_keys]
        test += ["only_eval=true", "from_scratch=false", "resume=0", f"load_model_path={self.checkpoint}"]
        test.append(f"val_path={self.grid.test_path}")
        commands = [] if self.is_trained else [train]
        return commands if self.run in self.grid.beginnings or self.is_done else [*commands, test]

    @property
    def launcher(self) -> list[str]:
        if self.n_gpus <= 1:
            return [sys.executable]
        return ["bash", str(ROOT / "slurm/launch.sh"), "--standalone", "--nproc_per_node", str(self.n_gpus)]

    @cached_property
    def _input_digests(self) -> list[str]:
        """Digests of the files that decide its weights: data, model shape, initial weights, its method's files."""
        shape = str(Path(self.config.model_id) / "config.json")
        found = [_content_digest(self.config.train_path), _content_digest(shape)]
        if self.begin is not None:
            found.append(self.begin.training_digest)
        elif not self.config.from_scratch:
            found += [_content_digest(self.config.model_id), _content_digest(self.config.load_model_path)]
        own = [getattr(self.config, key.name) for key in fields(Config) if key.metadata["file"]]
        return found + [_content_digest(path) for path in own if Path(path).is_file()]

    @cached_property
    def training_digest(self) -> str:
        """A digest of everything that decides its weights: the keys and `_input_digests`."""
        values = asdict(self.config)
        free = {key.name for key in fields(Config) if key.metadata["free"]}
        free |= {key.name for key in fields(Config) if key.metadata["later"] and values[key.name] == key.default}
        keys = {name: value for name, value in values.items() if name not in free}
        keys["method"] = self.config.rules.variant_of or self.config.method  # older results recorded the variant's base
        return _digest(json.dumps(keys, sort_keys=True), *self._input_digests)

    @cached_property
    def digest(self) -> str:
        """A digest of everything that decides its result: training, test split, evaluation keys."""
        keys = {name: getattr(self.config, name) for name in EVALUATION_KEYS} | {"checkpoint": self.grid.checkpoint}
        keys["max_new_tokens"] = self.config.n_new_tokens
        for name, default in GENERATION_KEYS.items():
            if (value := getattr(self.config, name)) != default:  # so older results keep their digest
                keys[name] = value
        return _digest(self.training_digest, _content_digest(self.grid.test_path), json.dumps(keys, sort_keys=True))

    def record_inputs(self) -> None:
        """Writes the digest of its input files to its folder, before the first checkpoint. Raises UserError."""
        if not checkpoints(self.folder):
            write_whole(self.folder / INPUTS, as_json({"digest": _digest(*self._input_digests)}))

    @property
    def conflicts(self) -> list[str]:
        """How the run in its folder differs from this job; empty if the folder holds no run."""
        from trainer.checkpoint import changed_keys  # imports torch

        found = list(changed_keys(self.config, self.folder).values())
        if found or not checkpoints(self.folder):
            return found
        try:
            recorded = read_object(self.folder / INPUTS)
        except UserError:
            return []  # started by hand, or before grids recorded inputs
        is_same = recorded.get("digest") == _digest(*self._input_digests)
        return [] if is_same else ["trained on other data, or from other weights"]

    def epochs(self) -> list[dict]:
        """Returns the epoch records of metrics.jsonl, without those that a restart repeated."""
        return list(latest(read_log(self.folder / "metrics.jsonl"), "epoch").values())


def _last_of_each_key(texts: list[str]) -> list[str]:
    return list({text.partition("=")[0]: text for text in texts}.values())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _content_digest(path: str | None) -> str:
    """Returns a digest of a file, or of the weights in a folder; the path itself if it is not on this machine."""
    where = Path(path or "")
    files = sorted([*where.glob("*.safetensors"), *where.glob("*.bin")]) if path and where.is_dir() else [where]
    digests = [_cached_digest(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return _digest(*digests) if digests else str(path)


@cache
def _cached_digest(file: Path, _size: int, _changed: int) -> str:
    """Hashes a file that many jobs share once, and again if it changes."""
    return file_digest(file)


def read_results(grid: Grid, out: Path) -> dict[str, list[dict]]:
    """Returns the recorded results of NAME.json, run -> a row per seed. Raises UserError if the file is damaged."""
    path = out / f"{grid.name}.json"
    results = read_object(path) if path.is_file() else {}
    for run, rows in results.items():
        rows = rows if isinstance(rows, list) else [None]
        if not all(isinstance(row, dict) and {"seed", "digest"} <= row.keys() for row in rows):
            raise UserError(f"{path}: {run!r} must be a list of objects with a seed and a digest")
    return results


def by_digest(results: dict[str, list[dict]]) -> dict[str, dict]:
    """Returns the rows of recorded results by the digest of their job."""
    return {row["digest"]: row for rows in results.values() for row in rows}


def jobs_of(
    grid: Grid, only: list[str] | None, seeds: list[int] | None, more: tuple[str, ...], n_gpus: int = 1
) -> list[Job]:
    """Returns the jobs of some runs and seeds (default: all), ordered by seed, so that an interrupted grid has complete
    seeds; a beginning comes before the runs that start from it."""
    if unknown := set(only or ()) - grid.runs.keys():
        raise UserError(f"{grid.name} has no run {', '.join(sorted(unknown))}; its runs are {', '.join(grid.runs)}")
    found: dict[str, Job] = {}
    every_seed = sorted({seed for spec in grid.runs.values() for seed in spec.seeds or grid.seeds})
    for seed in every_seed if seeds is None else seeds:
        for run, spec in grid.runs.items():
            is_chosen = seeds is not None or seed in (spec.seeds or grid.seeds)
            if is_chosen and (only is None or run in only):
                job = Job(grid, run, seed, more, n_gpus)
                if job.begin is not None:
                    found.setdefault(job.begin.name, job.begin)
                found.setdefault(job.name, job)
    return list(found.values())


def check_folders(jobs: list[Job]) -> None:
    """Raises UserError if the folder of a job holds another run, whose results would count as the job's."""
    for job in jobs:
        if conflicts := job.conflicts:
            raise UserError(f"{job.folder} holds another run ({'; '.join(conflicts)}); move it away")


def unfinished(jobs: list[Job], recorded: dict[str, dict]) -> list[Job]:
    """Returns the jobs that are neither done nor recorded, and the untrained jobs that they start from."""
    runs = [job for job in jobs if job.run in job.grid.runs and not job.is_done and job.digest not in recorded]
    needed = {job.name for job in runs} | {job.begin.name for job in runs if job.begin and not job.is_trained}
    return [job for job in jobs if job.name in needed and not job.is_done]
