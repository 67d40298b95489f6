"""The thought `token` against its definition, which takes logits and embeddings from transformers' own forward pass."""

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_base
from test_coconut import EOS, LATENT, gradients, make_model, make_rows, prompts

import methods  # noqa: F401 registers the thoughts
from dataset import collate_for_device, collate_prompts
from model.thought import make_thought
from utils import UserError


def plain_loss(model, rows, straight_through: bool) -> torch.Tensor:
    """Each row by itself, without padding or cache, everything recomputed for each thought."""
    base, losses, count = model.base_causallm, [], 0
    for input_ids, labels in rows:
        embed = base.get_input_embeddings()
        embeds = embed(torch.tensor([input_ids]))  # (1, T, D)
        for place in (place for place, token in enumerate(input_ids) if token == LATENT):
            logits = base(inputs_embeds=embeds[:, :place]).logits[:, -1:]
            fed = embed(logits.argmax(-1)).detach()
            if straight_through:
                mean = torch.einsum("btv,vd->btd", logits.softmax(-1), embed(torch.arange(logits.shape[-1])))
                fed = fed + mean - mean.detach()
            embeds = torch.cat([embeds[:, :place], fed, embeds[:, place + 1 :]], dim=1)
        logits = base(inputs_embeds=embeds).logits[0]
        targets = torch.tensor(labels[1:])
        losses.append(F.cross_entropy(logits[:-1], targets, reduction="sum"))
        count += int((targets != -100).sum())
    return sum(losses) / count


def compared(model, spelling: str) -> tuple[float, float, float]:
    """How far loss and gradients are from the definition, relative to the largest gradient, and that gradient."""
    rows = make_rows([2, 0, 3])
    loss = model(**collate_for_device(rows, pad_token_id=EOS, latent_token_id=LATENT)).loss
    plain = plain_loss(model, rows, spelling == "token:st")
    found, wanted = gradients(model, loss), gradients(model, plain)
    largest = max(gradient.abs().max().item() for gradient in wanted.values())
    return abs(loss - plain).item(), max((found[name] - wanted[name]).abs().max().item() for name in wanted), largest


@pytest.mark.parametrize("spelling", ["token", "token:st"])
@pytest.mark.parametrize(("family", "tied"), [("gpt2", True), ("llama", True), ("llama", False), ("phi", False)])
def test_it_is_the_embedding_of_the_likeliest_token(family, tied, spelling):
    """Phi's LM head has a bias."""
    loss, gradient, _ = compared(make_model(family, tied, thought=spelling, layers=3), spelling)
    assert loss < 1e-9
    assert gradient < 1e-9


@pytest.mark.parametrize("spelling", ["token", "token:st"])
def test_it_is_what_the_model_gets_where_embeddings_are_scaled_and_logits_capped(spelling):
    """Gemma's embedding module multiplies its weights by sqrt(D), and tanh caps its logits."""
    loss, gradient, largest = compared(make_model("gemma2", thought=spelling, dtype=torch.float32), spelling)
    assert loss < 1e-4
    assert gradient < 1e-4 * largest


def test_only_straight_through_has_a_gradient():
    """The loss after the thoughts moves the weights that make them; detached, only those that read them."""
    rows = make_rows([2])
    batch = collate_for_device(rows, pad_token_id=EOS, latent_token_id=LATENT)
    losses, of_head = [], []
    for spelling in ("token", "token:st"):
        model = make_model("llama", tied=False, thought=spelling)
        losses.append(model(**batch).loss)
        of_head.append(gradients(model, losses[-1])["base_causallm.lm_head.weight"])
    assert losses[0] == losses[1]
    assert (of_head[0] - of_head[1]).abs().max() > 1e-6


def test_generation_feeds_the_token_that_the_head_finds_likeliest(family):
    model = make_model(family, thought="token:st")
    rows = prompts([3, 0, 2])
    batch = collate_prompts(rows, EOS)
    logits, thoughts = model.thought_logits(**batch, return_thoughts=True)
    is_latent = batch["input_ids"][:, -4:-1] == LATENT
    likeliest = model.base_causallm.get_input_embeddings()(logits.argmax(-1))
    assert torch.equal(thoughts[is_latent], likeliest[is_latent])


@pytest.mark.parametrize("spelling", ["token:", "token:1", "token:ST", "last:st"])
def test_other_spellings_list_what_there_is(spelling):
    with pytest.raises(UserError, match=r"must be one of last, .*token\[:st\]"):
        make_thought(spelling, tiny_base("gpt2"))
