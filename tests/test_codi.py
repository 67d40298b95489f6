"""CODI and PCCoT: the whole loss and all gradients equal the plain definition; the same on several ranks."""

from collections.abc import Callable

import plain
import pytest
import torch
from conftest import check_ranks_and_restart, distance, keys, main, tiny_base, weights
from test_latent_block import largest
from test_methods import MARKERS, make_dataset

from config import Config
from dataset import MicroBatch
from methods.codi import Codi, TeacherDataset
from methods.parallel_latents import ParallelLatents
from preprocessing.tokens import tokenize
from trainer.pretrained import load_model, make_model


def mlp_of(model: Codi) -> Callable[[torch.Tensor], torch.Tensor]:
    """LayerNorm(V GELU(W h + a) + b)."""
    first, _, second, norm = model.thought.layers

    def think(hidden: torch.Tensor) -> torch.Tensor:
        inner = hidden @ first.weight.T + first.bias
        inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        found = inner @ second.weight.T + second.bias
        centred = found - found.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

    return think


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("thought", ["last", "mlp", "mlp:20", "pause"])
def test_loss_and_all_gradients_equal_the_plain_definition(family, tied, thought):
    config = Config(method="codi", max_latent_stage=3, distillation=0.7, thought=thought)
    dataset, examples = make_dataset(config, [1, 5, 0, 2])
    torch.manual_seed(2)
    model = make_model(config, tiny_base(family, tied, layers=3), MARKERS).eval()
    loss = model(**dataset.collate([dataset[index, 4] for index in range(4)])).loss
    think = mlp_of(model) if thought.startswith("mlp") else {"last": lambda hidden: hidden, "pause": None}[thought]
    wanted = plain.codi_loss(model.base_causallm, examples, 4, 3, 1, 0.7, think=think)
    assert largest(model, loss, wanted) < 1e-9
    assert all(parameter.grad.any() for parameter in model.thought.parameters())


@pytest.mark.parametrize("method", ["codi", "pccot"])
def test_sequences_of_student_and_teacher(method):
    dataset, examples = make_dataset(Config(method=method, max_latent_stage=2, c_thought=3), [3, 1])
    for index, example in enumerate(examples):
        student, labels, at, teacher, teacher_labels, teacher_at = dataset[index, 3]
        assert (student, labels) == plain.coconut_row(example, 3, 2, 3)
        assert (teacher, teacher_labels) == plain.teacher_row(example)
        # one token a character: the blank before the answer's first letter
        assert student[at : at + 2] == teacher[teacher_at : teacher_at + 2] == plain.ids(" " + example["answer"][0])


def test_the_compared_position_if_a_blank_belongs_to_the_answers_first_token():
    config = Config(method="codi", max_latent_stage=1)
    words = {"q\n": [5, 6], "s\n": [7], "### 42": [30, 32], "### ": [30, 31]}  # as GPT-2 has "###" and " 42"

    def joined(texts, **_):
        ids = [words[text] for text in texts]
        return {"input_ids": ids, "special_tokens_mask": [[0] * len(each) for each in ids]}

    tokens = tokenize([{"question": "q", "steps": ["s"], "answer": "42"}], joined)
    tokens.auxiliary, tokens.answer_prefix = tokens, words["### "]
    student, _, at, teacher, _, teacher_at = TeacherDataset(tokens, config, MARKERS)[0, 2]
    assert student[at : at + 2] == teacher[teacher_at : teacher_at + 2] == [30, 32]


def test_examples_not_tokens_weight_a_micro_batch():
    """Coconut's rule, the tokens of the student's answer, would weight all three losses."""
    dataset, _ = make_dataset(Config(method="codi", max_latent_stage=1), [1, 5, 0, 2])
    assert dataset.weight(MicroBatch([1], 0.5, (0, 1)), stage=2) == 0.5


# --- PCCoT: CODI with parallel latents, comparing the outputs of the decoder blocks only ---


@pytest.mark.parametrize("layers", ["all", "blocks"])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_pccot_is_codi_with_parallel_latents_over_the_chosen_layers(family, layers, passes):
    """With as many passes as latents, the thoughts are CODI's."""
    config = Config(
        method="pccot", max_latent_stage=3, latent_passes=str(passes), distilled_layers=layers, distillation=0.7
    )
    dataset, examples = make_dataset(config, [1, 5, 0, 2])
    model = make_model(config, tiny_base(family, layers=3), MARKERS).eval()
    assert isinstance(model, Codi)
    assert isinstance(model, ParallelLatents)
    loss = model(**dataset.collate([dataset[index, 4] for index in range(4)])).loss
    how = {"passes": passes} if passes < 3 else {}
    first = 0 if layers == "all" else 1
    wanted = plain.codi_loss(model.base_causallm, examples, 4, 3, 1, 0.7, first, **how)
    assert largest(model, loss, wanted) < 1e-9


# --- Runs ---


KEYS = keys("""
    method=codi thought=mlp:16 uniform_prob=0 num_epochs=2 max_train_examples=40 max_new_tokens=2
    global_batch_size=16 batch_size_training=4
""")


@pytest.mark.slow
def test_ranks_agree_and_a_restart_is_bitwise_the_same(place):
    alone = check_ranks_and_restart(place, "codi", KEYS, last=2)
    kept = main(place, *KEYS, "name=codi-kept", "gradient_checkpointing=true")
    assert distance(weights(kept / "checkpoint_2"), weights(alone / "checkpoint_2")) < 1e-5
    assert (alone / "checkpoint_2" / "thought.safetensors").is_file()
    evaluated = main(place, *KEYS, "name=codi-eval", "only_eval=true", f"load_model_path={alone}")
    assert (evaluated / "eval" / "metrics.json").is_file()


def test_evaluation_has_no_teacher(place):
    config = Config(method="codi", model_id=str(place / "model"), only_eval=True, load_model_path="somewhere")
    assert not isinstance(load_model(config, None).model, Codi)
