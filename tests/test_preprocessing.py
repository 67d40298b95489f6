"""The scripts of preprocessing/: their data, their errors, and the authors' files as a reference."""

import http.client
import json
import re
import urllib.error
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import arithmetic
import files
import gsm_icot
import machine
import numpy as np
import ood
import prontoqa
import prontoqa_generate
import prosqa
import pytest
import shortcuts
import tiny_model
from conftest import DATA, SMALL, check_closed_and_full_output, needs_data, one_error, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from test_downloads import blob_id
from transformers import AutoModelForCausalLM, AutoTokenizer

from preprocessing.examples import load_examples
from trainer.pretrained import read_tokenizer
from utils import UserError

# --- Files ---


def all_examples(splits: dict) -> list[dict]:
    return [example for examples in splits.values() for example in examples]


def test_files_appear_only_when_all_are_written(tmp_path):
    (tmp_path / "b.json").mkdir()
    with pytest.raises(UserError, match=r"b\.json cannot be written: Is a directory"):
        files.publish({tmp_path / "a.json": [{}], tmp_path / "b.json": [{}]})
    assert [path.name for path in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize("script", [arithmetic, prosqa, prontoqa_generate])
def test_a_file_in_place_of_the_folder_is_an_error(script, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    error = refusal(script.main, ["--out", tmp_path / "file", *SMALL], capsys)
    assert re.search("^error: .*file.* cannot be written: ", error.splitlines()[-1])


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (arithmetic, ["--out", "{place}", *SMALL]),
        (machine, ["--out", "{place}", *SMALL]),
        (gsm_icot, ["{place}/in.txt", "{place}/out.json"]),
        (tiny_model, ["{place}/data.json", "--out", "{place}/model", "--width", "8"]),
        (shortcuts, ["{place}/data.json"]),
    ],
)
def test_a_closed_pipe_is_no_error_and_a_full_disk_one_sentence(script, arguments, tmp_path, capfd, monkeypatch):
    """Bug: tracebacks of `preprocessing/arithmetic.py | true` and `> /dev/full`."""
    (tmp_path / "in.txt").write_text("q||<<1+1=2>> #### 2\n")
    example = {"question": "q", "steps": [], "answer": "a", "idx_to_symbol": "abc", "edges": [[0, 1]]}
    (tmp_path / "data.json").write_text(json.dumps([example | {"root": 0, "target": 1, "neg_target": 2}]))
    arguments = [argument.format(place=tmp_path) for argument in arguments]
    check_closed_and_full_output(script.main, arguments, capfd, monkeypatch)


# --- Arithmetic ---


def test_arithmetic_is_correct_and_its_splits_are_disjoint():
    splits = arithmetic.make_splits({"train": 500, "valid": 50, "test": 50}, base=7, seed=3)
    assert {name: len(examples) for name, examples in splits.items()} == {"train": 500, "valid": 50, "test": 50}
    assert len({example["question"] for example in all_examples(splits)}) == 600
    assert {len(example["steps"]) for example in splits["test"]} == {2, 3, 4}
    for example in splits["train"]:
        value, rest = int(example["question"][0]), example["question"][1:]
        for step, operation, operand in zip(example["steps"], rest[::2], rest[1::2], strict=True):
            result = eval(f"{value}{operation}{operand}") % 7
            assert step == f"<<{value}{operation}{operand}={result}>>"
            value = result
        assert example["answer"] == str(value)


MIRROR = "--mirror --template compact --min-hops 2 --max-hops 3 --test-hops 4 4 --prefix mirror"


@pytest.mark.parametrize(
    ("script", "options"), [(arithmetic, ""), (prosqa, ""), (prosqa, MIRROR), (prontoqa_generate, "")]
)
def test_files_depend_on_the_seed_alone_and_share_no_question(script, options, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert script.main([*options.split(), *SMALL, "--out", str(tmp_path / name), "--seed", seed]) == 0
    (test, train, valid), same, other = (sorted((tmp_path / name).iterdir()) for name in "abc")
    for a, b, c in zip((test, train, valid), same, other, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert a.read_bytes() != c.read_bytes()
    splits = {path.stem: load_examples(path) for path in (train, valid, test)}
    assert [len(examples) for examples in splits.values()] == [40, 5, 10]
    assert len({example["question"] for example in all_examples(splits)}) == 55
    if options:
        assert {len(example["steps"]) for example in load_examples(train)} == {2, 3}
        assert {len(example["steps"]) for example in load_examples(test)} == {4}
        assert len({prosqa.named_edges(example) for example in all_examples(splits)}) == 55


# --- ProsQA ---


@pytest.fixture(scope="module")
def splits() -> dict:
    return prosqa.make_splits({"train": 150, "valid": 20, "test": 20}, prosqa.Settings(), seed=1)


def distances(edges, root) -> dict[int, int]:
    found, frontier = {root: 0}, [root]
    while frontier:
        frontier = [head for node in frontier for tail, head in edges if tail == node and head not in found]
        found.update(dict.fromkeys(frontier, max(found.values()) + 1))
    return found


def test_prosqa_keeps_the_invariants_of_the_authors_data(splits):
    for example in all_examples(splits):
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


def test_prosqa_has_the_authors_wording(splits):
    for example in all_examples(splits):
        symbols = example["idx_to_symbol"]
        *facts, question = map(str.strip, re.findall(r"[^.?]+[.?]", example["question"]))
        every = {symbol: "" if symbol in prosqa.NAMES else "Every " for symbol in symbols}
        wanted = {f"{every[symbols[a]]}{symbols[a]} is a {symbols[b]}." for a, b in example["edges"]}
        assert set(facts) == wanted
        assert len(facts) == len(wanted)
        root, target, wrong = (symbols[example[key]] for key in ("root", "target", "neg_target"))
        assert question in (f"Is {root} a {target} or {wrong}?", f"Is {root} a {wrong} or {target}?")
        assert example["answer"] == f"{root} is a {target}."
        assert set(example["steps"]) <= wanted
        assert example["steps"][0].startswith(f"{root} is a ")
        assert example["steps"][-1].endswith(f" is a {target}.")
        for before, after in pairwise(example["steps"]):
            assert after.startswith(f"Every {before.rstrip('.').split()[-1]} is a ")


def test_prosqa_splits_share_no_graph():
    """Only 18 graphs have four nodes and these words, so repeated graphs must be drawn again."""
    settings = prosqa.Settings(4, 1, 2, ("Max", "Rex", "Sam"), ("wumpus", "impus", "jompus"))
    splits = prosqa.make_splits({"train": 10, "test": 5}, settings, seed=0)
    graphs = [prosqa.named_edges(example) for example in all_examples(splits)]
    assert len(set(graphs)) == 15
    example = splits["train"][0]
    renumbered = {**example, "edges": [list(edge) for edge in reversed(example["edges"])]}
    assert prosqa.named_edges(renumbered) == prosqa.named_edges(example)


def test_prosqa_of_another_size(tmp_path):
    options = ["--nodes", "12", "--min-hops", "2", "--max-hops", "3", "--prefix", "small"]
    assert prosqa.main([*options, *SMALL, "--out", str(tmp_path)]) == 0
    examples = load_examples(tmp_path / "small_train.json")
    assert {len(example["steps"]) for example in examples} <= {2, 3}
    assert max(len(example["idx_to_symbol"]) for example in examples) <= 12


def test_too_few_questions_are_an_error():
    with pytest.raises(UserError, match="more than half of the 12 questions"):
        arithmetic.make_splits({"train": 7}, min_steps=1, max_steps=1, base=2)
    with pytest.raises(UserError, match="hardly ever"):
        prosqa.make_splits({"train": 1}, prosqa.Settings(nodes=5, min_hops=6), seed=0)


def prosqa_statistics(example: dict) -> dict[str, float]:
    question, symbols, edges = example["question"], example["idx_to_symbol"], example["edges"]
    root, target, wrong = (example[key] for key in ("root", "target", "neg_target"))
    mine, others = distances(edges, root), distances(edges, 1 - root)
    n_children = Counter(tail for tail, _ in edges)
    facts = re.findall(r"[^.?]+[.?]", question)
    positions = [next(n for n, fact in enumerate(facts) if fact.strip() == step) for step in example["steps"]]
    return {
        "nodes": len(symbols),
        "edges": len(edges),
        "names": sum(symbol in prosqa.NAMES for symbol in symbols),
        "words": len(question.split()),
        "hops": len(example["steps"]),
        "leaves": len(symbols) - len(n_children),
        "nodes of the root alone": len(mine.keys() - others.keys()),
        "nodes of the other root alone": len(others.keys() - mine.keys()),
        "nodes of both": len(mine.keys() & others.keys()),
        "distance of a node": np.mean([*mine.values()]),
        "distance of the wrong target": others[wrong],
        "leaves as far as the target": sum(mine[n] == mine[target] for n in mine if n not in n_children),
        "children of the wrong target": n_children[wrong],
        "largest number of children": max(n_children.values()),
        "index of the target": target / len(symbols),
        "root": root,
        "target first": question.rindex(symbols[target]) < question.rindex(symbols[wrong]),
        "steps in the order of the facts": sum(a < b for a, b in pairwise(positions)),
        "length of an edge": np.mean([head - tail for tail, head in edges]),
    }


def different(left: list[dict], right: list[dict], statistics) -> set[str]:
    """Returns the statistics whose means differ by more than 3.5 standard errors."""
    sides = [list(map(statistics, examples)) for examples in (left, right)]
    found = set()
    for name in sides[0][0]:
        a, b = (np.array([row[name] for row in side], dtype=float) for side in sides)
        if abs(a.mean() - b.mean()) > 3.5 * (a.var() / len(a) + b.var() / len(b)) ** 0.5:
            found.add(name)
    return found


@needs_data
@pytest.mark.slow
def test_prosqa_is_distributed_like_the_authors_data(monkeypatch):
    """The test notices smaller graphs, fewer hops, and wrong targets that are not leaves."""
    authors = load_examples(DATA / "prosqa_valid.json")

    def found(size: int = 300, **settings) -> set[str]:
        made = prosqa.make_splits({"all": size}, prosqa.Settings(**settings), seed=21)["all"]
        return different(authors, made, prosqa_statistics)

    assert found(600) == set()
    assert {"nodes", "edges", "words"} <= found(nodes=26)
    assert "hops" in found(max_hops=4)
    right = prosqa.choose_question

    def any_wrong_target(rng, graph):
        choice = right(rng, graph)
        nodes = choice and [n for n, label in enumerate(graph.labels) if label == 2 - choice[0] and n > 1]
        return choice and (*choice[:2], int(rng.choice(nodes)))

    monkeypatch.setattr(prosqa, "choose_question", any_wrong_target)
    assert "children of the wrong target" in found()


# --- Mirrored ProsQA ---


def mirror_settings(nodes_a_side: int, low: int, high: int | None = None, characters: str = prosqa.CHARACTERS[:26]):
    return prosqa.Settings(min_hops=low, max_hops=high or low, nodes_a_side=nodes_a_side, characters=characters)


def one_example_of(settings: prosqa.Settings, seed: int) -> dict:
    return prosqa.make_splits({"one": 1}, settings, seed)["one"][0]


@st.composite
def mirrors(draw) -> tuple[dict, int, int]:
    """(an example, nodes a side, hops)."""
    hops = draw(st.integers(1, 9))
    side = draw(st.integers(hops + 1, 13))
    characters = prosqa.CHARACTERS[:26] if draw(st.booleans()) else ""
    return one_example_of(mirror_settings(side, hops, characters=characters), draw(st.integers(0, 2**32))), side, hops


@settings(max_examples=60, deadline=None)
@given(mirrors())
def test_a_mirror_is_a_graph_and_its_copy(drawn):
    example, side, hops = drawn
    edges = [tuple(edge) for edge in example["edges"]]
    assert len(set(edges)) == len(edges)
    assert [head for _, head in edges] == sorted(head for _, head in edges)
    assert all(tail < head for tail, head in edges)
    assert {(tail ^ 1, head ^ 1) for tail, head in edges} == set(edges)  # node n of side s has index 2n + s
    assert all(tail % 2 == head % 2 for tail, head in edges)
    assert {node for edge in edges for node in edge} == set(range(2 * side))
    assert set(range(2 * side)) - {head for _, head in edges} == {0, 1}
    assert len(set(example["idx_to_symbol"])) == len(example["idx_to_symbol"]) == 2 * side
    root, target = example["root"], example["target"]
    assert target % 2 == root
    assert example["neg_target"] == target ^ 1
    found = distances(edges, root)
    leaves = {node: distance for node, distance in found.items() if node not in {tail for tail, _ in edges}}
    assert leaves[target] == hops == max(leaves.values()) == len(example["steps"])
    assert (
        distances([*edges, *((head, tail) for tail, head in edges)], root)[target] == hops
    )  # no shorter path against the edges


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), side=st.integers(4, 10), hops=st.integers(1, 3), mirrored=st.booleans())
def test_the_compact_template_lists_the_graph(seed, side, hops, mirrored):
    plain = prosqa.Settings(20, 2, 5, characters=prosqa.CHARACTERS)
    example = one_example_of(mirror_settings(side, hops) if mirrored else plain, seed)
    facts, candidates, root = re.fullmatch(r"((?:\w\w )*\w\w)\?(\w\w):(\w)", example["question"]).groups()
    symbols = example["idx_to_symbol"]
    wanted = sorted((symbols[tail], symbols[head]) for tail, head in example["edges"])
    assert sorted(tuple(fact) for fact in facts.split(" ")) == wanted
    assert sorted(candidates) == sorted(symbols[example[key]] for key in ("target", "neg_target"))
    assert root == symbols[example["root"]]
    assert all(len(step) == 1 for step in example["steps"])
    assert set(pairwise([root, *example["steps"]])) <= set(wanted)
    assert example["steps"][-1] == example["answer"] == symbols[example["target"]]
    named = distances([(symbols[tail], symbols[head]) for tail, head in example["edges"]], root)
    assert len(example["steps"]) == named[example["answer"]]  # a shortest path


def test_each_side_of_a_chain_is_a_single_path(tmp_path):
    options = "--mirror --chains --min-hops 1 --max-hops 3 --test-hops 4 4 --template compact --prefix chains"
    assert prosqa.main([*options.split(), *SMALL, "--out", str(tmp_path)]) == 0
    examples = load_examples(tmp_path / "chains_train.json") + load_examples(tmp_path / "chains_test.json")
    assert {len(example["steps"]) for example in examples} == {1, 2, 3, 4}
    for example in examples:
        assert len(example["edges"]) == 2 * len(example["steps"])
        assert len({tail for tail, _ in example["edges"]}) == len(example["edges"])


def test_a_mirror_has_the_authors_wording():
    example = one_example_of(mirror_settings(5, 2, characters=""), seed=0)
    test_prosqa_has_the_authors_wording({"one": [example]})
    assert [symbol in prosqa.NAMES for symbol in example["idx_to_symbol"]] == [True] * 2 + [False] * 8


def test_roots_hops_and_the_order_of_candidates_are_uniform_in_mirrors():
    examples = prosqa.make_splits({"all": 1000}, mirror_settings(6, 1, 4), seed=0)["all"]
    first = [example["question"].partition("?")[2][0] == example["answer"] for example in examples]
    assert 400 < sum(first) < 600
    assert 400 < sum(example["root"] for example in examples) < 600
    hops = [len(example["steps"]) for example in examples]
    assert all(150 < hops.count(n) < 350 for n in (1, 2, 3, 4))


def test_mirror_splits_share_no_graph():
    """Two nodes a side and four letters have exactly twelve graphs."""
    splits = prosqa.make_splits({"train": 7, "test": 5}, mirror_settings(2, 1, characters="abcd"), seed=0)
    assert len({prosqa.named_edges(example) for example in all_examples(splits)}) == 12
    with pytest.raises(UserError, match="mirrors of 2 nodes a side with these words hardly ever have a new question"):
        prosqa.make_splits({"train": 7, "test": 6}, mirror_settings(2, 1, characters="abcd"), seed=0)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--nodes-a-side 5 --max-hops 5", "5 nodes a side have no leaf 5 hops from their root: it takes 6 nodes"),
        ("--nodes-a-side 5 --test-hops 5 6", "5 nodes a side have no leaf 6 hops from their root"),
        ("--nodes-a-side 21", "mirrors of 21 nodes a side take 2 names and 40 concepts, and there are 17 and 38"),
        ("--template compact --nodes-a-side 32", "mirrors of 32 nodes a side take 64 characters, and there are 62"),
    ],
)
def test_impossible_mirrors_are_one_error(tmp_path, arguments, complaint, capsys):
    error = refusal(prosqa.main, ["--out", tmp_path / "new", "--mirror", *arguments.split()], capsys)
    assert re.search(f"^error: {complaint}", error.splitlines()[-1])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        (prosqa, "--mirror --nodes 10", "--mirror takes --nodes-a-side, not --nodes"),
        (prosqa, "--nodes-a-side 5", "--nodes-a-side is an option of --mirror"),
        (prosqa, "--chains", "--chains is an option of --mirror"),
        (prosqa, "--mirror --chains --nodes-a-side 5", "leave --nodes-a-side out"),
        (prosqa, "--mirror --nodes-a-side 1", "--nodes-a-side at least 2"),
        (prosqa, "--min-hops 0", "it takes 1 <= min-hops <= max-hops"),
        (prosqa, "--test-hops 3 2", "--test-hops takes the fewest and then the most"),
        (arithmetic, "--max-steps 101", "<= max-steps <= 100"),  # was an OverflowError, or took minutes
        (machine, "--max-steps 101", "<= max-steps <= 100"),
        (machine, "--steps answer", "--steps answer needs --fan-out 2 or more, or --candidates"),
        (
            machine,
            "--prefix ../x",
            "--prefix '../x' begins the file names and cannot contain '/'",
        ),  # it wrote elsewhere
        (prosqa, "--seed -1", "--seed must be at least 0, not -1"),  # was numpy's traceback
        (machine, "--seed -1", "--seed must be at least 0, not -1"),
    ],
)
def test_contradictory_options_of_generators_are_errors(script, arguments, complaint, tmp_path, capsys):
    error = refusal(script.main, [*arguments.split(), "--out", tmp_path / "out"], capsys)
    assert complaint in error.replace("\n", " ")


# --- Tiny models ---


@pytest.mark.parametrize("kind", ["char", "word"])
def test_tokenizers_are_lossless(kind):
    texts = ["Every lempus is a wumpus. Is Tom a lempus or wumpus?\n", "### Tom is a wumpus.", "<<3+4=7>>\n"]
    tokenizer = tiny_model.make_tokenizer(texts, kind)
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids("<<") != tokenizer.unk_token_id or kind == "word"
    assert tokenizer.decode(tokenizer("é")["input_ids"]) == tiny_model.UNKNOWN


@pytest.fixture
def one_example(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([{"question": "1+2", "steps": ["<<1+2=3>>"], "answer": "3"}]))
    return tmp_path / "data.json"


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2"])
def test_tiny_models_are_hugging_face_folders(one_example, tmp_path, shape, capsys):
    options = f"--tokenizer char --shape {shape} --width 16 --heads 2".split()
    assert tiny_model.main([str(one_example), "--out", str(tmp_path / "model"), *options]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.model_type == shape
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "model"))
    assert model.config.eos_token_id == 0
    assert f"{model.num_parameters():,} parameters" in capsys.readouterr().out
    text = "1+2\n### 3"
    tokenizer = read_tokenizer(tmp_path / "model")
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text  # transformers makes a Qwen2Tokenizer of any, ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--untied", "GPT-2 is always tied"),
        ("--shape llama --width 12 --heads 4", "llama needs an even head size"),
        (f"--seed {10**23}", "--seed must be at least 0 and less than 2^63"),
        ("--seed -1", "--seed must be at least 0"),
        ("--out data.json", "--out data.json is a file, not a folder"),
        ("--out mine", "is not overwritten, because it contains thesis.tex"),
        ("--out pretrained", "is not overwritten, because it contains config.json"),
    ],
)
def test_impossible_tiny_models(one_example, tmp_path, monkeypatch, arguments, complaint, capsys):
    """These ended in a traceback, in a model whose first forward failed, or in success without a file."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("all of it")
    Path("pretrained").mkdir()
    for name, content in (("config.json", "{}"), ("tokenizer.json", '{"model": {"type": "BPE"}}')):
        Path("pretrained", name).write_text(content)
    options = arguments.split()
    options += [] if "--out" in options else ["--out", "model"]
    assert complaint in refusal(tiny_model.main, ["data.json", *options], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"data.json", "mine", "pretrained"}
    assert Path("pretrained/config.json").read_text() == "{}"


def test_a_tiny_model_replaces_an_earlier_one_only(one_example, tmp_path):
    for width in (16, 32):
        tiny_model.write_model([one_example], tmp_path / "model", "char", "llama", width, 1, 2, 16)
        assert json.loads((tmp_path / "model/config.json").read_text())["hidden_size"] == width
    (tmp_path / "model/README.md").write_text("notes")
    with pytest.raises(UserError, match=r"it contains README.md"):
        tiny_model.write_model([one_example], tmp_path / "model", "char", "llama", 16, 1, 2, 16)


# --- GSM8K ---


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
        (b"a||b #### 1\n\nc||d #### 2\n", r"line 2 has no '\|\|'"),
        (b"", "is empty"),
        ("a||b #### 1\n".encode("utf-16"), "is UTF-16"),
        (b"a||b #### 1\n\xff||b #### 1\n", "line 2 is not UTF-8"),
    ],
)
def test_malformed_gsm_lines_are_named(tmp_path, content, complaint, capsys):
    (tmp_path / "in.txt").write_bytes(content)
    (tmp_path / "out.json").write_text("before")
    error = refusal(gsm_icot.main, [tmp_path / "in.txt", tmp_path / "out.json"], capsys)
    assert re.search(f"^error: .*in.txt:? {complaint}", error)
    assert (tmp_path / "out.json").read_text() == "before"


def test_gsm_does_not_overwrite_its_source(tmp_path, capsys):
    (tmp_path / "icot.txt").write_text("q||<<1+1=2>> #### 2\n")
    assert "cannot read" in refusal(gsm_icot.main, [tmp_path / "gone", tmp_path / "icot.txt"], capsys)
    error = refusal(gsm_icot.main, [tmp_path / "icot.txt", tmp_path / "." / "icot.txt"], capsys)
    assert "is both the source and the target" in error
    assert (tmp_path / "icot.txt").read_text() == "q||<<1+1=2>> #### 2\n"


def test_gsm_files(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("a||<<1+1=2>> #### 2\r\nb||#### 3\n", encoding="utf-8")
    assert gsm_icot.main([str(tmp_path / "in.txt"), str(tmp_path / "new" / "out.json")]) == 0
    assert "2 examples, 1 of them without steps" in capsys.readouterr().out
    assert [example["answer"] for example in load_examples(tmp_path / "new" / "out.json")] == ["2", "3"]
    assert "cannot read" in refusal(gsm_icot.main, [tmp_path, tmp_path / "out.json"], capsys)
    error = refusal(gsm_icot.main, [tmp_path / "in.txt", tmp_path / "out.json", "--expect", "3"], capsys)
    assert "in.txt holds 2 examples, not 3" in error
    assert {path.name for path in tmp_path.iterdir()} == {"in.txt", "new"}


@needs_data
@pytest.mark.parametrize(
    ("name", "count", "without", "commas"), [("gsm_valid", 500, 6, 4), ("gsm_train_orig6973", 6973, 89, None)]
)
def test_real_gsm_files_become_the_reference_s_format(name, count, without, commas):
    examples = gsm_icot.convert(DATA / f"{name}.txt")
    assert len(examples) == count
    assert sum(not example["steps"] for example in examples) == without
    assert commas in (None, sum("," in example["answer"] for example in examples))
    lines = (DATA / f"{name}.txt").read_text(encoding="utf-8").split("\n")[:-1]
    for line, example in zip(lines, examples, strict=True):
        question, rest = line.split("||")
        steps, answer = rest.split("##")[0].strip().split(" "), rest.split("##")[-1].strip()
        assert example == {"question": question, "steps": [] if steps == [""] else steps, "answer": answer}


# --- GSM-Hard, SVAMP, MultiArith ---

ORIGINALS = {
    "gsm_hard": "".join(
        json.dumps({"input": f"{place}: 1  and é\u2028?", "code": "", "target": target}, ensure_ascii=False) + "\n"
        for place, target in enumerate([-9867630.0, 5186630.5999999996, 9284017268534.4, 2.0107e-06, 64.0, 0.0])
    ),
    "svamp": json.dumps(
        [
            {"ID": "chal-1", "Body": "It has 3. It gets 4", "Question": "How many?", "Answer": 7.0, "Type": "Addition"},
            {"ID": "chal-2", "Body": "It has 3. ", "Question": "How many?", "Answer": 3.0, "Type": "Addition"},
        ]
    ),
    "multiarith": json.dumps(
        [{"iIndex": n, "sQuestion": f" 2 and {n // 2}? ", "lEquations": [], "lSolutions": [n / 1]} for n in range(8)]
    ),
}


@pytest.fixture
def originals(tmp_path, monkeypatch):
    """Replaces the original files by small ones."""
    (tmp_path / "served").mkdir()
    for name, text in ORIGINALS.items():
        content = text.encode()
        path = tmp_path / "served" / f"{name}.txt"
        path.write_bytes(content)
        monkeypatch.setitem(ood.SOURCES, name, ood.SOURCES[name]._replace(url=path.as_uri(), blob=blob_id(content)))
    return tmp_path / "served"


def test_test_sets_are_downloaded_and_converted(originals, tmp_path, capsys):
    out = tmp_path / "new" / "data"
    assert ood.main([*ORIGINALS, "--out", str(out)]) == 0
    made = {path.stem: load_examples(path) for path in out.iterdir()}
    assert [example["answer"] for example in made["gsm_hard"]] == [
        *("-9867630", "5186630.6", "9284017268534.4", "0.0000020107", "64", "0")
    ]
    assert made["gsm_hard"][1] == {"question": "1: 1  and é\u2028?", "steps": [], "answer": "5186630.6"}
    assert made["svamp"] == [
        {"question": "It has 3. It gets 4. How many?", "steps": [], "answer": "7", "id": "chal-1", "type": "Addition"},
        {"question": "It has 3. How many?", "steps": [], "answer": "3", "id": "chal-2", "type": "Addition"},
    ]
    assert made["multiarith"][3] == {"question": "2 and 1?", "steps": [], "answer": "3", "index": 3}
    assert [example["index"] for example in made["multiarith"]] == list(range(8))
    assert [example["index"] for example in made["multiarith_180"]] == [0, 1, 5, 6]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("gsm_hard.json: 6 examples, 1 negative answers, 3 not integers, 0 duplicate questions")
    assert printed[2].endswith("multiarith.json: 8 examples, 0 negative answers, 0 not integers, 4 duplicate questions")
    assert ood.main([*ORIGINALS, "--out", str(out)]) == 0  # a second call finds the same files


def test_test_sets_are_read_from_files(originals, tmp_path, capsys):
    out = tmp_path / "data"
    assert ood.main(["svamp", "--from", str(originals / "svamp.txt"), "--out", str(out)]) == 0
    before = (out / "svamp.json").read_bytes()
    capsys.readouterr()
    for file, complaint in (
        (originals / "gsm_hard.txt", "gsm_hard.txt is not the expected svamp.txt: its blob id is "),
        (tmp_path / "none", "cannot read .*none: No such file"),
        (tmp_path, "cannot read .*: Is a directory"),
    ):
        error = refusal(ood.main, ["svamp", "--from", file, "--out", out], capsys)
        assert re.fullmatch(f"error: .*{complaint}.*\n", error)
    assert (out / "svamp.json").read_bytes() == before
    (out / "svamp.json").write_text("mine")
    assert "svamp.json exists with other content: move it" in refusal(ood.main, ["svamp", "--out", out], capsys)
    assert (out / "svamp.json").read_text() == "mine"
    refusal(ood.main, ["svamp", "multiarith", "--from", originals / "svamp.txt"], capsys)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (urllib.error.HTTPError("", 404, "Not Found", None, None), "Not Found"),
        (http.client.IncompleteRead(b"half", 996), r"IncompleteRead\(4 bytes read, 996 more expected\)"),
        (urllib.error.URLError(ConnectionRefusedError(111, "Connection refused")), ".*refused"),
        (TimeoutError("timed out"), "timed out"),
    ],
)
def test_a_failed_download_is_one_error_and_leaves_nothing(error, reason, tmp_path, capsys, monkeypatch):
    def fails(url, timeout):
        raise error

    monkeypatch.setattr("urllib.request.urlopen", fails)
    printed = refusal(ood.main, ["svamp", "--out", tmp_path / "data"], capsys)
    url = re.escape(ood.SOURCES["svamp"].url)
    assert re.fullmatch(f"error: {url} cannot be downloaded: {reason}; use --from FILE .*\n", printed)
    assert not (tmp_path / "data").exists()


def test_codis_split_has_180_questions():
    assert len(set(ood.CODI_180.split())) == len(ood.CODI_180.split()) == 180


@needs_data
def test_original_test_sets_have_the_counts_of_data_readme(tmp_path, capsys):
    for name, file in (("gsm_hard", "gsmhardv2.jsonl"), ("svamp", "SVAMP.json")):
        assert ood.main([name, "--from", str(DATA / file), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("1,319 examples, 146 negative answers, 299 not integers, 0 duplicate questions")
    assert printed[1].endswith("1,000 examples, 0 negative answers, 0 not integers, 0 duplicate questions")
    targets = [json.loads(line)["target"] for line in (DATA / "gsmhardv2.jsonl").read_text().splitlines()]
    answers = [float(example["answer"]) for example in load_examples(tmp_path / "gsm_hard.json")]
    assert max(abs(answer - target) for answer, target in zip(answers, targets, strict=True)) < 1e-7
    assert sum(0 < abs(answer) < 1e-3 for answer in answers) == 31
    questions = [example["question"] for example in load_examples(tmp_path / "gsm_hard.json")]
    assert sum("  " in question for question in questions) == 335
    bodies = [row["Body"] for row in json.loads((DATA / "SVAMP.json").read_text())]
    questions = [example["question"] for example in load_examples(tmp_path / "svamp.json")]
    added = [question[len(body)] == "." for body, question in zip(bodies, questions, strict=True)]
    assert sum(added) == 358


# --- ProntoQA ---

CHAIN = ["Max is a vumpus.", "Each vumpus is an impus.", "Max is an impus.", "Impuses are not red.", "Max is not red."]


def official(**changes) -> dict:
    example = {
        "question": "Impuses are not red. Each vumpus is an impus. Max is a vumpus.",
        "query": "True or false: Max is red.",
        "chain_of_thought": CHAIN,
        "answer": "False",
    }
    return {"test_example": {key: value for key, value in (example | changes).items() if value is not None}}


def test_prontoqa_steps_are_pairs_of_sentences():
    assert prontoqa.convert_example(official()) == {
        "question": "Impuses are not red. Each vumpus is an impus. Max is a vumpus. True or false: Max is red.",
        "steps": [
            "Max is a vumpus. Each vumpus is an impus.",
            "Max is an impus. Impuses are not red.",
            "Max is not red.",
        ],
        "answer": "False",
    }


def test_prontoqa_is_split_in_order(tmp_path, capsys):
    text = official()["test_example"]["question"]
    examples = {f"example{number}": official(question=f"{number}. {text}") for number in range(10)}
    (tmp_path / "in.json").write_text(json.dumps(examples))
    sizes = ["--train", "7", "--valid", "1", "--test", "2"]
    assert prontoqa.main([str(tmp_path / "in.json"), "--out", str(tmp_path / "new"), *sizes]) == 0
    splits = [load_examples(tmp_path / "new" / f"prontoqa_{name}.json") for name in ("train", "valid", "test")]
    numbers = [[example["question"][0] for example in examples] for examples in splits]
    assert numbers == [list("0123456"), ["7"], ["8", "9"]]
    error = refusal(prontoqa.main, [tmp_path / "in.json", "--out", tmp_path / "no"], capsys)
    assert "in.json holds 10 examples, not the 10,000 of 9,000/200/800" in error
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "does not exist .*how to make it"),
        (b"", "is empty"),
        (b"{", "is not valid JSON: .* column 2"),
        (b"\xff{}", "line 1 is not UTF-8"),
        ([], "is not from the official generator: it must hold a JSON object"),
        ({"example1": []}, "'example1' is malformed: it has no 'test_example' object"),
        ({"example1": official(question=3)}, "'example1' is malformed: its 'question' is no text"),
        ({"example1": official(chain_of_thought="Max.")}, ".*: its 'chain_of_thought' is no list of texts"),
        ({"example1": official(), "example2": official(query=None)}, "'example2' lacks 'query'"),
        ({"example1": official(query=3)}, "'example1' is malformed: its 'query' is no text"),
        ({"example1": official(answer="Yes")}, "'example1' is malformed: its answer is 'Yes', not True or False"),
        ({"example1": official(query="Is Max red?")}, ".*: its query does not begin with 'True or false"),
        ({"example1": official(answer="True")}, ".*: its answer is True, but its chain ends with 'Max is not"),
    ],
)
def test_malformed_prontoqa_files_are_named(tmp_path, content, complaint, capsys):
    path = tmp_path / "in.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    error = one_error(prontoqa.main, [path, "--out", tmp_path / "out"], capsys)
    assert re.search(f"^error: .*in.json:? {complaint}", error)
    assert not (tmp_path / "out").exists()


class Fact(NamedTuple):
    """A parsed sentence; either noun or property is set."""

    subject: str
    negated: bool
    noun: str | None
    property: str | None
    plural: bool


def parse(sentence: str) -> Fact:
    """Parses 'Each wumpus is a numpus.', 'Wumpuses are not red.' or 'Max is a wumpus.'"""
    singular = r"(?:(?:Each|Every) )?(\w+) is (not )?(?:an? (\w+)|(\w+))\."
    plural = r"(\w+us)es are (not )?(?:(\w+us)es|(\w+))\."
    is_plural = re.fullmatch(plural, sentence)
    subject, negated, noun, name = (is_plural or re.fullmatch(singular, sentence)).groups()
    return Fact(subject.lower(), bool(negated), noun, name, bool(is_plural))


def sentences_of(text: str) -> list[str]:
    return re.findall(r"[^. ][^.]+\.", text)


def test_generated_prontoqa_follows_from_its_facts():
    for example in prontoqa_generate.make_splits({"train": 250}, seed=4)["train"]:
        text, _, query = example["question"].partition(" True or false: ")
        facts = [parse(sentence) for sentence in sentences_of(text)]
        entity = parse(query).subject
        member = {fact.noun for fact in facts if fact.subject == entity}
        while more := {fact.noun for fact in facts if fact.noun and fact.subject in member} - member:
            member |= more
        values = {fact.negated for fact in facts if fact.property == parse(query).property and fact.subject in member}
        assert len(values) == 1  # only an unrelated concept has the negated property
        assert example["answer"] == str(values == {parse(query).negated})
        for step in example["steps"][:-1]:
            first, reason = sentences_of(step)
            assert reason in text
            assert parse(first).noun == parse(reason).subject
            assert parse(first).noun in member
        assert (example["steps"][-1] == query) == (example["answer"] == "True")


@needs_data
def test_the_official_prontoqa_file_is_converted():
    examples = prontoqa.convert(DATA / "5hop_0shot_random.json")
    assert len(examples) == 300
    assert {len(example["steps"]) for example in examples} == {6}
    for example in examples:
        query = example["question"].partition("True or false: ")[2]
        assert (example["steps"][-1] == query) == (example["answer"] == "True")


def prontoqa_statistics(example: dict) -> dict[str, float]:
    text, _, query = example["question"].partition(" True or false: ")
    facts = [parse(sentence) for sentence in sentences_of(text)]
    walked = [text.index(sentence) for step in example["steps"] for sentence in sentences_of(step)[1:]]
    properties = [fact for fact in facts if fact.property]
    others = [fact for fact in properties if fact.property != parse(query).property]
    about = [fact.subject for fact in facts]
    return {
        "sentences": len(facts),
        "words": len(text.split()),
        "steps": len(example["steps"]),
        "concepts": len({fact.noun for fact in facts if fact.noun}),
        "properties": len(properties),
        "plurals": sum(fact.plural for fact in facts),
        "each": text.count("Each "),
        "negated other properties": sum(fact.negated for fact in others),
        "negated query": parse(query).negated,
        "answer": example["answer"] == "True",
        "position of the chain": np.mean(walked) / len(text),
        "chain in order": sum(a < b for a, b in pairwise(walked)),
        "neighbours about one concept": sum(a == b for a, b in pairwise(about)),
        "first letter of the entity": ord(parse(query).subject[0]),
    }


@needs_data
def test_generated_prontoqa_is_distributed_like_the_official_file(monkeypatch):
    official_examples = prontoqa.convert(DATA / "5hop_0shot_random.json")

    def found() -> set[str]:
        made = prontoqa_generate.make_splits({"all": 600}, seed=21)["all"]
        return different(official_examples, made, prontoqa_statistics)

    assert found() == set()
    monkeypatch.setattr(prontoqa_generate, "NEGATED", 0.5)
    assert found() == {"negated other properties", "words"}
    monkeypatch.setattr(prontoqa_generate, "HOPS", 4)
    assert {"sentences", "steps", "concepts"} <= found()
