"""Coconut.from_pretrained, ask, answers, save_pretrained, push_to_hub."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_model
import torch
from conftest import equal, refuses

from coconut import Coconut
from config import Config
from trainer import checkpoint, inference
from trainer.pretrained import load_model

KEYS = {"method": "coconut", "thought": "projected", "c_thought": 2, "max_latent_stage": 3, "latent_markers": "none"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Makes a run's folder with two checkpoints, of stages 1 and 2."""
    place = tmp_path_factory.mktemp("trained")
    examples = [{"question": "<<3+4*5-6=7>>", "answer": "12", "steps": ["0 8 9"]}]
    (place / "data.json").write_text(json.dumps(examples))
    tiny_model.write_model([place / "data.json"], place / "tiny", "char", "llama", 32, 2, 2, 40, tied=False)
    config = Config(model_id=str(place / "tiny"), from_scratch=True, **KEYS)
    pretrained = load_model(config, None)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in pretrained.model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0).add_(0.01 * torch.randn_like(parameter))
    for epoch in (1, 2):
        folder = place / "run" / f"checkpoint_{epoch}"
        (folder / "trainer").mkdir(parents=True)
        (folder / "trainer" / "state.json").write_text("{}")
        (folder / "trainer" / "manifest.json").write_text('{"trainer/state.json": 2}')
        checkpoint.write_model(folder, config, pretrained, epoch, pretrained.model.state_dict())
    return place / "run"


def test_ask_and_answers_generate_like_generate(run):
    """Regression: a list as a question raised a bare TypeError of str and list."""
    assert Coconut.from_pretrained(run / "checkpoint_1").stage == 1
    model = Coconut.from_pretrained(str(run))
    assert (model.stage, model.config.c_thought, model.training) == (2, 2, False)
    ids = [*model.tokenizer("3+4\n")["input_ids"], *[model.markers.latent] * 4]
    new = model.generate(torch.tensor([ids]), max_new_tokens=6)[0].tolist()
    text = model.tokenizer.decode(new, skip_special_tokens=True)
    assert text
    assert model.ask("3+4", max_new_tokens=6) == text
    assert model.ask("3+4", max_new_tokens=6, n_thoughts=1) != text
    batch = model.answers(["3+4", "5*6-0"], max_new_tokens=6, show_thoughts=True)
    assert batch[0]["output"] == text
    assert [len(result["thoughts"]) for result in batch] == [4, 4]
    assert model.ask("3+4", max_new_tokens=6, do_sample=True, top_k=1) == text
    with pytest.raises(TypeError, match=r"a question must be a str, not list: answers\(\[...\]\) takes several"):
        model.ask(["3+4", "5"])


def test_a_question_without_steps_gets_the_thoughts_of_the_stage(run):
    """Bug: with pad_latent_to_max false, the last stage had as many thoughts as there are steps: none."""
    model = Coconut.from_pretrained(run)
    model.stage, model.config = 4, replace(model.config, pad_latent_to_max=False)
    assert [row.count(model.markers.latent) for row in inference.prompts(model, ["3+4", "5"])] == [6, 6]


def test_a_number_of_thoughts_that_follows_the_steps_has_to_be_chosen(run):
    """Bug: such a model was asked without thoughts, and exported so."""
    model = Coconut.from_pretrained(str(run))
    model.config = replace(model.config, method="latents_by_steps")
    refuses("as many thoughts as an example has steps.*--thoughts", model.ask, "1+2=")
    assert inference.prompts(model, ["1+2="], n_thoughts=2)[0].count(model.latent_token_id) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_loads_unchanged(run, tmp_path, dtype):
    model = Coconut.from_pretrained(run).to(dtype)
    model.save_pretrained(tmp_path / "saved")
    again = Coconut.from_pretrained(tmp_path / "saved")
    assert (again.markers, again.stage) == (model.markers, model.stage)
    assert equal(again.state_dict(), model.state_dict())
    assert again.ask("3+4") == model.ask("3+4")
    refuses("exists and is not", again.save_pretrained, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_push_to_hub_uploads_what_from_pretrained_downloads(run, tmp_path, monkeypatch):
    uploaded, made = {}, []

    class Api:
        def __init__(self, token):
            self.token = token

        def create_repo(self, repo_id, private, exist_ok):
            made.append((repo_id, private, self.token))
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message=None):
            uploaded.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
            return "https://hub/commit"

    monkeypatch.setattr(inference, "HfApi", Api)
    monkeypatch.setattr(inference, "hub_problem", lambda: None)
    model = Coconut.from_pretrained(run)
    assert model.push_to_hub("someone/coconut", commit_message="first") == "https://hub/commit"
    assert {"coconut.json", "thought.safetensors", "model.safetensors", "tokenizer.json", "README.md"} <= set(uploaded)
    assert "    from coconut import Coconut\n" in uploaded["README.md"].decode()
    for name, content in uploaded.items():
        (tmp_path / name).write_bytes(content)
    asked = []
    monkeypatch.setattr(inference, "snapshot_download", lambda name, **how: asked.append((name, how)) or tmp_path)
    assert Coconut.from_pretrained("someone/coconut", revision="v1").ask("3+4") == model.ask("3+4")
    assert asked == [("someone/coconut", {"revision": "v1"})]
    uploaded.clear()
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="someone/other", private=True)
    assert "coconut.json" in uploaded
    assert made == [("someone/coconut", None, None), ("someone/other", True, None)]
    with pytest.raises(TypeError, match="private are options of push_to_hub=True"):
        model.save_pretrained(tmp_path / "again", private=True)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("none", "'none' is no checkpoint"),
        ("some/where/else", "'some/where/else' is no checkpoint"),
        ("some/model", "checkpoint 'some/model' cannot be loaded: .*it is no local folder; on the hub"),
        ("{tiny}", "lacks coconut.json"),
        ("{exported}", "is an exported model"),
    ],
)
def test_other_sources_raise_an_error(run, tmp_path, monkeypatch, source, sentence):
    monkeypatch.setattr("trainer.pretrained.hub_problem", lambda: None)
    for name in ("config.json", "modeling_coconut.py"):
        (tmp_path / name).write_text("{}")
    refuses(sentence, Coconut.from_pretrained, source.format(tiny=run.parent / "tiny", exported=tmp_path))


def test_a_model_without_latents_takes_no_number_of_thoughts(run, tmp_path):
    model = Coconut.from_pretrained(run)
    model.config.method = "cot"
    model.save_pretrained(tmp_path / "cot")
    for options, complaint in (
        ({"n_thoughts": 2}, "this one is of method cot"),
        ({"mode": "direct"}, "mode direct is for method multi_mode: this model is of method cot"),
        ({"mode": "none"}, "mode must be one of"),
    ):
        refuses(complaint, model.ask, "3+4", **options)


def test_unknown_characters_are_named(run, capsys):
    model = Coconut.from_pretrained(run)
    capsys.readouterr()
    model.answers(["3 + 4", "3+4"], max_new_tokens=1)
    assert capsys.readouterr().err == ""
    model.ask("3x+4xy", max_new_tokens=1)
    assert capsys.readouterr().err == "warning: the tokenizer does not know 'xy' in the question '3x+4xy'\n"
