"""Parallel latents: as many passes as latents equal Coconut; fewer equal the plain definition of PCCoT or LOTUS."""

import plain
import pytest
import torch
from conftest import check_ranks_and_restart, distance, epochs, keys, main, refuses, tiny_base, weights
from test_coconut import END, EOS, LATENT, START, batch_of, gradients, make_rows
from test_coconut import make_model as make_coconut
from test_methods import MARKERS
from transformers import AutoModelForCausalLM, MambaConfig

from coconut import Coconut
from config import Config
from dataset import collate_prompts
from methods.parallel_latents import ParallelLatents
from trainer.pretrained import make_model
from utils import UserError

ROWS = [[3, 3, 3], [2, 0, 5], [1, 4, 2]]


def make_parallel(family: str, passes: int | str, tied: bool = True, thought: str = "last", c_thought: int = 1):
    config = Config(method="parallel_latents", latent_passes=str(passes), thought=thought, c_thought=c_thought)
    return make_model(config, tiny_base(family, tied), MARKERS).eval()


def largest(model: Coconut, loss: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference between two losses of a model and their gradients."""
    return max(abs(loss - wanted).item(), distance(gradients(model, loss), gradients(model, wanted)))


@pytest.mark.parametrize("n_latents", ROWS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("more", [0, 2])
def test_with_as_many_passes_as_latents_it_equals_coconut(family, tied, n_latents, more):
    rows = make_rows(n_latents)
    model = make_parallel(family, max(n_latents) + more, tied)
    loss = model(**batch_of(rows)).loss
    assert largest(model, loss, plain.loss(model.base_causallm, rows)) < 1e-9
    fewer = make_parallel(family, max(n_latents) - 1, tied)
    assert max(n_latents) == 1 or abs(fewer(**batch_of(rows)).loss - loss) > 1e-6  # "if and only if"


@pytest.mark.parametrize("n_latents", ROWS)
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_with_fewer_it_equals_the_plain_definition(family, passes, n_latents):
    rows, model = make_rows(n_latents), make_parallel(family, passes)
    output, wanted = model(**batch_of(rows)), plain.loss(model.base_causallm, rows, passes=passes)
    assert largest(model, output.loss, wanted) < 1e-9
    if passes == 0:
        pause = make_coconut(family, thought="pause")
        assert abs(pause(**batch_of(rows)).loss - model(**batch_of(rows)).loss) < 1e-12


@pytest.mark.parametrize("n_latents", [[4, 4, 4], [2, 0, 6], [2, 4, 8]])
@pytest.mark.parametrize("tied", [True, False])
def test_looped_latents_have_one_pass_per_step_of_their_own_row(family, tied, n_latents):
    rows = make_rows(n_latents)
    model = make_parallel(family, "stage", tied, "looped", c_thought=2)
    loss = model(**batch_of(rows)).loss
    assert largest(model, loss, plain.loss(model.base_causallm, rows, group=2)) < 1e-9


def test_other_thoughts_are_computed_in_parallel_too(family):
    batch = batch_of(make_rows([3, 1, 2]))
    for thought in ("normalised", "projected", "realigned"):
        sequential, model = make_coconut(family, thought=thought), make_parallel(family, 3, thought=thought)
        assert abs(model(**batch).loss - sequential(**batch).loss) < 1e-9


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("passes", [1, 2, "stage"])
def test_generation_equals_the_definition_batched_and_alone(family, passes, markers):
    model = make_parallel(family, passes, thought="looped" if passes == "stage" else "last")
    base = model.base_causallm
    generator = torch.Generator().manual_seed(3)
    prompts = []
    for n_words, n_latents in ((3, 2), (6, 2), (4, 3)):
        words = torch.randint(4, 30, (n_words,), generator=generator).tolist()
        prompts.append([*words, *[START] * markers, *[LATENT] * n_latents, *[END] * markers])
    for rows in (prompts[:2], prompts[2:]):
        tokens = model.generate(**collate_prompts(rows, EOS), max_new_tokens=5).tolist()
        for row, found in zip(rows, tokens, strict=True):
            embeds = plain.filled(base, row, **({"group": 1} if passes == "stage" else {"passes": passes}))
            logits, written = plain.logits_after(base, embeds), []
            assert (model(torch.tensor([row])).logits[0, -1] - logits).abs().max() < 1e-9
            while len(written) < 5 and EOS not in written:  # a generated latent token is an ordinary token
                written.append(int(plain.logits_after(base, embeds, written).argmax()))
            assert found == written + [EOS] * (len(found) - len(written))


def test_what_cannot_run_in_parallel_raises_an_error():
    refuses("do not record the layers", make_parallel, "gpt2", 2, thought="layer:-2")
    model = make_parallel("gpt2", 2)
    with pytest.raises(ValueError, match="must form one block"):
        model(torch.tensor([[5, LATENT, 6, LATENT, 7]]))
    with pytest.raises(ValueError, match="cannot be edited"):
        model(torch.tensor([[5, LATENT, 7]]), edit=lambda _, thought, __: thought)
    shape = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=0)
    with pytest.raises(UserError, match="attention in every layer"):
        ParallelLatents(AutoModelForCausalLM.from_config(shape), LATENT, START, END, EOS, latent_passes=2)


def test_there_are_no_more_updates_than_latents(family):
    model = make_parallel(family, 7)
    assert [model.latent_updates(n) for n in (1, 3, 9)] == [1, 3, 7]
    assert make_parallel(family, 7, thought="looped").latent_updates(3) == 7


SHORT = """
    max_train_examples=48 max_new_tokens=2 num_epochs=3 global_batch_size=16 batch_size_training=4 uniform_prob=0.4
"""


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["latent_passes=1", "latent_passes=stage thought=looped"])
def test_ranks_agree_and_a_restart_is_bitwise_the_same(place, passes):
    name, arguments = f"block-{passes.split()[0].partition('=')[2]}", keys(SHORT + passes)
    alone = check_ranks_and_restart(place, name, arguments)
    recomputed = main(place, *arguments, f"name={name}-checkpointing", "gradient_checkpointing=true")
    assert distance(weights(recomputed / "checkpoint_3"), weights(alone / "checkpoint_3")) < 1e-5
    evaluated = main(place, *arguments, f"name={name}-eval", "only_eval=true", f"load_model_path={alone}")
    assert (evaluated / "eval" / "metrics.json").is_file()
    assert epochs(alone)[-1]["stage"] == 2
