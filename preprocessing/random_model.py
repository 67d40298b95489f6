"""A randomly initialised model of GPT-2's, Llama's or Qwen2's shape, of any size.

transformers is imported only where a model is made, so that a command line can be read with these defaults at once.
"""

from dataclasses import dataclass

SHAPES = ("gpt2", "llama", "qwen2")


@dataclass(frozen=True)
class RandomModel:
    """The model and its weights, apart from the vocabulary. Without dropout: small models underfit anyway.

    GPT-2's shape fixes tied, mlp and kv_heads: True, 4, and as many as heads.
    """

    shape: str = "gpt2"
    width: int = 128  # hidden size
    layers: int = 2
    heads: int = 4  # of attention
    positions: int = 1024  # the longest sequence
    tied: bool = True  # one matrix for input and output, as in GPT-2
    seed: int = 0  # of the weights
    mlp: int = 3  # the MLP's width, in hidden sizes
    kv_heads: int | None = None  # None: as many as heads

    def config(self, vocab_size: int, eos: int = 0):
        """Its transformers configuration."""
        from transformers import GPT2Config, LlamaConfig, Qwen2Config

        common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": eos, "pad_token_id": None}
        if self.shape == "gpt2":
            sizes = {"n_embd": self.width, "n_layer": self.layers, "n_head": self.heads, "n_positions": self.positions}
            return GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common)
        return {"llama": LlamaConfig, "qwen2": Qwen2Config}[self.shape](
            hidden_size=self.width,
            intermediate_size=self.mlp * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=self.positions,
            tie_word_embeddings=self.tied,
            **common,
        )

    def build(self, vocab_size: int, eos: int = 0):
        """The model in float32, the same whenever the arguments are."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(self.seed)
        return AutoModelForCausalLM.from_config(self.config(vocab_size, eos), dtype=torch.float32)
