"""LoRA: the updates and their gradients against the plain definition; checkpoints, ranks, restarts, export."""

import builtins
import json
import shutil

import pytest
import torch
from conftest import tiny_base
from peft import PeftModel
from safetensors.torch import load_file
from test_coconut import END, EOS, LATENT, START, make_rows
from test_run import main, together, weights
from test_run import place as place  # a fixture
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Config,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from coconut import Coconut
from config import Config
from dataset import collate_for_device, collate_prompts
from model import lora
from tools import export
from trainer import inference
from trainer.pretrained import load_model
from utils import UserError


def moved(model: torch.nn.Module) -> None:
    """Away from where the updates are nothing."""
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize("tied", [True, False])
def test_the_updates_and_their_gradients_are_the_plain_definition(family, tied):
    """W + alpha / r B A in each linear layer but the head, and nothing else is trained."""
    batch = collate_for_device(make_rows([2, 0, 3]), pad_token_id=EOS, latent_token_id=LATENT)
    base = tiny_base(family, tied)
    lora.add(base, rank=3, alpha=6)
    model = Coconut(base, LATENT, START, END, EOS).eval()
    moved(model)
    loss = model(**batch).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found
    assert all("lora_" in name for name in found)
    plain = Coconut(tiny_base(family, tied), LATENT, START, END, EOS).eval()
    factors = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if "lora_" in name}
    values = dict(plain.named_parameters())
    layers = {name.partition(".lora_")[0] for name in factors}
    linear = [m for m in plain.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert len(layers) == len(linear) - 1
    for layer in layers:
        update = 6 / 3 * factors[f"{layer}.lora_B.default.weight"] @ factors[f"{layer}.lora_A.default.weight"]
        values[f"{layer}.weight"] = values[f"{layer}.weight"].detach() + (update.T if family == "gpt2" else update)
    wanted = functional_call(plain, values, kwargs=batch).loss
    assert abs(loss - wanted) < 1e-9
    for value, gradient in zip(factors.values(), torch.autograd.grad(wanted, list(factors.values())), strict=True):
        name = next(name for name, factor in factors.items() if factor is value)
        assert (found[name] - gradient).abs().max() < 1e-9


KEYS = ("lora_rank=4", "lora_alpha=8", "max_train_examples=40", "max_new_tokens=4", "global_batch_size=16", "lr=0.02")


@pytest.fixture
def tuned(place):
    """A run of three epochs."""
    return main(place, *KEYS, "name=lora", "batch_size_training=4")


def test_a_checkpoint_has_the_base_as_it_was_and_the_updates_as_peft_reads_them(place, tuned):
    folder = tuned / "checkpoint_3"
    before = load_model(Config(model_id=str(place / "model")), None).model.base_causallm.state_dict()
    after = load_file(folder / "model.safetensors")
    for name, value in after.items():
        of_words = slice(-3 if "wte" in name else None)  # less the markers'
        assert torch.equal(before[name][of_words], value[of_words])
    ours = Coconut.from_pretrained(folder)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter").eval()
    tokens = torch.randint(10, (2, 7), generator=torch.Generator().manual_seed(0))
    found = ours(tokens).logits
    assert (theirs(tokens).logits - found).abs().max() < 1e-5
    without = AutoModelForCausalLM.from_pretrained(folder)
    assert (without(tokens).logits - found).abs().max() > 1e-3
    merged = load_model(Config(model_id=str(place / "model"), load_model_path=str(folder)), folder).model
    assert not lora.layers_of(merged.base_causallm)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert (merged.eval()(tokens).logits - found).abs().max() < 1e-5


def test_markers_are_told_apart(place, tuned):
    """Their rows stay as they began: as copies of "<<" they would tie with it, and with each other, for ever."""
    model = Coconut.from_pretrained(tuned)
    rows = model.base_causallm.get_output_embeddings().weight
    markers = [model.markers.start, model.markers.latent, model.markers.end]
    like = model.tokenizer.convert_tokens_to_ids("<<")
    assert len({tuple(rows[token].tolist()) for token in [*markers, like]}) == 4
    plain = load_model(Config(model_id=str(place / "model")), None).model
    rows = plain.base_causallm.get_output_embeddings().weight
    assert len({tuple(rows[token].tolist()) for token in [*markers, like]}) == 1  # the reference's rule


def test_a_copy_as_step_decoder_has_the_updates(place, tuned):
    folder = tuned / "checkpoint_3"
    config = Config(model_id=str(place / "model"), load_model_path=str(folder), step_decoder="copy")
    model = load_model(config, folder).model
    ours, theirs = model.base_causallm.state_dict(), model.step_decoder.base_causallm.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_updates_are_for_the_layers_of_the_decoder_alone():
    """A tower for images got some, which no batch reached; DDP waited for their gradients."""
    shape = Gemma3TextConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=40,
    )
    tower = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28
    )
    base = AutoModelForImageTextToText.from_config(
        Gemma3Config(text_config=shape, vision_config=tower, mm_tokens_per_image=4)
    )
    targets = lora.targets_of(base)
    assert len(targets) == 2 * 7
    assert not any("vision" in name for name in targets)


def test_a_damaged_adapter_gets_a_sentence(place, tuned, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tuned / "checkpoint_3", folder)
    for text in (None, "{", "{}"):
        path = folder / "adapter" / "adapter_config.json"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(UserError, match=r"adapter_config\.json"):
            load_model(Config(model_id=str(place / "model"), load_model_path=str(folder)), folder)


def test_other_updates_begin_on_top_of_those_of_a_checkpoint(place, tuned):
    folder = tuned / "checkpoint_3"
    config = Config(model_id=str(place / "model"), load_model_path=str(folder), lora_rank=2)
    model = load_model(config, folder).model.eval()
    layers = lora.layers_of(model.base_causallm).values()
    assert {layer.r["default"] for layer in layers} == {2}
    tokens = torch.randint(10, (2, 7), generator=torch.Generator().manual_seed(0))
    assert (Coconut.from_pretrained(folder)(tokens).logits - model(tokens).logits).abs().max() < 1e-5
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("step_decoder=copy", "thought=projected")])
def test_ranks_agree_and_a_restart_is_bitwise_the_same(place, more):
    name = "lora" + "".join(more).partition("=")[0]
    keys = (*KEYS, *more, "batch_size_training=4")
    alone = main(place, *keys, f"name={name}-alone")
    wanted = load_file(alone / "checkpoint_3" / "adapter" / "adapter_model.safetensors")
    assert any(value.any() for key, value in wanted.items() if "lora_B" in key)
    for strategy in ("ddp", "fsdp"):
        together(place / "run.yaml", *keys, f"name={name}-{strategy}", f"strategy={strategy}")
        path = place / "runs" / f"{name}-{strategy}" / "checkpoint_3" / "adapter" / "adapter_model.safetensors"
        found = load_file(path)
        assert max((found[key] - wanted[key]).abs().max() for key in wanted) < 1e-4
    main(place, *keys, f"name={name}-parts", "num_epochs=2")
    parts = main(place, *keys, f"name={name}-parts")
    found = load_file(parts / "checkpoint_3" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert all(
        torch.equal(value, weights(alone / "checkpoint_3")[key])
        for key, value in weights(parts / "checkpoint_3").items()
    )


def test_an_exported_model_has_the_updates_in_its_weights(place, tuned, tmp_path):
    export.export(str(tuned), tmp_path / "out")
    options = {"trust_remote_code": True}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", **options)
    ours = Coconut.from_pretrained(tuned)
    question = json.loads((place / "valid.json").read_text())[0]["question"]
    rows = whole.generate(**tokenizer([question], return_tensors="pt"), max_new_tokens=6)
    wanted = ours.generate(**collate_prompts(inference.prompts(ours, [question]), ours.markers.eos), max_new_tokens=6)
    assert rows[0].tolist()[-wanted.shape[1] :] == wanted[0].tolist()


def test_bad_input_gets_a_sentence(place, tuned, monkeypatch, tmp_path):
    base = tiny_base("gpt2")
    lora.add(base, 2, 4)
    with pytest.raises(UserError, match="does not fit the model and lora_rank"):
        lora.load(base, tuned / "checkpoint_3")
    with pytest.raises(UserError, match="cannot be read"):
        lora.load(base, tmp_path)
    (problem,) = Config(lora_rank=2, from_scratch=True).problems(needs_files=False)
    assert "from_scratch" in problem
    imported = builtins.__import__

    def without_peft(name, *rest):
        if name == "peft":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    with pytest.raises(UserError, match="pip install peft"):
        load_model(Config(model_id=str(place / "model"), lora_rank=2), None)
