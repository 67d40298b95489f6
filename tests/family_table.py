"""Tiny models of every causal language model family in transformers, and the expected result of check_family."""

from __future__ import annotations

from ast import literal_eval

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# values that make a model small, for every attribute of a configuration with one of these names
SIZES = {
    "40": "vocab_size unpadded_vocab_size vocab_size_per_layer_input audio_vocab_size",
    "64": """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff n_inner ffn_hidden_size
        shared_intermediate_size intermediate_size_mlp d_inner dense_intermediate_size feed_forward_size
        prefix_dense_intermediate_size max_position_embeddings n_positions n_ctx max_seq_len model_max_length
        context_length rel_extent attention_window_size attention_chunk_size""",
    "32": """hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim attention_hidden_size lru_width
        input_embedding_size output_embedding_size moe_intermediate_size shared_expert_intermediate_size
        expert_ffn_hidden_size moe_shared_expert_intermediate_size shared_experts_intermediate_size""",
    "8": """head_dim swa_head_dim kv_channels v_head_dim qk_nope_head_dim qk_rope_head_dim dim_head d_head
        attention_head_size linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim d_rel mamba_d_head
        mamba_head_dim rotary_dim kv_lora_rank q_lora_rank gated_norm_rank loop_gate_rank laurel_rank hc_lowrank
        mamba_d_state ssm_state_size state_size time_step_rank mamba_dt_rank""",
    "6": "sliding_window window_size sliding_window_size local_attention",
    "4": """num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads decoder_attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads linear_num_heads
        linear_num_value_heads index_n_heads mamba_n_heads mamba_num_heads n_mamba_heads num_experts num_local_experts
        n_routed_experts moe_num_experts mamba_d_conv chunk_size mamba_chunk_size hidden_size_per_layer_input""",
    "2": """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
        num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts""",
    "1": """n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group
        mamba_n_groups n_groups""",
    "0": "num_nextn_predict_layers num_mtp_layers first_k_dense_replace zero_expert_num eos_token_id",
    "0.0": """dropout attention_dropout activation_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout
        hidden_dropout_prob attention_probs_dropout_prob residual_dropout router_jitter_noise input_jitter_noise
        final_dropout""",
    "None": "bos_token_id pad_token_id decoder_start_token_id forced_eos_token_id sep_token_id",
}
TINY = {name: literal_eval(value) for value, names in SIZES.items() for name in names.split()}


def fields(config: type[PreTrainedConfig]) -> set[str]:
    return {name for kind in config.__mro__ for name in getattr(kind, "__annotations__", {})}


def configure(family: str, **changes) -> PreTrainedConfig:
    """Returns a family's configuration, including its sub-configurations, with small values."""
    return _tiny(CONFIG_MAPPING[family], EXTRA.get(family, {}) | changes)


def _tiny(kind: type[PreTrainedConfig], changes: dict) -> PreTrainedConfig:
    has = fields(kind)
    values = {name: value for name, value in TINY.items() if name in has}
    changes = dict(changes)
    for name, inner in kind.sub_configs.items():
        if inner is AutoConfig:
            inner = type(getattr(kind(), name, None))
        if issubclass(inner, PreTrainedConfig):
            values[name] = _tiny(inner, changes.pop(name, {}))
    return kind(**values | changes)


LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
ATTENTION_SECOND = {"attn_layer_period": 2, "attn_layer_offset": 1}
ZAMBA = {"attention_hidden_size": 64, "attention_head_dim": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_expand": 2}  # of 8 each: 2 * 32
ALL_HEADS = {"num_key_value_heads": 4}
HAS_PAD = {"pad_token_id": 0}
HAS_START = {"decoder_start_token_id": 0}
CAPPED = {"final_logit_softcapping": 2.0}
NO_LAYER_INPUTS = {"hidden_size_per_layer_input": 0}
SPECIAL = {name: 30 + place for place, name in enumerate(("image_token_id", "video_token_id", "audio_token_id"))}
SPECIAL |= {"boi_token_id": 34, "eoi_token_id": 35, "boa_token_id": 36, "eoa_token_index": 37}
DECODER = {"is_decoder": True, "pad_token_id": 0}
QSA = {f"indexer_{name}": value for name, value in (("n_heads", 2), ("kv_heads", 1), ("head_dim", 8), ("budget", 64))}
QSA |= {"indexer_compress_ratio": 1}

# further values that a family needs, or that enable its special features
EXTRA: dict[str, dict] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"), ALL_HEADS),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"), ALL_HEADS),
    **dict.fromkeys(
        ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "lara_mini", "minimax", "olmo_hybrid"), LINEAR_AND_FULL
    ),
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), LINEAR_AND_FULL | ALL_HEADS),
    **{family: {"text_config": LINEAR_AND_FULL} for family in ("qwen3_5", "qwen3_5_moe")},
    "qwen4_exp_text": LINEAR_AND_FULL | QSA,
    "qwen4_exp": {"text_config": LINEAR_AND_FULL | QSA},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "jamba": ATTENTION_SECOND,
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA | LINEAR_AND_FULL,
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.5},
    "mamba2": {"num_heads": 8},
    "zamba": ZAMBA | {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "blt": {"encoder_hash_byte_group_vocab": 40},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "reformer": DECODER | {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "zaya": {"num_experts_per_tok": 1},
    "falcon": {"alibi": True},
    **{family: {"logits_scaling": 3.0} for family in ("hyperclovax", "granite")},
    "cwm": {"bos_token_id": 1},
    "modernbert-decoder": {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1},
    "mllama": {"text_config": {"bos_token_id": 1, "cross_attention_layers": [1]}},
    "emu3": {"text_config": {"pad_token_id": 0, "bos_token_id": 1}},
    **dict.fromkeys(("bigbird_pegasus", "blenderbot", "marian", "trocr", "whisper", "xglm"), HAS_START),
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra"), DECODER),
    **dict.fromkeys(("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roformer"), DECODER),
    **dict.fromkeys(("ernie", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod"), DECODER),
    "gemma4": SPECIAL | {"text_config": HAS_PAD | NO_LAYER_INPUTS | CAPPED},
    "gemma4_unified": SPECIAL | {"text_config": HAS_PAD | CAPPED},
    "gemma2": CAPPED,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "logits_soft_cap": 2.0},
    "llama4_text": {"attention_chunk_size": 6},
    "inkling_text": {"logits_mup_width_multiplier": 3.0},
}
HEAD = "its logits are not those of its LM head"
PADDING = "padding before a row changes its logits"
NO_EMBEDDINGS = "its forward pass from embeddings fails"
BY_ANY_METHOD = "cannot be trained here, by any method: "
WITH_LATENTS = "cannot be trained with latent thoughts here: "

# Part of the reason why a family cannot be trained by any method; all others can.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("bert", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"), HEAD),
    **dict.fromkeys(("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"), HEAD),
    **dict.fromkeys(("xlm-roberta-xl", "modernbert-decoder"), HEAD),
    **dict.fromkeys(("blt", "cpmant", "deepseek_v4", "prophetnet", "reformer", "xlm", "xmod"), NO_EMBEDDINGS),
    "gemma3n_text": "its forward uses more of a token than its embedding",
    "xlnet": "its logits at a token depend on later tokens",
}

# Part of the reason why a family can be trained only without latents.
REFUSED_WITH_LATENTS: dict[str, str] = {
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "git", "marian", "mbart"), PADDING),
    **dict.fromkeys(("mvp", "pegasus", "plbart", "recurrent_gemma", "trocr"), PADDING),
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), "over a cache its"),
    "ctrl": "modified inplace",  # it multiplies the embeddings that it is given
    **dict.fromkeys(("gemma4_text", "minimax", "openai-gpt", "rwkv", "xlstm"), NO_EMBEDDINGS),
    "zamba": "modified by an inplace operation",
}

# Audio models and parts of models; gemma3n needs the package timm, and gemma3n_text is tested.
NOT_BUILT = {"musicgen", "musicgen_melody", "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "dots3_note"}

# Families that fail in float64, because their masks are float32 or their modules fix a dtype
FLOAT32 = {"bloom", "gemma2", "granite_swa", "granitemoe_swa", "mpt", "vaultgemma", "xglm"}
FLOAT32 |= {"hy_v4", "inkling2_text", "inkling2_loop_text", "zamba"}
FAMILIES = [family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in NOT_BUILT]

# one family of each kind
QUICK = [
    *("gpt2", "llama", "qwen3", "mixtral", "deepseek_v3", "deepseek_v32", "gpt_neo", "bloom", "falcon", "biogpt"),
    *("hyperclovax", "cohere2", "granite", "gemma2", "gemma3", "gemma4", "inkling_text", "dory", "xglm", "llama4_text"),
    *("qwen3_5", "mamba2", "falcon_h1", "kimi_linear", "zamba2", "mamba", "jamba", "recurrent_gemma", "ctrl"),
    *("gemma3n_text", "gemma4_text", "rwkv", "xlstm", "minimax", "modernbert-decoder", "bert", "longcat_flash"),
]


def dtype_of(family: str) -> torch.dtype:
    return torch.float32 if family in FLOAT32 else torch.float64


def tiny_model(family: str, dtype: torch.dtype | None = None, seed: int = 0, **changes) -> PreTrainedModel:
    """Returns a random model with weights so large that no layer is nearly linear."""
    torch.manual_seed(seed)
    config = configure(family, **changes)
    base = AutoModelForCausalLM.from_config(config, dtype=dtype or dtype_of(family), experts_implementation="eager")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(5.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return base.eval()
