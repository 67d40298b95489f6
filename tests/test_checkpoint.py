"""What a run's folder holds: saving, finding, what comes back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pretrained import coconut_config
from test_pretrained import tiny as tiny  # a fixture

import checkpoint
from checkpoint import Progress, resolve
from config import Config
from pretrained import Pretrained, load_model
from utils import UserError


def save(config, world, pretrained: Pretrained, epoch: int, accuracy: float = 0.5, stage: int = 0):
    optimizer = torch.optim.AdamW(pretrained.model.parameters(), lr=1e-3)
    progress = Progress(epoch, 10 * epoch, best={stage: max(accuracy, 0.5)})
    files = {"metrics.json": json.dumps({"accuracy": accuracy}), "predictions.jsonl": ""}
    return checkpoint.save(config, world, pretrained, optimizer, progress, stage, files)


def test_only_whole_checkpoints_are_found(tiny, tmp_path, world):
    config = coconut_config(tiny, save_path=str(tmp_path / "runs"), name="run")
    parts = load_model(config, None)
    for epoch in (2, 10, 9):
        save(config, world, parts, epoch)
    run = config.run_dir
    (run / ".writing-checkpoint_11").mkdir()
    (run / "checkpoint_12").mkdir()
    (run / "checkpoint_13").write_text("of the reference")
    (run / "checkpoint_best").mkdir()
    assert [path.name for path in checkpoint.checkpoints(run)] == ["checkpoint_2", "checkpoint_9", "checkpoint_10"]
    assert resolve(str(run)).name == "checkpoint_10"
    assert checkpoint.read_progress(run / "checkpoint_9") == Progress(9, 90, best={0: 0.5})
    save(config, world, parts, 13)
    assert (run / "checkpoint_13.replaced-1").read_text() == "of the reference"
    assert not list(run.glob(".writing-checkpoint_13"))
    with pytest.raises(UserError, match="is no checkpoint"):
        resolve(str(tmp_path))


def learned(tiny, tmp_path, world) -> tuple[Config, Path]:
    """A checkpoint with a projection that is not the identity."""
    config = coconut_config(tiny, save_path=str(tmp_path / "runs"), name="run", thought="projected")
    parts = load_model(config, None)
    with torch.no_grad():
        parts.model.thought.weight.normal_()
    return config, save(config, world, parts, 1)


def test_what_a_thought_has_learnt_comes_back(tiny, tmp_path, world):
    config, folder = learned(tiny, tmp_path, world)
    weight = load_file(folder / "thought.safetensors")["weight"]
    assert torch.equal(load_model(config, folder)[0].thought.weight, weight)
    assert not torch.equal(weight, torch.eye(32))
    assert "thought.safetensors" in json.loads((folder / "trainer" / "manifest.json").read_text())
    # the folder stays one of the model alone, for everybody else
    names = load_file(folder / "model.safetensors").keys()
    assert names == load_file(Path(tiny) / "model.safetensors").keys()
    # other folders have nothing for it: it begins anew; and no thought that learns nothing writes a file
    assert torch.equal(load_model(config, Path(tiny))[0].thought.weight, torch.eye(32))
    plain = coconut_config(tiny, save_path=str(tmp_path / "runs"), name="plain")
    assert not (save(plain, world, load_model(plain, None), 1) / "thought.safetensors").exists()


def test_a_thought_that_does_not_fit_is_refused(tiny, tmp_path, world):
    config, folder = learned(tiny, tmp_path, world)
    file = folder / "thought.safetensors"
    with pytest.raises(UserError, match=r"does not fit the thought normalised: weights unexpected: weight"):
        load_model(coconut_config(tiny, thought="normalised"), folder)
    for weights, complaint in (
        ({"weight": torch.eye(7)}, r"of another shape: weight \[7, 7\] instead of \[32, 32\]"),
        ({"bias": torch.eye(32)}, r"missing: weight; unexpected: bias"),
    ):
        save_file(weights, file)
        with pytest.raises(UserError, match=complaint):
            load_model(config, folder)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"thought.safetensors cannot be read"):
        load_model(config, folder)
    file.unlink()
    with pytest.raises(UserError, match=r"was trained with the thought projected, but lacks thought.safetensors"):
        load_model(config, folder)


def test_old_checkpoints_go_but_never_the_best(tiny, tmp_path, world):
    config = coconut_config(tiny, save_path=str(tmp_path / "runs"), name="run", keep_checkpoints=1)
    parts = load_model(config, None)
    for epoch, accuracy in ((1, 0.2), (2, 0.5), (3, 0.4), (4, 0.5), (5, 0.1)):
        save(config, world, parts, epoch, accuracy)
    assert [path.name for path in checkpoint.checkpoints(config.run_dir)] == ["checkpoint_2", "checkpoint_5"]


def test_optimizer_and_random_state_come_back(tiny, tmp_path, world):
    config = coconut_config(tiny, save_path=str(tmp_path / "runs"), name="run")
    loaded = load_model(config, None)
    model = loaded.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
        optimizer.step()
    files = {"metrics.json": "{}", "predictions.jsonl": ""}
    folder = checkpoint.save(config, world, loaded, optimizer, Progress(1, 2), 0, files)
    wanted = torch.rand(3)
    other = torch.optim.AdamW(model.parameters(), lr=1e-3)
    checkpoint.load_optimizer(folder, model, other)
    assert checkpoint.load_random_state(folder, world)
    assert torch.equal(torch.rand(3), wanted)
    for parameter in model.parameters():
        before, after = optimizer.state[parameter], other.state[parameter]
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert after["step"] == 2
