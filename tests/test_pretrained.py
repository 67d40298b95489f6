"""Loading models, tokenizers and the reference's files; errors about what cannot be loaded."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_model
import torch
from conftest import equal, python, raising, read_json, refuses
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from config import Config
from trainer import pretrained, setup
from trainer.pretrained import END, LATENT, START, Pretrained, load_model
from trainer.run_folder import resolve
from utils import UserError

TEXTS = ["<<3+4=7>>\n", "### 12", "5*6-0"]


def write_tiny(folder, shape: str = "gpt2", tied: bool = True, texts=TEXTS, width: int = 32) -> str:
    data = folder.with_suffix(".json")
    data.write_text(json.dumps([{"question": text, "answer": "1", "steps": []} for text in texts]))
    tiny_model.write_model([data], folder, "char", shape, width, 2, 2, 64, tied)
    return str(folder)


@pytest.fixture
def tiny(tmp_path) -> str:
    return write_tiny(tmp_path / "tiny")


def coconut_config(model_id: str, **keys) -> Config:
    return Config(model_id=model_id, method=keys.pop("method", "coconut"), **keys)


@pytest.mark.parametrize(("shape", "tied"), [("gpt2", True), ("llama", False), ("llama", True), ("qwen2", False)])
@pytest.mark.parametrize("has_brackets", [True, False])
def test_new_rows_start_as_the_row_of_brackets_or_as_the_mean(tmp_path, shape, tied, has_brackets):
    texts = TEXTS if has_brackets else ["3+4"]
    model_id = write_tiny(tmp_path / "tiny", shape, tied, texts)
    plain = AutoModelForCausalLM.from_pretrained(model_id)
    model, tokenizer, markers = load_model(coconut_config(model_id), None)
    old = plain.config.vocab_size
    assert (markers.start, markers.end, markers.latent) == (old, old + 1, old + 2)  # the reference's order of rows
    assert tokenizer.convert_tokens_to_ids([START, END, LATENT]) == [old, old + 1, old + 2]
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(plain, get)().weight, getattr(model.base_causallm, get)().weight
        assert after.shape[0] == old + 3
        assert torch.equal(after[:old], before)
        like = before[tokenizer.convert_tokens_to_ids("<<")] if has_brackets else before.mean(dim=0)
        assert all(torch.equal(after[row], like) for row in range(old, old + 3))
    head, embedding = model.base_causallm.get_output_embeddings(), model.base_causallm.get_input_embeddings()
    assert (head.weight is embedding.weight) == (tied or shape == "gpt2")


@pytest.mark.parametrize(("gap", "fits"), [(1, False), (3, False), (50, True)])
def test_markers_do_not_take_ids_of_other_tokens(tiny, gap, fits):
    """Regression: with ids 0 to 9 and 15 to 20 the markers got those of '3', '4' and '<<', since new ids begin at the
    number of tokens."""
    file = Path(tiny) / "tokenizer.json"
    state = read_json(file)
    vocabulary = state["model"]["vocab"]
    state["model"]["vocab"] = {token: id + gap * (id > 8) for token, id in vocabulary.items()}
    file.write_text(json.dumps(state))
    tokenizer = pretrained.load_tokenizer(coconut_config(tiny))
    before = set(tokenizer.get_vocab().values())
    if fits:
        assert before.isdisjoint(pretrained.add_marker_tokens(tokenizer, "coconut")[:3])
        return
    sentence = "its ids have gaps, and a marker would get the id .* of the token"
    refuses(sentence, pretrained.add_marker_tokens, tokenizer, "coconut")


def test_the_shapes_of_weights_that_do_not_fit_are_named(tiny):
    """The message pointed at a report that nobody saw."""
    config = read_json(Path(tiny) / "config.json")
    (Path(tiny) / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    refuses(r"of another shape: .*wte.weight \[.*\] instead of \[500, ", load_model, coconut_config(tiny), None)


def test_methods_without_latents_do_not_change_the_vocabulary(tiny):
    model, tokenizer, markers = load_model(coconut_config(tiny, method="cot"), None)
    assert markers[:3] == (None, None, None)
    assert model.base_causallm.config.vocab_size == len(tokenizer)
    assert LATENT not in tokenizer.get_vocab()


def reference_state(base, wrapped: bool) -> dict:
    """Returns a state dict of the reference: of the bare model with GPT-2's mask buffers of older transformers, or of
    its wrapper, which holds the embedding twice."""
    state = {name: value.clone() for name, value in base.state_dict().items()}
    if not wrapped:
        return {**state, "transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    embedding = state["transformer.wte.weight"].clone()
    return {**{f"base_causallm.{name}": value for name, value in state.items()}, "embedding.weight": embedding}


# the reference's own wrapper always has the markers' rows
@pytest.mark.parametrize(("wrapped", "resized"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_the_reference_load(tiny, tmp_path, wrapped, resized, dtype, legacy):
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype)
    old = base.config.vocab_size
    if resized:
        base.resize_token_embeddings(old + 3, mean_resizing=False)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_()
    path = tmp_path / "checkpoint_5"
    torch.save(reference_state(base, wrapped), path, _use_new_zipfile_serialization=not legacy)
    model, _, _ = load_model(coconut_config(tiny, load_model_path=str(path)), resolve(str(path)))
    for name, value in base.state_dict().items():
        loaded = model.base_causallm.state_dict()[name]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded[: len(value)], value.float()), name
    table = model.base_causallm.get_input_embeddings().weight
    assert table.shape[0] == old + 3
    if not resized:
        like = load_model(coconut_config(tiny), None)[1].convert_tokens_to_ids("<<")
        assert torch.equal(table[old], table[like])


def test_a_coconut_needs_rows_for_the_markers_and_a_method_with_latents(tiny, tmp_path):
    """Bugs: such a fork's file was evaluated with untrained rows; without latents an evaluation gave a wrong number,
    where the reference refuses the file."""
    torch.save(reference_state(AutoModelForCausalLM.from_pretrained(tiny), wrapped=True), tmp_path / "file")
    refuses("file holds a Coconut without rows for the markers", load_model, coconut_config(tiny), tmp_path / "file")
    refuses("weights of a Coconut, which method cot", load_model, coconut_config(tiny, method="cot"), tmp_path / "file")


def test_markers_that_only_the_tokenizer_has_get_rows_like_new_ones(tiny):
    tokenizer = load_model(coconut_config(tiny), None).tokenizer
    tokenizer.save_pretrained(tiny)
    model, _, markers = load_model(coconut_config(tiny), None)
    table = model.base_causallm.get_input_embeddings().weight
    like = table[tokenizer.convert_tokens_to_ids("<<")]
    assert all(torch.equal(table[marker], like) for marker in markers[:3])


def test_prefixes_of_wrappers_do_not_matter(tiny, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny)
    base.resize_token_embeddings(base.config.vocab_size + 3)
    state = reference_state(base, wrapped=True)
    renamed = {
        f"_fsdp_wrapped_module.{name}".replace(".h.0.", ".h.0._fsdp_wrapped_module._orig_mod."): state[name]
        for name in state
    }
    torch.save(renamed, tmp_path / "file")
    model = load_model(coconut_config(tiny), tmp_path / "file").model
    wanted = {name: value for name, value in state.items() if name != "embedding.weight"}
    assert all(torch.equal(model.state_dict()[name][: len(value)], value) for name, value in wanted.items())


@pytest.fixture
def saved(tiny, tmp_path) -> tuple[Pretrained, Path]:
    """A model whose latent marker has a row of its own, and its folder."""
    loaded = load_model(coconut_config(tiny), None)
    with torch.no_grad():
        loaded.model.base_causallm.get_input_embeddings().weight[loaded.markers.latent] = 7.0
    loaded.model.base_causallm.save_pretrained(tmp_path / "saved")
    return loaded, tmp_path / "saved"


def test_a_checkpoint_converts_to_a_file_of_the_reference(tiny, saved, tmp_path):
    """The two lines of docs/from_reference.md."""
    loaded, folder = saved
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save({f"base_causallm.{name}": value for name, value in model.state_dict().items()}, tmp_path / "file")
    second = load_model(coconut_config(tiny), tmp_path / "file").model
    assert equal(loaded.model.state_dict(), second.state_dict())


@pytest.mark.parametrize("from_scratch", [False, True])  # from_scratch has no effect on a checkpoint
def test_a_checkpoint_keeps_its_markers_and_weights(tiny, saved, from_scratch):
    loaded, folder = saved
    loaded.tokenizer.save_pretrained(folder)
    again = load_model(coconut_config(tiny, from_scratch=from_scratch), folder)
    assert again.markers == loaded.markers
    assert equal(again.model.state_dict(), loaded.model.state_dict())
    assert pretrained.add_markers(loaded.tokenizer, again.model.base_causallm) == loaded.markers
    assert equal(again.model.state_dict(), loaded.model.state_dict())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("transformer.ln_f.weight"), "missing: transformer.ln_f.weight"),
        (lambda s: s.update(surprise=torch.ones(1)), "unexpected: surprise"),
        (
            lambda s: s.update({"transformer.ln_f.weight": torch.ones(7)}),
            r"another shape: transformer.ln_f.weight \[7\]",
        ),
        (
            lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1}),
            "which ties lm_head.weight and transformer.wte.weight: they differ",
        ),
        (lambda s: s.update(epoch=3), "must map names to dense tensors"),
        (lambda s: s.update({1: torch.ones(1)}), "must map names to dense tensors"),
        (lambda s: s.update({"transformer.ln_f.weight": torch.ones(32).to_sparse()}), "names to dense tensors"),
    ],
)
def test_files_that_do_not_fit_raise_an_error(tiny, tmp_path, change, complaint):
    state = reference_state(AutoModelForCausalLM.from_pretrained(tiny), wrapped=False)
    change(state)
    torch.save(state, tmp_path / "file")
    refuses(complaint, load_model, coconut_config(tiny), tmp_path / "file")


def test_a_folder_with_missing_or_truncated_weights_raises_an_error(tiny):
    path = Path(tiny) / "model.safetensors"
    state = load_file(path)
    state.pop("transformer.h.1.ln_1.weight")
    save_file(state, path, metadata={"format": "pt"})
    refuses(r"missing: transformer.h.1.ln_1.weight", load_model, coconut_config(tiny), None)
    os.truncate(path, 1000)
    refuses("cannot be loaded", load_model, coconut_config(tiny), None)


DAMAGES = {
    "empty": lambda content: b"",
    "text": lambda content: b"weights\n",
    "half": lambda content: content[: len(content) // 2],
    "no end": lambda content: content[:-64],
    "no beginning": lambda content: b"\x00" * 100 + content[100:],
}


def test_a_pickle_that_runs_code_is_not_loaded(tiny, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"weight": Evil()}, tmp_path / "evil")
    refuses("is no file of weights", load_model, coconut_config(tiny), tmp_path / "evil")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_weights_is_named(tiny, tmp_path, damage, legacy):
    """torch raises EOFError, RuntimeError, UnpicklingError, KeyError or IndexError, depending on the damage."""
    path = tmp_path / "file"
    state = reference_state(AutoModelForCausalLM.from_pretrained(tiny), wrapped=False)
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    refuses(f"{path} is no file of weights", load_model, coconut_config(tiny), path)


def change_config(tiny: str, **keys) -> None:
    file = Path(tiny) / "config.json"
    file.write_text(json.dumps(read_json(file) | keys))


def test_from_scratch_takes_only_the_shape(tiny):
    torch.manual_seed(1)
    model, _, _ = load_model(coconut_config(tiny, from_scratch=True), None)
    saved = AutoModelForCausalLM.from_pretrained(tiny)
    assert not torch.equal(model.base_causallm.transformer.h[0].mlp.c_fc.weight, saved.transformer.h[0].mlp.c_fc.weight)


@pytest.mark.parametrize(("known", "stops"), [(None, 0), (0, 0), (5, [0, 5]), ([5, 6], [0, 5, 6]), ([5, 0], [5, 0])])
def test_the_trained_eos_is_among_the_stop_tokens(tiny, known, stops):
    """Regression: Hugging Face's `generate` did not stop at the trained EOS, which is the tokenizer's."""
    file = Path(tiny) / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": known}))
    loaded = load_model(coconut_config(tiny), None)
    assert (loaded.markers.eos, loaded.model.base_causallm.generation_config.eos_token_id) == (0, stops)


def test_files_that_cannot_be_read_are_named(tiny, monkeypatch):
    """Regression: both were errors of safetensors, "header too large" and "No such file or directory"."""
    weights = Path(tiny) / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuses("model.safetensors is a Git LFS pointer, which `git lfs pull`", load_model, coconut_config(tiny), None)
    monkeypatch.setattr("pathlib.Path.open", raising(PermissionError(13, "Permission denied")))
    refuses("cannot be loaded: .* cannot be read: Permission denied", load_model, coconut_config(tiny), None)


def test_ranks_compare_the_ids_of_markers_and_eos(tiny):
    """Regression: a rank whose tokenizer_config.json named another EOS trained and validated with it."""
    loaded = load_model(coconut_config(tiny), None)
    others = loaded._replace(markers=loaded.markers._replace(eos=5))
    first, second = (setup.read_by_rank(Config(only_eval=True), each, {}) for each in (loaded, others))
    assert {name for name in first if first[name] != second[name]} == {"the ids of markers and EOS"}


def test_an_offline_hub_is_named(monkeypatch):
    """Regression: "we couldn't connect to the hub", although HF_HUB_OFFLINE forbids to ask it."""
    monkeypatch.setattr(pretrained.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(pretrained, "hub_problem", pretrained.hub_problem.__wrapped__)  # without its cache
    sentence = "it has not been downloaded, and HF_HUB_OFFLINE is set: download it where"
    refuses(sentence, load_model, coconut_config("some/model"), None)


def test_the_hubs_http_status_is_named(monkeypatch):
    """Regression: too many requests were reported as "couldn't connect"."""
    answer, between = ConnectionError("429 Client Error"), RuntimeError("no entry in the cache")
    answer.response, between.__cause__ = SimpleNamespace(status_code=429), answer
    error = OSError("We couldn't connect to the hub")
    error.__cause__ = between
    monkeypatch.setattr("trainer.pretrained.get_tokenizer_config", raising(error))
    monkeypatch.setattr("trainer.pretrained.hub_problem", lambda: None)
    sentence = r"couldn't connect to the hub; the hub's last answer was HTTP 429"
    refuses(sentence, load_model, coconut_config("some/model"), None)


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "requires bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "compressed-tensors"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
    ],
)
def test_a_missing_quantization_package_is_named(tiny, quantization, reason):
    change_config(tiny, quantization_config=quantization)
    with pytest.raises(UserError, match=f"cannot be loaded: it needs a package that is not installed: .*{reason}"):
        load_model(coconut_config(tiny), None)


@pytest.mark.parametrize("keys", [{}, {"from_scratch": True}])
def test_a_models_code_runs_only_with_trust_remote_code(tiny, tmp_path, monkeypatch, keys):
    """Regression: transformers asked on standard input, so that a pipe with "y" ran the code."""
    monkeypatch.setattr("builtins.input", lambda _: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    change_config(tiny, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"})
    text = "from transformers import GPT2Config, GPT2LMHeadModel\nfrom pathlib import Path\n"
    text += f"Path({str(tmp_path / 'ran')!r}).touch()\nclass Own(GPT2Config):\n    model_type = 'own'\n"
    text += "class OwnModel(GPT2LMHeadModel):\n    config_class = Own\n"
    (Path(tiny) / "own.py").write_text(text)
    with pytest.raises(UserError, match="it has Python code of its own: read that code, and set trust_remote_code"):
        load_model(coconut_config(tiny, **keys), None)
    assert not (tmp_path / "ran").exists()
    model = load_model(coconut_config(tiny, trust_remote_code=True, **keys), None).model
    assert type(model.base_causallm).__name__ == "OwnModel"


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_reported_at_once():
    """Regression: forty lines of retries took 80 s."""
    code = "from test_pretrained import coconut_config, load_model; load_model(coconut_config('some/model'), None)"
    code = f"import time; begin = time.time()\ntry: {code}\nfinally: print(time.time() - begin)"
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "PYTHONPATH": "tests:.:preprocessing"}
    done = python("-c", code, environment=hub, code=1)
    last = done.stderr.splitlines()[-1]
    assert "model_id 'some/model' cannot be loaded: it has not been downloaded, and the hub does not answer (h" in last
    assert "HF_HUB_OFFLINE=1" in last
    assert "Retrying" not in done.stderr
    assert float(done.stdout) < 30  # with the imports


@pytest.mark.parametrize("content", ["", "[]", '{"stage": '])
def test_a_damaged_description_is_named(tmp_path, content):
    (tmp_path / "coconut.json").write_text(content)
    refuses(r"coconut.json cannot be read", pretrained.read_description, tmp_path)
