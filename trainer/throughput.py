"""Tokens per second and model FLOPs utilisation, computed from the batches: nothing is measured on the device."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from coconut import Coconut
from model.backbone import decoder_of

# part of a card's name -> dense peak FLOP/s in (bfloat16, TF32, float32); the first that matches counts. From NVIDIA's
# data sheets, which state twice these for tensor cores, with sparsity
PEAKS = {
    "B200": (2250e12, 1125e12, 75e12),
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100 NVL": (835e12, 418e12, 60e12),
    "H100": (989e12, 494e12, 67e12),
    "H200 NVL": (835e12, 418e12, 60e12),
    "H200": (989e12, 494e12, 67e12),
    "GH200": (989e12, 494e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "L40": (181e12, 90.5e12, 90.5e12),
    "L4": (121e12, 60e12, 30.3e12),
    "A10": (125e12, 62.5e12, 31.2e12),
    "RTX 4090": (165e12, 82.6e12, 82.6e12),
    "V100": (125e12, 15.7e12, 15.7e12),
}


def peak_flops(card: str, arithmetic: str) -> float | None:
    """Returns the peak FLOP/s of a card in this arithmetic (Config.arithmetic); None if unknown."""
    peaks = next((peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", card)), None)
    return peaks and peaks[("bf16", "tf32", "float32").index(arithmetic)]


@dataclass
class FlopCounter:
    """Counts the FLOPs of training on a batch: forward, and twice as much for the backward pass.

    Counts matrix products: each token through the weights of the blocks, the LM head on supervised positions, and
    attention with T^2 position pairs per row of T tokens, as in PaLM's model FLOPs utilisation (arXiv 2204.02311,
    appendix B). Padding and recomputation do not count.
    """

    per_token: int
    per_pair: int
    per_supervised: int

    @classmethod
    def of(cls, model: Coconut) -> FlopCounter:
        decoder = decoder_of(model.base_causallm)
        linear = [module for module in decoder.modules() if isinstance(module, (nn.Linear, Conv1D))]
        head = model.base_causallm.get_output_embeddings().weight
        attention = _attention_width(model.base_causallm.config.get_text_config(decoder=True))
        return cls(2 * sum(module.weight.numel() for module in linear), 4 * attention, 2 * head.numel())

    def training(self, row_lengths: list[int], n_supervised: int) -> int:
        """Returns the FLOPs of one forward and backward pass over rows of these lengths."""
        pairs = sum(length * length for length in row_lengths)
        return 3 * (self.per_token * sum(row_lengths) + self.per_pair * pairs + self.per_supervised * n_supervised)


def _attention_width(config: PreTrainedConfig) -> int:
    """Returns the sum over layers of a token's query width (heads x head size); recurrent layers add nothing."""
    layers = list(config.per_layer_config)  # in some families layers differ
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    width = 0
    for kind, layer in zip(types, layers, strict=False):
        heads = getattr(layer, "num_attention_heads", None)
        if isinstance(heads, int) and "linear" not in kind:
            size = getattr(layer, "head_dim", None)
            width += heads * (size if isinstance(size, int) else layer.hidden_size // heads)
    return width


@dataclass
class Throughput:
    """Counts tokens, FLOPs and waiting times since the last report."""

    flops: FlopCounter
    peak: float | None
    n_tokens: int = 0
    n_flops: int = 0
    waiting: float = 0.0  # seconds spent waiting for the loader
    shares: dict[str, float] = field(default_factory=dict)  # name -> seconds of this rank, reported as shares of time
    since: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Resets all counts and the clock."""
        self.n_tokens, self.n_flops, self.waiting, self.since = 0, 0, 0.0, time.perf_counter()
        self.shares = {}

    def add(self, row_lengths: list[int], n_supervised: int) -> None:
        self.n_tokens += sum(row_lengths)
        self.n_flops += self.flops.training(row_lengths, n_supervised)

    def count(self, share: str, seconds: float) -> None:
        self.shares[share] = self.shares.get(share, 0.0) + seconds

    def report(self, world_size: int) -> dict[str, float]:
        """Returns tokens_per_second over all ranks, loader_wait and the other shares of this rank's time, and, if the
        card's peak is known, mfu; resets the counts. Call it after a device sync. Collective."""
        seconds = max(time.perf_counter() - self.since, 1e-9)
        totals = torch.tensor([self.n_tokens, self.n_flops], dtype=torch.float64)
        dist.all_reduce(totals)  # all ranks
        n_tokens, n_flops = totals.tolist()
        result = {"tokens_per_second": n_tokens / seconds, "loader_wait": self.waiting / seconds}
        result |= {name: part / seconds for name, part in self.shares.items()}
        if self.peak is not None:
            result["mfu"] = n_flops / seconds / (self.peak * world_size)
        self.start()
        return result
