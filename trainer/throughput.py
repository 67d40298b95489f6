"""Tokens a second and model FLOPs utilisation, from what a batch holds: nothing is measured on the device."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from coconut import Coconut
from model.backbone import decoder_of

# dense FLOP/s of a card in (bfloat16, TF32, float32), by a part of its name; the first that fits counts. From NVIDIA's
# data sheets, whose tensor core numbers are twice these, with sparsity
PEAKS = {
    "B200": (2250e12, 1125e12, 75e12),
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100": (989e12, 494e12, 67e12),
    "H200": (989e12, 494e12, 67e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "L4": (121e12, 60e12, 30.3e12),
    "A10": (125e12, 62.5e12, 31.2e12),
    "RTX 4090": (165e12, 82.6e12, 82.6e12),
    "V100": (125e12, 15.7e12, 15.7e12),
}


def peak_flops(card: str, arithmetic: str) -> float | None:
    """What a card can do at most, FLOP/s, in this arithmetic (Config.arithmetic); None where that is not known."""
    peaks = next((peaks for part, peaks in PEAKS.items() if part in card), None)
    return peaks and peaks[("bf16", "tf32", "float32").index(arithmetic)]


@dataclass
class FlopCounter:
    """FLOPs of training a model on a batch: forward, and twice as much for the backward pass.

    Counted are the matrix products: each token through the weights of the blocks, the LM head on supervised positions,
    and attention with T^2 pairs of positions in a row of T tokens, as PaLM's model FLOPs utilisation has it (arXiv
    2204.02311, appendix B). Padding and what is computed twice do not count.
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
        """FLOPs of one forward and backward pass over rows of so many tokens."""
        pairs = sum(length * length for length in row_lengths)
        return 3 * (self.per_token * sum(row_lengths) + self.per_pair * pairs + self.per_supervised * n_supervised)


def _attention_width(config: PreTrainedConfig) -> int:
    """Numbers in the queries of a token, in all layers together; recurrent layers have none."""
    layers = list(config.per_layer_config)  # in some families they differ
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
    """What has been trained on since the last report."""

    flops: FlopCounter
    peak: float | None
    n_tokens: int = 0
    n_flops: int = 0
    waiting: float = 0.0  # seconds for the loader
    shares: dict[str, float] = field(default_factory=dict)  # seconds of this rank, by the name that their share has
    since: float = field(default_factory=time.perf_counter)

    def start(self) -> None:
        """Begins to count, after a pause."""
        self.n_tokens, self.n_flops, self.waiting, self.since = 0, 0, 0.0, time.perf_counter()
        self.shares = {}

    def add(self, row_lengths: list[int], n_supervised: int) -> None:
        self.n_tokens += sum(row_lengths)
        self.n_flops += self.flops.training(row_lengths, n_supervised)

    def count(self, share: str, seconds: float) -> None:
        self.shares[share] = self.shares.get(share, 0.0) + seconds

    def report(self, world_size: int) -> dict[str, float]:
        """tokens_per_second over all ranks, loader_wait and what else is counted (shares of this rank's time), and,
        where the card is known, mfu, the share of its peak. To be called when the device has been waited for.
        Collective."""
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
