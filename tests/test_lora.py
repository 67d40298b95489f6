"""LoRA: updates and gradients equal the plain definition; checkpoints, ranks, restarts, export."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import check_ranks_and_restart, distance, equal, keys, main, read_json, refuses, tiny_base, weights
from peft import PeftModel
from safetensors.torch import load_file
from test_coconut import END, EOS, LATENT, START, batch_of, make_rows
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from coconut import Coconut
from config import Config
from dataset import collate_prompts
from model import lora
from tools import export
from trainer import inference
from trainer.pretrained import load_model


@pytest.mark.parametrize("tied", [True, False])
def test_updates_and_gradients_equal_the_plain_definition(family, tied):
    """Every linear layer but the head is W + alpha / r B A, and only A and B are trained."""
    batch = batch_of(make_rows([2, 0, 3]))
    base = tiny_base(family, tied)
    lora.add(base, rank=3, alpha=6)
    model, plain = (Coconut(each, LATENT, START, END, EOS).eval() for each in (base, tiny_base(family, tied)))
    torch.manual_seed(4)
    with torch.no_grad():  # so that the updates are not zero
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    loss = model(**batch).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if "lora_" in name}
    assert found
    assert found.keys() == factors.keys()
    values = dict(plain.named_parameters())
    layers = {name.partition(".lora_")[0] for name in factors}
    linear = [m for m in plain.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert len(layers) == len(linear) - 1
    for layer in layers:
        update = 6 / 3 * factors[f"{layer}.lora_B.default.weight"] @ factors[f"{layer}.lora_A.default.weight"]
        values[f"{layer}.weight"] = values[f"{layer}.weight"].detach() + (update.T if family == "gpt2" else update)
    wanted = functional_call(plain, values, kwargs=batch).loss
    assert abs(loss - wanted) < 1e-9
    gradients = torch.autograd.grad(wanted, list(factors.values()))
    assert distance(found, dict(zip(factors, gradients, strict=True))) < 1e-9


def loaded(place, folder=None, **keys):
    """The model that load_model returns, with the weights of a checkpoint's folder if there is one."""
    path = {"load_model_path": str(folder)} if folder else {}
    return load_model(Config(model_id=str(place / "model"), **path, **keys), folder).model


KEYS = keys("lora_rank=4 lora_alpha=8 lr=0.02 max_train_examples=40 max_new_tokens=4 global_batch_size=16")


@pytest.fixture(scope="module")
def tuned(place) -> Path:
    """A run of three epochs."""
    return main(place, *KEYS, "name=lora", "batch_size_training=4")


TOKENS = torch.randint(10, (2, 7), generator=torch.Generator().manual_seed(0))


def test_a_checkpoint_has_the_base_unchanged_and_the_updates_in_pefts_format(place, tuned):
    folder = tuned / "checkpoint_3"
    before = loaded(place).base_causallm.state_dict()
    for name, value in weights(folder).items():
        rows = slice(-3 if "wte" in name else None)  # without the markers'
        assert torch.equal(before[name][rows], value[rows])
    found = Coconut.from_pretrained(folder)(TOKENS).logits
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), folder / "adapter").eval()
    assert (theirs(TOKENS).logits - found).abs().max() < 1e-5
    assert (AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits - found).abs().max() > 1e-3
    merged = loaded(place, folder)
    assert not lora.layers_of(merged.base_causallm)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert (merged.eval()(TOKENS).logits - found).abs().max() < 1e-5
    # a copy as step decoder has the updates too
    model = loaded(place, folder, step_decoder="copy")
    assert equal(model.base_causallm.state_dict(), model.step_decoder.base_causallm.state_dict())
    # updates of another rank start on top of the checkpoint's
    model = loaded(place, folder, lora_rank=2).eval()
    assert {layer.r["default"] for layer in lora.layers_of(model.base_causallm).values()} == {2}
    assert (found - model(TOKENS).logits).abs().max() < 1e-5
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_markers_have_different_embeddings(place, tuned):
    """LoRA never trains them: as copies of "<<" they would stay equal to it and to each other."""
    model = Coconut.from_pretrained(tuned)
    tokens = [*model.markers[:3], model.tokenizer.convert_tokens_to_ids("<<")]
    for one, n_rows in ((model, 4), (loaded(place), 1)):  # the reference's rule: copies of "<<"
        rows = one.base_causallm.get_output_embeddings().weight
        assert len({tuple(rows[token].tolist()) for token in tokens}) == n_rows


def test_only_the_decoders_layers_have_updates():
    """A tower for images had some too; DDP waited for their gradients."""
    common = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    shape = transformers.Gemma3TextConfig(
        num_hidden_layers=2, num_key_value_heads=1, head_dim=8, vocab_size=40, **common
    )
    tower = transformers.SiglipVisionConfig(num_hidden_layers=1, image_size=28, **common)
    config = transformers.Gemma3Config(text_config=shape, vision_config=tower, mm_tokens_per_image=4)
    targets = lora.targets_of(transformers.AutoModelForImageTextToText.from_config(config))
    assert len(targets) == 2 * 7
    assert not any("vision" in name for name in targets)


def test_a_damaged_adapter_is_rejected(place, tuned, tmp_path):
    folder = shutil.copytree(tuned / "checkpoint_3", tmp_path / "checkpoint")
    path = folder / "adapter" / "adapter_config.json"
    for text in (None, "{", "{}"):
        path.unlink() if text is None else path.write_text(text)
        refuses(r"adapter_config\.json", loaded, place, folder)
    shutil.rmtree(folder / "adapter")  # bug: the base alone was evaluated
    refuses("was trained with lora_rank, but lacks adapter/", loaded, place, folder)


def adapter(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "adapter" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("step_decoder=copy", "thought=projected")])
def test_ranks_agree_and_a_restart_is_bitwise_the_same(place, more):
    name, arguments = "lora-ranks" + "".join(more).partition("=")[0], (*KEYS, *more, "batch_size_training=4")
    alone = check_ranks_and_restart(place, name, arguments, tolerance=1e-4, read=adapter)
    assert any(value.any() for key, value in adapter(alone / "checkpoint_3").items() if "lora_B" in key)
    parts = place / "runs" / f"{name}-parts"
    assert equal(weights(alone / "checkpoint_3"), weights(parts / "checkpoint_3"))


def test_an_exported_model_has_the_updates_in_its_weights(place, tuned, tmp_path):
    export.export(str(tuned), tmp_path / "out")
    whole, tokenizer = (
        kind.from_pretrained(tmp_path / "out", trust_remote_code=True) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    ours = Coconut.from_pretrained(tuned)
    question = read_json(place / "valid.json")[0]["question"]
    rows = whole.generate(**tokenizer([question], return_tensors="pt"), max_new_tokens=6)
    wanted = ours.generate(**collate_prompts(inference.prompts(ours, [question]), ours.markers.eos), max_new_tokens=6)
    assert rows[0].tolist()[-wanted.shape[1] :] == wanted[0].tolist()


def test_user_errors(place, tuned, monkeypatch, tmp_path):
    base = tiny_base("gpt2")
    lora.add(base, 2, 4)
    refuses("does not fit the model and lora_rank", lora.load, base, tuned / "checkpoint_3")
    refuses("cannot be read", lora.load, base, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)  # makes its import fail
    refuses("pip install peft", loaded, place, lora_rank=2)
