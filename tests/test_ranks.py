"""Agreement of the ranks."""

import os
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import raising, refuses

from trainer import checkpoint
from trainer import distributed as ranks
from trainer.distributed import World
from utils import UserError


def test_a_problem_of_rank_zero_reaches_every_rank(world):
    assert world == World(0, 0, 1, world.device)
    assert ranks.on_main_rank(world, lambda: 5) == 5
    assert ranks.hardware(world).startswith("CPU" if world.device.type == "cpu" else "NVIDIA")
    refuses("no", ranks.on_main_rank, world, raising(UserError("no")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("environment", "devices", "promise"),
    [
        ({"SLURM_GPUS_ON_NODE": "4"}, [], "SLURM_GPUS_ON_NODE=4 promises a GPU"),
        ({"SLURM_JOB_GPUS": "0,1"}, [], "SLURM_JOB_GPUS=0,1 promises a GPU"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, [], "CUDA_VISIBLE_DEVICES=0 promises a GPU"),
        ({}, ["/dev/nvidia3"], "/dev/nvidia3 is a GPU"),
        ({}, ["/dev/kfd"], "/dev/kfd is a GPU"),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_GPUS": ""}, [], None),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": ""}, ["/dev/nvidia0"], None),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "-1"}, ["/dev/nvidia0"], None),
    ],
)
def test_a_promised_gpu_that_torch_does_not_find_is_an_error(monkeypatch, environment, devices, promise):
    """The run went on, on the CPU, without a message."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "glob", lambda _, pattern: [Path(d) for d in devices if fnmatch(d, f"/dev/{pattern}")])
    if promise is None:
        assert ranks.promised_gpu() is None
    else:
        refuses(f'{promise}, but torch finds no GPU: .+; set CUDA_VISIBLE_DEVICES=""', ranks.setup_distributed)


@pytest.mark.parametrize(
    ("found", "size", "environment", "device", "reason"),
    [
        ("mps", 1, {}, "mps", "torch finds MPS and no CUDA"),
        ("xpu", 1, {}, "xpu", "torch finds XPU and no CUDA"),
        ("xpu", 1, {"SLURM_GPUS_ON_NODE": "4"}, "xpu", "torch finds XPU and no CUDA"),
        ("mps", 2, {}, "cpu", "MPS supports one process, and there are 2 ranks"),
        ("mps", 1, {"CUDA_VISIBLE_DEVICES": ""}, "cpu", 'CUDA_VISIBLE_DEVICES="" hides all GPUs'),
        (None, 1, {}, "cpu", "torch finds no GPU"),
    ],
)
def test_the_device_and_why(monkeypatch, found, size, environment, device, reason):
    """Apple's and Intel's GPUs were not used."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(Path, "glob", lambda *_: [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found and torch.device(found))
    assert ranks.choose_device(size, 0) == (torch.device(device), reason)


def test_a_world_of_one_needs_no_backend_for_its_device(world, monkeypatch):
    """gloo supports only CPUs and CUDA."""
    monkeypatch.setattr(torch.distributed, "all_reduce", None)
    ranks.all_reduce(torch.ones(2))


def test_the_random_state_of_any_device_is_restored(monkeypatch, tmp_path):
    """Only CUDA's was."""
    state = [torch.arange(3)]
    module = SimpleNamespace(get_rng_state=lambda: state[0], set_rng_state=lambda value: state.insert(0, value))
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    (tmp_path / "trainer").mkdir()
    checkpoint.save_progress(tmp_path, checkpoint.Progress(), 1)
    for kind, restored in (("mps", True), ("xpu", False)):
        checkpoint.save_random_state(tmp_path, World(0, 0, 1, torch.device("mps")))
        state[:] = [torch.zeros(3)]
        checkpoint.load_random_state(tmp_path, World(0, 0, 1, torch.device(kind)))
        assert torch.equal(state[0], torch.arange(3)) == restored


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "350000 100000"}, 3),  # a container
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/slurm/job/step", {"slurm/job/cpu.max": "200000 100000", "cpu.max": "max 100000"}, 2),  # of a group above
        (
            "5:cpuacct,cpu:/docker/1\n4:memory:/docker/1",
            {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("5:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("", {}, 16),
    ],
)
def test_allowed_cores_are_those_of_affinity_and_quota(tmp_path, monkeypatch, own, files, cores):
    """In a container a grid started one run per core of the host."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cgroup" / name).write_text(text + "\n")
    assert ranks.allowed_cores(tmp_path / "cgroup", tmp_path / "own") == cores
