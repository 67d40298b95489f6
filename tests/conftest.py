"""Shared by the tests: tiny models, short runs, helpers that start programs. Nothing is downloaded."""

import gc
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import run
from config import Config
from trainer.distributed import cleanup_distributed, setup_distributed
from trainer.logger import read_log
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("preprocessing", "experiments", "benchmarks")]

# other tests start two ranks on the same two cores
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"
if not os.environ.get("TEST_ON_GPU"):  # tests start two ranks, and each would need a GPU of its own
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# an example may wait for a core: hypothesis fails one that takes over 0.2 s
settings.register_profile("shared cores", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared cores")

VOCABULARY = 40
DATA = ROOT.parent / "shared" / "data"  # the authors' and others' original files
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
SMALL = ["--train", "40", "--valid", "5", "--test", "10"]  # options of the generators


def refusal(main, arguments, capsys) -> str:
    """Returns the standard error of a command that exits with code 2."""
    try:
        code = main(arguments.split() if isinstance(arguments, str) else list(map(str, arguments)))
    except SystemExit as end:
        code = end.code
    assert code == 2
    return capsys.readouterr().err


def one_error(main, arguments, capsys) -> str:
    """Returns the standard error of a command that exits with code 2 and one error message."""
    capsys.readouterr()
    error = refusal(main, arguments, capsys)
    assert (error[:7], error.count("\n")) == ("error: ", 1), error
    return error


def refuses(sentence: str, function, *arguments, **keys) -> None:
    """Asserts that a call raises a UserError whose text matches a pattern."""
    with pytest.raises(UserError, match=sentence):
        function(*arguments, **keys)


def check_closed_and_full_output(main, arguments: list[str], capfd, monkeypatch) -> str:
    """Asserts that a command ignores a closed pipe and that a full disk is one sentence. Returns its standard error."""
    reading, writing = os.pipe()
    os.close(reading)
    for target, code in ((writing, 0), ("/dev/full", 2)):
        with open(target, "w") as output:
            monkeypatch.setattr(sys, "stdout", output)
            assert main(arguments) == code
    error = capfd.readouterr().err
    assert error.splitlines()[-1] == "error: standard output cannot be written: No space left on device"
    return error


def raising(error: BaseException):
    """Returns a function that raises an error, whatever its arguments."""

    def fail(*_, **__):
        raise error

    return fail


def last_of_each(*arguments) -> list[str]:
    """Returns the arguments of run.py, with the last value of each key: run.py rejects a key that is set twice."""
    return list({str(argument).partition("=")[0]: str(argument) for argument in arguments}.values())


def keys(text: str) -> tuple[str, ...]:
    """The key=value arguments in a text, which blanks and newlines separate."""
    return tuple(text.split())


def tiny_base(family: str, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64, layers: int = 2):
    """Returns a randomly initialised model without dropout."""
    keys = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    if family == "gpt2":
        keys |= {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 64}
        keys |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    else:
        keys |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
        keys |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": tied}
    if family in ("gemma2", "mistral"):
        keys["sliding_window"] = 6  # shorter than the sequences
    if family == "gemma2":
        keys |= {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys), dtype=dtype)
    with torch.no_grad():  # with the usual small initialisation the model is nearly linear
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    return with_exact_norms(base) if dtype == torch.float64 else base


def with_exact_norms(base: torch.nn.Module) -> torch.nn.Module:
    """Replaces transformers' RMSNorm, which computes in float32 whatever the dtype, by a new one in float64."""
    for name, module in list(base.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            eps = getattr(module, "variance_epsilon", None) or module.eps
            norm = torch.nn.RMSNorm(module.weight.shape, eps=eps, dtype=torch.float64)
            base.set_submodule(name, norm)
    return base


@pytest.fixture(params=["gpt2", "llama", "qwen2"])
def family(request) -> str:
    return request.param


@pytest.fixture
def no_collection():
    """For tests that fill the stack: a collection there would fail in finalizers of what other tests left. Also for
    tests of what is freed without it: it frees cycles too late, because it does not know a tensor's size."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def world():
    """A world of one."""
    yield setup_distributed()
    cleanup_distributed()


# --- Weights ---


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Returns the largest absolute difference between tensors of the same name."""
    return max((found[name] - value).abs().max().item() for name, value in wanted.items())


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Returns whether two models are bitwise equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- Programs ---


def command(*arguments, ranks: int = 0) -> list[str]:
    """Returns the command line of a Python program, under torchrun if ranks > 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return [sys.executable, *launcher, *map(str, arguments)]


def python(
    *arguments, ranks: int = 0, code: int | None = 0, environment: dict | None = None, **options
) -> subprocess.CompletedProcess:
    """Runs a program in the repository. code: its expected exit code; None: any but 0."""
    options = {"cwd": ROOT, "timeout": 600, "env": {**os.environ, **(environment or {})}, **options}
    done = subprocess.run(command(*arguments, ranks=ranks), capture_output=True, text=True, **options)
    assert done.returncode != 0 if code is None else done.returncode == code, done.stdout[-3000:] + done.stderr[-4000:]
    return done


def start(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs run.py. Options as in `python`."""
    return python(ROOT / "run.py", *last_of_each(*arguments), **options)


def complaint_of(done: subprocess.CompletedProcess) -> str:
    """Returns the error of a program, which must print exactly one."""
    (found,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return found


def together(*arguments) -> subprocess.CompletedProcess:
    """Runs run.py on two ranks, without torchrun."""
    done = forked.run(2, ROOT / "run.py", *last_of_each(*arguments))
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture
def here(capsys, monkeypatch):
    """`start` in this process: a new one takes seconds to import torch."""

    def start_here(*arguments, code: int | None = 0) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["run.py", *last_of_each(*arguments)])
        capsys.readouterr()
        try:
            ended = run.main(run.configure(run.__doc__, run.schedule, run.plan))
        except SystemExit as end:
            ended = end.code or 0
        done = subprocess.CompletedProcess(arguments, ended, *capsys.readouterr())
        assert ended != 0 if code is None else ended == code, done.stderr
        return done

    return start_here


# --- Runs ---


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with data, two tiny models, a short run's configuration run.yaml, and the runs of all tests, by name."""
    import arithmetic
    import tiny_model

    folder = tmp_path_factory.mktemp("place")
    for name, examples in arithmetic.make_splits({"train": 150, "valid": 30}, base=5).items():
        (folder / f"{name}.json").write_text(json.dumps(examples))
    for name, width in (("model", 32), ("other_model", 64)):
        tiny_model.write_model([folder / "train.json"], folder / name, "char", "gpt2", width, 1, 2, 128)
    config = {
        **{"save_path": str(folder / "runs"), "name": "run", "model_id": str(folder / "model"), "coconut": True},
        **{"c_thought": 1, "epochs_per_stage": 1, "max_latent_stage": 2, "uniform_prob": 0.3, "num_epochs": 3},
        **{"seed": 1, "train_path": str(folder / "train.json"), "val_path": str(folder / "valid.json"), "lr": 1e-3},
        **{"batch_size_training": 8, "max_new_tokens": 40, "reset_optimizer": False, "num_workers": 0},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def with_dropout(place: Path) -> Path:
    folder = place / "with_dropout"
    model = AutoModelForCausalLM.from_pretrained(place / "model", resid_pdrop=0.2, embd_pdrop=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(folder)
    return folder


def main(place: Path, *overrides, code: int = 0) -> Path:
    """Runs run.main in this process; returns the run's folder."""
    config = Config.from_file(place / "run.yaml", last_of_each(*overrides))
    assert run.main(config) == code
    return config.run_dir


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def lines_of(file: Path) -> list[dict]:
    """Reads JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_json(file: Path) -> dict:
    return json.loads(file.read_text())


def steps(run_dir: Path, event: str = "step") -> list[dict]:
    """Reads the records of an event from a run's log, which the run may still be writing."""
    return [record for record in read_log(run_dir / "metrics.jsonl") if record["event"] == event]


def epochs(run_dir: Path) -> list[dict]:
    return steps(run_dir, "epoch")


def digest(folder: Path) -> str:
    contents = [(str(p), p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()]
    return hashlib.sha256(repr(contents).encode()).hexdigest()


def flip(file: Path) -> None:
    """Changes a bit."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def check_ranks_and_restart(place: Path, name: str, keys, last: int = 3, tolerance: float = 1e-5, read=weights) -> Path:
    """Asserts that two ranks, with DDP and FSDP, get the weights of one rank up to the order of additions, and that a
    restart before the last epoch gets them bitwise. Returns the folder of the run on one rank."""
    alone = main(place, *keys, f"name={name}")
    wanted = read(alone / f"checkpoint_{last}")
    for strategy in ("ddp", "fsdp"):
        together(place / "run.yaml", *keys, f"name={name}-{strategy}", f"strategy={strategy}")
        assert distance(read(place / "runs" / f"{name}-{strategy}" / f"checkpoint_{last}"), wanted) < tolerance
    main(place, *keys, f"name={name}-parts", f"num_epochs={last - 1}")
    assert equal(read(main(place, *keys, f"name={name}-parts") / f"checkpoint_{last}"), wanted)
    return alone
