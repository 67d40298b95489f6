"""A restart is bitwise the undisturbed run, and needs every part of the saved state for that."""

import math
import random
import shutil
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import lines_of, main, read_json, with_dropout
from safetensors.torch import load_file

import run
from trainer import checkpoint, pretrained
from trainer.checkpoint import Progress
from trainer.distributed import StopSignal, World
from trainer.logger import RunLogger
from trainer.run_folder import checkpoints

KEYS = (
    *("method=sim_cot", "step_decoder=copy", "thought=projected", "c_thought=1", "max_latent_stage=2"),
    *("curriculum=none", "uniform_prob=0", "num_epochs=2", "max_train_examples=40", "max_eval_examples=2"),
    *("max_new_tokens=1", "save_only_improve=true", "skip_nonfinite=true", "log_every_steps=1"),
)
LORA = (*KEYS, "method=coconut", "step_decoder=none", "lora_rank=2")
# one epoch of stage 0: its second is passed over; or its accuracy must reach advance_at in a second one
EARLY = (*KEYS, "curriculum=staged", "epochs_per_stage=2", "num_epochs=4", "advance_at=0", "lr_scheduler=linear")
AGAIN = (*EARLY, "epochs_per_stage=3", "num_epochs=4", "advance_after=2")
WRITTEN = (
    *("event", "step", "epoch", "stage", "loss", "auxiliary_loss", "lr"),
    *("train_loss", "train_seconds", "skipped", "accuracy"),
)


class Steps:
    """Replaces the clock, a loss, the check of a step, wandb and signals by functions of the number of steps."""

    def __init__(self, monkeypatch, stop_after: int | None = None, done: int = 0):
        self.done, original, open_log, train_step = done, run.update_weights, RunLogger.open, run.train_step

        def update_weights(*arguments) -> None:
            original(*arguments)
            self.done += 1

        def open_as(logger, config: dict, wandb_id: str | None = None) -> str:
            open_log(logger, config)
            return wandb_id or f"begun after {self.done} steps"

        def train_step_with_nan(*arguments) -> torch.Tensor:
            losses = train_step(*arguments)
            return losses * math.nan if self.done == 6 else losses  # in the second epoch

        monkeypatch.setattr(run, "update_weights", update_weights)
        monkeypatch.setattr(run, "train_step", train_step_with_nan)
        monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=lambda: float(self.done)))
        monkeypatch.setattr(run.parallel, "step_is_finite", lambda *_: self.done != 1)
        monkeypatch.setattr(RunLogger, "open", open_as)
        monkeypatch.setattr(StopSignal, "requested", lambda *_, **__: self.done == stop_after)


def outcome(folder) -> dict:
    """Returns the weights, averages, log, progress and checkpoints of a run that has ended."""
    last = checkpoints(folder)[-1]
    reader = dcp.FileSystemReader(last / checkpoint.OPTIMIZER)
    sizes = {name: of.size for name, of in reader.read_metadata().state_dict_metadata.items() if hasattr(of, "size")}
    state = {name: torch.empty(size) for name, size in sizes.items()}
    dcp.load(state, storage_reader=reader)
    for path in sorted(last.rglob("*.safetensors")):
        state |= {f"{path.name} {name}": value for name, value in load_file(path).items()}
    records = lines_of(folder / "metrics.jsonl")
    return {
        "tensors": {name: value.numpy().tobytes() for name, value in state.items()},
        "log": [{name: repr(record[name]) for name in WRITTEN if name in record} for record in records],
        "progress": read_json(last / "trainer" / "state.json"),
        "checkpoints": [path.name for path in checkpoints(folder)],
    }


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """keys -> all keys, an interrupted run's folder, and the outcome of an undisturbed run."""
    known, model = {}, with_dropout(place)

    def of(keys: tuple[str, ...]):
        more = (*keys, f"model_id={model}", f"load_model_path={model}")
        if keys not in known:
            folders = []
            for stop_after in (None, 7):  # two steps into the second epoch
                with pytest.MonkeyPatch.context() as patched:
                    Steps(patched, stop_after)
                    folders.append(main(place, *more, f"save_path={tmp_path_factory.mktemp('restart')}"))
            known[keys] = more, folders[1], outcome(folders[0])
        return known[keys]

    return of


def without_field(name: str):
    def patch(monkeypatch) -> None:
        original, initial = checkpoint.read_progress, getattr(Progress(), name)

        def read(folder) -> Progress:
            progress = original(folder)
            assert getattr(progress, name) != initial
            setattr(progress, name, initial)
            return progress

        monkeypatch.setattr(checkpoint, "read_progress", read)

    return patch


def without(module, name: str, result=None):
    return lambda monkeypatch: monkeypatch.setattr(module, name, lambda *_: result)


def without_updates(monkeypatch) -> None:
    original = pretrained.lora.apply_lora
    monkeypatch.setattr(
        pretrained.lora, "apply_lora", lambda base, rank, alpha, folder, drop: original(base, rank, alpha, None, drop)
    )


# setup_run compares `token_ids` and `scored_by` (test_faults.py); `begun` is for another `resume` (test_run.py)
PROGRESS = [field.name for field in fields(Progress) if field.name not in ("token_ids", "scored_by", "begun")]
OTHER_KEYS = {"at_goal": AGAIN, "passed_over": EARLY}
PARTS = {
    **{f"progress: {name}": (OTHER_KEYS.get(name, KEYS), without_field(name)) for name in PROGRESS},
    "the optimizer's averages": (KEYS, without(checkpoint, "load_optimizer")),
    "random numbers": (KEYS, without(checkpoint, "load_random_state", True)),
    "the companion": (KEYS, without(checkpoint, "load_companions", [])),
    "the thought": (KEYS, without(pretrained, "_load_thought")),
    "LoRA's updates": (LORA, without_updates),
}


def restarted(runs, place, keys, tmp_path, monkeypatch, patch=lambda _: None) -> tuple[dict, dict]:
    """Returns the outcomes of a restarted run and of the undisturbed one."""
    more, interrupted, wanted = runs(keys)
    shutil.copytree(interrupted, tmp_path / "run")
    Steps(monkeypatch, done=7)
    patch(monkeypatch)
    return outcome(main(place, *more, f"save_path={tmp_path}")), wanted


@pytest.mark.parametrize("keys", [KEYS, LORA, EARLY, AGAIN], ids=["all parts", "LoRA", "early", "again"])
def test_a_restart_is_bitwise_the_undisturbed_run(runs, place, keys, tmp_path, monkeypatch):
    found, wanted = restarted(runs, place, keys, tmp_path, monkeypatch)
    for name, value in wanted.items():
        assert found[name] == value, name


@pytest.mark.parametrize("part", PARTS)
def test_without_a_part_it_is_not(runs, place, part, tmp_path, monkeypatch):
    """Tests passed without the weights of SIM-CoT's decoder in a restart."""
    keys, patch = PARTS[part]
    found, wanted = restarted(runs, place, keys, tmp_path, monkeypatch, patch)
    assert found != wanted


def test_each_rank_gets_its_own_random_numbers(tmp_path):
    (tmp_path / "trainer").mkdir()
    checkpoint.save_progress(tmp_path, Progress(), world_size=2)
    worlds = [World(rank=rank, size=2, local_rank=rank, device=torch.device("cpu")) for rank in range(2)]

    def draw() -> list[float]:
        return [random.random(), np.random.random(), torch.rand(1).item()]

    drawn = []
    for world in worlds:
        run.seed_everything(0, world.rank)
        checkpoint.save_random_state(tmp_path, world)
        drawn.append(draw())
    assert not set(drawn[0]) & set(drawn[1])
    for world, wanted in zip(worlds, drawn, strict=True):
        assert checkpoint.load_random_state(tmp_path, world)
        assert draw() == wanted
