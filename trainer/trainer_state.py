"""What a restart needs beside the model, in a checkpoint's folder trainer/: how far the run was, the optimizer's
averages, each rank's random numbers; state.json, optimizer/, random_RANK.pt."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from methods.sim_cot import SimCot
from trainer.distributed import World
from utils import as_json, parse_json

FORMAT = 2  # of state.json, and of coconut.json beside it
OPTIMIZER = "trainer/optimizer"


@dataclass
class Progress:
    """How far a run is. Part of every checkpoint."""

    epoch: int = 0  # finished epochs, and so the next one to run
    step: int = 0  # finished optimizer steps
    seen: int = 0  # examples of the unfinished epoch, in its order, that have been trained on
    losses: float = 0.0  # sum of the losses of its steps
    seconds: float = 0.0  # that it has taken
    skipped: int = 0  # steps of the run that skip_nonfinite has skipped
    best: dict[int, float] = field(default_factory=dict)  # stage -> best validation accuracy
    wandb_id: str | None = None
    data: str | None = None  # digest of the training data, as tokens.cache_tokens names it
    val: str | None = None  # SHA-256 of the validation file
    started_from: str | None = None  # the checkpoint that load_model_path stood for when the run began


def save_progress(folder: Path, progress: Progress, world_size: int) -> None:
    state = {"format": FORMAT, "world_size": world_size, **asdict(progress)}
    (folder / "trainer" / "state.json").write_text(as_json(state), encoding="utf-8")


def read_state(folder: Path) -> dict:
    """What `save_progress` has written. Raises OSError, and ValueError where it is damaged."""
    state = parse_json((folder / "trainer" / "state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError("it is no object")
    kinds = {"epoch": int, "step": int, "seen": int, "losses": (int, float), "seconds": (int, float), "best": dict}
    for name, kind in {"format": int, "world_size": int, **kinds}.items():
        if name in state and not isinstance(state[name], kind):  # older files have fewer
            raise ValueError(f"its {name} is {state[name]!r}")
    return state


def read_progress(folder: Path) -> Progress:
    """How far the run was when it wrote this checkpoint."""
    state = read_state(folder)
    known = {field.name for field in fields(Progress)}
    progress = Progress(**{name: value for name, value in state.items() if name in known})
    progress.best = {int(stage): accuracy for stage, accuracy in progress.best.items()}
    return progress


def save_optimizer(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """All ranks' averages, and the weights of SIM-CoT's step decoder. Collective: every rank must call it."""
    state = {"optimizer": {"state": get_optimizer_state_dict(model, optimizer)["state"]}}
    if isinstance(model, SimCot):
        state["step_decoder"] = get_model_state_dict(model.step_decoder)
    dcp.save(state, checkpoint_id=folder / OPTIMIZER)


def load_optimizer(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores the optimizer's averages from a checkpoint, on any number of ranks; its hyper-parameters are those of
    the configuration. Collective: every rank must call it.

    What the checkpoint does not have, begins anew: weights that never got a gradient have no averages, and another
    version of torch may keep more of them.
    """
    optimizer.zero_grad()  # where gradients wait for a step, torch makes no state to load into, and says nothing
    reader = dcp.FileSystemReader(folder / OPTIMIZER)
    saved = reader.read_metadata().state_dict_metadata
    whole = get_optimizer_state_dict(model, optimizer)
    whole["state"] = {
        name: {key: value for key, value in values.items() if f"optimizer.state.{name}.{key}" in saved}
        for name, values in whole["state"].items()
        if f"optimizer.state.{name}.step" in saved
    }
    dcp.load({"optimizer": {"state": whole["state"]}}, storage_reader=reader)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=whole, options=StateDictOptions(strict=False))


def load_step_decoder(folder: Path, model: SimCot) -> bool:
    """Gives the step decoder the weights that it had in a checkpoint; False where that has none. Collective."""
    reader = dcp.FileSystemReader(folder / OPTIMIZER)
    if not any(name.startswith("step_decoder.") for name in reader.read_metadata().state_dict_metadata):
        return False
    state = get_model_state_dict(model.step_decoder)
    dcp.load({"step_decoder": state}, storage_reader=reader)
    set_model_state_dict(model.step_decoder, state)
    return True


def save_random_state(folder: Path, world: World) -> None:
    """This rank's."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None,
    }
    torch.save(state, folder / "trainer" / f"random_{world.rank}.pt")


def load_random_state(folder: Path, world: World) -> bool:
    """Restores this rank's random numbers; False where the checkpoint is of another world size and has none for it."""
    if read_state(folder).get("world_size") != world.size:
        return False
    saved = torch.load(folder / "trainer" / f"random_{world.rank}.pt", weights_only=True)
    random.setstate(saved["python"])
    kind, keys, *rest = saved["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda"], world.device)
    return True


def rank_files(folder: Path, world_size: int) -> list[Path]:
    """The files that other ranks than 0 may have written: their random state, their shares of the optimizer."""
    metadata = dcp.FileSystemReader(folder / OPTIMIZER).read_metadata()
    shares = {entry.relative_path for entry in (metadata.storage_data or {}).values()}
    states = [folder / "trainer" / f"random_{rank}.pt" for rank in range(world_size)]
    return [*states, *(folder / OPTIMIZER / share for share in sorted(shares))]
