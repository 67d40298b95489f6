"""Batches, the plan of an epoch, the token cache, data files."""

import bz2
import gzip
import json
import lzma
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from conftest import refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors

from config import Config
from curriculum import END, IGNORE, LATENT, NO_REASONING, START, Markers, training_sequence
from dataset import EpochPlan, StageDataset, batches_of, collate, collate_prompts, example_order
from preprocessing.examples import load_examples
from preprocessing.tokens import Tokens, cache_tokens, tokenize
from trainer.data import Data, check_lengths, longest_sequence, sequence_lengths
from utils import UserError

M = Markers(start=90, latent=91, end=92, eos=99)


def test_max_train_tokens_leaves_out_long_examples():
    tokens = make_tokens(30)
    lengths = [len(q) + sum(map(len, steps)) + len(a) + 1 for q, steps, a in (tokens[i] for i in range(30))]
    limit = sorted(lengths)[10]
    kept = [tokens[index] for index in range(30) if lengths[index] <= limit]
    tokens.leave_out_longer_than(limit)
    assert [tokens[index] for index in range(len(tokens))] == kept
    assert 10 < len(kept) < 30


# --- Batches ---


def make_tokens(n: int = 30) -> Tokens:
    random = np.random.default_rng(0)

    class Words:
        """A fake tokenizer: one token per character."""

        def __call__(self, texts, **options):
            ids = [[ord(letter) % 80 for letter in text] for text in texts]
            return {"input_ids": ids, "special_tokens_mask": [[0] * len(text) for text in texts]}

    examples = [
        {"question": "q" * int(random.integers(1, 20)), "steps": ["s" * 3] * int(random.integers(0, 4)), "answer": "a"}
        for _ in range(n)
    ]
    return tokenize(examples, Words())


@settings(max_examples=50, deadline=None)
@given(stage=st.integers(0, 7), c_thought=st.integers(0, 2), mixed=st.booleans(), seed=st.integers(0, 5))
def test_batches_align_the_first_latents_and_supervise_text_only(stage, c_thought, mixed, seed):
    config = Config(c_thought=c_thought, max_latent_stage=3, uniform_prob=0.5 if mixed else 0.0, seed=seed)
    dataset = StageDataset(make_tokens(8), config, M, epoch=0)
    rows = [dataset[index, stage] for index in range(8)]
    batch = collate(rows, pad_token_id=M.eos, latent_token_id=M.latent)
    assert {tensor.shape for tensor in batch.values()} == {batch["input_ids"].shape}
    starts = set()
    for number, (input_ids, labels) in enumerate(rows):
        row = {name: values[number] for name, values in batch.items()}
        real = row["attention_mask"].bool()
        assert row["input_ids"][real].tolist() == input_ids
        assert row["labels"][real].tolist() == labels
        assert row["position_ids"][real].tolist() == list(range(len(input_ids)))
        assert set(row["labels"][~real].tolist()) <= {IGNORE}
        assert set(row["position_ids"][~real].tolist()) <= {0}
        if M.latent in input_ids:
            starts.add(row["input_ids"].tolist().index(M.latent))
    assert len(starts) <= 1
    assert not batch["labels"].eq(M.latent).any()


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([[1, 2, 3], [4]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    for each in (batch, collate([([1, 2], [-100, 2])], 0, None)):
        assert {tensor.dtype for tensor in each.values()} == {torch.int64}


# --- Plan ---


def flat(plan):
    return [micro for step in plan for micro in step.micro_batches]


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("n_examples", [1, 7, 32, 61, 64])
def test_every_example_is_used_once_and_steps_do_not_depend_on_the_world_size(world_size, accumulation, n_examples):
    config = Config(batch_size_training=8, gradient_accumulation_steps=accumulation, seed=5)
    order = example_order(n_examples, config, 2)
    plans = [EpochPlan(order, config, rank, world_size) for rank in range(world_size)]
    seen = [index for plan in plans for micro in flat(plan) if micro.weight for index in micro.indices]
    assert sorted(seen) == list(range(n_examples))
    one = EpochPlan(order, Config(batch_size_training=8, gradient_accumulation_steps=4, seed=5), 0, 1)
    assert {len(plan) for plan in plans} == {len(one)}
    for number, step in enumerate(one):
        steps = [plan[number] for plan in plans]
        alone = sorted(tuple(micro.indices) for micro in step.micro_batches)
        assert alone == sorted(tuple(m.indices) for m in flat(steps) if m.weight)
        assert {other.n_examples for other in steps} == {sum(map(len, alone))}
        assert len({len(other.micro_batches) for other in steps}) == 1  # equal on all ranks
        assert sum(m.weight for m in flat(steps)) / world_size == pytest.approx(1.0)


@pytest.mark.parametrize("world_after", [1, 2, 4])
def test_the_rest_of_an_epoch_repeats_and_skips_no_example(world_after):
    config = Config(batch_size_training=8, seed=5)
    order = example_order(61, config, 3)
    before = [list(EpochPlan(order, config, rank, 2))[:2] for rank in range(2)]
    seen = sum(step.n_examples for step in before[0])
    after = [EpochPlan(order, config, rank, world_after, seen) for rank in range(world_after)]
    indices = [i for plan in [*before, *after] for m in flat(plan) if m.weight for i in m.indices]
    assert sorted(indices) == list(range(61))


class Recorded(StageDataset):
    """A dataset that records the collated items. Item i has i + 1 supervised tokens."""

    def __init__(self, fails_at: int | None = None):
        self.collated, self.fails_at = [], fails_at

    def __getitem__(self, key):
        if key[0] == self.fails_at:
            raise MemoryError(f"item {key[0]}")
        return key

    def sequence(self, item):
        return [], [7] * (item[0] + 1) + [-100] * 3

    def collate(self, rows):
        self.collated.append(rows)
        return {"rows": rows}


def test_batches_follow_the_plan_with_one_prefetched():
    config = Config(batch_size_training=4, gradient_accumulation_steps=2)
    plan = EpochPlan(np.arange(11), config, 0, 1)
    assert [step.n_examples for step in plan] == [8, 3]
    wanted = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    recorded, found = Recorded(), []
    with batches_of(recorded, plan, [5, 6]) as batches:
        for number, batch in enumerate(batches):
            found.append(batch["rows"])
            assert len(recorded.collated) <= number + 2
    assert found == [[(i, 5 + (i > 7)) for i in indices] for indices in wanted]


@pytest.mark.parametrize("n_examples", [96, 24, 101, 3])
@pytest.mark.parametrize(("batch", "size"), [(16, 8), (24, 32), (12, 16), (48, 32), (96, 32), (24, 16), (24, 4)])
def test_the_loss_of_a_step_does_not_depend_on_the_number_of_ranks(n_examples, batch, size):
    """Ranks with a share below batch_size_training computed a mean of means over smaller micro-batches."""
    losses = np.random.default_rng(0).normal(size=(n_examples, n_examples + 1))  # of each token
    config = Config(global_batch_size=batch, batch_size_training=size)

    def mean(batch: dict) -> float:
        return np.concatenate([losses[index][: index + 1] for index, _ in batch["rows"]]).mean()

    def steps_on(world_size: int) -> list[float]:
        plans = (EpochPlan(np.arange(n_examples), config, rank, world_size) for rank in range(world_size))
        micro = [[Recorded().micro_batch(m, 0) for m in flat(step)] for step in zip(*plans, strict=True)]
        return [sum(batch["weight"] * mean(batch) for batch in step) / world_size for step in micro]

    found = []
    for world_size in (1, 2, 3, 4, 6, 8):
        with suppress(UserError):  # some shares are larger than `size`, but no multiple
            found.append(steps_on(world_size))
    assert len(found) > 2
    assert all(steps == pytest.approx(found[0], abs=1e-12) for steps in found)


def test_an_exception_in_the_dataset_ends_the_loop_and_its_thread():
    """The loop once waited for ever."""

    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]

    plan = EpochPlan(np.arange(11), Config(batch_size_training=4), 0, 1)
    with pytest.raises(MemoryError, match="item 6"), batches_of(Recorded(fails_at=6), plan, [0, 0, 0]) as batches:
        list(batches)
    assert not threads()
    with suppress(RuntimeError), batches_of(Recorded(), plan, [0, 0, 0]) as batches:
        next(batches)
        raise RuntimeError("in the loop")
    assert not threads()


def test_the_order_is_a_function_of_seed_and_epoch():
    for lengths in (None, np.arange(50) % 7):
        orders = [
            example_order(50, Config(seed=seed, batch_size_training=8), epoch, lengths).tolist()
            for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
        ]
        assert orders[0] == orders[1]
        assert orders[0] != orders[2] != orders[3] != orders[0]


def test_grouping_by_length_keeps_similar_lengths_together():
    lengths = np.random.default_rng(0).integers(10, 500, 1003)
    config = Config(batch_size_training=8, gradient_accumulation_steps=2)
    order = example_order(1003, config, 0, lengths)
    assert sorted(order) == list(range(1003))

    def steps_of(order: np.ndarray) -> list[np.ndarray]:
        plan = EpochPlan(order, config, 0, 1)
        return [lengths[plan.examples(step)] for step in range(len(plan))]

    def padding(order: np.ndarray) -> float:
        return 1 - lengths.sum() / sum(max(step) * len(step) for step in steps_of(order))

    assert padding(order) < 0.05 < 0.4 < padding(example_order(1003, config, 0))
    means = [step.mean() for step in steps_of(order)]
    assert means[:50] != sorted(means[:50])  # the batches of a window are shuffled


@pytest.mark.parametrize("method", ["coconut", "cot", "no_cot", "no_thoughts", "icot"])
@pytest.mark.parametrize("pad", [True, False])
def test_lengths_are_those_of_the_sequences(cached, method, pad):
    config = Config(method=method, c_thought=2, max_latent_stage=2, pad_latent_to_max=pad)
    tokens = Tokens.open(cached())

    def wanted(stage: int) -> list[int]:
        return [len(training_sequence(*tokens[i], stage, config, M)[0]) for i in range(len(tokens))]

    for stage in (0, 1, 2, 3, NO_REASONING):
        assert sequence_lengths(tokens, config, stage).tolist() == wanted(stage)
    tokens.leave_out_longer_than(20)
    assert 0 < len(tokens) < 3
    assert all(tokens[i] == Tokens.open(cached())[tokens.record(i)] for i in range(len(tokens)))
    assert sequence_lengths(tokens, config, 0).tolist() == wanted(0)
    assert longest_sequence(tokens, config)[0] >= max(wanted(0))


def test_only_stages_that_are_run_count_for_the_longest_sequence(cached):
    """Bug: an example was refused for its length with all steps, which no stage of the run wrote."""
    tokens = Tokens.open(cached())

    def longest(stage: int | None = None, **keys) -> int:
        return longest_sequence(tokens, Config(max_latent_stage=3, **keys), stage)[0]

    lengths = [max(sequence_lengths(tokens, Config(max_latent_stage=3), stage)) for stage in range(5)]
    assert lengths[0] > max(lengths[3:])
    assert longest() == longest(curriculum="none", uniform_prob=0.1) == lengths[0]
    assert longest(stage=3) == lengths[3]
    assert longest(curriculum="none") == lengths[4]
    assert longest(epochs_per_stage=1, resume=3, num_epochs=5) == max(lengths[3:])


def test_a_methods_own_texts_count_for_the_longest_sequence(cached):
    """Bug: CODI's teacher, whose texts may have more tokens than the steps, was too long in the first step."""
    tokens, config = Tokens.open(cached()), Config(method="codi", max_latent_stage=3)
    alone = longest_sequence(tokens, config)[0]
    tokens.auxiliary = Tokens.open(cached(folder="auxiliary", step_separator=" " * 40))
    assert longest_sequence(tokens, config)[0] == max(tokens.auxiliary.written_lengths()) > alone


def test_validation_needs_no_room_for_the_stages_that_training_mixes_in(cached):
    tokens, config = Tokens.open(cached()), Config(max_latent_stage=3, curriculum="none", uniform_prob=0.1)
    longest = longest_sequence(tokens, replace(config, uniform_prob=0.0))[0]
    check_lengths(config, longest, Data([], tokens))
    refuses("record . .counted from 0. makes .* tokens", check_lengths, config, longest, Data([], tokens, train=tokens))


def test_forced_thoughts_count_for_the_longest_sequence(cached):
    """A prompt that was too long was an error in the middle of the evaluation."""
    tokens = Tokens.open(cached())
    wanted = max(len(question) + 2 + 50 + len(answer) + 1 for question, _, answer in tokens)
    for method in ("coconut", "latents_by_steps"):
        assert longest_sequence(tokens, Config(method=method, only_eval=True, eval_latents=50))[0] == wanted


def test_only_sequences_that_exist_count_for_the_longest_one(cached):
    """Bugs: iCoT's last stage had its steps, and SIM-CoT's targets were all in one sequence."""
    tokens, icot = Tokens.open(cached()), Config(method="icot", only_eval=True)
    wanted = max(len(question) + len(answer) + 1 for question, _, answer in tokens)
    assert longest_sequence(tokens, icot, NO_REASONING)[0] == wanted
    sim_cot = Config(method="sim_cot", c_thought=1, max_latent_stage=1, epochs_per_stage=1)
    alone = longest_sequence(tokens, sim_cot)[0]
    tokens.auxiliary = Tokens.open(cached(folder="auxiliary", step_separator=" " * 40))
    assert longest_sequence(tokens, sim_cot)[0] == alone


# --- Files ---

EXAMPLES = [
    {"question": "1+2", "steps": ["<<1+2=3>>"], "answer": "3", "extra": [1]},
    {"question": "2*3+1", "steps": ["<<2*3=6>>", "<<6+1=7>>"], "answer": "7"},
    {"question": "5", "steps": [], "answer": "5"},
]


@pytest.fixture
def data_file(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(EXAMPLES))
    return path


def character_tokenizer():
    return tiny_model.make_tokenizer([json.dumps(EXAMPLES), "### ", "\n"], "char")


@pytest.fixture
def cached(data_file, tmp_path):
    """Returns a function that caches the file's tokens and returns their folder."""

    def cached(tokenizer=None, folder: str = "cache", **keys) -> Path:
        tokenizer = tokenizer or character_tokenizer()
        return cache_tokens(str(data_file), tokenizer, tmp_path / folder, show_progress=False, **keys)

    return cached


def test_cached_tokens_decode_to_the_texts(data_file, cached):
    tokenizer = character_tokenizer()
    folder = cached(tokenizer)
    tokens = Tokens.open(folder)
    assert isinstance(tokens.ids, np.memmap)
    assert len(tokens) == 3
    for index, example in enumerate(EXAMPLES):
        question, steps, answer = tokens[index]
        assert tokenizer.decode(question) == example["question"] + "\n"
        assert [tokenizer.decode(step) for step in steps] == [step + "\n" for step in example["steps"]]
        assert tokenizer.decode(answer) == "### " + example["answer"]
    stamp = (folder / "ids.npy").stat().st_mtime_ns
    assert cached(tokenizer) == folder
    assert (folder / "ids.npy").stat().st_mtime_ns == stamp
    data_file.write_text(json.dumps(EXAMPLES[:2]))
    assert cached(tokenizer) != folder


def test_steps_of_one_token_need_no_separator(cached):
    with_newlines, without = (Tokens.open(cached(step_separator=separator)) for separator in ("\n", ""))
    newline = character_tokenizer()("\n")["input_ids"]
    for (question, steps, answer), (same, bare, also) in zip(with_newlines, without, strict=True):
        assert (question, answer) == (same, also)
        assert steps == [step + newline for step in bare]


def test_the_cache_key_ignores_truncation_and_padding(cached, tmp_path):
    """A tokenizer with either changed by its first use, and a restart was "trained on other data"."""
    tokenizer = character_tokenizer()
    plain = cached(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding()
    assert cached(tokenizer) == plain
    other = cached(tokenizer, "other")
    assert other.name == plain.name
    for name in ("ids.npy", "texts.npy"):
        assert np.array_equal(np.load(plain / name), np.load(other / name))
    tokenizer.add_tokens(["new"])
    assert cached(tokenizer) != plain


def test_the_digest_of_tokens_depends_on_their_ids_only(cached):
    """With a tokenizer that a later release saved differently, a restart was "trained on other data"."""
    first, later = character_tokenizer(), character_tokenizer()
    later.add_special_tokens({"additional_special_tokens": ["new"]})
    later.__class__ = type("LaterTokenizer", (type(later),), {})
    digests = [Tokens.open(cached(each)).digest() for each in (first, later)]
    assert digests[0] == digests[1]
    ids = tokenize(EXAMPLES, first)
    moved = ids.texts.copy()
    moved[1] += 1
    for changed in (Tokens(ids.ids + 1, ids.texts, ids.examples), Tokens(ids.ids, moved, ids.examples)):
        assert changed.digest() != digests[0] == ids.digest()


@pytest.mark.parametrize(
    ("number", "field", "marker"),
    [(2, "question", LATENT), (0, "answer", END), (1, "steps", START), (1100, "steps", LATENT)],
)
def test_a_marker_in_the_data_is_refused(data_file, cached, number, field, marker):
    """It became a latent position in the question, or a traceback in the middle of an epoch."""
    records, text = [dict(example) for example in (EXAMPLES * 400)[: number + 3]], f"4{marker}1"
    records[number][field] = [*records[number]["steps"], text, ""] if field == "steps" else text
    data_file.write_text(json.dumps(records))
    tokenizer = character_tokenizer()
    tokenizer.add_tokens([START, END, LATENT])
    with pytest.raises(UserError) as error:
        cached(tokenizer)
    assert str(error.value) == (
        f"{data_file}: record {number} (counted from 0) has the text {marker!r} in its {field!r}, which marks the "
        f"latent positions"
    )
    cached()  # for a tokenizer without markers it is ordinary text


def test_a_question_without_tokens_is_refused(data_file, cached):
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    data_file.write_text(json.dumps([*EXAMPLES, {"question": " ", "answer": "3", "steps": [" "]}]))
    refuses(r"record 3 \(counted from 0\) has a 'question' for which the tokenizer returns", cached, tokenizer)


@pytest.mark.parametrize("damage", [lambda ids: b"", lambda ids: ids[:-4], lambda ids: ids[:60]])
def test_damaged_tokens_are_named(cached, damage):
    """A power cut left an empty file, which was an EOFError, or a short one, which was not noticed."""
    folder = cached()
    (folder / "ids.npy").write_bytes(damage((folder / "ids.npy").read_bytes()))
    refuses(f"{folder} cannot be read: .*; remove it, and the next run makes it again", Tokens.open, folder)
    np.save(folder / "ids.npy", np.zeros(5, dtype=np.int32))
    refuses("it is incomplete; remove it", Tokens.open, folder)


@pytest.mark.parametrize("template", ["{0} $A", "{0} $A {0}"])
def test_special_tokens_of_the_tokenizer_come_before_the_question_only(template):
    """An EOS after each text ended up before the thoughts, in training and in evaluation."""
    tokenizer = character_tokenizer()
    eos, token = tokenizer.eos_token, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template.format(eos), special_tokens=[(eos, token)]
    )
    question, steps, answer = tokenize(EXAMPLES, tokenizer)[1]
    assert question[0] == token
    assert question.count(token) == 1
    assert all(token not in text for text in [*steps, answer])


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[", "is not valid JSON: .* column 2"),
        (b"[]", "at least one example"),
        (b"7", "must hold a JSON list"),
        (b'{"question": "a"}', "record 0.*lacks 'answer'"),
        (b'{"question": "a", "answer": "b", "steps": []}\n\n{"question"', "bad.json, line 3 is not .*: column 12"),
        (b"PAR1\x15\x04", "is a Parquet file; this converts it: .*pandas.read_parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer; this converts it: git lfs pull"),
        (b"ARROW1\0\0", "is an Arrow file; this converts it: .*pandas.read_feather"),
        ("[]".encode("utf-16"), "is UTF-16; this converts it: iconv -f UTF-16 -t UTF-8"),
        ("[]".encode("utf-16-le"), "is UTF-16; this converts it: iconv -f UTF-16LE -t UTF-8"),
        ("{}".encode("utf-16-be"), "is UTF-16; this converts it: iconv -f UTF-16BE -t UTF-8"),
        *(
            (text.encode(f"utf-32-{end}e"), f"is UTF-32; this converts it: iconv -f UTF-32{end.upper()}E -t UTF-8")
            for text in ("[]", "{}")
            for end in "lb"
        ),
        (b"\xff\xff\xff\xff\xf8\0\0\0", "is an Arrow stream; this converts it: .*pyarrow.ipc.open_stream"),
        # bug: "line 1 is not valid JSON"
        (b'{\n "question": "a",\n "answer": "b"\n}\n', "record 0.*lacks 'steps'"),
        (b'{"data": [\n{"question": "a", "answer": "b", "steps": []}\n]}', "record 0.*lacks 'question'"),
        ("[]".encode("utf-32"), "is UTF-32; this converts it: iconv -f UTF-32 -t UTF-8"),
        (gzip.compress(b"[]", mtime=0), "is compressed by gzip; this converts it: gzip -dc"),
        (lzma.compress(b"[]"), "is compressed by xz; this converts it: xz -dc"),
        (bz2.compress(b"[]"), "is compressed by bzip2; this converts it: bzip2 -dc"),
        (b'[{"question": "a", "answer": NaN, "steps": []}]', "record 0.*'answer' that is not a string"),
        (
            b'[{"question": "a", "answer": "b", "steps": []}, {"question": "a", "answer": "b"}]',
            "record 1.*lacks 'steps'",
        ),
        (b'[{"question": "a", "answer": true, "steps": []}]', "record 0.*'answer' that is not a string"),
        (b'[{"question": 3, "answer": "3", "steps": []}]', "record 0.*'question' that is not a string"),
        (b'[{"question": "a", "answer": "3", "steps": "x"}]', "record 0.*not a list of strings"),
        (b'["\xff"]', "is not UTF-8"),
        (b'[{"question": "a", "question": "c", "answer": "3"}]', r"\{.question.: .c.* has 'question' twice"),
        (b'[{"question": "a\\ud83d", "answer": "3", "steps": []}]', r"record 0 .* holds '\\ud83d', half a character"),
        (b'[{"question": "a", "answer": "3", "steps": ["\\udc00"]}]', "half a character, which UTF-8 cannot encode"),
        (b"[" * 100_000, "is not valid JSON: it is nested too deeply"),
        (b'[{"question": "a", "answer": "3", "steps": [], "n": ' + b"9" * 5000 + b"}]", "is not valid JSON: Exceeds"),
        (None, "cannot read"),  # there is no such file
    ],
)
def test_bad_files_are_named(tmp_path, content, complaint):
    path = tmp_path / "a bad.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        load_examples(path)
    assert "bad.json" in str(error.value)
    assert "converts it" not in str(error.value) or "git lfs" in complaint or f"'{path}'" in str(error.value)
    refuses("cannot read", load_examples, tmp_path)


@pytest.mark.parametrize(("suffix", "reader"), [("csv", "read_csv"), ("TSV", "read_table")])
def test_tables_are_named(tmp_path, suffix, reader):
    (tmp_path / f"a.{suffix}").write_text("question,steps,answer\na,[],b\n")
    sentence = f"a.{suffix} is a {suffix.upper()} file; this converts it: .*pandas.{reader}"
    refuses(sentence, load_examples, tmp_path / f"a.{suffix}")


def test_lists_and_lines_are_read(tmp_path):
    """JSON lines and a byte order mark were refused. A number as an answer becomes text."""
    records = [{"question": "a\u2028é", "answer": answer, "steps": [], "n": 1} for answer in ("b", 3, 3.5)]
    lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    wanted = [{**record, "answer": answer} for record, answer in zip(records, ("b", "3", "3.5"), strict=True)]
    (tmp_path / "one.json").write_text(json.dumps(records[0], indent=1))  # one example, on several lines
    assert load_examples(tmp_path / "one.json") == wanted[:1]
    for text in (json.dumps(records, indent=1), lines, f"\n{lines}\n\n"):
        for encoding in ("utf-8", "utf-8-sig"):
            (tmp_path / "data.json").write_text(text, encoding=encoding)
            assert load_examples(tmp_path / "data.json") == wanted
            assert load_examples(tmp_path / "data.json", 2) == wanted[:2]
