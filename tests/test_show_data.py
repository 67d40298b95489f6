"""tools/show_data.py: tokens, lengths, errors."""

import json
import re

import pytest
import tiny_model
from conftest import ROOT, one_error

from tools import show_data

EXAMPLES = [
    {"question": "1+2*3?", "steps": ["<<1+2=3>>", "<<3*3=9>>"], "answer": "9"},
    {"question": "5?", "steps": [], "answer": "5"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("look")
    (folder / "data.json").write_text(json.dumps(EXAMPLES))
    tiny_model.write_model([folder / "data.json"], folder / "model", "char", "gpt2", 16, 1, 2, 64)
    return folder


def looked(folder, capsys, *arguments: str) -> list[str]:
    assert show_data.main([str(folder / "data.json"), "--model", str(folder / "model"), *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_tokens_of_a_stage(folder, capsys):
    lines = looked(folder, capsys, "--stage", "1")
    assert lines[0].endswith(f"2 examples; method coconut, stage 1, model {folder / 'model'}")
    assert lines[2:7] == [
        "example 0: 22 tokens",
        "     given    8  1|+|2|*|3|?|⏎|<|start-latent|>",
        "    latent    1  <|latent|> x 1",
        "     given    1  <|end-latent|>",
        "supervised   12  <<|3|*|3|=|9|>>|⏎|###| |9|<|endoftext|>",
    ]
    assert lines[8].startswith("example 1: ")


def test_the_configuration_sets_method_and_stage(folder, capsys):
    lines = looked(folder, capsys, "--config", str(ROOT / "args" / "gsm_coconut.yaml"), "--examples", "1")
    assert "method coconut, stage 1" in lines[0]  # the run begins with epoch 3
    assert "    latent    2  <|latent|> x 2" in lines
    assert "example 1:" not in "\n".join(lines)
    lines = looked(folder, capsys, "--config", str(ROOT / "args" / "gsm.yaml"), "--stage", "3", "row=icot")
    assert lines[3:5] == [
        "     given    7  1|+|2|*|3|?|⏎",
        "supervised   17  2|=|3|>>|⏎|<<|3|*|3|=|9|>>|⏎|###| |9|<|endoftext|>",
    ]


def test_the_table_of_lengths(folder, capsys):
    lines = looked(folder, capsys, "--stage", "7", "--examples", "0")
    table = {line[:24].strip(): line[24:].split() for line in lines[-6:]}
    assert table == {
        "steps of an example": ["1.0", "0", "0", "2", "2", "0"],
        "tokens of the question": ["5.0", "3", "3", "7", "7", "0"],
        "tokens of all steps": ["8.0", "0", "0", "16", "16", "0"],
        "tokens of the answer": ["3.0", "3", "3", "3", "3", "0"],
        "sequence at stage 7": ["17.0", "15", "15", "19", "19", "0"],
        "of it supervised": ["4.0", "4", "4", "4", "4", "0"],
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["data.json", "--model", "model", "--stage", "8"], "there is no stage 8: the last one .* is 7"),
        (["data.json", "--model", "none/at/all"], "model_id 'none/at/all' cannot be loaded"),
        (["absent.json", "--model", "model"], "'absent.json' does not exist"),
        (["gsm_valid.json", "--model", "model"], r"does not exist \(make it with: bash preprocessing/gsm_icot.bash\)"),
        (["data.json", "--model", "./tiny_arithmetic"], r"does not exist \(make it with: .*arithmetic"),
        ([".", "--model", "model"], "'.' is no file"),
        (["data.json", "--config", "absent.yaml"], "cannot read absent.yaml"),
    ],
)
def test_errors_are_one_sentence(folder, arguments, complaint, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert re.search(complaint, one_error(show_data.main, arguments, capsys))


def test_further_inputs_of_methods(folder, capsys, tmp_path):
    """A method whose batches lack these trains without its own loss, and no error says so."""

    def shown(**keys) -> list[str]:
        path = tmp_path / "method.yaml"
        path.write_text(json.dumps({"max_latent_stage": 2, **keys}))
        return looked(folder, capsys, "--config", str(path), "--stage", "2", "--examples", "1")

    lines = shown(step_decoder="copy", c_thought=2)
    assert "  latents 1 to 2 predict: <<|1|+|2|=|3|>>" in lines
    assert "  latents 3 to 4 predict: <<|3|*|3|=|9|>>" in lines
    lines = shown(latent_labels=0.05, c_thought=2, thought="looped", latent_passes="stage")
    assert "  before latent 1 predicts: <<" in lines
    assert "  latent 2 predicts: + and <<" in lines
    lines = shown(method="codi")
    assert "  teacher:" in lines
    assert "supervised   11  <<|1|+|2|=|3|>>|###| |9|<|endoftext|>" in lines
    assert any(line.startswith("  compared: the states at ' ', before '9', columns") for line in lines)
    lines = shown(method="multi_mode")
    assert "  direct:" in lines
    assert "  written:" in lines
    assert "supervised   21  <<|1|+|2|=|3|>>|⏎|<<|3|*|3|=|9|>>|⏎|<|end-latent|>|###| |9|<|endoftext|>" in lines
