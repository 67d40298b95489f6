"""run.py as users start it: in one process and on two ranks."""

import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from unittest.mock import ANY

import conftest
import pytest
import tiny_model
import torch
import yaml
from conftest import ROOT, digest, distance, epochs, lines_of, main, one_error, read_json, start, together, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import run as run_module
from config import Config
from tools import evaluate as evaluate_tool
from trainer import run_folder as load_path

PROSQA = conftest.DATA / "prosqa_valid.json"


@pytest.fixture(scope="session")
def trained(place) -> tuple[Path, str]:
    """A run of three epochs on two ranks: its folder and its output."""
    done = start(place / "run.yaml", "num_workers=1", ranks=2)
    return place / "runs" / "run", done.stderr + done.stdout


def test_two_ranks_train_every_stage_and_leave_hugging_face_folders(trained):
    run, printed = trained
    assert [record["stage"] for record in epochs(run)] == [0, 1, 2]
    assert all(record["generated_tokens"] >= record["stage"] for record in epochs(run))
    assert epochs(run)[-1]["train_loss"] < epochs(run)[0]["train_loss"]
    assert [record["step"] for record in conftest.steps(run)] == list(range(1, 31))
    assert "global batch 16 = 2 ranks x 8 examples x 1 micro-batches; 10 steps an epoch" in printed
    assert "validation, stage 2" in printed
    last = run / "checkpoint_3"
    assert AutoModelForCausalLM.from_pretrained(last).config.vocab_size == len(AutoTokenizer.from_pretrained(last))
    description = read_json(last / "coconut.json")
    assert (description["method"], description["stage"]) == ("coconut", 2)
    predictions = lines_of(last / "predictions.jsonl")
    assert [prediction["index"] for prediction in predictions] == list(range(30))
    accuracy = sum(prediction["correct"] for prediction in predictions) / 30
    assert accuracy == pytest.approx(epochs(run)[-1]["accuracy"])


@pytest.mark.slow
def test_an_eval_only_run_agrees_with_training(place, trained):
    run, _ = trained
    arguments = ("only_eval=true", f"load_model_path={run}")
    main(place, *arguments, "name=eval-1")
    together(place / "run.yaml", *arguments, "name=eval-2")
    wanted = read_json(run / "checkpoint_3" / "metrics.json")
    for name in ("eval-1", "eval-2"):
        folder = place / "runs" / name / "eval"
        found = read_json(folder / "metrics.json")
        assert found["stage"] == 2
        for key in ("accuracy", "cot_match", "generated_tokens", "examples"):
            assert found[key] == wanted[key]
        assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        file = "predictions.jsonl"
        assert (folder / file).read_text() == (run / "checkpoint_3" / file).read_text()


SETS = "{{first: {place}/valid.json, words: {place}/words.json, third: {place}/valid.json}}"


@pytest.fixture(scope="session")
def words(place) -> Path:
    """A file whose answers are not numbers and whose examples have no steps."""
    examples = json.loads((place / "valid.json").read_text())[:7]
    path = place / "words.json"
    path.write_text(json.dumps([{**example, "answer": "+-", "steps": []} for example in examples]))
    return path


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_several_files_are_evaluated_in_one_run(place, trained, words, here, ranks):
    run, _ = trained
    arguments = (place / "run.yaml", "only_eval=true", f"load_model_path={run}", f"name=sets-{ranks}")
    done = (here if ranks == 1 else together)(*arguments, f"val_path={SETS.format(place=place)}")
    assert [line.split()[:5] for line in done.stdout.splitlines()[-4:]] == [
        ["n", "accuracy", "95", "%", "tokens"],
        *(["first,", "stage", "2", "30", ANY], ["words,", "stage", "2", "7", ANY], ["third,", "stage", "2", "30", ANY]),
    ]
    folder = place / "runs" / f"sets-{ranks}" / "eval"
    wanted = read_json(run / "checkpoint_3" / "metrics.json")
    found = read_json(folder / "metrics.json")["sets"]
    assert list(found) == ["first", "words", "third"]
    for name in ("first", "third"):
        for key in ("accuracy", "accuracy_text", "accuracy_number", "cot_match", "generated_tokens", "examples"):
            assert found[name][key] == wanted[key]
        assert found[name]["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        low, high = found[name]["accuracy_95"]
        assert low <= wanted["accuracy"] < high < 0.2
        predictions = (folder / f"predictions_{name}.jsonl").read_text()
        assert predictions == (run / "checkpoint_3" / "predictions.jsonl").read_text()
    assert found["words"]["examples"] == len(lines_of(folder / "predictions_words.jsonl")) == 7
    assert "accuracy_number" not in found["words"]
    assert found["words"]["file"] == str(words)
    events = [record["event"] for record in lines_of(folder / "metrics.jsonl")]
    assert events == ["eval/first", "eval/words", "eval/third"]
    files = {"config.yaml", "metrics.json", "metrics.jsonl", *(f"predictions_{name}.jsonl" for name in found)}
    assert {path.name for path in folder.iterdir()} == files


def test_an_evaluation_of_a_single_file_keeps_its_format(place, trained, words, here):
    """Other programs read these files."""
    run, _ = trained
    arguments = (place / "run.yaml", "only_eval=true", f"load_model_path={run}", "name=single", f"val_path={words}")
    done = here(*arguments)
    assert f"evaluating {run / 'checkpoint_3'} at stage 2 on {words} (7 examples)\n" in done.stderr
    lines = done.stdout.splitlines()[-2:]
    assert lines[0].split() == ["epochs", "accuracy", "tokens", "loss", "seconds"]
    assert lines[1].startswith("words, stage 2   ")
    folder = place / "runs" / "single" / "eval"
    files = {"config.yaml", "metrics.json", "metrics.jsonl", "predictions.jsonl"}
    assert {path.name for path in folder.iterdir()} == files
    assert list(read_json(folder / "metrics.json")) == [
        *("loss", "accuracy", "cot_match", "generated_tokens", "examples", "seconds_per_example", "seconds"),
        *("stage", "checkpoint", "file"),
    ]
    keys = ["index", "question", "gold", "output", "answer", "correct", "cot_correct", "generated_tokens"]
    assert list(lines_of(folder / "predictions.jsonl")[0]) == keys


def test_evaluating_on_the_validation_set_warns(place, trained, words, here):
    """A checkpoint records the digest of its validation file, so that a copy is recognised too."""
    run, _ = trained
    content = (place / "valid.json").read_bytes()
    described = read_json(run / "checkpoint_3" / "coconut.json")["validated_on"]
    assert described == {"file": str(place / "valid.json"), "sha256": hashlib.sha256(content).hexdigest()}
    (place / "copy.json").write_bytes(content)
    arguments = (place / "run.yaml", "only_eval=true", f"load_model_path={run}", "name=chosen", "max_new_tokens=2")
    done = here(*arguments, f"val_path={{copy: {place}/copy.json, words: {words}}}")
    (warning,) = [line for line in done.stderr.splitlines() if "validation file" in line]
    assert warning.startswith(f"warning: {place / 'copy.json'} is the validation file of {run / 'checkpoint_3'} (")
    assert "validation file" not in here(*arguments, f"val_path={words}").stderr
    arguments = (*arguments[:2], "method=coconut", f"load_model_path={place / 'model'}", "name=plain")
    assert "validation file" not in here(*arguments, "max_new_tokens=2").stderr  # of whom nothing is known


def test_one_rank_with_doubled_accumulation_gives_the_same_weights(place, trained):
    run, _ = trained
    main(place, "name=alone", "gradient_accumulation_steps=2", "max_new_tokens=2")
    alone, begin = weights(place / "runs" / "alone" / "checkpoint_3"), weights(place / "model")
    assert distance(alone, weights(run / "checkpoint_3")) < 1e-6
    # training has changed them much more than that
    assert distance(alone, {name: value for name, value in begin.items() if alone[name].shape == value.shape}) > 1e-2


SHORT = ("max_train_examples=48", "max_new_tokens=2", "num_epochs=2", "uniform_prob=0", "global_batch_size=16")


@pytest.mark.slow
def test_a_learned_thought_is_the_same_under_ddp_and_fsdp_and_alone(place):
    """In the first of two stages only weight decay changes its weights, in the second it learns."""
    arguments = (*SHORT, "thought=projected+normalised", "weight_decay=0.1")
    folders = {"alone": main(place, *arguments, "name=thought-alone")}
    for strategy in ("ddp", "fsdp"):
        keys = (f"name=thought-{strategy}", f"strategy={strategy}", "num_workers=1")
        done = together(place / "run.yaml", *arguments, *keys)
        assert f"on 2 x cpu ({strategy})" in done.stderr
        folders[strategy] = place / "runs" / f"thought-{strategy}"

    def learnt(folder: Path, epoch: int) -> torch.Tensor:
        return load_file(folder / f"checkpoint_{epoch}" / "thought.safetensors")["weight"]

    found = {
        name: {"first": learnt(folder, 1), "second": learnt(folder, 2), **weights(folder / "checkpoint_2")}
        for name, folder in folders.items()
    }
    first, second = found["alone"]["first"], found["alone"]["second"]
    assert torch.allclose(first, torch.eye(32) * (1 - 1e-3 * 0.1) ** 3)
    assert (second - first).abs().max() > 1e-4
    for strategy in ("ddp", "fsdp"):
        assert distance(found[strategy], found["alone"]) < 1e-6
    # a restart on another number of ranks reads it: with lr 0 it does not change
    main(place, *arguments, "name=thought-fsdp", "num_epochs=3", "lr=0", "continue_changed=true", "strategy=fsdp")
    assert torch.equal(learnt(folders["fsdp"], 3), found["fsdp"]["second"])


@pytest.mark.parametrize("thought", ["layer:0.5", "realigned", "last+suppressed"])
def test_sharded_weights_and_checkpointed_blocks_make_the_same_thoughts(place, thought):
    keys, name = (*SHORT, f"thought={thought}"), thought.replace(":", "-")
    wanted = weights(main(place, *keys, f"name={name}") / "checkpoint_2")
    for key in ("strategy=fsdp", "gradient_checkpointing=true"):
        other = main(place, *keys, f"name={name}-{key.partition('=')[0]}", key)
        assert distance(weights(other / "checkpoint_2"), wanted) < 1e-6


@pytest.mark.parametrize("thought", ["last", "layer:-2", "pause", "projected", "suppressed:0.1"])
def test_only_eval_agrees_with_training_for_every_thought(place, capsys, thought):
    name = "eval-" + thought.replace(":", "-")
    run = main(place, *SHORT, f"thought={thought}", f"name={name}", "max_train_examples=16")
    evaluation = (f"name={name}-only", "only_eval=true", f"load_model_path={run}", "max_new_tokens=2")
    evaluated = main(place, *evaluation, f"thought={thought}")
    found = read_json(evaluated / "eval" / "metrics.json")
    assert found["loss"] == pytest.approx(epochs(run)[-1]["loss"], rel=1e-6)
    main(place, *evaluation, code=0 if thought == "last" else 2)
    assert thought == "last" or f"(thought '{thought}', not 'last')" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["qwen2", "llama"])
def test_the_rows_of_other_models_train(place, shape):
    """The rows coconut_{qwen,llama} of gsm.yaml, with a tiny model and tiny data."""
    folder, row = place / f"{shape}_twin", "coconut_qwen" if shape == "qwen2" else "coconut_llama"
    tiny_model.write_model([place / "train.json"], folder, "char", shape, 32, 2, 2, 128, tied=True)
    keys = [f"row={row}", f"train_path={place / 'train.json'}", f"val_path={place / 'valid.json'}"]
    keys += [f"model_id={folder}", f"save_path={place / 'runs'}", "max_train_examples=16", "max_new_tokens=2"]
    config = Config.from_file(ROOT / "args" / "gsm.yaml", keys)
    assert (config.method, config.lr, config.bf16, config.load_model_path) == ("coconut", 1e-5, True, None)
    assert config.strategy == ("auto" if shape == "qwen2" else "fsdp")
    assert run_module.main(config) == 0
    assert [record["stage"] for record in epochs(config.run_dir)] == [0, 0, 1, 2, 3, 4, 4, 4]
    assert AutoModelForCausalLM.from_pretrained(config.run_dir / "checkpoint_8").config.model_type == shape


TINY = ("max_train_examples=16", "max_new_tokens=2")


@pytest.mark.parametrize(
    ("reset", "epochs_of_new"), [("never", [0]), ("stage", [0, 2]), ("epoch", [0, 1, 2, 3]), ("true", [0, 1, 2, 3])]
)
def test_the_optimizer_is_reset_when_it_should_be(place, monkeypatch, reset, epochs_of_new):
    made = []
    original = run_module.make_optimizer
    monkeypatch.setattr(run_module, "make_optimizer", lambda r: made.append(r.progress.step) or original(r))
    main(place, *TINY, f"name=reset-{reset}", f"reset_optimizer={reset}", "epochs_per_stage=2", "num_epochs=4")
    assert sorted(set(made)) == [2 * epoch for epoch in epochs_of_new]


def test_an_epoch_that_was_begun_with_smaller_steps_does_not_reset_the_optimizer_again(place, monkeypatch):
    """More ranks make larger steps, as more micro-batches do: what was a whole step may be a part of the first one."""
    keys = (*TINY, "name=reset-again", "reset_optimizer=epoch", "num_epochs=2")
    with monkeypatch.context() as patched:
        done = []
        patched.setattr(
            run_module, "update_weights", lambda run, _: done.append(run) or setattr(run.progress, "step", 1)
        )
        patched.setattr(run_module.StopSignal, "requested", lambda *_, **__: bool(done))
        main(place, *keys)
    made, original = [], run_module.make_optimizer
    monkeypatch.setattr(run_module, "make_optimizer", lambda r: made.append(r.progress.step) or original(r))
    main(place, *keys, "gradient_accumulation_steps=2", "continue_changed=true")
    assert made == [1, 2]  # in the restart, then in the second epoch


def test_the_training_loss_is_a_mean_over_the_examples_that_were_trained(place, monkeypatch):
    """Bug: after a restart with fewer examples their sum was divided by the new number."""
    with monkeypatch.context() as patched:
        before_and_after = iter([False, True, True])  # the first step, of 8 examples
        patched.setattr(run_module.StopSignal, "requested", lambda *_, **__: next(before_and_after))
        folder = main(place, *TINY, "name=fewer", "num_epochs=1")
    main(place, "name=fewer", "num_epochs=1", "max_new_tokens=2", "max_train_examples=4", "continue_changed=true")
    (step,), (epoch,) = conftest.steps(folder), epochs(folder)
    assert epoch["train_loss"] == pytest.approx(step["loss"])


def test_learning_rates_and_clipping(place):
    def lrs(name: str, *overrides: str) -> list[float]:
        folder = main(place, *TINY, f"name={name}", "num_epochs=2", *overrides)
        return [round(record["lr"] / 1e-3, 6) for record in conftest.steps(folder)]

    assert lrs("lr-constant", "max_grad_norm=0") == [1, 1, 1, 1]
    assert lrs("lr-warm", "warmup_steps=2") == [0.5, 1, 1, 1]
    assert lrs("lr-linear", "lr_scheduler=linear") == [1, 0.75, 0.5, 0.25]
    assert lrs("lr-cosine", "lr_scheduler=cosine") == [1, 0.853553, 0.5, 0.146447]
    # if stages end early, the schedule counts the steps that were trained
    early = ("epochs_per_stage=2", "num_epochs=4", "advance_at=0")
    assert lrs("lr-early", "lr_scheduler=linear", *early) == [1, 0.875, 0.75, 0.625]
    # a run that goes on counts from where it began, whatever resume says by then (bugs: negative rates, a traceback)
    lrs("lr-later", "lr_scheduler=linear")
    later = ("num_epochs=4", "resume=3", "continue_changed=true")
    assert lrs("lr-later", "lr_scheduler=linear", *later)[4:] == [0.5, 0.375, 0.25, 0.125]
    assert lrs("lr-constant", *later) == [1] * 8
    # AdamW ignores the scale of a gradient, unless it is as small as AdamW's epsilon
    lrs("clipped", "max_grad_norm=1e-12")
    norms = [step.get("grad_norm") for step in conftest.steps(place / "runs" / "clipped")]
    assert all(norm > 0.01 for norm in norms)  # before clipping
    assert len(set(norms)) == 4
    assert "grad_norm" not in conftest.steps(place / "runs" / "lr-constant")[0]
    folders = [place / "model", *(place / "runs" / name / "checkpoint_2" for name in ("clipped", "lr-constant"))]
    begin, clipped, plain = (weights(folder)["transformer.h.0.mlp.c_fc.weight"] for folder in folders)
    assert (clipped - begin).abs().max() < 0.1 * (plain - begin).abs().max()


def test_a_debug_run_does_not_touch_the_real_one(place, trained):
    run, _ = trained
    before = digest(run)
    for n_epochs in (2, 1):
        folder = main(place, "debug=true", f"num_epochs={n_epochs}", "max_new_tokens=2")
        assert len(epochs(folder)) == n_epochs  # bug: the table had the epochs of the earlier run too
    assert folder.name == "run-debug"
    assert not list(folder.glob("checkpoint_*"))
    assert digest(run) == before


def test_a_finished_run_is_not_changed(place, trained, here):
    run, _ = trained
    before = weights(run / "checkpoint_3")
    assert "after 3 of 3 epochs" in here(place / "run.yaml").stderr
    assert conftest.equal(before, weights(run / "checkpoint_3"))
    assert len(epochs(run)) == 3


@pytest.mark.parametrize(
    ("file", "content"), [("eval/metrics.json", "{"), ("metrics.jsonl", '{"event": "epoch"}'), ("metrics.jsonl", None)]
)
def test_a_damaged_log_does_not_fail_the_training(place, trained, tmp_path, here, file, content):
    """The exit code was 2 although all epochs were trained and saved."""
    folder = shutil.copytree(trained[0], tmp_path / "run")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    assert "warning: there is no table: " in here(place / "run.yaml", f"save_path={tmp_path}").stderr


def test_a_finished_run_with_save_only_improve_is_not_changed(place):
    """A restart repeated all epochs after the best one. With more epochs it continues from its last."""
    keys = ["name=improves", "save_only_improve=true", "lr=0", "epochs_per_stage=9", "max_new_tokens=2"]
    run = main(place, *keys, "num_epochs=3")
    assert [path.name for path in load_path.checkpoints(run)] == ["checkpoint_1", "checkpoint_3_step_57"]
    assert load_path.resolve(str(run)) == run / "checkpoint_1"
    main(place, *keys, "num_epochs=3")
    assert [record["epoch"] for record in epochs(run)] == [0, 1, 2]
    main(place, *keys, "num_epochs=4")
    assert [record["epoch"] for record in epochs(run)] == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["cot", "no_cot", "no_thoughts"])
def test_the_other_methods_run(place, method):
    keys = ("save_only_improve=true", "keep_checkpoints=1", "warmup_steps=5", "lr_scheduler=cosine", "max_grad_norm=1")
    run = main(place, *keys, f"method={method}", f"name=method-{method}", "num_epochs=2", "bf16=true")
    assert len(epochs(run)) == 2
    assert epochs(run)[-1]["loss"] < 3
    (saved,) = [path for path in run.glob("checkpoint_*") if load_path.is_epoch_checkpoint(path)]
    assert "<|latent|>" not in AutoTokenizer.from_pretrained(saved).get_vocab()


def test_coconut_starts_from_a_cot_run(place, here):
    words = main(place, "method=cot", "name=words", "num_epochs=1", "max_new_tokens=2")
    done = here(place / "run.yaml", f"load_model_path={words}", "resume=1", "name=from-words", "max_new_tokens=2")
    assert "starting with epoch 1, stage 1" in done.stderr
    assert [record["epoch"] for record in epochs(place / "runs" / "from-words")] == [1, 2]


def test_a_run_of_the_reference_is_continued_only_on_request(place, capsys):
    """It was replaced without a word; the reference would continue it."""
    folder = place / "runs" / "theirs"
    folder.mkdir(parents=True)
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    torch.save(base.state_dict(), folder / "checkpoint_2")
    brief = ("name=theirs", "max_train_examples=8", "max_eval_examples=4", "max_new_tokens=2")
    message = f"load_model_path={folder / 'checkpoint_2'} and resume=2"
    main(place, *brief, code=2)
    assert message in capsys.readouterr().err
    main(place, *brief, *message.split(" and "))
    assert [record["epoch"] for record in epochs(folder)] == [2]
    assert (folder / "checkpoint_2").is_file()


@pytest.mark.slow
def test_the_best_checkpoint_is_named_and_all_can_be_evaluated(place, trained, capsys, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    accuracy = {path: load_path.rating(path) for path in load_path.checkpoints(run)}
    best = max(accuracy, key=lambda path: (accuracy[path], int(path.name.partition("_")[2])))
    assert evaluate_tool.main([str(run)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"best in validation: {best.name}, stage ")
    assert last.endswith(f"(load_model_path={run}@best)")
    assert evaluate_tool.main([str(run), "--all", str(place / "valid.json")]) == 0
    _, *lines, last_again = capsys.readouterr().out.splitlines()
    assert last_again == last
    rows = {line.partition(",")[0]: line for line in lines}
    assert list(rows) == [path.name for path in accuracy]
    assert [name for name, line in rows.items() if ", best " in line] == [best.name]
    for path, (_, share) in accuracy.items():  # on the file that they were validated on
        assert f" {share:.1%} " in rows[path.name]
    assert (run / "evaluations" / "valid" / "checkpoint_1" / "eval" / "metrics.json").is_file()
    # a damaged checkpoint is reported, the others are evaluated, a warning is printed once
    odd = shutil.copytree(trained[0], tmp_path / "run #1")
    (odd / "checkpoint_2" / "model.safetensors").write_bytes(b"")
    (tmp_path / "te st #2.json").write_text((place / "valid.json").read_text())
    assert evaluate_tool.main([str(odd), "--all", str(tmp_path / "te st #2.json")]) == 2
    printed = capsys.readouterr()
    rows = [line.partition(",")[0] for line in printed.out.splitlines() if line.startswith("checkpoint_")]
    assert rows == ["checkpoint_1", "checkpoint_3"]
    assert "checkpoint_2 could not be evaluated: " in printed.err
    assert printed.err.count("it has chosen the checkpoint, so accuracy on it is too high") == 1
    assert evaluate_tool.main([str(run), "--all", "none.json"]) == 2
    printed = capsys.readouterr()
    assert re.fullmatch("error: .*none.json.*\n", printed.err)
    assert not printed.out
    (odd / "checkpoint_3" / "coconut.json").unlink()
    assert evaluate_tool.main([str(odd), "--all", str(place / "valid.json")]) == 2
    printed = capsys.readouterr()
    assert ", best" not in printed.out.replace("checkpoint_1, stage 0, best", "")
    assert "checkpoint_3 could not be evaluated: it is damaged" in printed.err
    assert "checkpoint_3 is damaged" in printed.err
    with (odd / "config.yaml").open("a") as file:
        file.write("\nfirst_unknown: 1\nsecond_unknown: 2\n")
    assert evaluate_tool.main([str(odd), "--all", str(place / "valid.json")]) == 2
    printed = capsys.readouterr().err
    assert "first_unknown" in printed  # bug: with two problems none was named
    assert "second_unknown" in printed
    assert evaluate_tool.main([str(tmp_path), "--all", "none.json"]) == 2
    assert "holds no checkpoint of a finished epoch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("eval/metrics.json", text) for text in ("", "{", "[]", "{}", '{"sets": 3}')),
        ("metrics.jsonl", '{"event": "epoch"}'),
    ],
)
def test_a_damaged_run_is_reported_in_one_sentence(trained, tmp_path, file, content, capsys):
    run = shutil.copytree(trained[0], tmp_path / "run")
    (run / "eval").mkdir(exist_ok=True)
    (run / file).write_text(content)
    assert str(run) in one_error(evaluate_tool.main, [run], capsys)


@pytest.mark.parametrize("arguments", [[], ["--all", "x.json"]])
@pytest.mark.parametrize(
    ("run", "sentence"),
    [("a" * 300, "cannot be reached: File name too long"), ("gone", "(gone|it) holds (neither|no checkpoint)")],
)
def test_a_missing_run_is_reported_in_one_sentence(arguments, run, sentence, capsys):
    printed = one_error(evaluate_tool.main, [run, *arguments], capsys)
    assert re.search(sentence, printed)
    assert "damaged" not in printed


def test_damaged_records_are_skipped(trained, tmp_path):
    run = shutil.copytree(trained[0], tmp_path / "run")
    wanted = evaluate_tool.summary(run)
    with (run / "metrics.jsonl").open("ab") as log:
        log.write(b'[]\n3\nnull\n{"a": 1}\n\xff\n')
    (run / "checkpoint_1" / "metrics.json").write_text('{"accuracy": "high"}')
    (run / "checkpoint_2" / "metrics.json").write_text('{"accuracy": NaN}')
    assert evaluate_tool.summary(run) == wanted
    assert load_path.best(run).name == "checkpoint_3"


def test_evaluate_all_ignores_max_eval_examples(place, trained, tmp_path):
    """The run's limit cut the test file too, and a file in a folder with such a name was not found."""
    run = shutil.copytree(trained[0], tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"max_eval_examples": 3}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("checkpoint_1", "checkpoint_2"):
        shutil.rmtree(run / name)
    (tmp_path / "\U0001f600").mkdir()
    file = shutil.copy(place / "valid.json", tmp_path / "\U0001f600")
    assert evaluate_tool.main([str(run), "--all", str(file)]) == 0
    assert read_json(run / "evaluations/valid/checkpoint_3/eval/metrics.json")["examples"] == 30
    # bug: another file of the same name took its place
    assert evaluate_tool.main([str(run), "--all", str(place / "valid.json")]) == 0
    assert {one["file"] for _, one in load_path.evaluations_in(run)} == {str(file), str(place / "valid.json")}


def test_results_of_an_evaluation_appear_together(place, trained, tmp_path):
    """A full disk left new metrics beside half of the new predictions, without the old ones."""
    folder = tmp_path / "run" / "eval"
    keys = (f"save_path={tmp_path}", f"load_model_path={trained[0]}", "only_eval=true")

    def predictions(*more: str) -> set[str]:
        main(place, *keys, *more)
        return {path.name for path in folder.glob("predictions*")}

    sets = f"val_path={{a: {place / 'valid.json'}, b: {place / 'valid.json'}}}"
    assert predictions(sets) == {"predictions_a.jsonl", "predictions_b.jsonl"}
    assert predictions() == {"predictions.jsonl"}
    before, aside = digest(folder), folder / f".{os.getpid()}.predictions.jsonl"
    aside.mkdir()  # the temporary file cannot be written
    main(place, *keys, code=2)
    aside.rmdir()
    assert digest(folder) == before
    (folder / "predictions.jsonl").unlink()
    (folder / "predictions.jsonl").mkdir()  # nor can it be renamed
    metrics = (folder / "metrics.json").read_bytes()
    main(place, *keys, code=2)
    assert (folder / "metrics.json").read_bytes() == metrics


def test_help_schedule_and_errors_do_not_import_torch(place, tmp_path):
    """It takes seconds. Here its import fails."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')")
    broken = {"environment": {"PYTHONPATH": str(tmp_path)}}
    assert "torch was imported" in start(place / "run.yaml", code=1, **broken).stderr
    printed = start("--help", **broken).stdout
    assert "global_batch_size" in printed
    assert "torchrun" in printed
    assert len(start(ROOT / "args" / "gsm_coconut.yaml", "--schedule", **broken).stdout.splitlines()) == 23
    assert start(place / "run.yaml", "num_epoch=1", code=2, **broken).stderr.startswith("error: ")


@pytest.fixture(scope="module")
def bad_files(place):
    """Writes the files of `BAD`."""
    record = {"question": "1", "answer": "1", "steps": []}
    for name, records in {
        "no_steps": [record, {"question": "1", "answer": "1"}],
        "marked": [record, {**record, "question": "<|latent|>1"}],
        "half": [{**record, "answer": "\ud83d"}],
    }.items():
        (place / f"{name}.json").write_text(json.dumps(records))
    torch.save(AutoModelForCausalLM.from_pretrained(place / "other_model").state_dict(), place / "other.bin")
    state = AutoModelForCausalLM.from_pretrained(place / "model").state_dict()
    torch.save({name: value * math.nan for name, value in state.items()}, place / "nan.bin")
    shutil.copytree(place / "model", place / "odd", dirs_exist_ok=True)  # the fixture may run again
    (place / "odd" / "coconut.json").write_text('{"stage": -3, "validated_on": "x"}')


BAD = {
    "no steps": (["train_path={place}/no_steps.json"], "record 1 .*lacks 'steps'"),
    "mistyped key": (["num_epoch=3"], "unknown key 'num_epoch'.*did you mean 'num_epochs'"),
    "checkpoint of another model": (
        ["only_eval=true", "load_model_path={place}/other_model"],
        "a checkpoint of another model: .*hidden_size 64",
    ),
    "weights of another model": (["load_model_path={place}/other.bin", "name=new"], "of another shape: lm_head.weight"),
    "no weights": (["load_model_path={place}/run.yaml", "name=new"], "is no file of weights"),
    "another configuration": (["c_thought=2"], "checkpoint_3 was trained with .* configuration .c_thought 1, not 2"),
    "another method": (
        ["only_eval=true", "method=cot", "load_model_path={place}/runs/run"],
        "configuration .method 'coconut', not 'cot'",
    ),
    "too long": (["name=long", "c_thought=60", "max_latent_stage=3"], "makes .* tokens, but .* has only 128 positions"),
    "far too long": (["name=long", f"c_thought={10**18}"], "makes .* tokens, but .* has only 128 positions"),
    "no numbers": (
        ["only_eval=true", "load_model_path={place}/runs/run", "answer_match=number", f"val_path={SETS}", "name=new"],
        "needs numbers, but the answer of record 0 .counted from 0. of .*words.json is '.-'",
    ),
    "a marker in the data": (["train_path={place}/marked.json", "name=new"], "record 1 .* has the text '<.latent.>'"),
    "no text": (["val_path={place}/half.json", "name=new"], "half.json: record 0 .* half a character"),
    "weights that are not numbers": (
        ["only_eval=true", "load_model_path={place}/nan.bin", "name=new"],
        "the weights of .*nan.bin are not finite",
    ),
    "a description of another kind": (
        ["only_eval=true", "load_model_path={place}/odd", "name=new"],
        "stage must be a whole number from 0 on, not -3; validated_on must be an object, not 'x'",
    ),
    "no layer": (["thought=layer:5", "name=new"], "thought 'layer:5' must be between layer:-2 and layer:1"),
}
FOUND_BY_RANKS = ("no steps", "no text", "checkpoint of another model", "no numbers")


@pytest.mark.parametrize(
    ("case", "ranks"),
    [(case, 0) for case in BAD]
    + [pytest.param(case, 2, marks=pytest.mark.slow) for case in ("mistyped key", *FOUND_BY_RANKS)],
)
def test_bad_input_is_reported_in_one_sentence_and_changes_nothing(place, trained, words, bad_files, here, case, ranks):
    run, _ = trained
    before = digest(run)
    arguments, sentence = BAD[case]
    arguments = (place / "run.yaml", *(argument.format(place=place) for argument in arguments))
    done = start(*arguments, ranks=ranks, code=None) if ranks else here(*arguments, code=2)
    complaint = conftest.complaint_of(done)
    assert re.search(sentence, complaint), complaint
    assert ("Traceback" in done.stderr) == bool(ranks)  # torchrun's own, where it started the ranks
    assert digest(run) == before


@pytest.mark.slow
@conftest.needs_data
def test_the_authors_prosqa_rows(tmp_path):
    tiny_model.write_model([PROSQA], tmp_path / "model", "word", "gpt2", 64, 2, 4, 1024)
    keys = [f"model_id={tmp_path / 'model'}", f"train_path={PROSQA}", f"val_path={PROSQA}", f"save_path={tmp_path}"]
    keys += ["max_train_examples=96", "max_eval_examples=16", "epochs_per_stage=1", "num_epochs=3", "max_new_tokens=60"]
    done = together(ROOT / "args" / "prosqa_mini.yaml", *keys)
    records = epochs(tmp_path / "prosqa_mini")
    assert [record["stage"] for record in records] == [0, 1, 2]
    assert records[-1]["train_loss"] < records[0]["train_loss"]
    assert "validation, stage 2" in done.stdout
