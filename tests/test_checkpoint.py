"""Checkpoints: saving, finding, restoring."""

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from conftest import equal, flip, raising, read_json, refuses
from safetensors.torch import load_file, save_file
from test_pretrained import coconut_config
from test_pretrained import tiny as tiny  # a fixture
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from config import Config
from trainer import checkpoint
from trainer.checkpoint import Progress
from trainer.distributed import World
from trainer.pretrained import Pretrained, load_model
from trainer.run_folder import resolve
from utils import UserError


@pytest.fixture
def saving(tiny, tmp_path, world):
    """keys -> a configuration, its model, and a function that saves it after an epoch."""

    def of(**keys) -> tuple[Config, Pretrained, Callable[..., Path]]:
        config = coconut_config(tiny, **{"save_path": str(tmp_path / "runs"), "name": "run", **keys})
        pretrained = load_model(config, None)

        def save(epoch: int, accuracy: float = 0.5, stage: int = 0) -> Path:
            optimizer = torch.optim.AdamW(pretrained.model.parameters(), lr=1e-3)
            progress = Progress(epoch, 10 * epoch, best={stage: max(accuracy, 0.5)})
            files = {"metrics.json": json.dumps({"accuracy": accuracy}), "predictions.jsonl": ""}
            return checkpoint.save(config, world, pretrained, optimizer, progress, stage, files)

        return config, pretrained, save

    return of


def names(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoint.checkpoints(run_dir)]


def test_only_complete_checkpoints_are_found(saving, tmp_path):
    config, _, save = saving()
    for epoch in (2, 10, 9):
        save(epoch)
    run = config.run_dir
    for name in (".writing-checkpoint_11", "checkpoint_12", "checkpoint_best"):
        (run / name).mkdir()
    (run / "checkpoint_13").write_text("of the reference")
    assert names(run) == ["checkpoint_2", "checkpoint_9", "checkpoint_10"]
    assert resolve(str(run)).name == "checkpoint_10"
    assert checkpoint.read_progress(run / "checkpoint_9") == Progress(9, 90, best={0: 0.5})
    save(13)
    assert (run / "checkpoint_13.replaced-1").read_text() == "of the reference"
    assert not list(run.glob(".writing-checkpoint_13"))
    refuses("is no checkpoint", resolve, str(tmp_path))


def test_an_optimizer_without_state_is_saved_without_it(saving, tmp_path):
    """Bug: torch made the state by a step, which later bias corrections counted; with skip_nonfinite, if all steps
    before a save were skipped."""
    model = saving()[1].model
    optimizer, other = (torch.optim.AdamW(model.parameters()) for _ in range(2))
    checkpoint.save_optimizer(tmp_path, model, optimizer)
    assert not optimizer.state
    checkpoint.load_optimizer(tmp_path, model, other)
    assert not any(values for values in other.state.values())


def test_a_checkpoint_can_be_chosen(saving, tmp_path, capsys):
    """In a run with two stages, where accuracy is higher in the first, easier one."""
    config, _, save = saving()
    for epoch, stage, accuracy in ((1, 0, 0.9), (2, 1, 0.5), (3, 1, 0.7), (4, 1, 0.7), (5, 1, 0.1)):
        save(epoch, accuracy, stage)
    run = config.run_dir
    assert resolve(str(run)).name == "checkpoint_5"
    assert resolve(f"{run}@best").name == "checkpoint_4"  # the last stage; the later of equals
    assert resolve(f"{run}@2").name == "checkpoint_2"
    # bug: read as a file of the reference, without stage, thought and adapter, with new rows for the markers
    assert resolve(f"{run}/checkpoint_2/model.safetensors") == run / "checkpoint_2"
    (run / "checkpoint_4" / "metrics.json").write_text("{")
    assert resolve(f"{run}@best").name == "checkpoint_3"
    assert f"{run / 'checkpoint_4'} is damaged" in capsys.readouterr().err
    (run / "checkpoint_5" / "coconut.json").rename(tmp_path / "taken")
    assert resolve(str(run)).name == "checkpoint_4"
    assert f"{run / 'checkpoint_5'} is damaged" in capsys.readouterr().err
    (tmp_path / "taken").rename(run / "checkpoint_5" / "coconut.json")
    refuses(r"expected RUN@best or RUN@EPOCHS; .* has the epochs 1, 2, 3, 4, 5", resolve, f"{run}@last")
    refuses("is no run's folder with a complete checkpoint", resolve, f"{tmp_path}@best")
    strange = run.rename(tmp_path / "a@best")
    assert resolve(str(strange)).name == "checkpoint_5"  # an existing folder's name
    for path in strange.glob("*/metrics.json"):
        path.unlink()
    refuses(r"no checkpoint of .* has a validation accuracy", resolve, f"{strange}@best")


def test_a_thoughts_parameters_are_restored_and_must_fit(saving, tiny):
    config, pretrained, save = saving(thought="projected")
    with torch.no_grad():
        pretrained.model.thought.weight.normal_()  # away from the identity
    folder = save(1)
    file = folder / "thought.safetensors"
    weight = load_file(file)["weight"]
    assert torch.equal(load_model(config, folder)[0].thought.weight, weight)
    assert not torch.equal(weight, torch.eye(32))
    assert "thought.safetensors" in read_json(folder / "trainer" / "manifest.json")
    # model.safetensors holds the model alone, for other programs
    assert load_file(folder / "model.safetensors").keys() == load_file(Path(tiny) / "model.safetensors").keys()
    # other folders lack it: it is re-initialised; a thought without parameters writes no file
    assert torch.equal(load_model(config, Path(tiny))[0].thought.weight, torch.eye(32))
    assert not (saving(name="plain")[2](1) / "thought.safetensors").exists()
    with pytest.raises(UserError, match=r"does not fit the thought normalised: weights unexpected: weight"):
        load_model(coconut_config(tiny, thought="normalised"), folder)
    for weights, complaint in (
        ({"weight": torch.eye(7)}, r"of another shape: weight \[7, 7\] instead of \[32, 32\]"),
        ({"bias": torch.eye(32)}, r"missing: weight; unexpected: bias"),
    ):
        save_file(weights, file)
        refuses(complaint, load_model, config, folder)
    file.write_bytes(b"nothing")
    refuses(r"thought.safetensors cannot be read", load_model, config, folder)
    file.unlink()
    refuses(r"was trained with the thought projected, but lacks thought.safetensors", load_model, config, folder)


def test_a_file_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(repo, file, local_files_only):
        asked.append((repo, file))
        if file == "none":
            raise huggingface_hub.errors.EntryNotFoundError("404 no such file")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert resolve("someone/coconut-gsm:checkpoint_33") == tmp_path / "checkpoint_33"
    assert asked == [("someone/coconut-gsm", "checkpoint_33")]
    with pytest.raises(UserError, match="coconut-gsm:none' cannot be downloaded from the hub: 404 no such file"):
        resolve("someone/coconut-gsm:none")


def test_old_checkpoints_are_removed_but_never_the_best(saving):
    config, _, save = saving(keep_checkpoints=1)
    for epoch, accuracy in ((1, 0.2), (2, 0.5), (3, 0.4), (4, 0.5), (5, 0.1)):
        save(epoch, accuracy)
    assert names(config.run_dir) == ["checkpoint_4", "checkpoint_5"]


def test_an_old_checkpoint_that_was_moved_and_linked_loses_only_its_link(saving, tmp_path, capsys):
    """rmtree refuses a link, which ended the run after a good save, and every restart."""
    config, _, save = saving(keep_checkpoints=1)
    first = save(1, 0.2)
    first.rename(tmp_path / "archive")
    first.symlink_to(tmp_path / "archive")
    save(2, 0.5)
    assert [path.name for path in config.run_dir.iterdir()] == ["checkpoint_2"]
    assert checkpoint.damage(tmp_path / "archive") is None
    assert "warning" not in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(saving, monkeypatch, capsys):
    """NFS keeps a file that another process has open, and its folder."""
    config, _, save = saving(keep_checkpoints=1)
    save(1, 0.2)

    def keep(path, *_, **__):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", keep)
        save(2, 0.5)
        assert re.search("warning: .*checkpoint_1 cannot be removed: Directory not empty", capsys.readouterr().err)
        save(3, 0.6)
    save(4, 0.7)
    assert [path.name for path in config.run_dir.iterdir()] == ["checkpoint_4"]  # removed by a later save


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("content", ["[]", '"x"', "{}", "[" * 100_000], ids=lambda content: content[:20])
def test_a_checkpoint_whose_manifest_is_not_an_object_of_files_is_damaged(saving, content):
    """A traceback each."""
    folder = saving()[2](1)
    (folder / "trainer" / "manifest.json").write_text(content)
    assert checkpoint.damage(folder) == "trainer/manifest.json is not readable"


def test_only_errors_of_the_disk_become_a_user_error(saving, monkeypatch):
    """A GPU without memory for the optimizer's shares was "cannot be written", without a traceback."""
    _, _, save = saving()

    def save_with(error: Exception) -> None:
        monkeypatch.setattr(checkpoint.dcp, "save", raising(error))
        save(1)

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Connection closed by peer")):
        with pytest.raises(type(error), match=str(error)):
            save_with(error)
        with pytest.raises(dcp.CheckpointException):
            save_with(dcp.CheckpointException("", {0: (full, None), 1: (error, None)}))
    for error in (full, dcp.CheckpointException("", {1: (full, None)})):
        refuses(r"checkpoint_1 cannot be written: .*No space left on device", save_with, error)


def test_a_file_of_a_checkpoint_that_another_node_does_not_see_is_named(tmp_path, monkeypatch):
    """The first function that read it ended in a traceback, without waiting."""
    folder, rank_1 = tmp_path / "checkpoint_1", World(1, 0, 2, torch.device("cpu"))
    (folder / "trainer").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "retried", lambda action: action())  # without waiting
    monkeypatch.setattr(checkpoint, "agree", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(checkpoint, "on_main_rank", lambda *_: ["trainer/state.json"])
    with pytest.raises(UserError, match=r"rank 1 on .* does not see .*checkpoint_1/trainer/state.json: No such file"):
        checkpoint._wait_until_visible(rank_1, folder)
    (folder / "trainer/state.json").touch()
    assert checkpoint._wait_until_visible(rank_1, folder) == folder


def test_optimizer_and_random_state_are_restored(trained, world):
    """A weight that never got a gradient was an error: "Missing key in checkpoint state_dict: ... .step"."""
    model, optimizer, folder = trained
    wanted = torch.rand(3)
    other = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpoint.load_optimizer(folder, model, other)
    assert checkpoint.load_random_state(folder, world)
    assert torch.equal(torch.rand(3), wanted)
    for parameter in model.base_causallm.parameters():
        assert equal(optimizer.state[parameter], other.state[parameter])
        assert other.state[parameter]["step"] == 2
    assert model.unused not in optimizer.state
    assert model.unused not in other.state  # initialised at its first gradient


@pytest.fixture
def trained(saving, world) -> tuple[torch.nn.Module, torch.optim.Optimizer, Path]:
    """A model with a weight that never gets a gradient, its optimizer, and their checkpoint."""
    config, loaded, _ = saving()
    loaded.model.unused = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-3)
    for _ in range(2):
        loaded.model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loaded.model, optimizer, checkpoint.save(config, world, loaded, optimizer, Progress(1, 2), 0, {})


class Command:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_random_state_runs_no_code(trained, world):
    """It ran none, but the traceback advised weights_only=False."""
    *_, folder = trained
    torch.save(Command(), folder / "trainer" / "random_0.pt")
    refuses("random_0.pt is not read: it holds other objects", checkpoint.load_random_state, folder, world)


def test_an_optimizers_metadata_runs_no_code(trained):
    """torch unpickles the file, and the objects that its entries of bytes point to."""
    model, optimizer, folder = trained
    file = folder / checkpoint.OPTIMIZER / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    name = next(iter(metadata.state_dict_metadata))
    for bad in (Command(), BytesStorageMetadata(), print, torch.load, torch.nn.Linear(1, 1)):
        others = metadata.state_dict_metadata | {name: bad}
        file.write_bytes(pickle.dumps(replace(metadata, state_dict_metadata=others)))
        for load in (checkpoint.load_optimizer, lambda *parts: checkpoint.load_companions(*parts[:2])):
            refuses(r"\.metadata is not read: it names [\w.]+, which could run code", load, folder, model, optimizer)
    file.write_bytes(pickle.dumps(metadata))
    checkpoint.load_optimizer(folder, model, optimizer)


def test_the_optimizer_of_another_torch_loads_the_state_that_exists(trained):
    """An additional key in AdamW's param_groups was a CheckpointException; an additional average would have been."""
    model, optimizer, folder = trained
    later = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.5, amsgrad=True)
    later.param_groups[0]["a key of the future"] = True
    checkpoint.load_optimizer(folder, model, later)
    group = later.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["a key of the future"]) == (5e-4, 0.5, True)
    weight = next(model.base_causallm.parameters())
    assert torch.equal(later.state[weight]["exp_avg"], optimizer.state[weight]["exp_avg"])
    assert later.state[weight]["step"] == 2


def test_a_file_that_another_rank_writes_late_is_in_the_manifest(trained, monkeypatch):
    """A file that rank 0 did not see yet was not in the manifest, so that its loss went unnoticed."""
    *_, folder = trained
    (folder / checkpoint.MANIFEST).unlink()
    late = folder / "trainer" / "random_1.pt"
    threading.Timer(0.5, late.write_text, ["of the other rank"]).start()
    target = folder.with_name("checkpoint_2")
    checkpoint._publish(folder, target, world_size=2)
    assert "trainer/random_1.pt" in read_json(target / checkpoint.MANIFEST)
    assert checkpoint.damage(target) is None
    (target / "trainer" / "random_1.pt").unlink()
    assert "random_1.pt" in checkpoint.damage(target)
    monkeypatch.setattr(checkpoint, "retried", lambda action: action())
    with pytest.raises(FileNotFoundError):  # `save` makes a UserError of it
        checkpoint._publish(target, folder, world_size=2)


def test_a_group_can_read_all_files_of_a_checkpoint(saving):
    """safetensors gave its files mode 0600."""
    before = os.umask(0o027)
    try:
        folder = saving(thought="projected", lora_rank=2)[2](1)
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) == 3
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750


def test_a_file_without_read_permission_is_not_damaged(saving, tiny, monkeypatch):
    """It was reported as damaged, and a run would have continued from an earlier checkpoint."""
    config, _, save = saving()
    folder = save(1)
    checkpoint.add_digests(folder)

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(checkpoint, "file_digest", refuse)
    for look in (checkpoint.damage, lambda folder: checkpoint.newest_whole(folder.parent)):
        refuses(r"checkpoint_1/\S+ cannot be read: Permission denied", look, folder)
    monkeypatch.setattr(Path, "is_file", refuse)  # as in a folder without permission
    for look in (checkpoint.newest_whole, checkpoint.checkpoints, lambda run_dir: resolve(str(run_dir))):
        refuses(r"run/\S+ cannot be read: Permission denied", look, folder.parent)
    monkeypatch.setattr(os, "listdir", refuse)
    refuses(f"model_id {tiny} cannot be read: Permission denied", load_model, config, None)


def test_sizes_are_compared_until_there_are_digests(saving):
    folder = saving()[2](1)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert checkpoint.damage(folder) == "model.safetensors differs from what was written"
    file.write_bytes(content)
    checkpoint.add_digests(folder)
    assert checkpoint.damage(folder) is None
    flip(file)
    assert checkpoint.damage(folder) == "model.safetensors differs from what was written"


def test_the_newest_two_epochs_keep_the_optimizer(saving, world):
    """75 GB for 50 epochs of GPT-2."""
    config, _, save = saving()
    folders = [save(epoch) for epoch in (1, 2, 3, 4)]
    assert [(folder / checkpoint.OPTIMIZER).exists() for folder in folders] == [False, False, True, True]
    assert [checkpoint.damage(folder) for folder in folders] == [None] * 4
    assert checkpoint.find_newest(config, world) == folders[-1]
    for folder in folders[2:]:
        shutil.rmtree(folder)
    sentence = "checkpoint_2 cannot be continued: only the newest two epochs keep .* load_model_path=.* and resume=2"
    refuses(sentence, checkpoint.find_newest, config, world)
    assert not list(config.run_dir.glob(".removing-*"))


def test_keys_that_decide_the_weights_are_compared(tmp_path):
    def changed(now: dict, **before) -> set[str]:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(Config(**before))))
        return {*checkpoint.changed_keys(Config(**before | now), tmp_path)}

    sizes = {"batch_size_training": 3, "gradient_accumulation_steps": 7}
    assert changed(sizes) == sizes.keys()
    assert changed(sizes, global_batch_size=42) == set()
    assert changed({"num_epochs": 7, "resume": 2}) == set()
    assert changed({"num_epochs": 7, "resume": 2}, warmup_steps=3) == {"resume"}
    assert changed({"num_epochs": 7, "resume": 2}, lr_scheduler="linear") == {"num_epochs", "resume"}


def test_continue_changed_is_not_for_keys_that_shape_the_sequences(saving, world):
    config, _, save = saving()
    save(1)
    other = replace(config, c_thought=config.c_thought + 1, continue_changed=True)
    refuses(
        r"another configuration \(c_thought \d, not \d\): choose another name$", checkpoint.find_newest, other, world
    )


def test_damaged_weights_are_not_trained_on(saving, world):
    config, _, save = saving()
    folder = save(1)
    checkpoint.add_digests(folder)
    flip(folder / "model.safetensors")
    other = replace(config, name="other", load_model_path=str(folder))
    refuses("is damaged: model.safetensors differs", checkpoint.find_weights, other, world)


def test_step_checkpoints_are_removed_when_their_epoch_is_saved(saving, world):
    config, loaded, _ = saving()
    optimizer = torch.optim.AdamW(loaded.model.parameters(), lr=1e-3)
    for epoch, step, files in ((0, 3, None), (0, 6, None), (0, 9, None), (1, 9, {}), (1, 12, None)):
        checkpoint.save(config, world, loaded, optimizer, Progress(epoch, step), 0, files)
        found = names(config.run_dir)
        if step == 9:
            assert found == (["checkpoint_1"] if files is not None else ["checkpoint_0_step_6", "checkpoint_0_step_9"])
    assert found == ["checkpoint_1", "checkpoint_1_step_12"]
