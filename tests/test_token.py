"""The thought `token` against its definition, which takes logits and embeddings from transformers' own forward pass."""

import pytest
import torch
from conftest import distance
from test_coconut import EOS, LATENT, batch_of, gradients, make_model, make_rows, plain_loss, prompts

import methods  # noqa: F401 registers the thoughts
from dataset import collate_prompts
from trainer.inference import thought_logits


@pytest.mark.parametrize("spelling", ["token", "token:st"])
@pytest.mark.parametrize(
    ("family", "tied"), [("gpt2", True), ("llama", True), ("llama", False), ("phi", False), ("gemma2", True)]
)
def test_it_is_the_embedding_of_the_likeliest_token(family, tied, spelling):
    """Phi's LM head has a bias; Gemma's embedding module multiplies by sqrt(D), and tanh caps its logits."""
    exact = family != "gemma2"
    dtype, layers = (torch.float64, 3) if exact else (torch.float32, 2)
    model, rows = make_model(family, tied, thought=spelling, layers=layers, dtype=dtype), make_rows([2, 0, 3])
    loss, plain = model(**batch_of(rows)).loss, plain_loss(model, rows, spelling)
    found, wanted = gradients(model, loss), gradients(model, plain)
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    assert abs(loss - plain) < (1e-9 if exact else 1e-4)
    assert distance(found, wanted) < (1e-9 if exact else 1e-4 * largest)


def test_only_straight_through_has_a_gradient():
    """The loss after the thoughts moves the weights that make them; detached, only those that read them."""
    losses, of_head = [], []
    for spelling in ("token", "token:st"):
        model = make_model("llama", tied=False, thought=spelling)
        losses.append(model(**batch_of(make_rows([2]))).loss)
        of_head.append(gradients(model, losses[-1])["base_causallm.lm_head.weight"])
    assert losses[0] == losses[1]
    assert (of_head[0] - of_head[1]).abs().max() > 1e-6


def test_generation_feeds_the_token_that_the_head_finds_likeliest(family):
    model = make_model(family, thought="token:st")
    batch = collate_prompts(prompts([3, 0, 2]), EOS)
    logits, thoughts = thought_logits(model, **batch)
    is_latent = batch["input_ids"][:, -4:-1] == LATENT
    likeliest = model.base_causallm.get_input_embeddings()(logits.argmax(-1))
    assert torch.equal(thoughts[is_latent], likeliest[is_latent])
