"""Analyses of models whose thoughts are known, because they are made by hand."""

import json
import re
import subprocess
import sys

import machine
import numpy as np
import prosqa
import pytest
import tiny_model
import torch
from conftest import ROOT
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from analysis import __main__ as command
from analysis import interventions, paths, probe, report, search
from analysis.subject import Asked, Change, Subject
from analysis.tasks import Graphs, Machine, load_task
from coconut import Coconut
from config import Config
from trainer.pretrained import load_tokenizer, mark
from utils import UserError

SURE = -30.0  # a logit of other tokens


class ByHand(LlamaModel):
    """Follows a question without any weights. Of the 2 V dimensions the first V are the set of letters that a position
    holds, the others which token it is; a hidden state has the logits of the next token there.

    A position holds what follows from the one that it was made from: a thought is read from its embedding, whatever
    stands there. `follow(question, letters, count)` is the set after one more step, None where there is none.
    """

    def forward(self, inputs_embeds, attention_mask, past_key_values=None, **_):
        if past_key_values is not None:
            states = inputs_embeds[:, None]
            inputs_embeds = past_key_values.update(states, states, 0)[0][:, 0]  # (B, T, D) of all columns so far
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
        """The next token: a letter that follows, or the answer's mark."""
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
        ends = letters - {pair[0] for pair in edges}  # leaves stay
        return {pair[1] for pair in edges if pair[0] in letters} | ends if letters - ends else None

    def go(self, question, letters, count):
        return {"###"} if self.answer(question, letters) != {"###"} else super().go(question, letters, count)

    def answer(self, question, letters):
        return set(question.partition("?")[2][:2]) & letters or {"###"}


def subject_of(kind, examples, folder, **known) -> Subject:
    """A subject whose model is made by hand, asked with as many thoughts as the longest question has steps."""
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps(examples))
    tiny_model.write_model([folder / "data.json"], folder / "model", "char", "llama", 16, 1, 2, 64)
    config = Config(model_id=str(folder / "model"), latent_markers="none", step_separator="", max_latent_stage=9)
    tokenizer = load_tokenizer(config)
    markers = mark(tokenizer, "coconut")
    size = len(tokenizer)
    shape = LlamaConfig(
        vocab_size=size, hidden_size=2 * size, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=128, tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    base = LlamaForCausalLM(shape)
    base.model = kind(shape)
    base.model.tokens = [tokenizer.decode([token]) for token in range(size)]
    for name, value in known.items():
        setattr(base.model, name, value)
    with torch.no_grad():
        letters = [len(token) == 1 and token.isalpha() for token in base.model.tokens]
        holds = torch.diag(torch.tensor(letters, dtype=torch.float32))
        base.get_input_embeddings().weight.copy_(torch.cat([holds, torch.eye(size)], dim=1))
        base.get_output_embeddings().weight.copy_(torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1))
    model = Coconut(base, markers.latent, markers.start, markers.end, markers.eos).eval()
    asked = Asked(model, tokenizer, markers, config, stage=10)
    return Subject(asked, examples, max(len(example["steps"]) for example in examples), batch=7)


@pytest.fixture(scope="module")
def tracking(tmp_path_factory):
    """(subject, task) of state tracking."""
    folder = tmp_path_factory.mktemp("tracking")
    sizes = ["--train", "60", "--valid", "5", "--test", "40", "--states", "6", "--buttons", "6", "--out", str(folder)]
    assert machine.main([*sizes, "--min-steps", "2", "--max-steps", "4"]) == 0
    task = load_task(folder / "machine_test.json")
    return subject_of(FollowsMachine, task.examples, folder, permutations=task.permutations), task


@pytest.fixture(scope="module")
def searching(tmp_path_factory):
    """(subject, task) of mirrored graphs."""
    settings = prosqa.Settings(min_hops=2, max_hops=3, nodes_a_side=6, characters=prosqa.CHARACTERS[:26])
    task = Graphs(prosqa.make_splits({"test": 40}, settings, 5)["test"])
    return subject_of(Searches, task.examples, tmp_path_factory.mktemp("searching")), task


def test_a_model_that_follows_the_machine_is_always_right(tracking):
    subject, task = tracking
    assert isinstance(task, Machine)
    assert [output.strip() for output in subject.outputs()] == [f"### {e['answer']}" for e in task.examples]
    for row in probe.sweep(subject, task):
        assert row["accuracy"] == 1
        assert row["classes"] == {"right steps and answer": 40, "right answer only": 0, "wrong answer": 0}


def test_its_thoughts_hold_the_states(tracking):
    subject, task = tracking
    for row in probe.decoded(subject, task):
        assert row["head"] == 1 or row["thought"] > 2  # a word of two is over: the mark of the answer follows
        assert row["probe"] > (0.8 if row["thought"] == 1 else 1 / 6)  # later ones have few questions to be fitted to
    steps = probe.next_step(task, probe.values(subject, task, subject.n_thoughts))
    lengths = [len(example["steps"]) for example in task.examples]
    assert [row["questions"] for row in steps] == [sum(n > k for n in lengths) for k in range(4)]
    for row in steps:
        assert row["value"] == pytest.approx(1, abs=1e-5)
        assert row["first"] == 1
        assert row["elsewhere"] == pytest.approx(0, abs=1e-5)


def test_a_transplanted_state_leads_where_the_buttons_say(tracking):
    subject, task = tracking
    for row in interventions.transplants(subject, task):
        assert row["where it leads"] == 1
        assert row["where it was"] == 0
        assert row["questions"] > 0


def test_interventions_come_out_as_computed_by_hand(tracking):
    subject, task = tracking
    tried = {one.name: one for one in interventions.interventions(subject, task)}
    places = interventions.places(subject.n_thoughts)
    assert places["all but the last"] == {0, 1, 2}
    assert places["the last"] == {3}

    def found(name, place):
        return interventions.measure(subject, task, tried[name], places[place])

    itself = found("itself", "all")
    assert (itself["accuracy"], itself["questions"], itself["donor"]) == (1, 40, None)
    assert itself["gold"] == pytest.approx(1, abs=1e-5)
    four = sum(len(example["steps"]) == 4 for example in task.examples)
    assert found("itself", "the last")["questions"] == four
    for name in ("any other question", "the twin"):  # the last thought holds the donor's last state
        assert found(name, "all")["donor"] == 1
    same = found("the same answer", "all")
    assert same["accuracy"] == 1
    assert same["donor"] is None  # a donor with the same answer shows nothing new
    assert found("pause embedding", "the last")["accuracy"] == 0  # it holds nothing
    assert found("zeros (off the manifold)", "all")["accuracy"] == 0
    twins = task.twins()
    assert all(twin["question"][1:] == e["question"][1:] for twin, e in zip(twins, task.examples, strict=True))
    for twin in twins:
        assert twin["answer"] == task.follow(twin["question"][0], twin["question"][1:])


def test_another_order_of_buttons_has_an_answer_of_its_own(tracking):
    subject, task = tracking
    found = interventions.with_another_question(subject, task)
    assert found["of the new question"] == 1
    assert found["accuracy"] < 1


def test_hidden_thoughts_are_not_attended_to(tracking):
    """The model made by hand reads its last thought: without it, it goes on from the one before."""
    subject, task = tracking
    outputs = subject.outputs(hidden_columns=frozenset({subject.n_thoughts - 1}))
    for example, output in zip(task.examples, outputs, strict=True):
        wanted = example["answer"] if len(example["steps"]) < 4 else example["steps"][2]
        assert output.strip().endswith(wanted)


def test_noise_has_the_mean_and_covariance_of_its_number():
    torch.manual_seed(0)
    thoughts = torch.randn(20_000, 2, 3) @ torch.tensor([[1.0, 0, 0], [2, 1, 0], [0, 0, 0.1]]) + 5
    noise = interventions._noise(thoughts, np.random.default_rng(0))
    assert noise.shape == thoughts.shape
    for number in range(2):
        assert (noise[:, number].mean(0) - thoughts[:, number].mean(0)).abs().max() < 0.1
        difference = np.cov(noise[:, number].numpy().T) - np.cov(thoughts[:, number].numpy().T)
        assert np.abs(difference).max() < 0.2


def test_donors_are_others_and_allowed():
    random = np.random.default_rng(0)
    lengths = [2, 2, 3, 2]
    donors = interventions._donors(4, lambda mine, other: lengths[mine] == lengths[other], random)
    assert donors[2] is None
    assert all(donor != mine and lengths[donor] == 2 for mine, donor in enumerate(donors) if mine != 2)


def test_a_search_by_breadth_has_the_values_of_its_frontier(searching):
    subject, task = searching
    values = probe.values(subject, task, 2)
    for k in range(2):
        row = search.frontier(task, values[k], k)
        assert row["auc"] == 1
        assert row["others"] == pytest.approx(0, abs=1e-5)
        for index, graph in enumerate(task.graphs):
            tree = search.tree(task, index, values[k])
            # nodes that another way reaches at a greater depth are in the set too
            held = [other for other, share in tree["values"].items() if share > 1e-6]
            for name in paths.frontier(graph, k + 1):
                assert tree["values"][name] == pytest.approx(1 / len(held), abs=1e-5)
            assert tree["nodes"][graph.root] == 0
            assert tree["marked"][graph.target] == "target"
            assert set(tree["nodes"]) == set(graph.names)
    means = search.parallelism(values[1])["mean"]
    assert means == sorted(means)
    assert means[2] <= 1 + 1e-6


def test_the_height_of_a_node_is_held_against_its_value(searching):
    subject, task = searching
    rows = search.by_height(task, probe.values(subject, task, 1)[1], 1)
    assert sum(row["nodes"] for row in rows) > 0
    assert {row["right"] for row in rows} <= {True, False}
    assert all(0 <= row["value"] <= 1 for row in rows)


def test_the_twin_of_a_graph_is_asked_about_the_other_root(searching):
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


def test_the_order_of_edges_says_nothing(searching):
    subject, task = searching
    assert interventions.with_another_question(subject, task)["accuracy"] == 1


def test_sentences_have_twins_and_orders_too():
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


# ---- values of names of several tokens ----


def random_subject(folder, examples, markers="both") -> Subject:
    """A subject whose model has random weights and a token for each character."""
    (folder / "data.json").write_text(json.dumps(examples))
    tiny_model.write_model([folder / "data.json"], folder / "model", "char", "llama", 16, 2, 2, 1024)
    config = Config(model_id=str(folder / "model"), latent_markers=markers)
    tokenizer = load_tokenizer(config)
    marks = mark(tokenizer, "coconut")
    torch.manual_seed(1)
    shape = LlamaConfig.from_pretrained(folder / "model", vocab_size=len(tokenizer), torch_dtype="float32")
    model = Coconut(LlamaForCausalLM(shape).float(), marks.latent, marks.start, marks.end, marks.eos).eval()
    return Subject(Asked(model, tokenizer, marks, config, 2), examples, 2, batch=6)


def sentences_of(count: int) -> list[dict]:
    return prosqa.make_splits({"test": count}, prosqa.Settings(min_hops=2, max_hops=3, nodes_a_side=4), 5)["test"]


def log_probability(subject: Subject, index: int, forced: str, name: str, change: Change | None = None) -> float:
    """Of a name after a question, its thoughts and what is forced: a whole sequence, without a cache."""
    (model, tokenizer, marks, config, _), example = subject.asked, subject.examples[index]
    latents = [marks.latent] * subject.n_thoughts
    if config.latent_markers == "both":
        latents = [marks.start, *latents, marks.end]
    before = [*tokenizer(example["question"] + "\n")["input_ids"], *latents, *tokenizer(forced)["input_ids"]]
    ids = [*before, *tokenizer(name)["input_ids"]]
    edit = change.of(slice(index, index + 1)) if change else None
    with torch.no_grad():
        logits = model(torch.tensor([ids]), edit=edit).logits[0].log_softmax(-1)
    return sum(logits[place - 1, ids[place]] for place in range(len(before), len(ids))).item()


@pytest.mark.parametrize("markers", ["both", "none"])
def test_a_value_is_the_product_of_its_tokens_probabilities(tmp_path, markers):
    """Against whole sequences without a cache; batches of questions of different lengths, edited thoughts too."""
    subject = random_subject(tmp_path, sentences_of(5), markers)
    names = [["lempus", "rorpus", "tumpus"][: 2 + index % 2] for index in range(5)]
    content = torch.randn(5, 2, 16)
    for change in (None, Change(content, frozenset({1}))):
        found = subject.values(names, "Every ", change=change)
        for index, row in enumerate(names):
            for number, name in enumerate(row):
                wanted = np.exp(log_probability(subject, index, "Every ", name, change))
                assert found[index, number] == pytest.approx(wanted, rel=1e-4)
        assert found[0, 2] == 0


def test_a_value_does_not_depend_on_the_other_names(tmp_path):
    """What all names of a file began with was forced as well, and left out of their values."""
    subject = random_subject(tmp_path, sentences_of(2))
    found = subject.values([["Alex is a lempus.", "Alex is a lorpus."]] * 2, "### ")
    wanted = np.exp(log_probability(subject, 1, "### ", "Alex is a lorpus."))
    assert found[1, 1] == pytest.approx(wanted, rel=1e-4)


def test_names_of_several_tokens_are_few_at_once(tmp_path, monkeypatch):
    """Each has a copy of its question's cache: 250 questions of 28 names would not fit a GPU."""
    subject, sizes = random_subject(tmp_path, sentences_of(5)), []
    plain = Subject._continued
    monkeypatch.setattr(
        Subject,
        "_continued",
        lambda self, inputs, names, edit: sizes.append(len(names)) or plain(self, inputs, names, edit),
    )
    subject.values([["lempus", "rorpus", "tumpus"]] * 5, "Every ")
    assert sizes == [2, 2, 1]


def test_sentences_begin_with_the_node_before(tmp_path):
    """The name after 'Every' was taken for the one that the step leads to; an answer was forced without its space."""
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


def test_there_is_room_for_all_steps_and_the_answer(tmp_path):
    """After 64 tokens the long answers of sentences were cut off, and counted as wrong."""
    examples = sentences_of(2)
    subject, limits = random_subject(tmp_path, examples), []
    subject.model.generate = lambda **options: limits.append(options["max_new_tokens"]) or torch.zeros(2, 1).long()
    subject.outputs(0)
    assert limits[0] > 64
    lengths = [sum(len(step) + 1 for step in e["steps"]) + 2 + len(e["answer"]) + 1 for e in examples]  # '###' is one
    assert limits[0] == 2 * max(lengths)


def test_names_may_have_spaces():
    """Of a name of several words the last one was looked for."""
    example = sentences_of(1)[0]
    old = Graphs([example]).next_name(0, 1)
    new = f"big {old}"
    example = json.loads(json.dumps(example).replace(old, new))
    assert Graphs([example]).next_name(0, 1) == new


# ---- the program ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two checkpoints that know nothing, and a data file of each kind."""
    import run

    folder = tmp_path_factory.mktemp("trained")
    sizes = ["--train", "40", "--valid", "4", "--test", "12", "--out", str(folder)]
    assert machine.main([*sizes, "--states", "5", "--buttons", "5", "--min-steps", "2", "--max-steps", "3"]) == 0
    mirror = ["--mirror", "--nodes-a-side", "4", "--hops", "2", "--template", "compact", "--prefix", "mirror"]
    assert prosqa.main([*mirror, *sizes]) == 0
    for kind in ("machine", "mirror"):
        data, model = folder / f"{kind}_train.json", folder / f"{kind}_model"
        tiny_model.write_model([data], model, "char", "llama", 16, 1, 2, 64)
        for thought in ("last", "pause"):
            keys = [f"model_id={model}", f"train_path={data}", f"val_path={folder / f'{kind}_valid.json'}"]
            keys += [f"save_path={folder}", f"name={kind}-{thought}", f"thought={thought}", "num_epochs=1"]
            keys += ["epochs_per_stage=[1]", "max_latent_stage=2", "curriculum=none", "global_batch_size=20"]
            keys += ["batch_size_training=20"]
            assert run.main(Config.from_file(ROOT / "args" / "machine.yaml", keys)) == 0
    return folder


@pytest.mark.parametrize("kind", ["machine", "mirror"])
def test_the_page_has_every_part_and_can_be_made_again(trained, tmp_path, kind, capsys):
    arguments = [str(trained / f"{kind}-last"), "--control", str(trained / f"{kind}-pause")]
    arguments += ["--data", str(trained / f"{kind}_test.json"), "--out", str(tmp_path), "--questions", "10"]
    assert command.main(arguments) == 0
    text = (tmp_path / "index.html").read_text()
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


def test_a_control_may_have_fewer_thoughts(trained, tmp_path):
    """A traceback: the page looked for places that it does not have."""
    about = {"kind": "graphs", "states": 5}
    rows = [{"kind": "control", "name": "itself", "place": place, "accuracy": 0.5} for place in ("all", "thought 1")]
    rows += [{**row, "name": name} for row in rows for name in ("mean", "noise", "any other question", "the twin")]
    of = {"rows": rows, "another question": {}}
    few = {**of, "rows": [row for row in rows if row["place"] == "all"]}
    assert "thought 1" in report.interventions_section({"a": few, "b": of}, about).figures[1].svg


def test_few_questions_have_no_numbers_instead_of_a_traceback(tracking, searching):
    """A mean of nothing is no number, and a probe fitted to nothing is none."""
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


def test_a_twin_has_one_answer():
    """Its root might lead to both candidates: no answer was another question's."""
    edges = [[0, 2], [1, 3], [4, 2], [4, 3]]  # Adam leads to both, Wren to the other one
    facts = "Tom is a wug. Wren is a dax. Adam is a wug. Adam is a dax."
    names = {"idx_to_symbol": ["Tom", "Wren", "wug", "dax", "Adam"], "edges": edges}
    asked = {"root": 0, "target": 2, "neg_target": 3, "answer": "Tom is a wug.", "steps": ["Tom is a wug."]}
    example = {"question": f"{facts} Is Tom a wug or dax?", **names, **asked}
    (twin,) = Graphs([example]).twins()
    assert twin["question"] == f"{facts} Is Wren a wug or dax?"
    assert twin["answer"] == "Wren is a dax."
    without = {**example, "edges": [edge for edge in edges if edge != [1, 3]]}
    assert Graphs([without]).twins() == [None]


def test_questions_of_another_machine_are_refused(trained, tmp_path):
    for name in ("machine_test.json", "machine_machine.json"):
        (tmp_path / name).write_text((trained / name).read_text())
    examples = json.loads((tmp_path / "machine_test.json").read_text())
    load_task(tmp_path / "machine_test.json")
    for question in ("", "aB", examples[1]["question"] + "a"):
        examples[1]["question"] = question
        (tmp_path / "machine_test.json").write_text(json.dumps(examples))
        with pytest.raises(
            UserError, match=r"machine_test.json: record 1 \(counted from 0\) is no question of its machine"
        ):
            load_task(tmp_path / "machine_test.json")


def test_a_damaged_graph_is_named(trained, tmp_path):
    examples = json.loads((trained / "mirror_test.json").read_text())
    del examples[2]["edges"]
    (tmp_path / "graphs.json").write_text(json.dumps(examples))
    with pytest.raises(
        UserError, match=r"graphs.json: record 2 \(counted from 0\): the example is no graph of .* KeyError\('edges'\)"
    ):
        load_task(tmp_path / "graphs.json")
    (tmp_path / "graphs.json").write_text(json.dumps(examples[:1]))
    with pytest.raises(UserError, match=r"graphs.json holds too few such questions \(1\)"):
        load_task(tmp_path / "graphs.json")


def test_thoughts_are_one_a_step_and_text_follows_at_once(trained, tmp_path):
    """The k-th of two a step was measured as the k-th step."""
    (tmp_path / "two").symlink_to(sorted((trained / "machine-last").glob("checkpoint_*"))[-1])
    folder = tmp_path / "checkpoint_1"
    folder.mkdir()
    for path in (tmp_path / "two").iterdir():
        if path.name != "coconut.json":
            (folder / path.name).symlink_to(path)
    description = json.loads((tmp_path / "two" / "coconut.json").read_text())
    examples = json.loads((trained / "machine_test.json").read_text())
    for changed, complaint in (
        ({"c_thought": 2}, r"has 2 thoughts a step \(c_thought\)"),
        ({"method": "multi_mode"}, "is of method multi_mode: what is asked here"),
        ({"latent_passes": "2"}, "is of method parallel_latents: what is asked here"),
        ({"stage": 0}, r"no thoughts to look at: it is of method coconut, stage 0 \(--thoughts K asks it with K\)"),
    ):
        (folder / "coconut.json").write_text(json.dumps(description | changed))
        with pytest.raises(UserError, match=complaint):
            Subject.load(str(folder), examples)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["none"], "none"),
        (["{}/machine-last", "--data", "{}/none.json"], "none.json"),
        (["{}/machine-last", "--data", "{}/machine_model/config.json"], "config.json"),
    ],
)
def test_what_cannot_be_analysed_is_one_sentence(trained, tmp_path, arguments, complaint, capsys):
    arguments = [argument.format(trained) for argument in arguments]
    data = [] if "--data" in arguments else ["--data", str(trained / "machine_test.json")]
    assert command.main([*arguments, *data, "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert complaint in error
    assert not (tmp_path / "new").exists()


def test_questions_of_one_length_can_be_chosen(tmp_path):
    sizes = ["--train", "60", "--valid", "5", "--test", "40", "--states", "6", "--buttons", "6", "--out", str(tmp_path)]
    assert machine.main([*sizes, "--min-steps", "2", "--max-steps", "3"]) == 0
    task = load_task(tmp_path / "machine_test.json", 5, steps=3)
    every = load_task(tmp_path / "machine_test.json").examples
    assert task.examples == [example for example in every if len(example["steps"]) == 3][:5]
    with pytest.raises(UserError, match=r"too few such questions \(0\)"):
        load_task(tmp_path / "machine_test.json", steps=4)


def test_without_matplotlib_it_says_what_to_install():
    """A traceback."""
    code = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_module('analysis', run_name='__main__')"
    command = [sys.executable, "-c", code, "x", "--data", "y", "--out", "z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: the figures need matplotlib: pip install -r requirements-dev.txt\n"


def test_a_page_without_numbers_is_one_sentence(tmp_path, capsys):
    assert command.main(["x", "--data", "y", "--out", str(tmp_path), "--page"]) == 2
    assert re.search("^error: cannot read .*about.json: No such file", capsys.readouterr().err)
