"""Small real models, built in the tests: nothing is downloaded."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from trainer.distributed import cleanup_distributed, setup_distributed

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "preprocessing"))

# in-process tests leave the two cores to the ranks that other tests start
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
os.environ["HF_HUB_OFFLINE"] = "1"

# hypothesis takes an example that lasts 0.2 s for a mistake: it may have waited for a core
settings.register_profile("shared cores", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared cores")

VOCABULARY = 40
DATA = ROOT.parent / "shared" / "data"  # the authors' and others' original files
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data is absent")
SMALL = ["--train", "40", "--valid", "5", "--test", "10"]  # options of the generators


def refusal(main, arguments, capsys) -> str:
    """The standard error of a command that ends with exit code 2."""
    try:
        code = main(arguments.split() if isinstance(arguments, str) else list(map(str, arguments)))
    except SystemExit as end:
        code = end.code
    assert code == 2
    return capsys.readouterr().err


def settled(*arguments) -> list[str]:
    """Arguments of run.py, of each key the last one: run.py itself takes a key that is set twice for a mistake."""
    return list({str(argument).partition("=")[0]: str(argument) for argument in arguments}.values())


def load_script(path: Path):
    """A script as a module, under a name of its own: generate.py and thoughts.py are in benchmarks/ too."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tiny_base(family: str, tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float64, layers: int = 2):
    """A randomly initialised model without dropout."""
    common = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    if family == "gpt2":
        config = GPT2Config(
            n_embd=32, n_layer=layers, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **common
        )
    else:
        if family in ("gemma2", "mistral"):
            common["sliding_window"] = 6  # shorter than the sequences, so that it matters
        if family == "gemma2":
            common |= {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
        configs = {
            "llama": LlamaConfig,
            "qwen2": Qwen2Config,
            "qwen3": Qwen3Config,
            "gemma2": Gemma2Config,
            "phi": PhiConfig,
            "mistral": MistralConfig,
        }
        config = configs[family](
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            **common,
        )
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():  # the usual initialisation is so small that everything is nearly linear
        for parameter in base.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5.0)
    for name, module in list(base.named_modules()):
        if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
            # transformers' own rounds to float32, whatever the model's dtype
            parent, _, attribute = name.rpartition(".")
            norm = torch.nn.RMSNorm(
                module.weight.shape, eps=getattr(module, "variance_epsilon", None) or module.eps, dtype=dtype
            )
            setattr(base.get_submodule(parent), attribute, norm)
    return base


@pytest.fixture(params=["gpt2", "llama", "qwen2"])
def family(request) -> str:
    return request.param


@pytest.fixture
def world():
    """A world of one."""
    yield setup_distributed()
    cleanup_distributed()
