"""The thoughts alone; test_coconut.py compares models that use them with the plain definition."""

import importlib

import pytest
import torch
from conftest import distance, keys, refuses, tiny_base
from test_coconut import EOS, LATENT, batch_of, gradients, make_model, make_rows, plain_loss, prompts

from coconut import Coconut
from config import THOUGHTS, Config
from dataset import collate_prompts
from model.backbone import Backbone, decoder_blocks
from model.thought import REGISTRY, Seen, make_thought
from trainer.inference import thought_logits

SPELLINGS = [
    name + {":N": ":-2", "[:T]": ":0.1", "[:P]": ":8", "[:st]": ":st", "": ""}[takes]
    for name, (takes, _) in THOUGHTS.items()
]


def seen(layers: int = 4, **parts) -> Seen:
    """Random states of two rows."""
    states = torch.randn(layers + 3, 2, 1, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = {"hidden": states[0], "embedding": states[1], "stream": states[2:], "prepared": None}
    return Seen(**made | parts)


def test_the_configuration_knows_every_thought():
    for _, module in THOUGHTS.values():
        importlib.import_module(module)
    assert REGISTRY.keys() == THOUGHTS.keys()
    assert all(thought.__doc__ for thought in REGISTRY.values())
    assert (
        "projected | normalised | projected+normalised | realigned | token[:st] | layer:N | suppressed[:T]"
        in Config.describe()
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_makes_a_thought(family, spelling):
    base = tiny_base(family, layers=4)
    thought = make_thought(spelling, base)
    assert thought.needs_layers == ("layer" in spelling or "suppressed" in spelling)
    assert thought.sequential == (spelling != "pause")
    if thought.sequential:
        weight = torch.randn(40, 32, dtype=torch.float64)
        made = thought(seen(prepared=thought.precompute(weight, weight), backbone=Backbone(base)))
        assert (made.shape, made.dtype) == ((2, 1, 32), torch.float64)


@pytest.mark.parametrize(
    "spelling",
    [
        "",
        *keys("first layer layer: layer:two layer:1:2 last:1 last:st last+ Last suppressed:-1 token: token:1 token:ST"),
    ],
)
def test_an_unknown_thought_raises_an_error_that_lists_all(spelling):
    known = r"must be one of last, .*pause, .*token\[:st\], layer:N, .*embedding\+suppressed\[:T\]"
    refuses(known, make_thought, spelling, tiny_base("llama", layers=4))


@pytest.mark.parametrize("spelling", ["layer:5", "layer:-6", "layer:1.5"])
def test_a_layer_that_the_model_lacks_raises_an_error(spelling):
    complaint = f"thought '{spelling}' must be between .* the model has 4 blocks"
    refuses(complaint, make_thought, spelling, tiny_base("llama", layers=4))


@pytest.mark.parametrize(
    ("spelling", "index"),
    [("layer:0", 0), ("layer:3", 3), ("layer:-2", 3), ("layer:-5", 0), ("layer:0.5", 2), ("layer:.0", 0)],
)
def test_a_layer_is_a_number_from_either_end_or_a_share(spelling, index):
    given = seen(layers=4)
    assert torch.equal(make_thought(spelling, tiny_base("gpt2", layers=4))(given), given.stream[index])


@pytest.mark.parametrize("spelling", ["layer:-1", "layer:4", "layer:1.0", "last"])
def test_the_last_layer_is_the_unchanged_last_hidden_state(spelling):
    given, thought = seen(stream=None), make_thought(spelling, tiny_base("gpt2", layers=4))
    assert thought(given) is given.hidden
    assert not thought.needs_layers


def test_a_projection_is_the_identity_at_first():
    given = seen()
    assert torch.equal(make_thought("projected", tiny_base("gpt2"))(given), given.hidden)


def test_realigning_turns_output_rows_into_input_rows():
    """With more dimensions than tokens it is exact up to the ridge; with tied embeddings it is the identity."""
    thought = make_thought("realigned", tiny_base("gpt2"))
    inputs, outputs = torch.randn(2, 12, 32, dtype=torch.float64)
    matrix = thought.precompute(inputs, outputs)
    made = thought(seen(hidden=outputs[3:5, None], prepared=matrix))
    assert (made - inputs[3:5, None]).abs().max() < 1e-2
    tied = torch.randn(64, 32, dtype=torch.float64)
    assert (thought.precompute(tied, tied) - torch.eye(32)).abs().max() < 1e-2
    assert thought.precompute(tied.bfloat16(), tied.bfloat16()).dtype == torch.float32


def test_only_the_last_column_is_recorded_and_only_on_request(family):
    base = tiny_base(family, layers=3)
    backbone = Backbone(base)
    backbone.record_layers()
    input_ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with backbone.recording(lambda state: state[:, -1:]) as states:
        output = base.get_decoder()(input_ids, output_hidden_states=True)
    base.get_decoder()(input_ids)
    assert [state.shape for state in states] == [(2, 1, 32)] * 4
    for ours, theirs in zip(states[:-1], output.hidden_states[:-1], strict=True):
        assert torch.equal(ours, theirs[:, -1:])
    assert not torch.equal(states[-1], output.hidden_states[-1][:, -1:])  # theirs has the final norm


def test_an_outer_recording_continues_after_a_nested_one():
    """CODI with a thought from the layers recorded nothing after the last thought."""
    backbone = Backbone(tiny_base("llama", layers=3))
    backbone.record_layers()
    with backbone.recording(lambda state: state[:, :1]) as outer:
        with backbone.recording(lambda state: state[:, -1:]) as inner:
            backbone.decoder(torch.tensor([[5, 6, 7]]))
        backbone.decoder(torch.tensor([[5, 6]]))
    assert (len(outer), len(inner)) == (4, 4)
    embeds = backbone.embed(torch.tensor([[5, 6, 7]]))
    assert torch.equal(outer[0], embeds[:, :1])
    assert torch.equal(inner[0], embeds[:, -1:])


def test_a_model_without_blocks_has_no_thoughts_from_layers(monkeypatch):
    base = tiny_base("gpt2")
    base._no_split_modules = None
    assert len(decoder_blocks(base)) == 2  # those that transformers can checkpoint
    monkeypatch.setattr("model.backbone.GradientCheckpointingLayer", type("Nothing", (), {}))
    refuses("names its decoder blocks", Coconut, base, 2, 1, 3, 0, thought="suppressed")


# --- The thought `token` equals its definition, computed with transformers' own forward pass ---


@pytest.mark.parametrize("spelling", ["token", "token:st"])
@pytest.mark.parametrize(
    ("family", "tied"), [("gpt2", True), ("llama", True), ("llama", False), ("phi", False), ("gemma2", True)]
)
def test_it_equals_the_embedding_of_the_likeliest_token(family, tied, spelling):
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
    """With it the loss after the thoughts reaches the weights that compute them."""
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
