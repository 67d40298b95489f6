"""Families of models: each is right, by the plain definition, or refused with a sentence when it is wrapped."""

import pytest
import torch
import torch.nn.functional as F
from family_table import (
    BY_ANY_METHOD,
    FAMILIES,
    QUICK,
    REFUSED,
    REFUSED_WITH_LATENTS,
    WITH_LATENTS,
    dtype_of,
    tiny_model,
)

from coconut import Coconut
from dataset import collate_for_device, collate_prompts
from families import vouch
from thoughts import decoder_of
from throughput import FlopCounter
from utils import IGNORE, UserError

EOS, START, LATENT, END = 0, 1, 2, 3


def make_model(base, latent: int | None = LATENT, thought: str = "last") -> Coconut:
    return Coconut(base, latent, START, END, EOS, thought=thought).eval()


def make_rows(n_latents: list[int]) -> list[tuple[list[int], list[int]]]:
    """One (input_ids, labels) pair for each number of latents, of different lengths, from words 4 to 29."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(4, 30, (count,), generator=generator).tolist()

    rows = []
    for place, count in enumerate(n_latents):
        before = [*words(3 + 2 * place), START, *[LATENT] * count, END]
        after = [*words(7 - place), EOS]
        rows.append((before + after, [IGNORE] * len(before) + after))
    return rows


def plain_logits(model: Coconut, input_ids: list[int], generated: int = 0) -> torch.Tensor:
    """(T, V) by definition: no cache, no padding, everything recomputed for each thought, the model's own head. The
    last so many tokens were generated, and are no latents."""
    base = model.base_causallm
    embeds = base.get_input_embeddings()(torch.tensor([input_ids]))  # (1, T, D)
    for place, token in enumerate(input_ids):
        if token == LATENT and place < len(input_ids) - generated:
            thought = decoder_of(base)(inputs_embeds=embeds[:, :place], use_cache=False).last_hidden_state[:, -1:]
            embeds = torch.cat([embeds[:, :place], thought, embeds[:, place + 1 :]], dim=1)
    return base(inputs_embeds=embeds, use_cache=False).logits[0]


def plain_loss(model: Coconut, rows) -> torch.Tensor:
    losses, count = [], 0
    for input_ids, labels in rows:
        targets = torch.tensor(labels[1:])
        losses.append(F.cross_entropy(plain_logits(model, input_ids)[:-1], targets, reduction="sum"))
        count += int((targets != IGNORE).sum())
    return sum(losses) / count


def gradients(model: Coconut, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True))


def check_training(model: Coconut, n_latents: list[int], tolerance: float) -> None:
    """The loss and every gradient are those of the plain definition."""
    rows = make_rows(n_latents)
    loss, wanted_loss = model(**collate_for_device(rows, EOS, LATENT)).loss, plain_loss(model, rows)
    assert abs(loss - wanted_loss) < tolerance * wanted_loss
    found, wanted = gradients(model, loss), gradients(model, wanted_loss)
    assert [name for name in found if found[name] is None] == [name for name in wanted if wanted[name] is None]
    largest = max(gradient.abs().max() for gradient in wanted.values() if gradient is not None)
    for name, gradient in wanted.items():
        if gradient is not None:
            assert (found[name] - gradient).abs().max() < tolerance * largest, name


@torch.no_grad()
def check_generation(model: Coconut, n_latents: list[int], new: int = 4) -> None:
    """A batch is decoded as its rows alone, and these as by recomputing everything for each token."""
    prompts = [row[: row.index(END) + 1] for row, _ in make_rows(n_latents)]
    together = model.generate(**collate_prompts(prompts, EOS), max_new_tokens=new)
    for prompt, found in zip(prompts, together.tolist(), strict=True):
        continued = list(prompt)
        while len(continued) < len(prompt) + new and continued[-1] != EOS:
            continued.append(int(plain_logits(model, continued, len(continued) - len(prompt))[-1].argmax()))
        tokens = continued[len(prompt) :]
        assert found == tokens + [EOS] * (len(found) - len(tokens))


def check_family(family: str) -> None:
    base, model = None, None
    base = tiny_model(family)
    if family in REFUSED:
        for latent in (None, LATENT):
            with pytest.raises(UserError, match=f"{base.config.model_type} .*{BY_ANY_METHOD}.*{REFUSED[family]}"):
                vouch(make_model(base, latent))
        return
    vouch(make_model(base, None))
    model = make_model(base)
    FlopCounter.of(model)
    tolerance = 1e-5 if dtype_of(family) == torch.float64 else 1e-4
    if family in REFUSED_WITH_LATENTS:
        with pytest.raises(UserError, match=f"{WITH_LATENTS}.*{REFUSED_WITH_LATENTS[family]}.* cot, no_cot, icot and"):
            vouch(model)
        vouch(make_model(base, thought="pause"))
        n_latents = [0, 0, 0]
    else:
        vouch(model)
        n_latents = [2, 0, 3]
    check_training(model, n_latents, tolerance)
    check_generation(model, n_latents)


@pytest.mark.parametrize("family", QUICK)
def test_a_family_of_each_kind_is_right_or_refused(family):
    check_family(family)


@pytest.mark.families
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in QUICK])
def test_every_other_family_is_right_or_refused(family):
    check_family(family)
