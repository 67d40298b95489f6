"""Markov thoughts: a row equals the row without its earlier latents, at the same positions."""

import plain
import pytest
import torch
from conftest import check_ranks_and_restart, distance, keys, refuses, tiny_base
from test_coconut import END, EOS, LATENT, START, batch_of, gradients, make_rows
from test_methods import MARKERS
from transformers import AutoModelForCausalLM, MambaConfig

from coconut import Coconut
from config import Config
from dataset import collate_prompts
from trainer import samples
from trainer.pretrained import make_model
from utils import UserError


def make_markov(family: str, tied: bool = True, thought: str = "last") -> Coconut:
    return make_model(Config(method="markov", thought=thought), tiny_base(family, tied), MARKERS).eval()


def kept_row(base, input_ids: list[int], token: bool) -> tuple[torch.Tensor, list[int]]:
    """Returns the input embeddings (1, t, D) of a row without its earlier latents, and their positions in the row."""
    embed, fed, kept = base.get_input_embeddings(), None, []
    for position, word in enumerate(input_ids):
        if word == LATENT:
            before = states(base, torch.stack([x for _, x in kept])[None], [at for at, _ in kept])[:, -1]
            fed = embed(base.get_output_embeddings()(before).argmax(-1)).detach() if token else before
            kept = [one for one in kept if input_ids[one[0]] != LATENT]
        kept.append((position, fed[0] if word == LATENT else embed(torch.tensor(word))))
    return torch.stack([x for _, x in kept])[None], [at for at, _ in kept]


def states(base, embeds: torch.Tensor, positions: list[int]) -> torch.Tensor:
    return base.get_decoder()(inputs_embeds=embeds, position_ids=torch.tensor([positions])).last_hidden_state


def plain_logits(base, input_ids: list[int], token: bool = False) -> tuple[torch.Tensor, list[int]]:
    embeds, kept = kept_row(base, input_ids, token)
    return base.get_output_embeddings()(states(base, embeds, kept))[0], kept


def plain_loss(base, rows, token: bool) -> torch.Tensor:
    sums = []
    for input_ids, labels in rows:
        logits, kept = plain_logits(base, input_ids, token)
        sums.append(plain.summed(logits, [labels[at] for at in kept]))
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


@pytest.mark.parametrize("n_latents", [[3, 3, 3], [2, 0, 5], [1, 4, 2], [0, 0, 0], [5]])
@pytest.mark.parametrize("thought", ["last", "token"])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_the_plain_definition(family, tied, thought, n_latents):
    rows, model = make_rows(n_latents), make_markov(family, tied, thought)
    loss, wanted = model(**batch_of(rows)).loss, plain_loss(model.base_causallm, rows, thought == "token")
    assert abs(loss - wanted) < 1e-9
    assert distance(gradients(model, loss), gradients(model, wanted)) < 1e-9
    coconut = make_model(Config(thought=thought), model.base_causallm, MARKERS)
    assert (abs(coconut(**batch_of(rows)).loss - loss) > 1e-6) == (max(n_latents) > 1)


PROMPTS = [[5, 6, 7, START, LATENT, LATENT, LATENT, END], [8, START, LATENT, END], [9, 9, START, LATENT, LATENT, END]]


def test_greedy_and_sampled_answers_equal_the_plain_definition(family):
    """Sampling decodes over a cache of its own."""
    model = make_markov(family)
    tokens = model.generate(**collate_prompts(PROMPTS, EOS), max_new_tokens=5).tolist()
    policy = samples.Policy(temperature=0.0)
    drawn = samples.generate(model, PROMPTS, [(row,) for row in range(3)], 2, policy, 5).tokens
    for number, (row, found) in enumerate(zip(PROMPTS, tokens, strict=True)):
        written = []
        while len(written) < 5 and EOS not in written:
            written.append(int(plain_logits(model.base_causallm, row + written)[0][-1].argmax()))
        assert found == written + [EOS] * (len(found) - len(written))
        assert drawn[2 * number] == drawn[2 * number + 1] == written


def test_what_it_cannot_do_raises_an_error():
    model = make_markov("gpt2")
    refuses("decodes greedily", model.generate, torch.tensor([[5, LATENT]]), do_sample=True)
    with pytest.raises(ValueError, match="must form one block"):
        model(torch.tensor([[5, LATENT, 6, LATENT, 7]]))
    shape = MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=0)
    with pytest.raises(UserError, match="which family mamba lacks"):
        make_model(Config(method="markov"), AutoModelForCausalLM.from_config(shape), MARKERS)
    assert "thought pause has none" in str(Config(method="markov", thought="pause").problems())


@pytest.mark.slow
def test_ranks_agree_and_a_restart_is_bitwise_the_same(place):
    short = "max_train_examples=48 max_new_tokens=2 num_epochs=3 global_batch_size=16 batch_size_training=4"
    check_ranks_and_restart(place, "markov", keys(f"method=markov {short}"))
