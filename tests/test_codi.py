"""CODI: the whole loss and all gradients against the plain definition; the MLP thought; the same on several ranks."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_base
from test_coconut import END, EOS, LATENT, START, gradients
from test_run import main, together, weights
from test_run import place as place  # a fixture
from test_sim_cot import MARKERS, make_tokens

from config import Config
from methods.codi import Codi, TaughtDataset
from preprocessing.tokens import tokenize
from trainer.pretrained import load_model


def make_codi(family: str, tied: bool, thought: str) -> Codi:
    torch.manual_seed(2)
    model = Codi(tiny_base(family, tied, layers=3), LATENT, START, END, EOS, thought)
    model.distillation = 0.7
    return model.eval()


def make_dataset(config: Config, n_steps: list[int]) -> tuple[TaughtDataset, list[dict]]:
    examples, tokens, words = make_tokens(n_steps, 2)
    told = [{**example, "steps": config.rules.texts(config).steps(example["steps"])} for example in examples]
    tokens.auxiliary = tokenize(told, words, step_separator="")
    tokens.answer_prefix = words(["### "])["input_ids"][0]
    return TaughtDataset(tokens, config, MARKERS, epoch=0), examples


def plain_thought(model: Codi, embeds: torch.Tensor) -> torch.Tensor:
    output = model.base_causallm.get_decoder()(inputs_embeds=embeds, output_hidden_states=True)
    hidden, name = output.last_hidden_state[:, -1:], type(model.thought).__name__
    if name in ("Last", "Layer"):
        return hidden if name == "Last" else output.hidden_states[model.thought.index][:, -1:]
    first, _, second, norm = model.thought.layers
    inner = hidden @ first.weight.T + first.bias
    inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
    found = inner @ second.weight.T + second.bias
    centred = found - found.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def plain_row(model: Codi, input_ids: list[int], labels: list[int], place: int):
    """(sum of cross-entropies, number of tokens, transformers' hidden states at a place) of one row, uncached."""
    base = model.base_causallm
    embeds = base.get_input_embeddings()(torch.tensor([input_ids]))
    for column, token in enumerate(input_ids):
        if token == LATENT and model.thought.sequential:
            thought = plain_thought(model, embeds[:, :column])
            embeds = torch.cat([embeds[:, :column], thought, embeds[:, column + 1 :]], dim=1)
    output = base(inputs_embeds=embeds, output_hidden_states=True)
    targets = torch.tensor(labels[1:])
    loss = F.cross_entropy(output.logits[0, :-1], targets, reduction="sum")
    return loss, int((targets != -100).sum()), [state[0, place] for state in output.hidden_states]


def plain_codi(model: Codi, items) -> torch.Tensor:
    students = [plain_row(model, *item[:3]) for item in items]
    teachers = [plain_row(model, *item[3:]) for item in items]
    distance = torch.zeros(())
    for layer in range(len(students[0][2])):
        ours = torch.stack([states[layer] for _, _, states in students])
        theirs = torch.stack([states[layer].detach() for _, _, states in teachers])
        gap = (ours - theirs).abs()
        smooth = torch.where(gap < 1, 0.5 * gap**2, gap - 0.5).mean()
        spread = ((theirs - theirs.mean()).square().sum() / (theirs.numel() - 1)).sqrt()
        distance = distance + smooth / spread / len(students[0][2])
    means = [sum(row[0] for row in rows) / sum(row[1] for row in rows) for rows in (students, teachers)]
    return means[0] + model.distillation * distance + means[1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("thought", ["last", "mlp", "mlp:20", "layer:1", "pause"])
def test_its_loss_and_all_gradients_are_the_plain_definition(family, tied, thought):
    config = Config(method="codi", max_latent_stage=3)
    dataset, _ = make_dataset(config, [1, 5, 0, 2])
    items = [dataset[index, config.last_stage] for index in range(4)]
    model = make_codi(family, tied, thought)
    loss, plain = model(**dataset.collate(items)).loss, plain_codi(model, items)
    assert abs(loss - plain) < 1e-9
    found, wanted = gradients(model, loss), gradients(model, plain)
    assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-9
    assert all(value.any() for name, value in found.items() if "thought" in name)


def test_what_student_and_teacher_see():
    config = Config(method="codi", max_latent_stage=2, c_thought=3)
    dataset, examples = make_dataset(config, [3, 1])
    _, _, words = make_tokens([1], 2)

    def ids(text: str) -> list[int]:
        return words([text])["input_ids"][0]

    for index, example in enumerate(examples):
        question, answer = ids(example["question"] + "\n"), ids("### " + example["answer"])
        student, labels, at, teacher, teacher_labels, teacher_at = dataset[index, config.last_stage]
        assert student == [*question, START, *[LATENT] * 6, END, *answer, EOS]
        assert [label for label in labels if label != -100] == [*answer, EOS]
        steps = ids(" ".join(example["steps"][:-1]))
        assert teacher == [*question, *steps, *answer, EOS]
        assert [label for label in teacher_labels if label != -100] == [*steps, *answer, EOS]
        # one token a character: the blank before the answer's first letter
        assert student[at : at + 2] == teacher[teacher_at : teacher_at + 2] == ids(" " + example["answer"][0])


def test_the_place_is_found_where_a_blank_belongs_to_the_answer():
    config = Config(method="codi", max_latent_stage=1)
    words = {"q\n": [5, 6], "s\n": [7], "### 42": [30, 32], "### ": [30, 31]}  # as GPT-2 has "###" and " 42"

    def joined(texts, **_):
        return {"input_ids": [words[text] for text in texts]}

    tokens = tokenize([{"question": "q", "steps": ["s"], "answer": "42"}], joined)
    tokens.auxiliary, tokens.answer_prefix = tokens, words["### "]
    student, _, at, teacher, _, teacher_at = TaughtDataset(tokens, config, MARKERS)[0, 2]
    assert student[at : at + 2] == teacher[teacher_at : teacher_at + 2] == [30, 32]


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        ({"uniform_prob": 0.5}, "method codi has always the thoughts of the last one"),
        ({"pad_latent_to_max": False}, "method codi thinks"),
        ({"c_thought": 0}, "method codi thinks"),
        ({"step_decoder": "copy"}, "step_decoder is for method sim_cot"),
        ({"latent_labels": 0.1}, "latent_labels are for method lotus"),
    ],
)
def test_stages_are_a_mistake(keys, complaint):
    (problem,) = Config(method="codi", **keys).problems(needs_files=False)
    assert complaint in problem


KEYS = (
    *("method=codi", "thought=mlp:16", "num_epochs=2", "uniform_prob=0", "max_train_examples=40", "max_new_tokens=2"),
    *("global_batch_size=16", "batch_size_training=4"),
)


@pytest.fixture
def codi_place(place):
    text = (place / "run.yaml").read_text().replace("coconut: true\n", "")
    (place / "codi.yaml").write_text(text + "method: codi\n")
    return place


@pytest.mark.slow
def test_ranks_agree_and_a_restart_is_bitwise_the_same(codi_place):
    alone = main(codi_place, *KEYS, "name=codi")
    wanted = weights(alone / "checkpoint_2")
    for strategy in ("ddp", "fsdp"):
        together(codi_place / "run.yaml", *KEYS, f"name=codi-{strategy}", f"strategy={strategy}")
        found = weights(codi_place / "runs" / f"codi-{strategy}" / "checkpoint_2")
        assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-5
    main(codi_place, *KEYS, "name=codi-parts", "num_epochs=1")
    parts = main(codi_place, *KEYS, "name=codi-parts")
    assert all(torch.equal(value, wanted[name]) for name, value in weights(parts / "checkpoint_2").items())
    kept = main(codi_place, *KEYS, "name=codi-kept", "gradient_checkpointing=true")
    found = weights(kept / "checkpoint_2")
    assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-5
    assert (alone / "checkpoint_2" / "thought.safetensors").is_file()
    evaluated = main(codi_place, *KEYS, "name=codi-eval", "only_eval=true", f"load_model_path={alone}")
    assert (evaluated / "eval" / "metrics.json").is_file()


def test_evaluation_has_no_teacher(codi_place):
    config = Config(method="codi", model_id=str(codi_place / "model"), only_eval=True, load_model_path="somewhere")
    assert not isinstance(load_model(config, None).model, Codi)
