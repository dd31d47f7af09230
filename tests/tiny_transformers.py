"""Tiny random models of many architectures of transformers, in float64."""

from typing import Any

import torch
import transformers

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
HEADS_OF_4 = GROUPED | {"head_dim": 4}
GPT2_SIZES = {
    "vocab_size": VOCAB,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

# the architectures that the adapter takes: class of their settings, and the settings
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", GPT2_SIZES),
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", HEADS_OF_4),
    "mistral": ("MistralConfig", HEADS_OF_4 | {"sliding_window": 5}),
    "gemma": ("GemmaConfig", HEADS_OF_4),
    "gemma2": (
        "Gemma2Config",
        HEADS_OF_4 | {"query_pre_attn_scalar": 4, "sliding_window": 5, "layer_types": ALTERNATING},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        HEADS_OF_4 | {"query_pre_attn_scalar": 4, "sliding_window": 5, "layer_types": ALTERNATING},
    ),
    "gptj": ("GPTJConfig", GPT2_SIZES | {"rotary_dim": 2}),
    "gpt_neox": ("GPTNeoXConfig", SMALL),
    "phi": ("PhiConfig", GROUPED),
    "phi3": ("Phi3Config", GROUPED | {"sliding_window": 5}),
    "olmo": ("OlmoConfig", GROUPED),
    "olmo2": ("Olmo2Config", GROUPED),
    "smollm3": ("SmolLM3Config", GROUPED),
    "opt": (
        "OPTConfig",
        {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 12, "pad_token_id": 1},
    ),
    "gpt_oss": (
        "GptOssConfig",
        HEADS_OF_4
        | {
            "sliding_window": 5,
            "layer_types": ALTERNATING,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "mixtral": ("MixtralConfig", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("CohereConfig", GROUPED),
    "cohere2": ("Cohere2Config", GROUPED | {"sliding_window": 5, "layer_types": ALTERNATING}),
    "granite": (
        "GraniteConfig",
        GROUPED | {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "starcoder2": ("Starcoder2Config", GROUPED | {"sliding_window": 5}),
    "gpt_bigcode": ("GPTBigCodeConfig", GPT2_SIZES | {"multi_query": True}),
    "llama4_text": (
        "Llama4TextConfig",
        HEADS_OF_4
        | {
            "intermediate_size_mlp": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 5,
            "no_rope_layers": [1, 1, 0],
            "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        SMALL
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 8,
            "first_k_dense_replace": 1,
        },
    ),
    "stablelm": ("StableLmConfig", GROUPED),
    "olmoe": ("OlmoeConfig", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        HEADS_OF_4 | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
}

# architectures with a layer that no bias per key can reach, and the first such layer
REFUSED: dict[str, tuple[str, dict[str, Any], int]] = {
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 4},
        0,
    ),
    "mpt": ("MptConfig", {"vocab_size": VOCAB, "d_model": 16, "n_layers": 2, "n_heads": 4}, 0),
    "falcon": ("FalconConfig", SMALL, 0),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
        0,
    ),
    "mamba": (
        "MambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
        0,
    ),
    "jamba": (
        "JambaConfig",
        GROUPED
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
        },
        0,
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        HEADS_OF_4
        | {
            "layer_types": ["full_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 4,
            "linear_value_head_dim": 4,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        1,
    ),
    "lfm2": (
        "Lfm2Config",
        GROUPED | {"layer_types": ["full_attention", "conv", "full_attention"]},
        1,
    ),
    "recurrent_gemma": ("RecurrentGemmaConfig", HEADS_OF_4 | {"lru_width": 16}, 0),
    "rwkv": ("RwkvConfig", {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2}, 0),
}


def tiny(name: str, *, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A random causal model, the same whenever it is asked for."""
    config_class, settings = (SUPPORTED | REFUSED)[name][:2]
    config = getattr(transformers, config_class)(**(settings | changes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # large enough for differences to show
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
    return model.to(dtype)


def supported() -> list[str]:
    """The architectures of SUPPORTED that the installed version of transformers makes reachable."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    since_5 = {"stablelm", "olmoe"}
    return [
        name
        for name in SUPPORTED
        if version >= ((5, 24) if name == "gptj" else (5, 0) if name in since_5 else (4, 56))
    ]


def refused() -> list[str]:
    return [name for name, (config, *_) in REFUSED.items() if hasattr(transformers, config)]
