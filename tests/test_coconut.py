"""Coconut's forward pass and generation, compared with the plain definition."""

import pytest
import torch
import torch.nn.functional as F
from conftest import VOCABULARY, distance, tiny_base
from plain import END, EOS, LATENT, START, mean

from coconut import Coconut
from dataset import collate, collate_for_device, collate_prompts
from model.backbone import Backbone, decoder_blocks
from model.checkpointing import checkpoint_blocks
from model.thought import Last
from trainer.inference import thought_logits


def make_model(
    family: str, tied: bool = True, thought: str = "last", dtype: torch.dtype = torch.float64, layers: int = 2
) -> Coconut:
    return Coconut(tiny_base(family, tied, dtype=dtype, layers=layers), LATENT, START, END, EOS, thought=thought).eval()


def make_rows(n_latents: list[int], seed: int = 0, end: int = VOCABULARY) -> list[tuple[list[int], list[int]]]:
    """Returns one (input_ids, labels) pair per number of latents, of different lengths, with tokens 4 to end - 1."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(4, end, (count,), generator=generator).tolist()

    rows = []
    for number, count in enumerate(n_latents):
        before = [*words(3 + 2 * number), START, *[LATENT] * count, END]
        after = [*words(7 - number), EOS]
        rows.append((before + after, [-100] * len(before) + after))
    return rows


def batch_of(rows, collate=collate_for_device) -> dict:
    return collate(rows, pad_token_id=EOS, latent_token_id=LATENT)


def plain_thought(model: Coconut, spelling: str, before: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """Defines a thought (1, 1, D) from the input embeddings of all positions before it (1, t, D) and of the latent
    token (1, 1, D)."""
    base, taken = model.base_causallm, []
    decoder, embed = base.get_decoder(), base.get_input_embeddings()
    if spelling.startswith("token"):
        logits = base(inputs_embeds=before).logits[:, -1:]
        fed = embed(logits.argmax(-1)).detach()
        mean = torch.einsum("btv,vd->btd", logits.softmax(-1), embed(torch.arange(logits.shape[-1])))
        return fed + mean - mean.detach() if spelling == "token:st" else fed
    norm = next(module for name, module in decoder.named_children() if name in ("ln_f", "norm", "final_layernorm"))
    handle = norm.register_forward_pre_hook(lambda _, arguments: taken.append(arguments[0][:, -1:]))
    output = decoder(inputs_embeds=before, output_hidden_states=True)
    handle.remove()
    states = [state[:, -1:] for state in output.hidden_states]  # transformers' own: the last is after the norm
    last, stream = states[-1], [*states[:-1], *taken]
    # including the scale that some families apply in the module
    inputs = embed(torch.arange(base.config.vocab_size)).detach()
    outputs = base.get_output_embeddings().weight.detach()
    if spelling.startswith("layer:"):
        text = spelling.removeprefix("layer:")
        return states[round(float(text) * (len(states) - 1)) if "." in text else int(text)]
    if "projected" in spelling:
        last = torch.einsum("ij,btj->bti", model.thought.weight, last)
    if "normalised" in spelling:
        mean_norm = sum(row.square().sum().sqrt() for row in inputs) / len(inputs)
        last = mean_norm * last / last.square().sum().sqrt()
    if spelling == "realigned":
        gram = outputs.T @ outputs
        last = last @ torch.inverse(gram + 1e-4 * gram.trace() / len(gram) * torch.eye(len(gram))) @ outputs.T @ inputs
    if "suppressed" in spelling:
        threshold = float(spelling.partition(":")[2] or 0)
        suppressed = torch.zeros_like(last)
        for block in range(1, len(stream)):
            if block > (len(stream) - 1) // 2:
                fall = stream[block - 1].abs() - stream[block].abs()
                suppressed = suppressed + torch.where(fall > threshold, stream[block - 1], 0)
        beside = {"suppressed": 0, "last": last, "embedding": latent}
        return suppressed + beside[spelling.partition(":")[0].partition("+")[0]]
    return last


def plain_loss(model: Coconut, rows, thought: str = "last") -> torch.Tensor:
    """Defines the loss: one row at a time, without padding or cache, everything recomputed for each thought."""
    filled = []
    for input_ids, labels in rows:
        embeds = model.base_causallm.get_input_embeddings()(torch.tensor([input_ids]))  # (1, T, D)
        for position, token in enumerate(input_ids):
            if token == LATENT and thought != "pause":
                fed = plain_thought(model, thought, embeds[:, :position], embeds[:, position : position + 1])
                embeds = torch.cat([embeds[:, :position], fed, embeds[:, position + 1 :]], dim=1)
        filled.append((embeds, labels))
    return mean(model.base_causallm, filled)


def assert_generated_as_alone(model: Coconut, rows: list[list[int]], together: torch.Tensor, **options) -> None:
    """Asserts that each row of a batch equals its generation alone, followed by EOS."""
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), **options)[0]
        assert found[: len(alone)].tolist() == alone.tolist()
        assert set(found[len(alone) :].tolist()) <= {EOS}


def gradients(model: Coconut, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def largest_difference(model: Coconut, rows, loss: torch.Tensor, thought: str = "last") -> tuple[float, float]:
    """Returns the largest difference of a loss, and of its gradients, from the plain definition."""
    found = gradients(model, loss)
    plain = plain_loss(model, rows, thought)
    return abs(loss - plain).item(), distance(found, gradients(model, plain))


@pytest.mark.parametrize("n_latents", [[0, 0, 0], [1, 1, 1], [3, 3, 3], [6, 6, 6], [2, 0, 6, 3]])
@pytest.mark.parametrize("tied", [True, False])
def test_forward_is_the_plain_definition(family, tied, n_latents):
    model, rows = make_model(family, tied), make_rows(n_latents)
    loss = model(**batch_of(rows)).loss
    assert abs(loss - model(**batch_of(rows, collate)).loss) < 1e-12
    assert max(largest_difference(model, rows, loss)) < 1e-9


VARIANTS = (
    *("pause", "layer:-1", "layer:-2", "layer:1", "layer:0", "layer:0.7", "projected", "normalised"),
    *("projected+normalised", "realigned", "suppressed", "suppressed:0.3", "last+suppressed", "embedding+suppressed"),
)


def make_variant(family: str, spelling: str, dtype: torch.dtype = torch.float64) -> Coconut:
    """Returns a model of three layers whose projection is not the identity."""
    model = make_model(family, tied=False, thought=spelling, layers=3, dtype=dtype)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.thought.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("spelling", VARIANTS)
def test_every_thought_is_its_plain_definition(family, spelling):
    model, rows = make_variant(family, spelling), make_rows([2, 0, 3])
    loss = model(**batch_of(rows)).loss
    assert max(largest_difference(model, rows, loss, spelling)) < 1e-9
    other = plain_loss(model, rows, "last" if spelling != "layer:-1" else "layer:-2")
    assert abs(loss - other) > 1e-6  # the loss depends on the thought


@pytest.mark.parametrize("spelling", ["normalised", "projected+normalised", "realigned"])
def test_thoughts_use_the_scaled_embeddings(spelling):
    """Gemma's embedding module multiplies its weights by sqrt(D)."""
    model, rows = make_variant("gemma2", spelling, torch.float32), make_rows([2, 0, 3])
    found = gradients(model, model(**batch_of(rows)).loss)
    wanted = gradients(model, plain_loss(model, rows, spelling))
    assert distance(found, wanted) < 1e-4 * max(gradient.abs().max() for gradient in wanted.values())


@pytest.mark.parametrize("spelling", ["layer:-2", "projected+normalised", "realigned", "embedding+suppressed"])
def test_generation_agrees_with_the_forward_pass_for_every_thought(family, spelling):
    """Batched, alone, and with Hugging Face's `generate`."""
    model, rows = make_variant(family, spelling), prompts([3, 0, 2])
    together = model.generate(**collate_prompts(rows, EOS), max_new_tokens=6)
    assert_generated_as_alone(model, rows, together, max_new_tokens=6, do_sample=False)
    continued = list(rows[0])
    for token in together[0].tolist():
        continued.append(int(model(torch.tensor([continued])).logits[0, -1].argmax()))
        assert continued[-1] == token
        if token == EOS:
            break


@pytest.mark.parametrize("how", ["checkpointed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_layers_are_recorded_with_blocks_that_are(how):
    """Checkpointed blocks run again in the backward pass, which must not be recorded."""
    model, plain = (make_variant("gpt2", "last+suppressed") for _ in range(2))
    rows, blocks = make_rows([2, 3]), decoder_blocks(model.base_causallm)
    if how == "checkpointed":
        checkpoint_blocks(blocks)
    else:
        blocks[-1].compile(dynamic=True, backend="eager")
    loss, wanted = model(**batch_of(rows)).loss, plain_loss(plain, rows, "last+suppressed")
    assert abs(loss - wanted) < 1e-9
    if how == "checkpointed":
        assert distance(gradients(model, loss), gradients(plain, wanted)) < 1e-9


def test_a_batch_without_latents_gives_a_learned_thought_a_zero_gradient():
    """Without one, DDP waits for ever."""
    model = make_variant("gpt2", "projected")
    model(**batch_of(make_rows([0, 0]))).loss.backward()
    assert torch.equal(model.thought.weight.grad, torch.zeros_like(model.thought.weight))


@pytest.mark.parametrize(
    ("other", "dtype", "tolerance"),
    # Gemma 2's eager attention computes in float32 whatever the dtype
    [("phi", torch.float64, 1e-9), ("mistral", torch.float64, 1e-9), ("gemma2", torch.float32, 2e-4)],
)
def test_forward_is_the_plain_definition_for_other_families(other, dtype, tolerance):
    """With a bias in the head; with sliding windows; with soft-capped logits and scaled embeddings."""
    model, rows = make_model(other, dtype=dtype), make_rows([2, 0, 4])
    assert max(largest_difference(model, rows, model(**batch_of(rows, collate)).loss)) < tolerance
    together = model.generate(**collate_prompts(prompts([3, 1]), EOS), max_new_tokens=8)
    assert_generated_as_alone(model, prompts([3, 1]), together, max_new_tokens=8)


def test_padding_longer_than_the_sliding_window_is_harmless():
    """Its last positions attend to nothing."""
    model = make_model("mistral")
    model.base_causallm.config.sliding_window = 2
    rows = [([5, START, LATENT, *words, EOS], [-100] * 3 + [*words, EOS]) for words in ([8, 9], [])]
    assert max(largest_difference(model, rows, model(**batch_of(rows, collate)).loss)) < 1e-9


@pytest.mark.parametrize("broken", ["dropped", "detached"])
def test_the_comparison_notices_a_missing_feedback(family, broken, monkeypatch):
    """With random weights the loss hardly depends on the thoughts, so the gradients must be compared."""
    model, rows = make_model(family), make_rows([3, 3, 3])
    if broken == "dropped":
        monkeypatch.setattr(Last, "sequential", False)
    else:
        monkeypatch.setattr(Last, "forward", lambda self, seen: seen.hidden.detach())
    assert largest_difference(model, rows, model(**batch_of(rows, collate)).loss)[1] > 1e-4


def test_a_second_backward_gives_the_same_gradients(family):
    """The cache accumulates gradients in its own buffer, which each backward must clear."""
    model = make_model(family)
    loss = model(**batch_of(make_rows([3, 3]), collate)).loss
    first, second = (torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_unaligned_rows_and_batches_without_positions_or_labels(family):
    model, rows = make_model(family), make_rows([2, 3, 1])
    batch = collate(rows, pad_token_id=EOS, latent_token_id=None)  # padded on the right only
    assert batch["input_ids"].eq(LATENT).any(dim=0).sum() > 3
    assert max(largest_difference(model, rows, model(**batch).loss)) < 1e-9
    batch = batch_of(make_rows([2, 2, 0]), collate)
    loss, labels = model(**batch).loss, batch.pop("labels")
    del batch["position_ids"]
    assert torch.equal(loss, model(**batch, labels=labels).loss)
    mask = batch.pop("attention_mask")
    for dtype in (torch.bool, torch.int32, torch.float32):
        assert torch.equal(loss, model(**batch, attention_mask=mask.to(dtype), labels=labels).loss)
        rows = collate_prompts(prompts([2, 3]), EOS)
        found = model.generate(**(rows | {"attention_mask": rows["attention_mask"].to(dtype)}), max_new_tokens=3)
        assert torch.equal(found, model.generate(**rows, max_new_tokens=3))
    output = model(**batch, attention_mask=mask)
    assert output.loss is None
    assert abs(loss - F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())) < 1e-9


def test_every_token_is_processed_once(family, monkeypatch):
    model, lengths = make_model(family), []
    span = Backbone.span

    def counting(self, embeds, *others):
        lengths.append(embeds.shape[1])
        return span(self, embeds, *others)

    monkeypatch.setattr(Backbone, "span", counting)
    batch = batch_of(make_rows([4, 4, 4]), collate)
    model(**batch)
    first = int(batch["input_ids"].eq(LATENT).any(dim=0).nonzero()[0])
    assert lengths == [first, 1, 1, 1, batch["input_ids"].shape[1] - first - 3]


def test_the_head_runs_on_supervised_positions_only(monkeypatch):
    model, rows = make_model("llama", tied=False), make_rows([2, 2])
    seen = []
    original = F.linear_cross_entropy
    monkeypatch.setattr(F, "linear_cross_entropy", lambda h, *a, **k: seen.append(h.shape[0]) or original(h, *a, **k))
    model(**batch_of(rows, collate))
    assert seen == [sum(label != -100 for _, labels in rows for label in labels)]


def test_pause_is_one_pass_over_the_learned_embedding(family):
    model, batch = make_model(family, thought="pause"), batch_of(make_rows([3, 3, 3]), collate)
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model.base_causallm(**given).logits
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert abs(model(**batch).loss - wanted) < 1e-9


def test_a_latent_cannot_come_first():
    with pytest.raises(ValueError, match="must not begin with a latent"):
        make_model("gpt2")(torch.tensor([[LATENT, 5, 6]]))


def test_padding_cannot_stand_before_a_later_latent():
    """Bug: its hidden state was the thought."""
    rows = torch.tensor([[5, 7, LATENT, LATENT, 6, 9], [4, 6, START, EOS, LATENT, 9]])
    with pytest.raises(ValueError, match="padding before a latent"):
        make_model("gpt2")(rows, torch.tensor([[1] * 6, [1, 1, 1, 0, 1, 1]]))


def prompts(n_latents: list[int]) -> list[list[int]]:
    return [row[: row.index(END) + 1] for row, _ in make_rows(n_latents)]


@pytest.mark.parametrize("n_latents", [[0, 0, 0], [3, 3, 3], [6, 0, 2]])
def test_batched_generation_equals_single_generation(family, n_latents):
    model, rows = make_model(family), prompts(n_latents)
    together = model.generate(**collate_prompts(rows, EOS), max_new_tokens=12)
    assert_generated_as_alone(model, rows, together, max_new_tokens=12)


def test_generation_is_the_plain_definition_whatever_the_generation_config(family):
    """Greedy decoding that recomputes everything for each token."""
    model, row = make_model(family), prompts([3])[0]
    wanted: list[int] = []
    while len(wanted) < 8 and EOS not in wanted:
        wanted.append(int(model(torch.tensor([row + wanted])).logits[0, -1].argmax()))
    assert model.generate(torch.tensor([row]), max_new_tokens=8)[0].tolist() == wanted
    model.base_causallm.generation_config.update(do_sample=True, temperature=9.0, max_new_tokens=2, num_beams=2)
    assert model.generate(torch.tensor([row]), max_new_tokens=8)[0].tolist() == wanted


def test_generation_stops_at_eos_even_as_first_token(family):
    """The reference checks for EOS only from the second token on."""
    model, rows = make_model(family), prompts([2, 2])
    batch = collate_prompts(rows, EOS)
    model.eos_token_id = int(model.generate(**batch, max_new_tokens=6)[0, 0])
    assert set(model.generate(**batch, max_new_tokens=6)[0].tolist()) == {model.eos_token_id}
    assert model.generate(torch.tensor(rows[:1]), max_new_tokens=6).tolist() == [[model.eos_token_id]]


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


# --- Edited thoughts ---


@pytest.mark.parametrize("spelling", ["last", "pause", "normalised", "last+suppressed"])
def test_an_identity_edit_changes_nothing(family, spelling):
    """Also for `pause`, whose latents are then processed one by one."""
    model, batch, seen = make_variant(family, spelling), batch_of(make_rows([3, 0, 2])), []

    def same(number, thought, made_of):
        seen.append((number, tuple(thought.shape), tuple(made_of.hidden.shape)))
        return thought

    loss, edited = model(**batch).loss, model(**batch, edit=same).loss
    assert abs(loss - edited) < 1e-12
    width = model.base_causallm.config.hidden_size
    assert seen == [(number, (3, 1, width), (3, 1, width)) for number in range(3)]
    assert distance(gradients(model, edited), gradients(model, loss)) < 1e-12
    ids = collate_prompts(prompts([3, 3]), EOS)
    assert model.generate(**ids, max_new_tokens=5, edit=same).equal(model.generate(**ids, max_new_tokens=5))
    assert (thought_logits(model, **ids)[0] - thought_logits(model, **ids, edit=same)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("spelling", ["last", "pause"])
def test_an_edited_thought_is_fed_to_the_model(family, spelling):
    """Compared with the base model on embeddings with the thoughts filled in one by one."""
    model, row = make_model(family, thought=spelling), prompts([3])[0]
    base, first, ids = model.base_causallm, row.index(LATENT), torch.tensor([row])
    torch.manual_seed(3)
    strange = torch.randn(1, 1, base.config.hidden_size, dtype=torch.float64)

    def edit(number, thought, _):
        return strange if number == 1 else thought

    embeds = base.get_input_embeddings()(ids).detach()
    for number in range(3):
        if spelling == "last":
            hidden = base.get_decoder()(inputs_embeds=embeds[:, : first + number]).last_hidden_state[:, -1]
            embeds[:, first + number] = hidden.detach()
        if number == 1:
            embeds[:, first + number] = strange[:, 0]
    output, wanted = model(ids, edit=edit, return_thoughts=True), base(inputs_embeds=embeds).logits
    assert (output.thoughts - embeds[:, first : first + 3]).abs().max() < 1e-12
    assert (output.logits - wanted).abs().max() < 1e-9
    for options in ({}, {"num_beams": 2}):
        found = model.generate(ids, max_new_tokens=1, edit=edit, **options)
        assert (found[0, 0], found.shape) == (wanted[0, -1].argmax(), (1, 1))


def test_return_thoughts(family):
    model, batch = make_model(family), batch_of(make_rows([2, 2]), collate)
    assert model(**batch).thoughts is None
    output = model(**batch, return_thoughts=True)
    columns = (batch["input_ids"][0] == LATENT).nonzero().flatten()
    assert torch.equal(output.thoughts, output.inputs_embeds[:, columns])
    assert output.thoughts.shape == (2, 2, model.base_causallm.config.hidden_size)
    ids = collate_prompts(prompts([2, 2]), EOS)
    wanted = model(**ids, return_thoughts=True).thoughts
    generated = model.generate(**ids, max_new_tokens=3, return_thoughts=True)
    beams = model.generate(**ids, max_new_tokens=3, return_thoughts=True, num_beams=2)
    for _, thoughts in (generated, beams, thought_logits(model, **ids)):
        assert (thoughts - wanted).abs().max() < 1e-12
    assert torch.equal(generated[0], model.generate(**ids, max_new_tokens=3))
