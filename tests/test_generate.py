"""tools/generate.py: prompts, output, errors."""

import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
import tiny_model
import torch
from conftest import check_closed_and_full_output, command, one_error, python, refusal, refuses
from transformers import AutoModelForCausalLM, GPT2Config

from analysis.subject import Subject
from coconut import Coconut
from config import Config
from tools import export, generate, thoughts_needed
from trainer import inference
from trainer.pretrained import Pretrained, load_model
from utils import print_result

QUESTIONS = ["3+4", "5*6-0*2"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints with random weights, as run.py writes them, by method."""
    place = tmp_path_factory.mktemp("ask")
    examples = [{"question": "<<3+4*5-6=7>>", "answer": "12", "steps": ["0 8 9"]}]
    (place / "data.json").write_text(json.dumps(examples))
    tiny_model.write_model([place / "data.json"], place / "tiny", "char", "llama", 32, 2, 2, 40)
    for method in ("coconut", "cot"):
        torch.manual_seed(1)
        config = Config(model_id=str(place / "tiny"), method=method, from_scratch=True, thought="layer:-2")
        model, tokenizer, _ = load_model(config, None)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
        model.base_causallm.save_pretrained(place / method)
        tokenizer.save_pretrained(place / method)
        description = {"method": method, "thought": "layer:-2", "stage": 2, "c_thought": 2, "max_latent_stage": 3}
        (place / method / "coconut.json").write_text(json.dumps(description | {"pad_latent_to_max": False}))
    return {name: place / name for name in ("coconut", "cot", "tiny")}


def loaded(folder: Path) -> Pretrained:
    pretrained = load_model(Config(model_id=str(folder), thought="layer:-2"), None)
    pretrained.model.eval()
    return pretrained


def ask(capsys, *arguments) -> list[dict]:
    """Runs the command with --json and returns its lines."""
    assert generate.main([*map(str, arguments), "--json", "--max-new-tokens", "6"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_prompt_is_the_one_of_training(folders, capsys):
    (found,) = ask(capsys, folders["coconut"], QUESTIONS[0])
    model, tokenizer, markers = loaded(folders["coconut"])
    ids = [*tokenizer("3+4\n")["input_ids"], markers.start, *[markers.latent] * 4, markers.end]  # stage 2, two a step
    new = model.generate(torch.tensor([ids]), max_new_tokens=6)[0].tolist()
    text = tokenizer.decode(new, skip_special_tokens=True)
    assert found == {"question": "3+4", "output": text, "answer": text.split("#")[-1].strip()}
    assert found["output"]


def test_options_may_stand_before_the_question():
    assert generate.parse(["run", "--thoughts", "2", "3+4"]).question == "3+4"


def test_a_long_question_does_not_cut_the_answers_of_others(folders, monkeypatch):
    """Bug: it limited the answers of its whole batch."""
    model = inference.load_for_use(str(folders["coconut"]))
    n_prompt = len(inference.prompts(model, [""])[0])
    questions = ["1+2", "1" * (model.max_positions - n_prompt - 2)]
    alone = [model.answers([question], max_new_tokens=6)[0] for question in questions]
    assert model.answers(questions, max_new_tokens=6) == alone
    generated, asked = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **given: asked.append(given) or generated(**given))
    model.answers(questions, max_new_tokens=6)
    assert sorted(given["max_new_tokens"] for given in asked) == [2, 6]  # up to the model's last position
    assert model.answers([]) == []


@pytest.mark.parametrize("k", [0, 1, 5])
def test_thoughts_are_counted_and_shown(folders, capsys, k):
    (found,) = ask(capsys, folders["coconut"], "3+4", "--show-thoughts", "--thoughts", k)
    assert len(found["thoughts"]) == k
    model, tokenizer, markers = loaded(folders["coconut"])
    ids = [*tokenizer("3+4\n")["input_ids"], markers.start, *[markers.latent] * k, markers.end]
    shares = model(torch.tensor([ids])).logits[0].softmax(dim=-1)
    for place, words in enumerate(found["thoughts"], start=ids.index(markers.start)):
        assert words[0][0] == tokenizer.decode([int(shares[place].argmax())])
        assert words[0][1] == pytest.approx(shares[place].max().item(), abs=1e-3)
        assert [share for _, share in words] == sorted((share for _, share in words), reverse=True)
    assert generate.main([str(folders["coconut"]), "3+4", "--show-thoughts", "--thoughts", str(k)]) == 0
    assert capsys.readouterr().out.count("thought ") == k
    assert ask(capsys, folders["cot"], "3+4", "--show-thoughts")[0]["thoughts"] == []


def test_the_source_of_questions_makes_no_difference(folders, tmp_path, capsys, monkeypatch):
    """Bug: the model got all of a JSON file with a byte order mark as one question."""
    single = [ask(capsys, folders["coconut"], question)[0] for question in QUESTIONS]
    (tmp_path / "lines.txt").write_text("3+4\n\n5*6-0*2\n")
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS))
    for name in ("lines.txt", "lines.jsonl"):
        assert ask(capsys, folders["coconut"], "--file", tmp_path / name) == single
        monkeypatch.setattr("sys.stdin", io.StringIO((tmp_path / name).read_text()))
        assert ask(capsys, folders["coconut"]) == single
    examples = [{"question": q, "answer": "1", "steps": ["2"], "id": n} for n, q in enumerate(QUESTIONS)]
    wanted = [{**result, "gold": "1", "id": number} for number, result in enumerate(single)]
    for mark in ("", "\ufeff"):
        (tmp_path / "examples.json").write_text(mark + json.dumps(examples, indent=1), encoding="utf-8")
        assert ask(capsys, folders["coconut"], "--file", tmp_path / "examples.json", "--batch", "1") == wanted


def test_a_question_may_hold_a_line_separator(tmp_path):
    """Bug: str.splitlines divided the question."""
    question = "3\u20284"
    for name, line in (("a.txt", question), ("a.jsonl", json.dumps({"question": question}, ensure_ascii=False))):
        (tmp_path / name).write_text(line + "\n", encoding="utf-8")
        assert generate.read_questions(tmp_path / name) == [{"question": question}]


def test_a_closed_pipe_is_no_error_and_a_full_disk_one_sentence(folders, capfd, monkeypatch):
    """As in `python -m tools.generate ... | head -1`."""
    arguments = [str(folders["coconut"]), "3+4", "--max-new-tokens", "2"]
    assert check_closed_and_full_output(generate.main, arguments, capfd, monkeypatch).count("\n") == 1


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("{cot} 3+4 --thoughts 2", "a number of thoughts is for models with latents"),
        ("{tiny} 3+4", "lacks coconut.json"),
        ("none 3+4", "'none' is no checkpoint"),
        ("{coconut} " + "3" * 60, "a question of 67 tokens fills all 40 positions"),
        ("{coconut} 3\udcff", "a question is not valid UTF-8"),
        ("{coconut} <|latent|>3+4", "a question holds a marker of the latent positions: '<.latent.>3.4'"),
        ("a" * 300 + " 3+4", "cannot be reached: File name too long"),
        ("{coconut} --file {place}/deep.json", "deep.json is not valid JSON: it is nested too deeply"),
        ("{coconut} --file {place}/deeper.jsonl", "line 1 is not valid JSON: it is nested too deeply"),
        ("{coconut} 3+4 --thoughts 99999999999999999999", "thoughts do not fit into 40 positions"),
        ("{coconut} 3+4 --thoughts 40", "40 thoughts do not fit into 40 positions"),
        ("{coconut} --file none.json", "cannot read none.json"),
        ("{coconut}", "standard input is closed: name a question, or a --file"),
        ("{coconut} --file {place}/bad.json", r"record 1 \(counted from 0\) has no 'question'"),
        ("{coconut} --file {place}/worse.jsonl", "line 2 is not valid JSON"),
        # bug: tracebacks, or meaningless samples
        *(
            (f"{{coconut}} 3+4 --sample {option}", f"error: .*{option.split()[0]}")
            for option in ("--top-k -4", "--top-k 0", "--top-p 2", "--temperature 1e-300", "--seed -1")
        ),
    ],
    ids=lambda value: value[:40],
)
def test_errors_are_one_sentence(folders, tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr("sys.stdin", None)  # as with `<&-`
    (tmp_path / "bad.json").write_text('[{"question": "1"}, {"answer": "1"}]')
    (tmp_path / "worse.jsonl").write_text("3+4\n{question: 1}\n")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "deeper.jsonl").write_text('{"question": ' * 100_000)
    error = refusal(generate.main, arguments.format(place=tmp_path, **folders), capsys)
    assert error.startswith("usage: " if "--sample" in arguments else "error: ")
    assert re.search(sentence, error), error


def test_a_models_own_code_runs_if_it_is_trusted(folders, tmp_path, capsys, monkeypatch):
    """Bug: the message was to set trust_remote_code: true, and these commands had no such option."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    own, data = shutil.copytree(folders["coconut"], tmp_path / "own"), tmp_path / "data.json"
    config = json.loads((own / "config.json").read_text()) | {"model_type": "own_llama"}
    config |= {"auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}}
    (own / "config.json").write_text(json.dumps(config))
    text = (
        "from transformers import LlamaConfig, LlamaForCausalLM\nclass Own(LlamaConfig):\n    model_type = 'own_llama'"
    )
    (own / "own.py").write_text(text + "\nclass OwnModel(LlamaForCausalLM):\n    config_class = Own\n")
    assert ask(capsys, own, "3+4", "--trust-remote-code") == ask(capsys, folders["coconut"], "3+4")
    data.write_text('[{"question": "3+4", "answer": "7", "steps": []}]')
    how = [str(own), str(data), "--out", str(tmp_path / "out.json"), "--max-new-tokens", "2"]
    assert thoughts_needed.main([*how, "--trust-remote-code"]) == 0
    refuses("has 2 thoughts a step", Subject.load, str(own), [{"question": "3+4"}], None, True)
    assert "set trust_remote_code: true" in refusal(thoughts_needed.main, how, capsys)
    assert "Python code of its own, which the exported folder would lack" in refusal(
        export.main, [own, tmp_path / "exported"], capsys
    )


def test_wrong_arguments_raise_before_the_import_of_torch(tmp_path):
    """Bug: five seconds of imports came first."""
    calls = [
        ["generate", "none", "3+4"],
        ["generate", str(tmp_path), "3+4"],
        ["generate", "a/b", "--file", "none.json"],
    ]
    calls += [["export", "none", "out"], ["export", "a/b", str(tmp_path.parent)], ["show_data", "none.json"]]
    code = "import importlib, sys\n"
    for tool, *arguments in calls:
        code += f"assert importlib.import_module('tools.{tool}').main({arguments}) == 2\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    lines = python("-c", code).stderr.splitlines()
    assert [line.startswith("error: ") for line in lines] == [True] * len(calls)


def test_sampling_is_from_the_models_own_distribution(folders, tmp_path, capsys):
    """Bug: a checkpoint's top_k of 1 gave one text for every seed."""
    picky = shutil.copytree(folders["coconut"], tmp_path / "picky")
    settings = {"top_k": 1, "repetition_penalty": 50.0, "min_p": 0.9, "do_sample": True}
    (picky / "generation_config.json").write_text(json.dumps(settings))

    def sampled(folder: Path, seed: int, *more) -> str:
        return ask(capsys, folder, "3+4", "--sample", "--temperature", 20, "--seed", seed, *more)[0]["output"]

    plain = [sampled(folders["coconut"], seed) for seed in (0, 0, 1, 2, 3)]
    assert plain[1:] == [sampled(picky, seed) for seed in range(4)]
    assert plain[0] == plain[1]
    assert len(set(plain)) > 1
    assert sampled(folders["coconut"], 5, "--top-k", 1) == ask(capsys, folders["coconut"], "3+4")[0]["output"]


def test_any_text_is_printed_in_any_encoding(folders, monkeypatch):
    """A terminal that is not UTF-8 ended the program with a traceback."""
    for prints in (
        lambda: generate.main([str(folders["coconut"]), "é?", "--json", "--max-new-tokens", "1"]),
        lambda: print_result('"question": "é?"'),
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        prints()
        sys.stdout.flush()
        assert rb'"question": "\xe9?"' in sys.stdout.buffer.getvalue()


def test_damaged_weights_do_not_answer(folders, tmp_path, capsys):
    damaged = shutil.copytree(folders["coconut"], tmp_path / "damaged")
    if not (damaged / "trainer" / "manifest.json").is_file():
        (damaged / "trainer").mkdir()
        (damaged / "trainer" / "manifest.json").write_text(
            json.dumps({"model.safetensors": 1, "trainer/state.json": 1})
        )
    assert "is damaged: model.safetensors differs" in one_error(generate.main, [damaged, "1+2"], capsys)


def test_sampling_is_from_all_tokens():
    """Hugging Face's default is the likeliest 50."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=1, n_positions=600))
    with torch.no_grad():
        base.lm_head.weight.mul_(1e-3)  # nearly uniform: of equal probabilities top_k would keep all
    model = Coconut(base, 297, 298, 299, 0).eval()
    found = model.generate(torch.tensor([[5, 298, 297, 299]]), max_new_tokens=500, do_sample=True, eos_token_id=[])
    assert len(set(found[0].tolist())) > 150
    assert base.generation_config.top_k != 0  # the model's own settings are unchanged


# --- On a terminal ---


class Terminal:
    """tools.generate on a pseudo-terminal."""

    def __init__(self, *arguments):
        self.end, theirs = pty.openpty()
        self.process = subprocess.Popen(
            command("-m", "tools.generate", *arguments, "--max-new-tokens", "6"),
            **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
            start_new_session=True,
            # so that Ctrl-C sends SIGINT, which a shell's background jobs, and their children, ignore
            preexec_fn=lambda: (fcntl.ioctl(0, termios.TIOCSCTTY, 0), signal.signal(signal.SIGINT, signal.SIG_DFL)),
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)

    def until(self, text: str, seconds: float = 180) -> str:
        """Returns the output up to and including a text."""
        found, end = "", time.monotonic() + seconds
        while text not in found:
            assert select.select([self.end], [], [], max(0, end - time.monotonic()))[0], found
            found += os.read(self.end, 4096).decode()
        return found

    def answer(self, keys: str) -> str:
        """Types keys and returns the output up to the next prompt, with single blanks."""
        os.write(self.end, keys.encode())
        return re.sub(r"\s+", " ", self.until("\n> "))


@pytest.fixture
def terminal(folders):
    found = Terminal(folders["coconut"])
    yield found
    found.process.kill()
    found.process.wait()
    os.close(found.end)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_a_conversation(folders, terminal, capsys, key):
    output = re.sub(r"\s+", " ", ask(capsys, folders["coconut"], "3+4")[0]["output"]).strip()
    terminal.until("> ")
    assert output in terminal.answer("3+4\n")
    assert output in terminal.answer("\x1b[A\n")  # the arrow recalls the line before
    assert "error: a question of 67 tokens fills all 40 positions" in terminal.answer("3" * 60 + "\n")
    terminal.answer("\n")
    output = ""
    for _ in range(6):  # Python handles a signal between the prompt and the wait for a key at the next key only
        os.write(terminal.end, key.encode())
        with suppress(AssertionError):
            output = terminal.until("\n", seconds=5)  # no key later: a signal at the interpreter's exit would kill it
            break
    assert terminal.process.wait(timeout=60) == 0
    assert "Traceback" not in output
