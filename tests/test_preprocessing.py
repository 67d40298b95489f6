"""What the generators promise."""

import json
import re

import arithmetic
import gsm_icot
import prosqa
import pytest
import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset import load_examples

# ---- arithmetic ----


def test_arithmetic_is_right_and_disjoint():
    splits = arithmetic.make_splits({"train": 500, "valid": 50, "test": 50}, base=7, seed=3)
    assert {name: len(examples) for name, examples in splits.items()} == {"train": 500, "valid": 50, "test": 50}
    questions = [example["question"] for examples in splits.values() for example in examples]
    assert len(set(questions)) == 600
    assert {len(example["steps"]) for example in splits["test"]} == {2, 3, 4}
    for example in splits["train"]:
        value, rest = int(example["question"][0]), example["question"][1:]
        for step, operation, operand in zip(example["steps"], rest[::2], rest[1::2], strict=True):
            result = eval(f"{value}{operation}{operand}") % 7
            assert step == f"<<{value}{operation}{operand}={result}>>"
            value = result
        assert example["answer"] == str(value)


def test_arithmetic_is_deterministic_in_its_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arithmetic.main(
            ["--out", str(tmp_path / name), "--train", "50", "--valid", "5", "--test", "5", "--seed", str(seed)]
        )
    a, b, c = ((tmp_path / name / "arithmetic_train.json").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert len(load_examples(tmp_path / "a" / "arithmetic_train.json")) == 50


def test_arithmetic_says_when_there_are_too_few_questions():
    with pytest.raises(ValueError, match="more than half of the 12 questions"):
        arithmetic.make_splits({"train": 7}, min_steps=1, max_steps=1, base=2)


# ---- ProsQA ----


@pytest.fixture(scope="module")
def splits() -> dict:
    return prosqa.make_splits({"train": 150, "valid": 20, "test": 20}, prosqa.Settings(), seed=1)


def everything(splits) -> list[dict]:
    return [example for examples in splits.values() for example in examples]


def distances(edges, root) -> dict[int, int]:
    found, frontier = {root: 0}, [root]
    while frontier:
        frontier = [head for node in frontier for tail, head in edges if tail == node and head not in found]
        found.update(dict.fromkeys(frontier, max(found.values()) + 1))
    return found


def test_prosqa_keeps_the_invariants_of_the_authors_data(splits):
    for example in everything(splits):
        symbols, edges = example["idx_to_symbol"], example["edges"]
        assert len(set(symbols)) == len(symbols)
        assert len({tuple(edge) for edge in edges}) == len(edges)
        assert all(tail < head for tail, head in edges)
        assert [head for _, head in edges] == sorted(head for _, head in edges)
        assert {node for edge in edges for node in edge} == set(range(len(symbols)))
        heads = {head for _, head in edges}
        assert all((symbol in prosqa.NAMES) == (node not in heads) for node, symbol in enumerate(symbols))
        root, target, wrong = example["root"], example["target"], example["neg_target"]
        assert root in (0, 1)
        mine, others = distances(edges, root), distances(edges, 1 - root)
        assert target in mine
        assert target not in others
        assert wrong in others
        assert wrong not in mine
        assert not {target, wrong} & {tail for tail, _ in edges}
        assert len(example["steps"]) == mine[target]
        assert 3 <= len(example["steps"]) <= 6


def test_prosqa_reads_like_the_authors_data(splits):
    for example in everything(splits):
        symbols = example["idx_to_symbol"]
        *facts, question = re.findall(r"[^.?]+[.?]", example["question"])
        facts = [fact.strip() for fact in facts]
        wanted = {
            f"{symbols[a]} is a {symbols[b]}."
            if symbols[a] in prosqa.NAMES
            else f"Every {symbols[a]} is a {symbols[b]}."
            for a, b in example["edges"]
        }
        assert set(facts) == wanted
        assert len(facts) == len(wanted)
        root, target, wrong = (symbols[example[key]] for key in ("root", "target", "neg_target"))
        assert question.strip() in (f"Is {root} a {target} or {wrong}?", f"Is {root} a {wrong} or {target}?")
        assert example["answer"] == f"{root} is a {target}."
        assert set(example["steps"]) <= wanted
        assert example["steps"][0].startswith(f"{root} is a ")
        assert example["steps"][-1].endswith(f" is a {target}.")
        for before, after in zip(example["steps"], example["steps"][1:], strict=False):
            assert after.startswith(f"Every {before.rstrip('.').split()[-1]} is a ")


def test_prosqa_repeats_nothing_and_is_deterministic(splits):
    questions = [example["question"] for example in everything(splits)]
    assert len(set(questions)) == len(questions)
    again = prosqa.make_splits({"train": 150, "valid": 20, "test": 20}, prosqa.Settings(), seed=1)
    assert again == splits
    assert prosqa.make_splits({"train": 150}, prosqa.Settings(), seed=2)["train"] != splits["train"]


def test_prosqa_of_another_size(tmp_path):
    arguments = [
        "--out",
        str(tmp_path),
        "--train",
        "20",
        "--valid",
        "5",
        "--test",
        "5",
        "--nodes",
        "12",
        "--min-hops",
        "2",
        "--max-hops",
        "3",
        "--prefix",
        "small",
    ]
    assert prosqa.main(arguments) == 0
    examples = load_examples(tmp_path / "small_train.json")
    assert {len(example["steps"]) for example in examples} <= {2, 3}
    assert max(len(example["idx_to_symbol"]) for example in examples) <= 12


def test_prosqa_says_when_the_settings_allow_no_question():
    with pytest.raises(ValueError, match="hardly ever"):
        prosqa.make_splits({"train": 1}, prosqa.Settings(nodes=5, min_hops=6), seed=0)


# ---- tiny models ----


@pytest.mark.parametrize("kind", ["char", "word"])
def test_tokenizers_are_lossless(kind):
    texts = ["Every lempus is a wumpus. Is Tom a lempus or wumpus?\n", "### Tom is a wumpus.", "<<3+4=7>>\n"]
    tokenizer = tiny_model.make_tokenizer(texts, kind)
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids("<<") != tokenizer.unk_token_id or kind == "word"
    assert tokenizer.decode(tokenizer("é")["input_ids"]) == tiny_model.UNKNOWN


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2"])
def test_tiny_models_are_hugging_face_folders(tmp_path, shape, capsys):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"question": "1+2", "steps": ["<<1+2=3>>"], "answer": "3"}]))
    assert (
        tiny_model.main(
            [
                str(data),
                "--out",
                str(tmp_path / "model"),
                "--tokenizer",
                "char",
                "--shape",
                shape,
                "--width",
                "16",
                "--heads",
                "2",
            ]
        )
        == 0
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.model_type == shape
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "model"))
    assert model.config.eos_token_id == 0
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out


# ---- GSM8K ----


@pytest.mark.parametrize(
    ("line", "example"),
    [
        ("a?||<<1+2=3>> <<3*2=6>> #### 6", {"question": "a?", "steps": ["<<1+2=3>>", "<<3*2=6>>"], "answer": "6"}),
        ("ticket #3?||#### 1,000", {"question": "ticket #3?", "steps": [], "answer": "1,000"}),
        ("é  b?|| <<.5*2=1>> #### -1 ", {"question": "é  b?", "steps": ["<<.5*2=1>>"], "answer": "-1"}),
    ],
)
def test_gsm_lines(line, example):
    assert gsm_icot.parse_line(line) == example


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"a||b #### 1\nno bars #### 2\n", r"line 2 has no '\|\|'"),
        (b"a||b 1\n", "line 1 has no '####'"),
        (b"a||b||c #### 1\n", r"line 1 has more than one '\|\|'"),
        (b"a||b ####\n", "line 1 has an empty question, or no answer"),
        (b"", "line 1 has no"),
        (b"a||b #### 1\n\xff||b #### 1\n", "line 2 is not UTF-8"),
    ],
)
def test_gsm_lines_that_cannot_be_read_are_named(tmp_path, content, complaint, capsys):
    (tmp_path / "in.txt").write_bytes(content)
    (tmp_path / "out.json").write_text("before")
    assert gsm_icot.main([str(tmp_path / "in.txt"), str(tmp_path / "out.json")]) == 2
    assert re.search(f"error: .*in.txt: {complaint}", capsys.readouterr().err)
    assert (tmp_path / "out.json").read_text() == "before"


def test_gsm_files(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a||<<1+1=2>> #### 2\r\nb||#### 3\n", encoding="utf-8")
    assert gsm_icot.main([str(tmp_path / "in.txt"), str(tmp_path / "new" / "out.json")]) == 0
    assert "2 examples, 1 of them without steps" in capsys.readouterr().out
    assert [example["answer"] for example in load_examples(tmp_path / "new" / "out.json")] == ["2", "3"]
    assert gsm_icot.main([str(tmp_path), str(tmp_path / "out.json")]) == 2
    assert "cannot read" in capsys.readouterr().err
