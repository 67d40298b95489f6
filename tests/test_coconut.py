"""The cached forward and generation against the plain definition."""

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, tiny_base

from coconut import Coconut
from dataset import collate, collate_for_device, collate_prompts
from thoughts import Last

EOS, START, LATENT, END = 0, 1, 2, 3


def make_model(family: str, tied: bool = True, thought: str = "last", dtype: torch.dtype = torch.float64) -> Coconut:
    return Coconut(tiny_base(family, tied, dtype=dtype), LATENT, START, END, EOS, thought=thought).eval()


def make_rows(n_latents: list[int], seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """One (input_ids, labels) pair for each number of latents; questions and continuations of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(4, VOCABULARY, (count,), generator=generator).tolist()

    rows = []
    for place, count in enumerate(n_latents):
        before = [*words(3 + 2 * place), START, *[LATENT] * count, END]
        after = [*words(7 - place), EOS]
        rows.append((before + after, [-100] * len(before) + after))
    return rows


def plain_loss(model: Coconut, rows) -> torch.Tensor:
    """The definition: each row by itself, without padding or cache, everything recomputed for each thought."""
    losses, count = [], 0
    for input_ids, labels in rows:
        embeds = model.base_causallm.get_input_embeddings()(torch.tensor([input_ids]))  # (1, T, D)
        for place, token in enumerate(input_ids):
            if token == LATENT:
                hidden = model.base_causallm.get_decoder()(inputs_embeds=embeds[:, :place]).last_hidden_state
                embeds = torch.cat([embeds[:, :place], hidden[:, -1:], embeds[:, place + 1 :]], dim=1)
        logits = model.base_causallm(inputs_embeds=embeds).logits[0]
        targets = torch.tensor(labels[1:])
        losses.append(F.cross_entropy(logits[:-1], targets, reduction="sum"))
        count += int((targets != -100).sum())
    return sum(losses) / count


def gradients(model: Coconut, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_difference(model: Coconut, rows, loss: torch.Tensor) -> tuple[float, float]:
    """Between a loss, its gradients and the plain definition's."""
    found = gradients(model, loss)
    plain = plain_loss(model, rows)
    wanted = gradients(model, plain)
    return abs(loss - plain).item(), max((found[name] - wanted[name]).abs().max().item() for name in wanted)


@pytest.mark.parametrize("n_latents", [[0, 0, 0], [1, 1, 1], [3, 3, 3], [6, 6, 6], [2, 0, 6, 3]])
@pytest.mark.parametrize("tied", [True, False])
def test_forward_is_the_plain_definition(family, tied, n_latents):
    model, rows = make_model(family, tied), make_rows(n_latents)
    loss = model(**collate_for_device(rows, pad_token_id=EOS, latent_token_id=LATENT)).loss
    assert torch.equal(loss, model(**collate(rows, pad_token_id=EOS, latent_token_id=LATENT)).loss)
    loss_difference, gradient_difference = largest_difference(model, rows, loss)
    assert loss_difference < 1e-9
    assert gradient_difference < 1e-9


@pytest.mark.parametrize(
    ("other", "dtype", "tolerance"),
    # Gemma 2 has eager attention only, which computes in float32 whatever the model's dtype
    [("phi", torch.float64, 1e-9), ("mistral", torch.float64, 1e-9), ("gemma2", torch.float32, 2e-4)],
)
def test_forward_is_the_plain_definition_for_other_families_too(other, dtype, tolerance):
    """A head with bias; sliding windows; soft-capped logits and embeddings that the model scales."""
    model, rows = make_model(other, dtype=dtype), make_rows([2, 0, 4])
    loss = model(**collate(rows, pad_token_id=EOS, latent_token_id=LATENT)).loss
    assert max(largest_difference(model, rows, loss)) < tolerance
    batch = collate_prompts(prompts([3, 1]), EOS)
    together = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=8)
    for row, found in zip(prompts([3, 1]), together, strict=True):
        alone = model.generate(torch.tensor([row]), max_new_tokens=8)[0]
        assert found[: len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("broken", ["dropped", "detached"])
def test_the_comparison_notices_a_missing_feedback(family, broken, monkeypatch):
    """On random weights the loss hardly depends on the thoughts: it is the gradients that must be compared."""
    model, rows = make_model(family), make_rows([3, 3, 3])
    if broken == "dropped":
        monkeypatch.setattr(Last, "sequential", False)
    else:
        monkeypatch.setattr(Last, "forward", lambda self, hidden: hidden.detach())
    loss = model(**collate(rows, pad_token_id=EOS, latent_token_id=LATENT)).loss
    assert largest_difference(model, rows, loss)[1] > 1e-4


def test_a_graph_may_be_gone_through_twice(family):
    """The cache gathers gradients in a buffer of its own, which must not remember an earlier backward."""
    model = make_model(family)
    loss = model(**collate(make_rows([3, 3]), pad_token_id=EOS, latent_token_id=LATENT)).loss
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_rows_need_not_be_aligned(family):
    model, rows = make_model(family), make_rows([2, 3, 1])
    batch = collate(rows, pad_token_id=EOS, latent_token_id=None)  # padded on the right only
    assert batch["input_ids"].eq(LATENT).any(dim=0).sum() > 3
    loss_difference, gradient_difference = largest_difference(model, rows, model(**batch).loss)
    assert max(loss_difference, gradient_difference) < 1e-9


def test_default_positions_are_those_of_the_collator(family):
    model = make_model(family)
    batch = collate(make_rows([2, 2, 0]), pad_token_id=EOS, latent_token_id=LATENT)
    without = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
    assert torch.equal(model(**batch).loss, model(**without).loss)


def test_every_token_is_processed_once(family, monkeypatch):
    model, lengths = make_model(family), []
    span = Coconut._span

    def counting(self, embeds, *others):
        lengths.append(embeds.shape[1])
        return span(self, embeds, *others)

    monkeypatch.setattr(Coconut, "_span", counting)
    batch = collate(make_rows([4, 4, 4]), pad_token_id=EOS, latent_token_id=LATENT)
    model(**batch)
    first = int(batch["input_ids"].eq(LATENT).any(dim=0).nonzero()[0])
    assert lengths == [first, 1, 1, 1, batch["input_ids"].shape[1] - first - 3]


def test_the_head_runs_on_supervised_positions_only(monkeypatch):
    model, rows = make_model("llama", tied=False), make_rows([2, 2])
    seen = []
    original = F.linear_cross_entropy
    monkeypatch.setattr(F, "linear_cross_entropy", lambda h, *a, **k: seen.append(h.shape[0]) or original(h, *a, **k))
    model(**collate(rows, pad_token_id=EOS, latent_token_id=LATENT))
    assert seen == [sum(label != -100 for _, labels in rows for label in labels)]


def test_pause_is_one_pass_over_the_learned_embedding(family):
    model, rows = make_model(family, thought="pause"), make_rows([3, 3, 3])
    batch = collate(rows, pad_token_id=EOS, latent_token_id=LATENT)
    logits = model.base_causallm(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]
    ).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert abs(model(**batch).loss - wanted) < 1e-9


def test_without_labels_there_are_logits(family):
    model = make_model(family)
    batch = collate(make_rows([2, 2]), pad_token_id=EOS, latent_token_id=LATENT)
    labels = batch.pop("labels")
    output = model(**batch)
    assert output.loss is None
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(loss - model(**batch, labels=labels).loss) < 1e-9


def test_a_latent_cannot_come_first():
    with pytest.raises(ValueError, match="no position before it"):
        make_model("gpt2")(torch.tensor([[LATENT, 5, 6]]))


def prompts(n_latents: list[int]) -> list[list[int]]:
    return [row[: row.index(END) + 1] for row, _ in make_rows(n_latents)]


@pytest.mark.parametrize("n_latents", [[0, 0, 0], [3, 3, 3], [6, 0, 2]])
def test_batched_generation_is_one_by_one(family, n_latents):
    model = make_model(family)
    rows = prompts(n_latents)
    batch = collate_prompts(rows, EOS)
    together = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=12)
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), max_new_tokens=12)[0]
        assert found[: len(alone)].tolist() == alone.tolist()
        assert set(found[len(alone) :].tolist()) <= {EOS}


def test_generation_is_the_plain_definition(family):
    """Greedy decoding by recomputing everything for each token."""
    model, row = make_model(family), prompts([3])[0]
    found = model.generate(torch.tensor([row]), max_new_tokens=8)[0].tolist()
    wanted = []
    for _ in range(8):
        logits = model(torch.tensor([row + wanted])).logits[0, -1]
        wanted.append(int(logits.argmax()))
        if wanted[-1] == EOS:
            break
    assert found == wanted


def test_generation_is_greedy_whatever_the_model_says(family):
    model = make_model(family)
    row = torch.tensor(prompts([3])[:1])
    before = model.generate(row, max_new_tokens=8)
    model.base_causallm.generation_config.update(do_sample=True, temperature=9.0, max_new_tokens=2, num_beams=2)
    assert torch.equal(model.generate(row, max_new_tokens=8), before)


def test_generation_stops_at_eos_even_as_first_token(family):
    """The reference tests for EOS only from the second token on."""
    model, rows = make_model(family), prompts([2, 2])
    batch = collate_prompts(rows, EOS)
    ordinary = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=6)
    model.eos_token_id = int(ordinary[0, 0])
    stopped = model.generate(batch["input_ids"], batch["attention_mask"], max_new_tokens=6)
    assert set(stopped[0].tolist()) == {model.eos_token_id}
    alone = model.generate(torch.tensor(rows[:1]), max_new_tokens=6)
    assert alone.tolist() == [[model.eos_token_id]]


def test_hugging_face_options_continue_from_the_thoughts(family):
    model = make_model(family)
    batch = collate_prompts(prompts([3, 3, 3]), EOS)
    batch.pop("position_ids")
    greedy = model.generate(**batch, max_new_tokens=8)
    theirs = model.generate(**batch, max_new_tokens=8, num_beams=1, do_sample=False)
    assert theirs.tolist() == greedy.tolist()
    torch.manual_seed(0)
    sampled = model.generate(**batch, max_new_tokens=8, do_sample=True, temperature=5.0)
    assert sampled.shape[0] == 3
    assert sampled.tolist() != greedy.tolist()
