"""The predicted memory, disk and time of a run; measured peaks."""

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import tiny_model
import torch
import yaml
from conftest import ROOT, read_json, refuses
from transformers import AutoModelForCausalLM

from config import Config, configure
from trainer import memory
from trainer.memory import SHARE_OF_GPU, largest_that_fits
from trainer.parallel import bytes_under_ddp, strategy_of
from trainer.plan import Cost, Machine, cost_of, estimate, explains_out_of_memory, plan, read_source, what_would_fit
from utils import UserError

MIB = 2**20
TOLERANCE = 0.1
DROPOUTS = ("attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout")


def write_config(
    place: Path, folder: Path, family: str, width: int = 64, layers: int = 1, dropout: float = 0.0, **keys
) -> Config:
    """Writes a model and a configuration. Llama and Qwen2 share a key-value head between two query heads."""
    model = place / f"{family}-{width}-{layers}-{dropout}"
    if not model.is_dir():
        kv_heads = None if family == "gpt2" else 2
        tiny_model.write_model([place / "train.json"], model, "char", family, width, layers, 4, 128, kv_heads=kv_heads)
        shape = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(shape | dict.fromkeys(DROPOUTS, dropout)))
    config = {"save_path": str(place / "runs"), "model_id": str(model), "max_latent_stage": 1, "epochs_per_stage": 1}
    config |= {"train_path": str(place / "train.json"), "val_path": str(place / "valid.json"), "num_epochs": 4}
    config |= {"batch_size_training": 16, "max_new_tokens": 20, **keys}
    name = "-".join([model.name, *(f"{key}={value}" for key, value in keys.items())])
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return Config.from_file(path)


def check_peaks(folder: Path, configs: list[Config]) -> None:
    """Compares counted bytes with those of rank 1; rank 0 also holds the whole model that it has read for FSDP.

    One pair of ranks measures all configurations. What differs is measured again, at most four times, and the least
    counts: a thread that still holds a tensor can only add. In a validation under FSDP it may hold what it has gathered
    before, which in models of two blocks is as much as all weights, or more.
    """
    counted, measured, held = {}, {}, {}
    for config in configs:
        found = estimate(config, Machine(2, None), config.strategy, read_source(config))
        (folder / f"{config.name}.stage").write_text(str(found.stage))
        counted |= {(config.name, kind): getattr(found, kind).total for kind in ("training", "validation")}
        held[config.name, "validation"] = 1.5 * found.training.gathered  # seen: one copy and a half

    def differs(row: tuple[str, str]) -> bool:
        return row not in measured or not (
            counted[row] <= measured[row] * (1 + TOLERANCE)
            and measured[row] <= counted[row] * (1 + TOLERANCE) + held.get(row, 0)
        )

    for _ in range(5):
        names = dict.fromkeys(name for name, _ in filter(differs, counted))
        if not names:
            break
        done = forked.run(2, ROOT / "tests" / "peak.py", *(folder / f"{name}.yaml" for name in names))
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        for name in names:
            for kind, n_bytes in read_json(folder / f"{name}-1.json").items():
                measured[name, kind] = min(measured.get((name, kind), n_bytes), n_bytes)
    for (name, kind), n_bytes in counted.items():
        print(f"{name} {kind}: {n_bytes / MIB:.2f} MiB counted, {measured[name, kind] / MIB:.2f} measured")
    assert not list(filter(differs, counted))


def measurable(place: Path, folder: Path, family: str, strategy: str, **keys) -> Config:
    return write_config(place, folder, family, 128, 2, curriculum="none", strategy=strategy, max_latent_stage=2, **keys)


def test_the_counted_peak_is_the_measured_one(place, tmp_path):
    ddp = measurable(place, tmp_path, "gpt2", "ddp", gradient_accumulation_steps=2)
    check_peaks(tmp_path, [ddp, measurable(place, tmp_path, "llama", "fsdp", gradient_checkpointing=True)])


SPECIAL = {"gpt2": {"dropout": 0.1}, "llama": {"bf16": True}}
SPECIAL["qwen2"] = {"method": "sim_cot", "step_decoder": "copy", "c_thought": 1}


@pytest.mark.slow
@pytest.mark.parametrize("family", SPECIAL)
def test_the_counted_peak_is_the_measured_one_in_all_families(place, tmp_path, family):
    make = partial(measurable, place, tmp_path, family)
    plain = [make(strategy, gradient_checkpointing=c) for strategy in ("ddp", "fsdp") for c in (False, True)]
    check_peaks(tmp_path, [*plain, make("ddp", **SPECIAL[family])])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gpu_attention_needs_as_much_memory_as_the_cpus_without_dropout(place, tmp_path, family):
    """Without dropout the CPU's kernel is flash attention too."""
    config = write_config(place, tmp_path, family, curriculum="none")
    source = read_source(config)
    cpu, gpu = (estimate(config, Machine(1, name), "ddp", source).training.total for name in (None, "H100"))
    assert abs(gpu / cpu - 1) < TOLERANCE


@pytest.mark.slow
def test_layer_norms_are_float32_on_gpus(place, tmp_path, monkeypatch):
    """Bug: under FSDP and bf16 the plan counted bfloat16, as on a CPU."""
    config = write_config(place, tmp_path, "gpt2", bf16=True)
    source = read_source(config)
    gpu = estimate(config, Machine(2, "H100"), "fsdp", source).training.rest
    monkeypatch.setattr(memory, "_gpu_layer_norm", memory.layer_norm)
    assert gpu > 1.05 * estimate(config, Machine(2, "H100"), "fsdp", source).training.rest


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"method": "icot"},
        {"method": "codi", "thought": "mlp:16", "lora_rank": 4},
        {"method": "pccot"},
        {"method": "lotus", "thought": "looped", "c_thought": 2},
        {"method": "multi_mode"},
        {"method": "parallel_latents", "latent_passes": 2},
        {"method": "no_thoughts", "uniform_prob": 0.2},
        {"thought": "pause", "bf16_weights": True},
        *({"thought": t} for t in ("layer:-1", "projected", "normalised", "realigned", "suppressed", "token:st")),
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_every_method_can_be_planned(place, tmp_path, keys):
    config = write_config(place, tmp_path, "llama", layers=2, **{"uniform_prob": 0.0, "num_epochs": 2, **keys})
    assert "a rank at the peak" in plan(config, gpus=2)


@pytest.mark.parametrize("method", ["grpo", "stopping"])
def test_a_plan_of_steps_that_generate_is_one_sentence(place, tmp_path, method):
    """Bug: tracebacks."""
    refuses("--plan cannot count the steps of method", plan, write_config(place, tmp_path, "llama", method=method))


@pytest.mark.parametrize("limit", [0, 102, 103, 200, 249, 255, 258, 10_000])
def test_largest_that_fits_finds_the_largest_size(limit):
    calls = []

    def needed(size: int) -> int:
        calls.append(size)
        return 100 + 3 * size + 2 * max(size - 50, 0)

    sizes = list(range(1, 4097))
    for first in (None, 1, 32, 4096):
        assert largest_that_fits(needed, limit, sizes, first) == max(
            (s for s in sizes if needed(s) <= limit), default=0
        )
        calls.clear()
        largest_that_fits(needed, limit, sizes, first)
        assert len(calls) < 20
    assert largest_that_fits(needed, limit, [4, 16]) in (0, 4, 16)


def test_the_text_of_a_plan(place, tmp_path):
    """load_model_path need not exist yet. A GPU with the needed memory fits the batch, a smaller one half of it."""
    keys = {"global_batch_size": 32, "keep_checkpoints": 2, "bf16": True, "curriculum": "none"}
    config = write_config(place, tmp_path, "llama", **keys)
    config = replace(config, load_model_path="runs/to_come")
    lines = dict(line.split(maxsplit=1) for line in plan(config, gpus=2, gpu_memory=80).splitlines())
    assert list(lines) == ["model", "strategy", "batch", "training", "validation", "fits", "disk", "work", "time"]
    n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(config.model_id).parameters())
    n_parameters += 3 * 64  # the markers' rows
    assert f"{n_parameters:,} parameters, {n_parameters:,} trained" in lines["model"]
    assert lines["strategy"].startswith("ddp on 2 x H100 (auto: weights, gradients and AdamW take 0.00")
    assert lines["batch"] == "32 = 2 ranks x 16 examples x 1 passes"
    assert lines["fits"].startswith("batch_size_training 16 is the largest that fits 92% of a GPU's 80 GiB")
    assert "the newest 2 and the best are kept" in lines["disk"]
    assert lines["time"].endswith("30% of 9.89e+14 FLOP/s, the peak of H100 in bf16")
    source = read_source(config)
    needed = estimate(config, Machine(2, "H100"), "ddp", source).training.total
    for spare, largest in ((1, 16), (-1, 8)):
        memory = int(needed / SHARE_OF_GPU) + spare * 2**10
        assert estimate(config, Machine(2, "H100", memory), "ddp", source).largest == largest


def test_a_cost_counts_the_examples_and_models_that_a_run_trains(place, tmp_path):
    """Bugs: no example was left out, the first ones were taken to be as long as all, and a decoder took no disk."""

    def cost(**keys) -> Cost:
        return cost_of(replace(write_config(place, tmp_path, "gpt2"), **keys))

    def length(example: dict) -> int:
        steps = sum(len(step) + 1 for step in example["steps"])
        return len(example["question"]) + 1 + steps + len("### " + example["answer"]) + 1

    def of(name: str, chosen: list[dict]) -> float:
        (tmp_path / name).write_text(json.dumps(chosen))
        return cost(train_path=str(tmp_path / name)).tokens

    examples, whole = read_json(place / "train.json"), cost()
    limit = sorted(map(length, examples))[60]
    assert cost(max_train_tokens=limit).tokens == of("short.json", [e for e in examples if length(e) <= limit])
    assert cost(max_train_examples=20).tokens == of("first.json", examples[:20]) < whole.tokens
    assert cost(method="sim_cot", step_decoder="copy").disk == 2 * whole.disk
    low_rank, with_decoder = cost(lora_rank=2), cost(lora_rank=2, method="sim_cot", step_decoder="copy")
    assert with_decoder.disk == low_rank.disk + whole.disk  # bug: without AdamW's averages of the decoder


def test_the_cost_of_icot_counts_the_stages_within_an_epoch(place, tmp_path):
    """Bug: each epoch was counted at the stage of its end."""
    (example, *_) = read_json(place / "train.json")
    (tmp_path / "one.json").write_text(json.dumps([example] * 40))
    config = replace(write_config(place, tmp_path, "gpt2"), method="icot", icot_tokens_per_epoch=4, num_epochs=1)
    config = replace(config, train_path=str(tmp_path / "one.json"), icot_smoothing=None)
    whole = cost_of(replace(config, method="cot"), epochs=[0]).tokens
    # for ten examples each
    assert cost_of(config, epochs=[0]).tokens == whole - 10 * (0 + 1 + 2 + 3)


def test_auto_shards_where_the_model_is_too_large(place, tmp_path):
    config = write_config(place, tmp_path, "llama")
    shape = read_source(config).shape
    n_parameters = bytes_under_ddp(config, shape) // 16
    for per_parameter, strategy in ((16 / 0.6 - 0.1, "fsdp"), (16 / 0.6 + 0.1, "ddp")):
        machine = Machine(2, "H100", int(per_parameter * n_parameters))
        assert strategy_of(config, machine.ranks, machine.memory, shape)[0] == strategy
    assert strategy_of(config, 2, None, shape)[0] == "ddp"
    assert strategy_of(replace(config, strategy="fsdp"), 1, None, shape)[0] == "fsdp"
    # bug: all runs counted as full trainings in float32
    for keys, per_parameter in (({"only_eval": True}, 4), ({"lora_rank": 2}, 4), ({"bf16_weights": True}, 8)):
        assert bytes_under_ddp(replace(config, **keys), shape) == per_parameter * n_parameters


def test_shards_take_less(place, tmp_path):
    config = write_config(place, tmp_path, "llama", strategy="fsdp", curriculum="none")
    source = read_source(config)
    one, four = (estimate(config, Machine(n, "H100"), "fsdp", source).training for n in (1, 4))
    assert four.weights < 0.3 * one.weights
    assert four.optimizer < 0.3 * one.optimizer
    assert one.gathered == four.gathered
    assert four.total < one.total


@pytest.mark.parametrize("missing", ["train_path", "val_path", "model_id"])
def test_a_missing_file_is_named(place, tmp_path, capsys, monkeypatch, missing):
    config = write_config(place, tmp_path, "llama")
    monkeypatch.setattr(
        sys, "argv", ["run.py", str(tmp_path / f"{config.name}.yaml"), f"{missing}=absent/x.json", "--plan"]
    )
    with pytest.raises(SystemExit) as end:
        configure("", None, plan)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert missing in line
    assert "absent/x.json" in line


# --- out of memory ---

OF_TORCH = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB\nmore"


def test_what_would_fit_names_settings(place, tmp_path):
    config = write_config(place, tmp_path, "gpt2", layers=2, global_batch_size=16, curriculum="none")
    needed = estimate(config, Machine(1, "H100"), "ddp", read_source(config)).training.total
    text = what_would_fit(config, Machine(1, "H100", int(0.9 * needed / SHARE_OF_GPU)))
    options = "batch_size_training=8 or gradient_checkpointing=true with batch_size_training=16 would fit"
    assert re.fullmatch(rf"batch_size_training 16 needs .+ GiB of .+ GiB; {options}", text)
    assert "should have fitted" in what_would_fit(config, Machine(1, "H100", 2 * needed))
    assert what_would_fit(config, Machine(1, "H100", 2**20)).endswith("strategy=fsdp on more GPUs would fit")


@pytest.fixture
def small_gpu(monkeypatch):
    """A GPU of 1 GiB."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")


def on(kind: str, world) -> SimpleNamespace:
    return SimpleNamespace(size=world.size, device=torch.device(kind))


def out_of_memory(config: Config, world) -> str:
    with pytest.raises(UserError) as error, explains_out_of_memory(config, on("cuda", world)):
        raise torch.OutOfMemoryError(OF_TORCH)
    begin, end = "CUDA is out of memory: ", f" ({OF_TORCH.splitlines()[0]})"
    assert str(error.value).startswith(begin)
    assert str(error.value).endswith(end)
    return str(error.value)[len(begin) : -len(end)]


@pytest.mark.slow
def test_out_of_memory_is_one_sentence(place, tmp_path, world, small_gpu):
    """Regression: it was torch's traceback. The advice comes from a process without a process group."""
    config = write_config(place, tmp_path, "gpt2")
    assert out_of_memory(config, world).startswith("batch_size_training 16 should have fitted, with 0.0")


def test_out_of_memory_is_one_sentence_without_a_count(place, tmp_path, world, small_gpu, monkeypatch):
    config = write_config(place, tmp_path, "gpt2")
    monkeypatch.setattr("trainer.plan.ProcessPoolExecutor", lambda *_: (_ for _ in ()).throw(RuntimeError))
    assert out_of_memory(config, world).startswith("try a smaller batch_size_training")
    with pytest.raises(ZeroDivisionError), explains_out_of_memory(config, world):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="a shape"), explains_out_of_memory(config, world):
        raise RuntimeError("a shape")


def test_out_of_memory_without_cuda_is_one_sentence(place, tmp_path, world):
    """Regression: on a CPU it was a traceback, on another accelerator a second one that hid it."""
    config = write_config(place, tmp_path, "gpt2")
    begin = "CPU is out of memory: try a smaller batch_size_training"
    with pytest.raises(UserError, match=begin), explains_out_of_memory(config, world):
        torch.empty(2**50, dtype=torch.float64)
    with pytest.raises(UserError, match="XPU is out of memory"), explains_out_of_memory(config, on("xpu", world)):
        raise torch.OutOfMemoryError("XPU out of memory")
