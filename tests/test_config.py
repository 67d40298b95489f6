"""The configuration: how YAML files and overrides are read, and the messages about mistakes in them."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, python, refuses

import config as config_module
import methods
import utils
from config import Config
from trainer import run_folder
from utils import UserError


@pytest.fixture
def write(tmp_path):
    for name in ("train.json", "valid.json", "weights"):
        (tmp_path / name).write_text("[]")

    def write_yaml(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(f"train_path: {tmp_path}/train.json\nval_path: {tmp_path}/valid.json\n{text}")
        return path

    return write_yaml


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        Config.from_file(path, overrides)
    return str(error.value)


ROWS_OF = {
    stem: re.findall(r"^  (\w+):", (ROOT / "args" / f"{stem}.yaml").read_text(), re.MULTILINE)
    for stem in ("gsm", "prosqa")
}
ROWS_OF["prontoqa"] = ROWS_OF["prosqa"]


REFERENCE = """
project: coconut
save_path: {folder}
name: gsm-coconut
only_eval: False
coconut: True
cot: False
no_thoughts: False
no_cot: False
c_thought: 2
epochs_per_stage: 3
max_latent_stage: 3
pad_latent_to_max: True
save_only_improve: False
uniform_prob: 0.0
model_id: openai-community/gpt2
load_model_path: {folder}/weights
seed: 0
resume: 3
bf16: False
reset_optimizer: True
batch_size_training: 32
debug: False
gradient_accumulation_steps: 1
num_epochs: 25
lr: !!float "1e-4"
weight_decay: 0.01
"""


def test_the_references_files_are_read(write, tmp_path):
    config = Config.from_file(write(REFERENCE.format(folder=tmp_path)))
    assert (config.method, config.lr, config.reset_optimizer) == ("coconut", 1e-4, "epoch")
    assert config.load_model_path == f"{tmp_path}/weights"
    text = REFERENCE.replace("{folder}/weights", '"None"').replace("1e-4", "1e-5")
    config = Config.from_file(write(text.format(folder=tmp_path)))
    assert (config.load_model_path, config.lr) == (None, 1e-5)


READ = [
    ("coconut: True\nno_thoughts: True", [], {"method": "no_thoughts"}),
    ("coconut: False\ncot: True", [], {"method": "cot"}),
    ("no_cot: True", [], {"method": "no_cot"}),
    ("method: no_thoughts", [], {"method": "no_thoughts"}),
    *(
        (f"coconut: False\ncot: False\nno_cot: False\nno_thoughts: False{more}", [], {"method": "coconut"} | wanted)
        for more, wanted in (("", {"thought": "pause"}), ("\nthought: token", {"thought": "token"}))
    ),
    ("", [], {"method": "coconut"}),
    # the shell turns `step_separator=""` into `step_separator=`; quotes that reach the program are YAML's
    ("step_separator: ''", [], {"step_separator": ""}),
    *(("", [f"step_separator{text}"], {"step_separator": ""}) for text in ("=", '=""')),
    ("", ['step_separator="\\n\\n"'], {"step_separator": "\n\n"}),
    ("", ["name='run #2' # a comment"], {"name": "run #2"}),
    ('load_model_path: ""', ["icot_smoothing=null"], {"load_model_path": None, "icot_smoothing": None}),
    ("epochs_per_stage: [1, 1, 1]\nmax_latent_stage: 1", [], {"epochs_per_stage": [1, 1, 1]}),
    ("save_path: run.yaml", [], {"save_path": "run.yaml"}),
    ("thought: layer:-2", [], {"thought": "layer:-2"}),
    # YAML would read 0123 as 83
    ("epochs_per_stage: [010, 2]", ["seed=010"], {"epochs_per_stage": [10, 2], "seed": 10}),
    *(
        case
        for name in ("0123", "1_000", "2026-01-31", "on", "no", "1e3", "0x1F", "1:30", "12", "~x")
        for case in (
            (f"name: {name}\nproject: {name}", [], {"name": name, "project": name}),
            ("", [f"name={name}", "seed=010"], {"name": name, "seed": 10}),
        )
    ),
    # taken literally: YAML would read the comment of `run #2`, and could not read most of the others
    *(
        ("", [f"name={name}", f"project={name}"], {"name": name, "project": name})
        for name in ("run #2", "a: b", "@x", "*x", "%x", "=", "2026-13-45", "{x", "x]", "'x", '"x', "!x", "- x", "a\nb")
    ),
]


@pytest.mark.parametrize(("text", "overrides", "wanted"), READ, ids=lambda value: str(value)[:40])
def test_values_are_read(write, text, overrides, wanted):
    config = Config.from_file(write(text), overrides)
    assert {key: getattr(config, key) for key in wanted} == wanted


WRONG = [
    ("batch_size_trainin: 3", "unknown key 'batch_size_trainin' .*did you mean 'batch_size_training'"),
    ("coconut: True\ncot: True", "two methods at once .*: coconut and cot"),
    ("method: cot\nno_cot: True", "two methods at once"),
    ("coconut: False\ncot: False", "no method"),
    ("method: magic", "method must be one of coconut, cot"),
    ("seed: many", "seed must be a whole number, not 'many'"),
    ("seed: 1.5", "seed must be a whole number"),
    ("answer_match: float", "answer_match must be one of text, number, not 'float'"),
    ("bf16: 1", "bf16 must be true or false"),
    ("lr: fast", "lr must be a number"),
    ("method: icot\nuniform_prob: 0.5", "icot removes single tokens"),
    ("method: icot\nadvance_at: 0.9", "icot's stages are within an epoch"),
    ("advance_at: 98", "advance_at must be at most 1"),
    ("advance_after: 2", "advance_after needs advance_at"),
    ("latent_markers: some", "latent_markers must be one of both, none"),
    ("uniform_prob: 2", "uniform_prob must be at most 1"),
    ("batch_size_training: 0", "batch_size_training must be at least 1"),
    ("seed: null", "seed must be set"),
    ("save_path:", "save_path must be set"),
    ("only_eval: True", "load_model_path .checkpoints/run. does not exist"),
    ("eval_latents: 2", "eval_latents needs only_eval and a method with latents"),
    ("load_model_path: YOUR_PATH_TO_COCONUT_CKPT", "load_model_path is still the placeholder"),
    ("save_path: YOUR_PATH_TO_SAVE_THE_MODEL", "save_path is still the placeholder"),
    ("load_model_path: no/such", "load_model_path 'no/such' does not exist"),
    ("epochs_per_stage: [1, 1, 1, 1]\nmax_latent_stage: 1", "epochs_per_stage has 4 entries, but .* only 3 stages"),
    ("epochs_per_stage: [1, 0]", "epochs_per_stage must be at least 1"),
    ("global_batch_size: 100", "global_batch_size 100 is no multiple of 1 ranks x batch_size_training 32"),
    ("method: [coconut]", "method must be text, not .coconut."),
    ("resume: 50", "resume 50 leaves no epoch of num_epochs 50"),
    ("model_id: ./no/such", "model_id './no/such' does not exist"),
    ("reset_optimizer: sometimes", "reset_optimizer must be one of never, stage, epoch"),
    ("thought: nothing", "thought must be one of last, .*pause, .*, projected, .*, layer:N, .*, not .nothing."),
    ("thought: layer:half", "thought must be one of"),
    ("bf16: True\nbf16_weights: True", "exclude each other"),
    ("- a list", "not valid YAML|must hold"),
    ("extends: run.yaml", "extends itself"),
    ("extends: none.yaml", "cannot read .*none.yaml"),
    ('extends: "a\\0b"', "cannot read .*: embedded null byte"),
    ('name: !!str "\\ud800"', "name must be text|is not valid YAML"),
    ("rows: {a: {row: b}}\nrow: a", "a row cannot choose another one"),
    ("save_path: ${HOME:-/tmp}/runs", "must be a path with variables as"),
    ("save_path: ${HOME", "must be a path with variables as"),
    ("save_path: $EMPTY", "save_path must be a path whose variables are set .EMPTY is not."),
    ("method: grpo\nreward: $EMPTY/r.py", "reward must be a path whose variables are set"),
    ("extends: [a]", r"extends in .* must be text, not \[a\]"),
    ("lr: 1e-3\nseed: 1\nlr: 1e-4", "run.yaml is not valid YAML: the key 'lr' is set twice, in lines 3 and 5"),
    ("<<: {lr: 1e-3, lr: 1e-4}", "the key 'lr' is set twice, in lines 3 and 3"),
    ("? [lr, seed]\n: 1", 'found unhashable key in "<unicode string>", line 3'),
    ("epochs_per_stage: &loop [*loop]", "found unconstructable recursive node"),
    ("train_path: " + "[" * 5000, "is not valid YAML: maximum recursion depth"),
    ("name: !!python/object/apply:os.getcwd []", r"name must be text, not \[\]"),
    *((f"name: {name}", "name .* must be a plain folder name") for name in ("../a", "/tmp/a", "a/b", "..", ".")),
    ("rows: {a: {sed: 1}}\nrow: a", "unknown key 'sed' in"),
    ("rows: [a]", "rows in"),
    ("rows: {a: {extends: b}, b: {}}\nrow: a", "row a extends 'b', which is no earlier row"),
    ("rows: {a: {}, b_c: {}}", "set row=NAME: the rows are a, b_c"),
    ("rows: {a: {}}\nrow: [a]", r"unknown row \[a\] in .*: the rows are a"),
]


def test_a_model_may_be_a_folder_of_the_root(write):
    """An IndexError."""
    assert Config.from_file(write("model_id: /tmp")).model_id == "/tmp"


def test_home_and_variables_in_paths_are_expanded(write, tmp_path, monkeypatch):
    """A run once created a folder named ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "scratch" / "model").mkdir(parents=True)
    write("lr: 0.5", "base.yaml")
    path = tmp_path / "run.yaml"
    path.write_text(
        "extends: $HOME/base.yaml\nsave_path: ~/runs\ntrain_path: ~/train.json\nval_path: ${HOME}/valid.json\n"
        "project: ~x$y\n"
    )
    config = Config.from_file(path, ["model_id=$SCRATCH/model", "load_model_path=~/weights"])
    assert (config.save_path, config.val_path) == (f"{tmp_path}/runs", f"{tmp_path}/valid.json")
    assert (config.model_id, config.load_model_path) == (f"{tmp_path}/scratch/model", f"{tmp_path}/weights")
    assert (config.lr, config.project) == (0.5, "~x$y")
    paths = "{a: ~/valid.json, b: $SCRATCH/b}"
    config = Config.from_file(path, ["only_eval=true", f"test_path={paths}"], needs_files=False)
    assert config.val_path == {"a": f"{tmp_path}/valid.json", "b": f"{tmp_path}/scratch/b"}
    monkeypatch.delenv("SCRATCH")
    complaint = "save_path must be a path whose variables are set (SCRATCH is not), not '$SCRATCH/runs'"
    assert complaint in problem(path, "save_path=$SCRATCH/runs")
    assert "a user who exists (~nobody-here does not)" in problem(path, "save_path=~nobody-here/runs")
    assert "extends in" in problem(write("extends: $SCRATCH/base.yaml"))


def test_overrides_win_and_extends_is_read(write, tmp_path):
    write("coconut: True\nlr: 1e-3\nseed: 1\nname: parent", "base.yaml")
    child = tmp_path / "child.yaml"
    child.write_text("extends: base.yaml\nseed: 2\ncot: True")
    config = Config.from_file(child, ["seed=3", "epochs_per_stage=[1, 2]", "load_model_path=None"])
    assert (config.name, config.seed, config.lr, config.method) == ("child", 3, 1e-3, "cot")
    assert config.epochs_per_stage == [1, 2]


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(("text", "complaint"), WRONG, ids=lambda value: str(value)[:40])
def test_mistakes_in_a_file_are_reported(write, monkeypatch, text, complaint):
    monkeypatch.setenv("EMPTY", "")
    found = problem(write(text))
    assert re.search(complaint, found), found


PATHS = ("train_path", "val_path", "load_model_path", "save_path", "model_id")
WRONG_ON_THE_COMMAND_LINE = [
    (["extends=a.yaml"], "unknown key 'extends' in the command line: it belongs into a file"),
    (["lr=1", "seed=1", "lr=2"], "lr is set twice on the command line"),
    (["row=x"], "row 'x' in the command line: there are no rows to choose from"),
    (["row=[x]"], r"row \[x\] in the command line: there are no rows to choose from"),
    (["val_path=" + "[" * 5000], "val_path must be text or a mapping|val_path .* cannot be reached"),
    (["val_path={a: TMP/valid.json}"], "which needs only_eval: a training run takes one path$"),
    # AdamW raised a traceback for lr=1e38 on every rank
    *(
        ([f"{key}={value}"], f"{key} must be a")
        for key in ("lr", "weight_decay", "distillation", "latent_labels", "step_decoder_weight")
        for value in ("1e38", ".inf", ".nan")
    ),
    ([f"name={'a' * 201}"], "must be a plain folder name, of at most 200 characters"),
    (["only_eval=true", f"val_path={{{'a' * 201}: x}}"], "must be a plain file name, of at most 200 characters"),
    (["max_latent_stage=1000000000"], "max_latent_stage must be at most 100000"),
    # num_epochs never ended, a sample took all memory, a rank was a traceback
    *(
        ([f"{key}=1000000000000"], rf"{key} must be at most \d+, not")
        for key in ("num_epochs", "val_samples", "group_size", "lora_rank")
    ),
    ([f"batch_size_training={2**63}"], f"batch_size_training must be at most {2**63 - 1}, not"),
    # an OSError
    *(([f"{key}={'a' * 300}"], f"{key} '{'a' * 300}' cannot be reached: File name too long") for key in PATHS),
]


def test_yaml_merges_mappings_as_the_reference_reads_them(write, tmp_path):
    text = "rows:\n  a: &a {lr: 0.1, seed: 3}\n  b: &b {<<: *a, seed: 5}\n  c: {<<: [*b, {num_epochs: 7}]}\nrow: c"
    path = write(text)
    values = yaml.safe_load(path.read_text())["rows"]["c"]
    config = Config.from_file(path)
    assert {name: getattr(config, name) for name in values} == values == {"lr": 0.1, "seed": 5, "num_epochs": 7}


def test_save_path_is_no_link_to_nowhere(write, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "scratch")
    assert re.search(
        "link' is a link to .*scratch', which does not exist$", problem(write(""), f"save_path={tmp_path}/link")
    )


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(("overrides", "complaint"), WRONG_ON_THE_COMMAND_LINE, ids=lambda value: str(value)[:40])
def test_mistakes_on_the_command_line_are_reported(write, tmp_path, overrides, complaint):
    found = problem(write(""), *(text.replace("TMP", str(tmp_path)) for text in overrides))
    assert re.search(complaint, found), found


# keys, and a part of the only message about them
MISTAKES = [
    ({"compile": True, "gradient_checkpointing": True}, "exclude each other"),
    ({"lora_rank": 2, "from_scratch": True}, "from_scratch"),
    ({"method": "codi", "uniform_prob": 0.5}, "method codi always has the thoughts of the last stage"),
    ({"method": "codi", "pad_latent_to_max": False}, "method codi has max_latent_stage"),
    ({"method": "codi", "c_thought": 0}, "method codi has max_latent_stage"),
    ({"method": "codi", "step_decoder": "copy"}, "step_decoder is for method sim_cot"),
    ({"method": "codi", "latent_labels": 0.1}, "latent_labels is for method lotus"),
    ({"step_decoder": "copy", "method": "cot"}, "is for method sim_cot"),
    ({"step_decoder": "copy", "thought": "pause"}, "a thought that is fed back"),
    ({"step_decoder": "copy", "c_thought": 0}, "c_thought"),
    ({"step_decoder": "pretrained", "from_scratch": True}, "set it to copy"),
    ({"latent_labels": 0.1, "method": "cot"}, "latent_labels"),
    ({"latent_labels": 0.1, "step_decoder": "copy"}, "latent_labels"),
    ({"method": "multi_mode", "latent_markers": "none"}, "latent_markers must be both"),
    ({"method": "multi_mode", "latent_labels": 0.1}, "latent_labels is for method lotus"),
    ({"mode": "written", "only_eval": True, "load_model_path": "x"}, "mode written is for method multi_mode"),
    ({"method": "multi_mode", "mode": "written"}, "mode written is for eval-only runs"),
    (
        {"method": "multi_mode", "mode": "written", "only_eval": True, "eval_latents": 2, "load_model_path": "x"},
        "eval_latents counts latents",
    ),
    ({"latent_passes": "3", "method": "cot"}, "latent_passes"),
    ({"thought": "looped"}, "looped"),
    ({"latent_passes": "2", "thought": "pause"}, "pause"),
    ({"latent_passes": "stage", "c_thought": 0}, "c_thought"),
    ({"method": "grpo", "positions": "offset"}, "positions of sampled answers"),  # they had no effect
    ({"method": "stopping", "positions": "offset"}, "unset positions"),
    ({"latent_passes": "0", "step_decoder": "copy"}, "it needs a thought that is fed back"),
]


@pytest.mark.parametrize(("keys", "complaint"), MISTAKES, ids=lambda value: str(value)[:60])
def test_keys_that_exclude_each_other_are_reported(keys, complaint):
    (found,) = Config(**keys).problems(needs_files=False)
    assert complaint in found


def test_an_evaluation_takes_several_files(write, tmp_path):
    """Their names are taken literally: YAML would read 0123 as 83 and on as True."""
    (tmp_path / "010").write_text("[]")
    path = write(f"only_eval: true\nload_model_path: {tmp_path}/weights\n")
    single = f"val_path: {tmp_path}/valid.json"
    path.write_text(path.read_text().replace(single, f"val_path:\n  0123: {tmp_path}/valid.json"))
    assert Config.from_file(path).val_path == {"0123": f"{tmp_path}/valid.json"}
    config = Config.from_file(path, [f"val_path={{on: {tmp_path}/train.json, b: {tmp_path}/valid.json}}"])
    found = {name: one.val_path for name, one in config.by_set().items()}
    assert found == {"on": f"{tmp_path}/train.json", "b": f"{tmp_path}/valid.json"}
    run_folder.write_config(dataclasses.asdict(config), tmp_path / "out", world_size=1)
    assert Config.from_file(tmp_path / "out" / "config.yaml") == config
    single = Config.from_file(path, [f"val_path={tmp_path}/010"])
    assert single.by_set() == {"": single}


def test_mistakes_in_several_files_are_reported_together(write, tmp_path):
    path = write(f"only_eval: true\nload_model_path: {tmp_path}/weights")
    files = f"{{a: none.json, svamp: data/no/svamp.json, there: {tmp_path}/valid.json, folder: {tmp_path}}}"
    assert problem(path, f"val_path={files}").splitlines()[1:] == [
        "  - val_path a 'none.json' does not exist",
        "  - val_path svamp 'data/no/svamp.json' does not exist (make it with: python preprocessing/ood.py svamp)",
        f"  - val_path folder '{tmp_path}' is no file",
    ]
    for files, complaint in (
        (f"{{../a: {tmp_path}/valid.json}}", "'../a' must be a plain file name"),
        ("{a: x, a: y}", "val_path on the command line: the key 'a' is set twice"),
        ("{a: YOUR_PATH}", "val_path a is still the placeholder"),
        *(
            (wrong, "val_path must be text or a mapping of names to texts")
            for wrong in ("{}", "[a, b]", "{a: [b]}", "{a: {b: c}}")
        ),
    ):
        assert complaint in problem(path, f"val_path={files}"), files


def test_all_mistakes_are_reported_together(write, tmp_path):
    """Missing files were reported only when every key was right. A key with a wrong value is named once."""
    overrides = ["seeed=1", "lr=fast", "train_path=gone.json", "bf16=true", "bf16_weights=true", "val_path=[1]"]
    lines = problem(write("coconut: True\ncot: True"), *overrides, "nonsense").splitlines()
    for words in (
        *("'seeed'", "lr must", "two methods", "'nonsense' on the command line", "'gone.json' does not exist"),
        *("bf16 (mixed precision)", "  - val_path must be text or a mapping of names to texts, not [1]"),
    ):
        assert sum(words in line for line in lines) == 1, words
    assert sum("val_path" in line for line in lines) == 1
    assert problem(tmp_path / "gone.yaml") == f"cannot read {tmp_path}/gone.yaml: No such file or directory"


@pytest.mark.parametrize("key", PATHS)
def test_a_folder_without_permission_is_reported(write, monkeypatch, key):
    """A PermissionError, which root never gets, was a traceback."""

    def stat(path, *arguments, real=os.stat, **options):
        if str(path).startswith("closed/"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    assert f"{key} 'closed/x' cannot be reached: Permission denied" in problem(write(""), f"{key}=closed/x")


def test_an_empty_text_is_null(write, tmp_path):
    """An only_eval run with load_model_path "" was a traceback."""
    text = problem(write('load_model_path: ""\nonly_eval: true'), "val_path=")
    assert "load_model_path 'checkpoints/run' does not exist" in text
    assert "val_path is missing" in text
    (tmp_path / "gone.yaml").write_text("train_path: data/prosqa_train.json")
    text = problem(tmp_path / "gone.yaml")
    assert "python preprocessing/prosqa.py" in text or (ROOT / "data/prosqa_train.json").exists()
    assert "val_path is missing" in text


def test_accumulation_without_effect_is_reported(write, tmp_path):
    (tmp_path / "base.yaml").write_text("global_batch_size: 64")
    path, accumulation = write("extends: base.yaml"), "gradient_accumulation_steps=2"
    assert "gradient_accumulation_steps in the command line has no effect" in problem(path, accumulation)
    assert Config.from_file(path, [accumulation, "global_batch_size=null"]).micro_batches(1) == (2, 32)
    both = write("global_batch_size: 64\ngradient_accumulation_steps: 1")  # as in a run's own config.yaml
    assert Config.from_file(both).micro_batches(1) == (2, 32)


@pytest.mark.parametrize(("rank", "world_size"), [("3", None), ("3", "4"), ("", "")])
def test_ranks_without_a_launcher_are_ignored(monkeypatch, rank, world_size):
    """Some schedulers set RANK alone, which was a KeyError; a shell may keep both without a rendezvous address."""
    for name in utils.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", rank)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert utils.launched_ranks() == (0, 1)


OLDER = {
    "sim_cot": {"step_decoder": "copy"},
    "lotus": {"thought": "looped", "latent_passes": "stage", "latent_labels": 0.05},
    "parallel_latents": {"latent_passes": "3"},
    "pccot": {"method": "codi", "latent_passes": "3"},
}


@pytest.mark.parametrize("method", OLDER)
def test_older_spellings_of_a_method_are_read(write, method):
    """In YAML, on the command line, in a checkpoint and by the constructor, without a change of another key."""
    older = OLDER[method]
    expected = dataclasses.asdict(Config(method="no_thoughts")) | older | {"method": method}
    assert dataclasses.asdict(Config(**older)) == expected
    config = dataclasses.asdict(Config.from_file(write("\n".join(f"{key}: {value}" for key, value in older.items()))))
    assert expected.items() <= {**config, "name": "run", "train_path": None, "val_path": None}.items()
    assert Config.from_file(write(""), [f"{key}={value}" for key, value in older.items()]).method == method
    assert methods.modern({"method": "coconut", **older})["method"] == method
    assert dataclasses.replace(Config(**older), seed=1).method == method


def test_gsm_generates_as_many_tokens_as_in_the_reference():
    assert Config(val_path="data/gsm_valid.json").n_new_tokens == 64
    assert Config(val_path="data/gsm_valid.json", max_new_tokens=128).n_new_tokens == 128
    assert Config(val_path="data/prosqa_valid.json").n_new_tokens == 128
    sets = Config(val_path={"gsm": "data/gsm_test.json", "svamp": "data/svamp.json"}).by_set()
    assert {name: config.n_new_tokens for name, config in sets.items()} == {"gsm": 64, "svamp": 128}  # bug: 64, 64


def test_a_method_has_the_defaults_of_its_paper(write):
    lotus = Config(method="lotus")
    found = [lotus.thought, lotus.latent_passes, lotus.latent_labels, lotus.c_thought, lotus.max_latent_stage]
    assert found == ["looped", "stage", 0.05, 13, 6]
    assert (lotus.epochs_per_stage, lotus.max_grad_norm, lotus.reset_optimizer) == (1, 1.0, "never")
    pccot = Config.from_file(write("method: pccot\nseed: 3"))
    found = [pccot.max_latent_stage, pccot.latent_passes, pccot.thought, pccot.distilled_layers, pccot.weight_decay]
    assert found == [24, "3", "last", "blocks", 0.01]
    assert Config.from_file(write("method: pccot"), ["max_latent_stage=6"]).max_latent_stage == 6
    assert (Config().step_decoder, Config(method="sim_cot").step_decoder) == ("none", "pretrained")
    assert Config(method="parallel_latents").latent_passes == "3"
    for method in config_module.METHODS:
        assert Config(method=method).problems(needs_files=False) == []


FILES = sorted(path.stem for path in (ROOT / "methods").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("gone", FILES)
def test_the_core_works_without_a_methods_file(tmp_path, gone):
    for path in (
        "config.py",
        "curriculum.py",
        "utils.py",
        "trainer/commands.py",
        "trainer/files.py",
        "trainer/run_folder.py",
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    shutil.copytree(ROOT / "methods", tmp_path / "methods")
    (tmp_path / "methods" / f"{gone}.py").unlink()
    code = """if True:
        import json, sys
        from config import METHODS, THOUGHTS, Config
        found = {name: Config(method=name).problems(needs_files=False) for name in METHODS}
        print(json.dumps([found, list(THOUGHTS), [key for key in vars(Config())], Config.describe()]))
        assert "torch" not in sys.modules
    """
    methods_left, thoughts, keys, _ = json.loads(python("-c", code, cwd=tmp_path).stdout)
    assert gone not in methods_left
    assert {"coconut", "cot", "no_cot", "no_thoughts"} <= methods_left.keys()
    assert not any(methods_left.values())
    own = {"lotus": "latent_labels", "codi": "distillation", "sim_cot": "step_decoder", "icot": "icot_smoothing"}
    for name, key in own.items():
        assert (key in keys) == (name in methods_left)
    assert ("pause" in thoughts) == (gone != "thoughts")
    assert ("pccot" in methods_left) == (gone not in ("pccot", "codi", "parallel_latents"))


def test_micro_batches_depend_on_the_world_size(monkeypatch, write):
    """tools.evaluate RUN --all failed for runs of two ranks, whose batch one rank cannot make."""
    config = Config(global_batch_size=128, batch_size_training=32)
    assert [config.micro_batches(world_size) for world_size in (1, 2, 4, 8)] == [(4, 32), (2, 32), (1, 32), (1, 16)]
    assert Config(batch_size_training=32, gradient_accumulation_steps=3).micro_batches(5) == (3, 32)
    for world_size in (3, 256):
        refuses("no multiple", config.micro_batches, world_size)
    for name, value in zip(sorted(utils.LAUNCHED), ("127.0.0.1", "29500", "0", "3"), strict=True):
        monkeypatch.setenv(name, value)
    path = write("global_batch_size: 128")
    assert "3 ranks" in problem(path)
    assert Config.from_file(path, ["only_eval=true", f"load_model_path={path}"]).only_eval


def test_the_written_config_is_the_same_config(write, tmp_path):
    config = Config.from_file(write("lr: 1e-3\nepochs_per_stage: [1, 2]\nreset_optimizer: False"))
    run_folder.write_config(dataclasses.asdict(config), tmp_path / "out", world_size=2)
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert "# torch: 2." in text
    assert "# git commit: " in text
    assert Config.from_file(tmp_path / "out" / "config.yaml") == config


def test_every_yaml_in_args_is_valid_except_for_missing_files():
    paths = sorted((ROOT / "args").glob("*.yaml"))
    assert len(paths) <= 25
    for path in paths:
        for row in ROWS_OF.get(path.stem, [None]):
            overrides = [] if row is None else [f"row={row}"]
            for more in ([], ["only_eval=true"]):
                try:
                    Config.from_file(path, [*overrides, *more])
                except UserError as error:
                    lines = str(error).removeprefix(f"{path}: ").strip().splitlines()
                    assert all("does not exist" in line for line in lines), (path, row)


@pytest.mark.parametrize("name", ["gsm_cot", "gsm_coconut", "prontoqa_coconut", "prosqa_coconut"])
def test_the_authors_files_are_rows(name):
    stem, _, row = name.partition("_")
    found = Config.from_file(ROOT / "args" / f"{name}.yaml", needs_files=False)
    assert found == Config.from_file(ROOT / "args" / f"{stem}.yaml", [f"row={row}"], needs_files=False)
    assert found.name == f"{stem}-{row}"
    if row == "coconut":
        evaluation = Config.from_file(ROOT / "args" / f"{name}_eval.yaml", needs_files=False)
        assert evaluation.load_model_path == f"checkpoints/{stem}-coconut@best"
        assert evaluation.val_path == f"data/{stem}_test.json"
        assert (evaluation.run_dir, evaluation.resume) == (found.run_dir, 0)


ROWED = """
seed: 1
row: plain
rows:
  plain: {}
  no_cot: {method: no_cot, lr: 0.5}
  slow: {extends: no_cot, lr: 0.25, seed: 2}
"""


def test_a_row_is_chosen_and_names_the_run(write, tmp_path):
    path = write(ROWED, "set.yaml")
    for overrides, wanted in (
        ([], ("set-plain", "coconut", 1e-4, 1)),
        (["row=no_cot"], ("set-no-cot", "no_cot", 0.5, 1)),
        (["row=slow"], ("set-slow", "no_cot", 0.25, 2)),
        (["row=slow", "lr=1"], ("set-slow", "no_cot", 1, 2)),
    ):
        config = Config.from_file(path, overrides)
        assert (config.name, config.method, config.lr, config.seed) == wanted
    (tmp_path / "mine.yaml").write_text("extends: set.yaml\nrow: slow\nseed: 5")
    for overrides, wanted in (([], ("mine", 0.25, 5)), (["row=no_cot"], ("mine-no-cot", 0.5, 5))):
        config = Config.from_file(tmp_path / "mine.yaml", overrides)
        assert (config.name, config.lr, config.seed) == wanted
    assert "unknown row 'none' in the command line: the rows are plain, no_cot, slow" in problem(path, "row=none")


def test_what_only_eval_evaluates(write, tmp_path):
    """The run's best checkpoint on test_path, or what is set beside only_eval; other keys belong to the training."""
    (tmp_path / "other.json").write_text("[]")
    training = (
        f"test_path: {tmp_path}/train.json\nload_model_path: {tmp_path}/weights\nresume: 3\nsave_path: {tmp_path}/r\n"
    )
    path, best = write(f"only_eval: False\n{training}from_scratch: true"), f"{tmp_path}/r/run@best"

    def evaluated(path, *overrides):
        config = Config.from_file(path, ["only_eval=true", *overrides], needs_files=False)
        assert config.test_path is None
        return config.load_model_path, config.val_path, config.resume, config.from_scratch

    train, valid, other = (f"{tmp_path}/{name}.json" for name in ("train", "valid", "other"))
    assert evaluated(path) == (best, train, 0, False)
    assert evaluated(path, "load_model_path=x", "resume=2") == ("x", train, 2, False)
    assert evaluated(path, f"val_path={other}") == (best, other, 0, False)
    both = write(f"only_eval: True\n{training}", "both.yaml")
    assert evaluated(both, f"val_path={other}")[1] == other  # bug: the file's test_path
    assert evaluated(both)[1] == evaluated(both, f"val_path={other}", f"test_path={train}")[1] == train
    assert evaluated(path, "debug=true") == (best, train, 0, False)  # bug: the checkpoint of a debug run
    assert evaluated(path, f"test_path={{a: {other}}}") == (best, {"a": other}, 0, False)
    assert evaluated(write(""), "load_model_path=x") == ("x", valid, 0, False)  # no test_path
    refuses(r"only_eval evaluates .*/run@best on test_path: set test_path", evaluated, write(""))
    reference = write(REFERENCE.format(folder=tmp_path).replace("only_eval: False", "only_eval: True"))
    config = Config.from_file(reference)
    assert (config.load_model_path, config.val_path, config.resume) == (f"{tmp_path}/weights", valid, 3)
    config = Config.from_file(path, ["only_eval=true", f"val_path={other}"], needs_files=False)
    run_folder.write_config(dataclasses.asdict(config), tmp_path / "out", world_size=1)
    assert Config.from_file(tmp_path / "out" / "config.yaml", needs_files=False) == config


@pytest.mark.parametrize(
    "path",
    [
        *("data/tiny_arithmetic", "data/tiny_prosqa", "data/machine/model", "data/machine/machine_train.json"),
        *("data/prontoqa_train.json", "data/breadth/model", "data/mirrored3/model", "checkpoints/gsm-cot"),
    ],
)
def test_the_hint_names_scripts(path):
    """Of data, models and runs that must exist first."""
    hint = config_module._preparation_hint(path)
    script, *files = re.search(r"make it with: python ([^ )]+)(?: ([^ )]+yaml))?", hint).groups()
    assert all((ROOT / file).is_file() for file in (script, *filter(None, files)))


@pytest.mark.parametrize("arguments", [["--num_epochs=1"], ["x=1", "--num-epochs", "1"]])
def test_a_key_with_dashes_gets_a_hint(write, monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", str(write("")), *arguments])
    with pytest.raises(SystemExit) as end:
        config_module.configure("", lambda *_: "", lambda *_: "")
    assert end.value.code == 2
    assert "keys are set without dashes, as in num_epochs=1" in capsys.readouterr().err


def test_a_closed_or_full_output_is_no_traceback(write):
    """BrokenPipeError ends quietly, a full disk in one sentence."""
    command = [sys.executable, str(ROOT / "run.py"), str(write("")), "--schedule"]
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed, open("/dev/full", "w") as full:
        done = [subprocess.run(command, stdout=out, stderr=subprocess.PIPE, check=False) for out in (closed, full)]
    assert (done[0].returncode, done[0].stderr) == (0, b"")
    assert done[1].returncode == 2
    assert done[1].stderr == b"error: standard output cannot be written: No space left on device\n"
