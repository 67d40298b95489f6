"""Analyses of hand-made models, whose thoughts are known."""

import itertools
import json
import re
import shutil
from types import SimpleNamespace

import family_table
import machine
import numpy as np
import prosqa
import pytest
import tiny_model
import torch
from conftest import ROOT, one_error, python, read_json, refuses
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from analysis import __main__ as command
from analysis import interventions, paths, probe, report, search
from analysis.subject import Change, Subject
from analysis.tasks import Graphs, Machine, load_task
from config import Config
from trainer.pretrained import add_marker_tokens, load_tokenizer, make_model

SURE = -30.0  # a logit of other tokens


class ByHand(LlamaModel):
    """Answers questions without weights. A vector has 2 V dimensions: the first V are a set of letters; the others are
    the token in an embedding, and the logits of the next token in a hidden state.

    A latent position reads its set of letters from its embedding. `follow(question, letters, count)` returns the set
    after step count + 1, or None without one.
    """

    def forward(self, inputs_embeds, attention_mask, past_key_values=None, **_):
        if past_key_values is not None:
            states = inputs_embeds[:, None]
            inputs_embeds = past_key_values.update(states, states, 0)[0][:, 0]  # (B, T, D), cached columns included
            new = states.shape[2]
        else:
            new = inputs_embeds.shape[1]
        hidden = torch.stack([self.row(*row) for row in zip(inputs_embeds, attention_mask, strict=True)])
        return BaseModelOutputWithPast(last_hidden_state=hidden[:, -new:], past_key_values=past_key_values)

    def row(self, embeds, mask):
        size, tokens = embeds.shape[1] // 2, self.tokens
        letters, count, question, answering, rows = set(), None, "", False, []
        for embed, seen in zip(embeds, mask, strict=True):
            identity = embed[size:]
            is_token = identity.max() == 1 and identity.count_nonzero() == 1
            token = tokens[int(identity.argmax())] if is_token else None
            following = set()
            if not seen:
                pass
            elif count is None and token != "\n":
                question += token
            elif token == "\n" and count is None:
                letters, count = {self.start(question)}, 0
                following = self.go(question, letters, count)
            elif token == "###":
                answering, following = True, {" "}
            elif token == " ":
                following = self.answer(question, letters)
            elif answering:
                following = {"<|endoftext|>"}
            else:  # a thought or a written letter
                held = embed[:size]
                letters = {tokens[place] for place in (held == held.max()).nonzero().flatten() if held.max() > 0}
                count += 1
                following = self.go(question, letters, count)
            after = self.follow(question, letters, count) if count is not None else None
            row = torch.full((2 * size,), SURE)
            row[:size] = 0
            for letter in letters if after is None else after:
                row[tokens.index(letter)] = 1.0
            for word in following or {"###"}:
                row[size + tokens.index(word)] = 0.0
            rows.append(row)
        return torch.stack(rows)

    def go(self, question, letters, count):
        """Returns the possible next tokens: letters of the next step, or the mark of the answer."""
        return self.follow(question, letters, count) or {"###"}

    def answer(self, question, letters):
        return letters


class FollowsMachine(ByHand):
    def start(self, question):
        return question[0]

    def follow(self, question, letters, count):
        if count >= len(question) - 1 or not letters:
            return None
        return {self.permutations[question[1 + count]][letter] for letter in letters}


class Searches(ByHand):
    def start(self, question):
        return question[-1]

    def follow(self, question, letters, count):
        edges = question.partition("?")[0].split(" ")
        ends = letters - {pair[0] for pair in edges}  # leaves stay in the set
        return {pair[1] for pair in edges if pair[0] in letters} | ends if letters - ends else None

    def go(self, question, letters, count):
        return {"###"} if self.answer(question, letters) != {"###"} else super().go(question, letters, count)

    def answer(self, question, letters):
        return set(question.partition("?")[2][:2]) & letters or {"###"}


def make_subject(examples, folder, make_base, stage=2, n_thoughts=2, batch=6, **keys) -> Subject:
    """A subject with a token for each character; make_base(tokenizer) returns its language model."""
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps(examples))
    tiny_model.write_model([folder / "data.json"], folder / "model", "char", "llama", 16, 2, 2, 1024)
    config = Config(model_id=str(folder / "model"), **keys)
    tokenizer = load_tokenizer(config)
    markers = add_marker_tokens(tokenizer, "coconut")
    model = make_model(config, make_base(tokenizer), markers).eval()
    model.tokenizer, model.markers, model.config, model.stage = tokenizer, markers, config, stage
    return Subject(model, examples, n_thoughts, batch)


def hand_made_subject(kind, examples, folder, **known) -> Subject:
    """A subject with a hand-made model and as many thoughts as the longest question has steps."""

    def make_base(tokenizer):
        size = len(tokenizer)
        shape = LlamaConfig(
            vocab_size=size, hidden_size=2 * size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
            max_position_embeddings=128, tie_word_embeddings=False, attn_implementation="eager",
        )  # fmt: skip
        base = LlamaForCausalLM(shape)
        base.model = kind(shape)
        tokens = [tokenizer.decode([token]) for token in range(size)]
        vars(base.model).update(known, tokens=tokens)
        with torch.no_grad():
            letters = torch.diag(torch.tensor([float(len(token) == 1 and token.isalpha()) for token in tokens]))
            base.get_input_embeddings().weight.copy_(torch.cat([letters, torch.eye(size)], dim=1))
            base.get_output_embeddings().weight.copy_(torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1))
        return base

    n_thoughts = max(len(example["steps"]) for example in examples)
    keys = {"latent_markers": "none", "step_separator": "", "max_latent_stage": 9}
    return make_subject(examples, folder, make_base, stage=10, n_thoughts=n_thoughts, batch=7, **keys)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    """(subject, task) of state tracking."""
    folder = tmp_path_factory.mktemp("tracking")
    sizes = ["--train", "60", "--valid", "5", "--test", "40", "--states", "6", "--buttons", "6", "--out", str(folder)]
    assert machine.main([*sizes, "--min-steps", "2", "--max-steps", "4"]) == 0
    task = load_task(folder / "machine_test.json")
    return hand_made_subject(FollowsMachine, task.examples, folder, permutations=task.permutations), task


@pytest.fixture(scope="module")
def searching(tmp_path_factory):
    """(subject, task) of mirrored graphs."""
    settings = prosqa.Settings(min_hops=2, max_hops=3, nodes_a_side=6, characters=prosqa.CHARACTERS[:26])
    task = Graphs(prosqa.make_splits({"test": 40}, settings, 5)["test"])
    return hand_made_subject(Searches, task.examples, tmp_path_factory.mktemp("searching")), task


def test_the_sweep_counts_classes_of_outputs(tracking):
    subject, task = tracking
    assert [output.strip() for output in subject.outputs()] == [f"### {e['answer']}" for e in task.examples]
    for row in probe.sweep(subject, task):
        assert row["accuracy"] == 1
        assert row["classes"] == {"right steps and answer": 40, "right answer only": 0, "wrong answer": 0}


def test_probes_decode_the_states(tracking):
    subject, task = tracking
    for row in probe.decoded(subject, task):
        assert row["head"] == 1 or row["thought"] > 2  # after the last button the answer's mark is likeliest
        assert row["probe"] > (0.8 if row["thought"] == 1 else 1 / 6)  # few questions to fit later probes to
    steps = probe.next_step(task, probe.values(subject, task, subject.n_thoughts))
    lengths = [len(example["steps"]) for example in task.examples]
    assert [row["questions"] for row in steps] == [sum(n > k for n in lengths) for k in range(4)]
    for row in steps:
        assert row["value"] == pytest.approx(1, abs=1e-5)
        assert row["first"] == 1
        assert row["elsewhere"] == pytest.approx(0, abs=1e-5)


def test_a_probe_is_tested_on_other_questions_than_it_is_fitted_to():
    random = np.random.default_rng(0)
    states, classes = random.standard_normal((80, 100)), random.integers(4, size=80)
    assert probe.probe_accuracy(states, classes, 4) < 0.5
    states[np.arange(80), classes] += 20
    assert probe.probe_accuracy(states, classes, 4) > 0.9


def test_values_of_the_next_step():
    task = SimpleNamespace(names=lambda: [["a", "b"]], next_name=lambda index, k: "a")
    (row,) = probe.next_step(task, np.array([[[0.3, 0.1]]]))
    assert row == pytest.approx(
        {"thoughts": 0, "questions": 1, "value": 0.3, "renormalised": 0.75, "first": 1, "elsewhere": 0.6}
    )


def test_norms_and_cosines_of_thoughts():
    thoughts = torch.tensor([[[3.0, 4], [6, 8], [0, 2]]])
    first, second, third = probe.shape(SimpleNamespace(thoughts=lambda: thoughts))
    assert [row["norm"] for row in (first, second, third)] == [5, 10, 2]
    assert first["cosine with the one before"] is None
    assert (second["cosine with the one before"], third["cosine with the one before"]) == pytest.approx((1, 0.8))


def test_answers_follow_a_transplanted_state(tracking):
    subject, task = tracking
    for row in interventions.transplants(subject, task):
        assert row["where it leads"] == 1
        assert row["where it was"] == 0
        assert row["questions"] > 0


def test_interventions_have_known_results(tracking):
    subject, task = tracking
    tried = {one.name: one for one in interventions.interventions(subject, task)}
    sets = interventions.thought_sets(subject.n_thoughts)
    assert (sets["all but the last"], sets["the last"]) == ({0, 1, 2}, {3})

    def found(name, which):
        return interventions.measure(subject, task, tried[name], sets[which])

    itself = found("itself", "all")
    assert (itself["accuracy"], itself["questions"], itself["donor"]) == (1, 40, None)
    assert itself["gold"] == pytest.approx(1, abs=1e-5)
    four = sum(len(example["steps"]) == 4 for example in task.examples)
    assert found("itself", "the last")["questions"] == four
    for name in ("any other question", "the twin"):  # the last thought holds the donor's last state
        assert found(name, "all")["donor"] == 1
    same = found("the same answer", "all")
    assert (same["accuracy"], same["donor"]) == (1, None)
    assert found("pause embedding", "the last")["accuracy"] == 0  # it holds no state
    assert found("zeros (off the manifold)", "all")["accuracy"] == 0
    for twin, example in zip(task.twins(), task.examples, strict=True):
        assert twin["question"][1:] == example["question"][1:]
        assert twin["answer"] == task.follow(twin["question"][0], twin["question"][1:])
    reordered = interventions.with_another_question(subject, task)
    assert reordered["of the new question"] == 1
    assert reordered["accuracy"] < 1


def test_one_thought_is_transplanted(tracking, monkeypatch):
    subject, task = tracking
    changes, gold = [], [example["answer"] for example in task.examples]
    monkeypatch.setattr(subject, "answers", lambda change: changes.append(change) or gold)
    for seed in (0, 1):
        interventions.transplants(subject, task, seed)
    assert [change.numbers for change in changes] == [{0}, {1}, {2}, {3}] * 2
    assert not changes[0].content.equal(changes[4].content)  # the seed draws the donors


def test_the_vectors_of_interventions(tracking):
    subject, task = tracking
    thoughts, lengths = subject.thoughts(), [len(example["steps"]) for example in task.examples]
    tried = {one.name: one.content for one in interventions.interventions(subject, task)}
    for k in range(4):
        assert tried["in another order"][:, k].equal(thoughts[:, (k + 1) % 4])
        assert (tried["mean"][7, k] - sum(thoughts[:, k]) / 40).abs().max() < 1e-5
    for index, content in enumerate(tried["as many steps"]):
        donors = [other for other in range(40) if thoughts[other].equal(content)]
        assert any(lengths[other] == lengths[index] for other in donors)


def test_probabilities_are_means_over_the_scored_questions(tracking, monkeypatch):
    subject, task = tracking
    itself = interventions.interventions(subject, task)[0]
    shares = torch.tensor([[float(len(example["steps"]) == 4)] for example in task.examples])
    monkeypatch.setattr(subject, "values", lambda names, *_, **__: shares.expand(-1, len(names[0])))
    monkeypatch.setattr(subject, "answers", lambda **_: [""] * 40)
    assert interventions.measure(subject, task, itself, frozenset({3}))["gold"] == 1


def test_the_model_does_not_attend_to_masked_thoughts(tracking):
    """The hand-made model continues from the last thought that it sees."""
    subject, task = tracking
    outputs = subject.outputs(masked_thoughts=frozenset({subject.n_thoughts - 1}))
    for example, output in zip(task.examples, outputs, strict=True):
        wanted = example["answer"] if len(example["steps"]) < 4 else example["steps"][2]
        assert output.strip().endswith(wanted)


def test_noise_has_the_mean_and_covariance_of_each_thought():
    torch.manual_seed(0)
    thoughts = torch.randn(20_000, 2, 3) @ torch.tensor([[1.0, 0, 0], [2, 1, 0], [0, 0, 0.1]]) + 5
    noise = interventions._noise(thoughts, np.random.default_rng(0))
    assert noise.shape == thoughts.shape
    for number in range(2):
        assert (noise[:, number].mean(0) - thoughts[:, number].mean(0)).abs().max() < 0.1
        difference = np.cov(noise[:, number].numpy().T) - np.cov(thoughts[:, number].numpy().T)
        assert np.abs(difference).max() < 0.2


def test_a_donor_is_another_question_that_is_allowed():
    lengths = [2, 2, 3, 2]
    random = np.random.default_rng(0)
    donors = interventions._donors(4, lambda mine, other: lengths[mine] == lengths[other], random)
    assert donors[2] is None
    assert all(donor != mine and lengths[donor] == 2 for mine, donor in enumerate(donors) if mine != 2)


def test_a_breadth_first_search_values_its_frontier(searching):
    subject, task = searching
    values = probe.values(subject, task, 2)
    for k in range(2):
        row = search.frontier(task, values[k], k)
        assert row["auc"] == 1
        assert row["others"] == pytest.approx(0, abs=1e-5)
        for index, graph in enumerate(task.graphs):
            tree = search.tree(task, index, values[k])
            # the model also holds nodes of smaller depth that a longer path reaches
            held = [other for other, share in tree["values"].items() if share > 1e-6]
            for name in paths.frontier(graph, k + 1):
                assert tree["values"][name] == pytest.approx(1 / len(held), abs=1e-5)
            assert tree["nodes"][graph.root] == 0
            assert tree["marked"][graph.target] == "target"
            assert set(tree["nodes"]) == set(graph.names)
    means = search.parallelism(values[1])["mean"]
    assert means == sorted(means)
    assert means[2] <= 1 + 1e-6
    rows = search.by_height(task, values[1], 1)
    assert sum(row["nodes"] for row in rows) > 0
    assert {row["right"] for row in rows} <= {True, False}
    assert all(0 <= row["value"] <= 1 for row in rows)


def test_the_twin_of_a_graph_is_about_the_other_root(searching):
    subject, task = searching
    twins = task.twins()
    for twin, example, graph in zip(twins, task.examples, task.graphs, strict=True):
        assert twin["question"][:-1] == example["question"][:-1]
        assert twin["answer"] == graph.other
    assert Graphs(twins).graphs[0].target == task.graphs[0].other
    twin = next(one for one in interventions.interventions(subject, task) if one.name == "the twin")
    found = interventions.measure(subject, task, twin, frozenset(range(subject.n_thoughts)))
    assert found["donor"] == 1
    assert found["T"] == pytest.approx(0, abs=1e-5)
    assert found["escape"] == pytest.approx(0, abs=1e-5)
    assert interventions.with_another_question(subject, task)["accuracy"] == 1  # the order of edges has no effect


def test_twins_and_reordered_questions_of_sentences():
    settings = prosqa.Settings(min_hops=2, max_hops=3, nodes_a_side=6)
    task = Graphs(prosqa.make_splits({"test": 5}, settings, 5)["test"])
    for twin, example, graph in zip(task.twins(), task.examples, task.graphs, strict=True):
        assert twin["answer"].endswith(f"is a {graph.other}.")
        root = twin["answer"].partition(" is a ")[0]
        assert f"Is {root} a " in twin["question"]
        assert twin["question"].partition("Is ")[0].split() == example["question"].partition("Is ")[0].split()
    _, redrawn = task.redrawn(np.random.default_rng(0))
    for new, example in zip(redrawn, task.examples, strict=True):
        assert sorted(new["question"].split(". ")) == sorted(example["question"].split(". "))
        assert new["question"].split(". ")[-1] == example["question"].split(". ")[-1]


# --- Values of names of several tokens ---


def random_subject(folder, examples, markers="both", family=None, method="coconut") -> Subject:
    """A subject with a randomly initialised model, by default a Llama."""

    def make_base(tokenizer):
        if family is not None:
            return family_table.tiny_model(
                family, torch.float32, vocab_size=len(tokenizer), max_position_embeddings=1024
            )
        torch.manual_seed(1)
        shape = LlamaConfig.from_pretrained(folder / "model", vocab_size=len(tokenizer), torch_dtype="float32")
        return LlamaForCausalLM(shape).float()

    return make_subject(examples, folder, make_base, latent_markers=markers, method=method)


def sentences_of(count: int) -> list[dict]:
    return prosqa.make_splits({"test": count}, prosqa.Settings(min_hops=2, max_hops=3, nodes_a_side=4), 5)["test"]


def log_probability(subject: Subject, index: int, forced: str, name: str, change: Change | None = None) -> float:
    """The log-probability of a name after a question, its thoughts and the forced text, from one pass without cache."""
    model, tokenizer, markers, example = subject.model, subject.tokenizer, subject.markers, subject.examples[index]
    latents = [markers.latent] * subject.n_thoughts
    if model.config.latent_markers == "both":
        latents = [markers.start, *latents, markers.end]
    before = [*tokenizer(example["question"] + "\n")["input_ids"], *latents, *tokenizer(forced)["input_ids"]]
    ids = [*before, *tokenizer(name)["input_ids"]]
    edit = change.of(slice(index, index + 1)) if change else None
    with torch.no_grad():
        logits = model(torch.tensor([ids]), edit=edit).logits[0].log_softmax(-1)
    return sum(logits[place - 1, ids[place]] for place in range(len(before), len(ids))).item()


@pytest.mark.parametrize("family", ["mamba2", "falcon_h1"])
def test_values_need_no_cache_that_forks(tmp_path, family):
    """Bug: a recurrent family ended the analysis in a traceback."""
    subject = random_subject(tmp_path, sentences_of(3), family=family)
    names = ["lempus", "rorpus"]
    found = subject.values([names] * 3, "Every ")
    for index, number in itertools.product(range(3), range(2)):
        wanted = np.exp(log_probability(subject, index, "Every ", names[number]))
        assert found[index, number] == pytest.approx(wanted, rel=1e-3, abs=0)


@pytest.mark.parametrize(
    ("markers", "method"), [("both", "coconut"), ("none", "coconut"), ("both", "markov"), ("both", "latents_by_steps")]
)
def test_a_value_is_the_product_of_its_tokens_probabilities(tmp_path, markers, method):
    """Compared with whole sequences without a cache, for questions of different lengths and with edited thoughts. Bugs:
    the last tokens of a name attended to all thoughts of a markov model; latents_by_steps was refused."""
    subject = random_subject(tmp_path, sentences_of(5), markers, method=method)
    names = [["lempus", "rorpus", "tumpus"][: 2 + index % 2] for index in range(5)]
    content = torch.randn(5, 2, 16)
    for change in (None, Change(content, frozenset({1}))):
        found = subject.values(names, "Every ", change=change)
        for index, row in enumerate(names):
            for number, name in enumerate(row):
                wanted = log_probability(subject, index, "Every ", name, change)
                assert found[index, number].log().item() == pytest.approx(wanted, abs=1e-4)
        assert found[0, 2] == 0


def test_the_share_of_an_unlikely_answer(tmp_path):
    """Bug: T was 0 where both answers have less than 1e-12."""
    subject, task = random_subject(tmp_path, sentences_of(3)), Graphs(sentences_of(3))
    itself = interventions.interventions(subject, task)[0]
    assert itself.name == "itself"
    found = interventions.measure(subject, task, itself, frozenset({0}))
    logs = [
        [log_probability(subject, index, "### ", name) for name in (example["answer"], other)]
        for index, (example, other) in enumerate(zip(task.examples, task.others(), strict=True))
    ]
    assert max(map(max, logs)) < np.log(1e-12)
    assert found["T"] == pytest.approx(np.mean([1 / (1 + np.exp(other - gold)) for gold, other in logs]), rel=1e-3)


def test_values_of_names_with_a_common_beginning_in_small_batches(tmp_path):
    """Bug: the common beginning of all names was forced too, and so missing from their values. And each name has a copy
    of its question's cache: 250 questions with 28 names do not fit a GPU."""
    subject, sizes = random_subject(tmp_path, sentences_of(5)), []
    plain = subject._log_probabilities
    subject._log_probabilities = lambda inputs, names, edit: sizes.append(len(names)) or plain(inputs, names, edit)
    found = subject.values([["Alex is a lempus.", "Alex is a lorpus.", "Alex is a tumpus."]] * 5, "### ")
    assert sizes == [2, 2, 1]
    wanted = np.exp(log_probability(subject, 1, "### ", "Alex is a lorpus."))
    assert found[1, 1] == pytest.approx(wanted, rel=1e-4, abs=0)


def test_a_sentence_begins_with_the_parent(tmp_path):
    """Bug: the name after 'Every' counted as the step's child, and an answer was forced without its space."""
    examples = sentences_of(5)
    task, subject = Graphs(examples), random_subject(tmp_path, examples)
    assert task.next_name(0, 0) is None  # 'Alex is a lempus.'
    for index, (graph, example) in enumerate(zip(task.graphs, examples, strict=True)):
        for k in range(1, len(example["steps"])):
            name = task.next_name(index, k)
            assert example["steps"][k].startswith(f"Every {name} is a ")
            assert name in paths.frontier(graph, task.distance(k))
    rows = probe.next_step(task, probe.values(subject, task, 2))
    assert [row["thoughts"] for row in rows] == [1, 2][: max(len(example["steps"]) for example in examples) - 1]
    last = rows[-1]["thoughts"]
    subject.n_thoughts = last
    asked = [index for index, example in enumerate(examples) if len(example["steps"]) > last]
    wanted = [np.exp(log_probability(subject, index, "Every ", task.next_name(index, last))) for index in asked]
    assert rows[-1]["value"] == pytest.approx(np.mean(wanted), rel=1e-4)
    subject.n_thoughts = 2
    itself = interventions.interventions(subject, task)[0]
    found = interventions.measure(subject, task, itself, frozenset({0, 1}))
    wanted = [np.exp(log_probability(subject, index, "### ", e["answer"])) for index, e in enumerate(examples)]
    assert found["gold"] == pytest.approx(np.mean(wanted), rel=1e-4)


def test_outputs_have_room_for_all_steps_and_the_answer(tmp_path):
    """Bug: outputs ended after 64 tokens, so that long answers counted as wrong."""
    examples = sentences_of(2)
    subject, limits = random_subject(tmp_path, examples), []
    subject.model.generate = lambda **options: limits.append(options["max_new_tokens"]) or torch.zeros(2, 1).long()
    subject.outputs(0)
    assert limits[0] > 64
    lengths = [sum(len(step) + 1 for step in e["steps"]) + 2 + len(e["answer"]) + 1 for e in examples]  # '###' is one
    assert limits[0] == 2 * max(lengths)


def test_names_may_have_spaces():
    """Bug: only the last word of a name counted."""
    (example,) = sentences_of(1)
    old = Graphs([example]).next_name(0, 1)
    example = json.loads(json.dumps(example).replace(old, f"big {old}"))
    assert Graphs([example]).next_name(0, 1) == f"big {old}"


# --- The command ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """For each task data, and a checkpoint with and one without feedback, both hardly trained."""
    import run

    folder = tmp_path_factory.mktemp("trained")
    sizes = ["--train", "40", "--valid", "4", "--test", "12", "--out", str(folder)]
    assert machine.main([*sizes, "--states", "5", "--buttons", "5", "--min-steps", "2", "--max-steps", "3"]) == 0
    mirror = "--mirror --nodes-a-side 4 --min-hops 2 --max-hops 2 --template compact --prefix mirror"
    assert prosqa.main([*mirror.split(), *sizes]) == 0
    for kind in ("machine", "mirror"):
        data, model = folder / f"{kind}_train.json", folder / f"{kind}_model"
        tiny_model.write_model([data], model, "char", "llama", 16, 1, 2, 64)
        for thought in ("last", "pause"):
            keys = [f"model_id={model}", f"train_path={data}", f"val_path={folder / f'{kind}_valid.json'}"]
            keys += [f"save_path={folder}", f"name={kind}-{thought}", f"thought={thought}", "num_epochs=1"]
            keys += ["epochs_per_stage=[1]", "max_latent_stage=2", "curriculum=none"]
            keys += ["global_batch_size=20", "batch_size_training=20"]
            assert run.main(Config.from_file(ROOT / "args" / "machine_fixed.yaml", keys)) == 0
    return folder


@pytest.mark.parametrize("kind", ["machine", "mirror"])
def test_the_page_has_every_part_and_is_the_same_from_its_numbers(trained, tmp_path, kind):
    arguments = [str(trained / f"{kind}-last"), "--control", str(trained / f"{kind}-pause")]
    arguments += ["--data", str(trained / f"{kind}_test.json"), "--out", str(tmp_path), "--questions", "10"]
    assert command.main(arguments) == 0
    text = (tmp_path / "index.html").read_text()
    assert list(read_json(tmp_path / "about.json")["checkpoints"]) == ["Coconut", "pause as thought"]
    titles = ["What thoughts hold", "Are thoughts used?", "With another number of thoughts"]
    for title in titles if kind == "machine" else [*titles, "Is it a search?"]:
        assert f">{title}</h2>" in text
    assert "pause as thought" in text
    assert "<script" not in text
    (tmp_path / "index.html").unlink()
    assert command.main([*arguments, "--page"]) == 0
    assert (tmp_path / "index.html").read_text() == text
    rows = json.loads((tmp_path / "interventions.json").read_text())["Coconut"]["rows"]
    assert {row["kind"] for row in rows} == {"control", "content", "donor", "removal"}


def test_a_control_may_have_fewer_thoughts():
    """Bug: a traceback, because the page looked for thoughts that the control lacks."""
    about = {"kind": "graphs", "states": 5}
    rows = [{"kind": "control", "name": "itself", "place": place, "accuracy": 0.5} for place in ("all", "thought 1")]
    rows += [{**row, "name": name} for row in rows for name in ("mean", "noise", "any other question", "the twin")]
    few = [row for row in rows if row["place"] == "all"]
    found = {name: {"rows": chosen, "another question": {}} for name, chosen in (("a", few), ("b", rows))}
    assert "thought 1" in report.interventions_section(found, about).figures[1].svg


def test_too_few_questions_give_none(tracking, searching):
    """Bug: a traceback of a mean, or of a probe, over no questions."""
    subject, task = tracking
    few = Machine(sorted(task.examples, key=lambda example: len(example["steps"]))[-1:], task.permutations)
    few.examples += [example for example in task.examples if len(example["steps"]) == 2][:2]
    rows = probe.decoded(subject.asking(few.examples), few)
    assert [row["questions"] for row in rows] == [3, 3, 1, 1]
    assert rows[-1]["probe"] is None
    assert rows[0]["probe"] is not None
    subject, task = searching
    nobody = interventions.Intervention("none", "donor", subject.thoughts(), (None,) * len(task.examples))
    found = interventions.measure(subject, task, nobody, frozenset({0}))
    assert {found[key] for key in ("accuracy", "donor", "gold", "T", "escape")} == {None}


def test_the_root_of_a_twin_reaches_one_candidate():
    """Bug: it might reach both, so that either answer was right."""
    edges = [[0, 2], [1, 3], [4, 2], [4, 3]]  # Adam reaches both, Wren only the other one
    facts = "Tom is a wug. Wren is a dax. Adam is a wug. Adam is a dax."
    names = {"idx_to_symbol": ["Tom", "Wren", "wug", "dax", "Adam"], "edges": edges}
    asked = {"root": 0, "target": 2, "neg_target": 3, "answer": "Tom is a wug.", "steps": ["Tom is a wug."]}
    example = {"question": f"{facts} Is Tom a wug or dax?", **names, **asked}
    (twin,) = Graphs([example]).twins()
    assert twin["question"] == f"{facts} Is Wren a wug or dax?"
    assert twin["answer"] == "Wren is a dax."
    without = {**example, "edges": [edge for edge in edges if edge != [1, 3]]}
    assert Graphs([without]).twins() == [None]


def test_examples_that_contradict_their_machine_or_graph_raise(trained, tmp_path):
    for name in ("machine_test.json", "machine_machine.json"):
        shutil.copy(trained / name, tmp_path)
    file = tmp_path / "machine_test.json"
    load_task(file)
    examples = read_json(file)
    for question in ("", "aB", examples[1]["question"] + "a"):
        examples[1]["question"] = question
        file.write_text(json.dumps(examples))
        refuses(r"machine_test.json: record 1 \(counted from 0\) does not follow from the machine's", load_task, file)
    examples, file = read_json(trained / "mirror_test.json"), tmp_path / "graphs.json"
    del examples[2]["edges"]
    file.write_text(json.dumps(examples))
    sentence = r"graphs.json: record 2 \(counted from 0\): the example has no valid ProsQA graph: KeyError\('edges'\)"
    refuses(sentence, load_task, file)
    file.write_text(json.dumps(examples[:1]))
    refuses(r"graphs.json has too few such questions \(1\)", load_task, file)


def test_a_checkpoint_needs_one_thought_a_step_and_text_right_after(trained, tmp_path):
    """Bug: with two thoughts a step, the k-th thought was compared with the k-th step."""
    folder = shutil.copytree(trained / "machine-last" / "checkpoint_1", tmp_path / "checkpoint_1")
    description, examples = read_json(folder / "coconut.json"), read_json(trained / "machine_test.json")
    for changed, complaint in (
        ({"c_thought": 2}, r"has 2 thoughts a step \(c_thought\)"),
        ({"method": "multi_mode"}, "has method multi_mode: the analysis needs"),
        ({"latent_passes": "2"}, "has method parallel_latents: the analysis needs"),
        ({"stage": 0}, r"no thoughts to analyse: its method is coconut, its stage 0 \(--thoughts K gives it K\)"),
    ):
        (folder / "coconut.json").write_text(json.dumps(description | changed))
        refuses(complaint, Subject.load, str(folder), examples)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["none"], "none"),
        (["{}/machine-last", "--data", "{}/none.json"], "none.json"),
        (["{}/machine-last", "--data", "{}/machine_model/config.json"], "config.json"),
    ],
)
def test_errors_are_one_sentence(trained, tmp_path, arguments, complaint, capsys):
    arguments = [argument.format(trained) for argument in arguments]
    data = [] if "--data" in arguments else ["--data", str(trained / "machine_test.json")]
    assert complaint in one_error(command.main, [*arguments, *data, "--out", tmp_path / "new"], capsys)
    assert not (tmp_path / "new").exists()


def test_a_page_without_numbers_and_without_matplotlib(tmp_path, capsys):
    error = one_error(command.main, ["x", "--data", "y", "--out", tmp_path, "--page"], capsys)
    assert re.search("^error: cannot read .*about.json: No such file", error)
    code = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_module('analysis', run_name='__main__')"
    error = python("-c", code, "x", "--data", "y", "--out", "z", code=2).stderr
    assert error == "error: the figures need matplotlib: pip install -r requirements-dev.txt\n"


def test_questions_with_a_number_of_steps_can_be_chosen(trained):
    file = trained / "machine_test.json"
    wanted = [example for example in load_task(file).examples if len(example["steps"]) == 3]
    assert load_task(file, 2, steps=3).examples == wanted[:2] != wanted
    refuses(r"too few such questions \(0\)", load_task, file, steps=4)
