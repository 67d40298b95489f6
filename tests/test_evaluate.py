"""Scoring rules, metrics, warnings about answers that cannot be scored, and the table of a run."""

import json
from dataclasses import replace

import pytest
import tiny_model
import torch
from conftest import refuses, tiny_base
from tokenizers import normalizers, pre_tokenizers

from coconut import Coconut
from config import Config
from curriculum import Markers
from dataset import StageDataset, collate
from model.thought import make_thought
from preprocessing.tokens import tokenize
from tools.evaluate import main
from trainer import evaluate as scores
from trainer.data import Data
from trainer.evaluate import as_files, evaluate, extract_answer, is_right, warn_unscorable_answers, wilson
from trainer.only_eval import stage_to_evaluate
from trainer.pretrained import Pretrained
from utils import UserError


@pytest.mark.parametrize(
    ("text", "answer", "steps"),
    [
        ("<<3+4=7>>\n### 7", "7", "<<3+4=7>>"),
        ("### 1,234,567", "1234567", ""),
        ("a\nb\n### Tom is a lempus.", "Tom is a lempus.", "a\nb"),
        ("no mark", "no mark", "no mark"),
        ("### 1\n### 2 ", "2", ""),
    ],
)
def test_extraction(text, answer, steps):
    assert extract_answer(text) == answer
    assert scores.extract_steps(text) == steps


NUMBERS = {
    **{"#### 1,000.0": 1000, "-3": -3, "### -1,234.50": -1234.5, "3.50 dollars": 3.5, "no number": None, "": None},
    "5 ### none": None,  # text before the last mark does not count
    **{"### 1 ### 2 and 3.": 3, "### 1.5e3": 1500, "### 2E-2": 0.02, "### .5": 0.5, "### $-4 a day": -4},
    **{"### \N{MINUS SIGN}3": -3, "### (7)-2": 2, "### 50%": 50, "### 3e": 3},
    "### 12-3": 3,  # a difference, not a negative number
    "### 1/2": 2,  # fractions are not parsed
    "### 1 000": 0,  # a space ends a number
}


@pytest.mark.parametrize("text", NUMBERS)
def test_the_number_of_an_answer(text):
    assert scores.extract_number(text) == NUMBERS[text]


@pytest.mark.parametrize(
    ("text", "gold", "by_text", "by_number"),
    [
        ("### 1,000.0", "1000", False, True),
        ("### 1,000", "1000", True, True),
        ("### 5.3333", "5.3333333333", False, True),
        ("### 5.332", "5.3333333333", False, False),
        ("### 7 apples", "7", False, True),
        ("### -3", "3", False, False),
        ("### 9284017268534.4", "9284017268534.4", True, True),
        ("### 0", "0.0000020107", False, True),  # the tolerance is absolute, as in the field
        ("### 1e999", "7", False, False),
        ("### none", "7", False, False),
        ("### Tom", "Tom", True, False),
        ("### 7", "7 apples", False, False),  # a gold answer with a unit is not a number
    ],
)
def test_answer_match(text, gold, by_text, by_number):
    assert is_right(text, gold, "text") == by_text
    assert is_right(text, gold, "number") == by_number


def test_gold_answers_that_are_numbers():
    numbers = {"-9867630": -9867630, "0.0000020107": 2.0107e-6, "5.": 5, "1e3": 1000}
    numbers |= dict.fromkeys(("", "Tom", "7 apples", "50%", "1/2", "$3", "nan", "inf"))
    assert {text: scores.number_of(text) for text in numbers} == numbers


EXAMPLES = [
    {"question": "1+2", "steps": ["<<1+2=3>>"], "answer": "3"},
    {"question": "2*3+1", "steps": ["<<2*3=6>>", "<<6+1=7>>"], "answer": "1,007"},
    {"question": "5", "steps": [], "answer": "5"},
    {"question": "5-1-1-1", "steps": ["<<5-1=4>>", "<<4-1=3>>", "<<3-1=2>>"], "answer": "2"},
]


class Scripted(Coconut):
    """Generates the scripted text for each question."""

    def generate(self, input_ids, attention_mask, **options):
        rows = []
        for row, mask in zip(input_ids, attention_mask, strict=True):
            question = self.tokenizer.decode(row[mask.bool()]).split("\n")[0]
            rows.append(self.tokenizer(self.script[question])["input_ids"] + [0])
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def scripted(script: dict[str, str]) -> Pretrained:
    tokenizer = tiny_model.make_tokenizer([json.dumps(EXAMPLES), json.dumps(script), "### ", "\n"], "char")
    vocabulary = len(tokenizer)
    tokenizer.add_tokens(["<|start-latent|>", "<|end-latent|>", "<|latent|>"])
    markers = Markers(vocabulary, vocabulary + 2, vocabulary + 1, 0)
    base = tiny_base("gpt2", dtype=torch.float32)
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model = Scripted(base, markers.latent, markers.start, markers.end, 0)
    model.tokenizer, model.script = tokenizer, script
    return Pretrained(model, tokenizer, markers)


SCRIPT = {"1+2": "### 3", "2*3+1": "<<6+1=7>>\n### 1007", "5": "### 6", "5-1-1-1": "<<4-1=3>>\n### 2"}


def test_metrics_and_predictions(world):
    loaded = scripted(SCRIPT)
    model, tokenizer, markers = loaded
    config = Config(eval_batch_size=2, batch_size_training=3)
    tokens = tokenize(EXAMPLES, tokenizer)
    metrics, predictions = evaluate(loaded, Data(EXAMPLES, tokens), 1, config, world)
    assert [p["correct"] for p in predictions] == [True, True, False, True]
    assert [p["cot_correct"] for p in predictions] == [True, True, True, False]
    assert predictions[0]["generated_tokens"] == 3 + 1  # "###", " ", "3", and one latent thought
    assert (metrics["accuracy"], metrics["cot_match"], metrics["examples"]) == (0.75, 0.75, 4)
    # the loss is the mean over the tokens of the whole set, whatever the batches
    rows = [StageDataset(tokens, config, markers)[index, 1] for index in range(4)]
    with torch.no_grad():
        whole = model(**collate(rows, 0, markers.latent)).loss.item()
    assert metrics["loss"] == pytest.approx(whole, rel=1e-5)
    assert scores.validation_loss(loaded, tokens, 1, config, world) == metrics["loss"]
    assert metrics["seconds"] > 4 * metrics["seconds_per_example"]  # bug: without the loss and the samples
    files = as_files(metrics, predictions)
    assert json.loads(files["predictions.jsonl"].splitlines()[1])["gold"] == "1007"


def test_pause_tokens_do_not_count_as_generated(world):
    loaded = scripted(SCRIPT)
    loaded.model.thought = make_thought("pause", loaded.model.base_causallm)
    _, predictions = evaluate(loaded, Data(EXAMPLES, tokenize(EXAMPLES, loaded.tokenizer)), 1, Config(), world)
    assert predictions[0]["generated_tokens"] == 3


@pytest.mark.parametrize(("answer_match", "accuracy"), [("text", 0.25), ("number", 0.75)])
def test_accuracy_follows_answer_match_beside_both_rules(world, answer_match, accuracy):
    loaded = scripted({**SCRIPT, "2*3+1": "### 1,007.0", "5-1-1-1": "### 2.0004 in all"})
    config = Config(answer_match=answer_match)
    data = Data(EXAMPLES, tokenize(EXAMPLES, loaded.tokenizer))
    metrics, predictions = evaluate(loaded, data, 1, config, world)
    assert (metrics["accuracy"], metrics["accuracy_text"], metrics["accuracy_number"]) == (accuracy, 0.25, 0.75)
    assert [p["correct_text"] for p in predictions] == [True, False, False, False]
    assert [p["correct_number"] for p in predictions] == [True, True, False, True]
    assert all(p["correct"] == p[f"correct_{answer_match}"] for p in predictions)
    assert warn_unscorable_answers(loaded.tokenizer, data, config) == []


def test_with_other_answers_than_numbers_there_is_only_accuracy(world):
    examples = [*EXAMPLES[:3], {**EXAMPLES[3], "answer": "2 or 3"}]
    loaded = scripted({**SCRIPT, "or": ""})
    data = Data(examples, tokenize(examples, loaded.tokenizer))
    metrics, predictions = evaluate(loaded, data, 1, Config(), world)
    assert metrics["accuracy"] == 0.5
    assert not any("_text" in key or "_number" in key for key in (*metrics, *predictions[0]))
    with pytest.raises(UserError, match=r"needs numbers, but the answer of record 3 .* of some\.json is '2 or 3'"):
        warn_unscorable_answers(loaded.tokenizer, data, Config(answer_match="number", val_path="some.json"))


def test_dropout_is_off_in_an_evaluation(world):
    loaded = scripted(SCRIPT)
    loaded.model.train()
    evaluate(loaded, Data(EXAMPLES, tokenize(EXAMPLES, loaded.tokenizer)), 1, Config(), world)
    assert not any(module.training for module in loaded.model.modules())


def test_answers_are_generated_in_bf16(world, monkeypatch):
    loaded, seen, original = scripted(SCRIPT), [], Scripted.generate
    data = Data(EXAMPLES, tokenize(EXAMPLES, loaded.tokenizer))

    def generate(*arguments, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(*arguments, **options)

    monkeypatch.setattr(Scripted, "generate", generate)
    for bf16 in (False, True):
        seen.clear()
        evaluate(loaded, data, 1, Config(bf16=bf16), world)
        assert set(seen) == {bf16}


def test_wilson_intervals():
    """The values of R's prop.test(x, n, correct = FALSE)."""
    assert wilson(8 / 10, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert wilson(1, 20) == pytest.approx((0.8389, 1), abs=1e-4)


def test_several_sets_give_one_table_and_a_file_each(tmp_path):
    found = {"loss": 1.5, "generated_tokens": 8.25, "seconds": 61.0, "stage": 4, "file": "data/svamp.json"}
    results = {
        "svamp": ({**found, "accuracy": 0.5, "examples": 1000}, [{"index": 0}, {"index": 1}]),
        "multiarith": ({**found, "accuracy": 0.8, "examples": 10}, [{"index": 0}]),
    }
    metrics, files = scores.of_sets(results)
    assert sorted(files) == ["metrics.json", "predictions_multiarith.jsonl", "predictions_svamp.jsonl"]
    assert json.loads(files["predictions_svamp.jsonl"].splitlines()[1]) == {"index": 1}
    assert json.loads(files["metrics.json"]) == json.loads(json.dumps(metrics))
    assert metrics["sets"]["svamp"] == {**results["svamp"][0], "accuracy_95": wilson(0.5, 1000)}
    assert scores.summary(tmp_path, metrics).splitlines() == [
        "                                      n  accuracy            95 %  tokens    loss  seconds",
        "svamp, stage 4                    1,000     50.0%  46.9% to 53.1%     8.2   1.500     61.0",
        "multiarith, stage 4                  10     80.0%  49.0% to 94.3%     8.2   1.500     61.0",
    ]
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text(files["metrics.json"])
    assert scores.summary(tmp_path) == scores.summary(tmp_path, metrics)
    only = results["svamp"]
    assert scores.of_sets({"": only}) == (only[0], as_files(*only))


def test_the_last_record_of_a_repeated_epoch_counts(tmp_path, capsys):
    common = {"event": "epoch", "train_seconds": 5.0, "seconds": 1.0, "generated_tokens": 9.0, "loss": 1.0}
    records = [
        {**common, "epoch": epoch, "stage": stage, "accuracy": accuracy}
        for epoch, stage, accuracy in ((0, 0, 0.1), (1, 0, 0.2), (1, 0, 0.3), (2, 1, 0.4))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main([str(tmp_path)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[1].split() == ["validation,", "stage", "0", "2", "30.0%", "9.0", "1.000", "12"]
    assert table[2].split() == ["validation,", "stage", "1", "1", "40.0%", "9.0", "1.000", "6"]
    refuses("neither a finished epoch nor an evaluation", scores.summary, tmp_path / "none")
    assert main([str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("answer", ["so it is #### 7", "lower Case", "e\u0301", "a  b"])
def test_answers_that_cannot_be_right_are_named(answer):
    """Regression: a perfect model had 0 %, which showed only after a whole training."""
    examples = [{"question": "1+2", "steps": [], "answer": text} for text in ("3", "1,234", answer, "x#y")]
    tokenizer = tiny_model.make_tokenizer([json.dumps(examples, ensure_ascii=False), "### ", "\n"], "char")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("  ", "removed"), tokenizer.backend_tokenizer.pre_tokenizer]
    )
    config = Config(val_path="valid.json")
    (text,) = warn_unscorable_answers(tokenizer, Data(examples, tokenize(examples, tokenizer)), config)
    assert text.startswith("valid.json: 2 of 4 answers cannot be right")
    assert f"record 2 (counted from 0), whose answer {answer!r} is decoded from its tokens as" in text
    right = Data(examples[:2], tokenize(examples[:2], tokenizer))
    assert warn_unscorable_answers(tokenizer, right, config) == []
    config.max_new_tokens = 3  # enough for ### and one digit
    assert "1 of 2 answers cannot be right" in warn_unscorable_answers(tokenizer, right, config)[0]


def test_steps_that_hide_the_answer_are_named():
    """Regression: a perfect model had 0 % where max_new_tokens was too small for the steps or they held an EOS."""
    examples = [
        {"question": "1+2", "steps": steps, "answer": "3"} for steps in (["1"], ["1+2", "2+1"], ["2#"], ["1", "<eos>"])
    ]
    tokenizer = tiny_model.make_tokenizer([json.dumps(examples), "### ", "\n"], "char")
    examples[3]["steps"][1] = tokenizer.eos_token
    data = Data(examples, tokenize(examples, tokenizer))
    config = Config(val_path="valid.json", method="cot")
    assert warn_unscorable_answers(tokenizer, data, replace(config, method="coconut"), [9]) == []  # no steps
    assert warn_unscorable_answers(tokenizer, data, replace(config, method="no_cot"), [0]) == []
    wrong, unmatched = warn_unscorable_answers(tokenizer, data, config, [0, 0])
    assert wrong.startswith("valid.json: 1 of 4 answers cannot be right at stage 0")
    assert "record 3 (counted from 0), whose steps and answer" in wrong
    assert unmatched.startswith("valid.json: 1 of 4 examples cannot have a cot_match at stage 0")
    assert "record 2 (counted from 0), whose steps '2#' are decoded as '2'" in unmatched
    wrong, _ = warn_unscorable_answers(tokenizer, data, replace(config, max_new_tokens=8), [0])
    assert "2 of 4 answers cannot be right at stage 0" in wrong
    assert "11 tokens with max_new_tokens 8, are decoded as '1+2" in wrong


@pytest.mark.parametrize(
    ("keys", "description", "stage", "warning"),
    [
        ({}, {}, 4, "records no stage"),
        ({"resume": 4}, {}, 1, None),
        ({}, {"stage": 2}, 2, None),
        ({"resume": 4}, {"stage": 2}, 1, "stage is 2, but resume=4 asks for 1"),
        ({"method": "cot"}, {}, 0, None),
        ({"num_epochs": 1}, {}, 0, "the last one of this configuration, 0"),
        ({"resume": 4}, {"stage": 1 << 30}, 1, "stage is all, but resume=4 asks for 1"),  # of iCoT
        ({"num_epochs": 8}, {}, 2, "the last one of this configuration, 2"),
    ],
)
def test_a_checkpoint_without_a_stage_is_evaluated_at_the_last(keys, description, stage, warning):
    """Regression: a file of the reference was evaluated at stage 0, without thoughts, and had 0.0 %."""
    keys = {"epochs_per_stage": 3, "max_latent_stage": 3, "num_epochs": 25} | keys
    found, warnings = stage_to_evaluate(Config(load_model_path="file", **keys), description)
    assert found == stage
    assert len(warnings) == (warning is not None)
    assert warning is None or warning in warnings[0]
