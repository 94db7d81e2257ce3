"""Tiny random models of every causal language model of transformers, and of variants of some.

A config's own defaults are shrunk by the names of their sizes, at any depth; what that leaves
inconsistent, `_EXCEPT` puts right for a kind.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 96
_LARGEST = 4_000_000

_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size",
    128: (
        "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions crop_size "
        "ngram_vocab_size_base max_window_layers"
    ),
    64: "mamba_d_ssm index_topk hidden_size_global encoder_hash_byte_group_vocab",
    48: (
        "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff d_inner "
        "ffn_hidden_size block_ff_dim mlp_dim feed_forward_size"
    ),
    32: (
        "hidden_size n_embd d_model word_embed_proj_dim dim emb_dim embedding_size lru_width "
        "input_embedding_size output_embedding_size attention_hidden_size conv_dim block_dim "
        "ple_embed_dim out_hidden_size output_channels embedding_dim cross_attention_hidden_size "
        "backbone_hidden_size output_dim"
    ),
    16: (
        "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size "
        "expert_hidden_size expert_ffn_hidden_size q_lora_rank kv_lora_rank qk_head_dim "
        "index_head_dim mamba_d_state ssm_state_size state_size attention_window_size "
        "sliding_window window_size sliding_window_size image_size router_hidden_size "
        "num_mel_bins"
    ),
    8: (
        "head_dim d_head d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim mamba_n_heads mamba_d_head mamba_num_heads "
        "mamba_head_dim mamba_headdim mamba_chunk_size chunk_size attention_head_dim "
        "attention_head_size global_head_dim patch_size hidden_size_per_layer_input hc_lowrank "
        "hidden_size_per_head pronunciation_embed_dim shape_embed_dim rotary_dim "
        "make_ngram_vocab_size_divisible_by ffn_round_up_to_multiple_of"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts mamba_d_conv conv_kernel "
        "linear_num_value_heads linear_num_heads mamba_dt_rank time_step_rank laurel_rank "
        "num_buckets mm_tokens_per_image adapter_rank"
    ),
    2: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_decoder_layers num_encoder_layers depth num_blocks num_key_value_heads "
        "num_experts_per_tok num_experts_per_token moe_k moe_topk n_group num_expert_group "
        "index_n_heads linear_num_key_heads mamba_expand n_mamba_heads type_vocab_size "
        "num_global_key_value_heads hc_count split_ngram_parts"
    ),
    1: (
        "n_shared_experts num_shared_experts topk_group first_k_dense_replace "
        "moe_layer_start_index moe_layer_end_index moe_num_shared_experts mamba_n_groups "
        "n_groups mamba_ngroups num_dense_layers pad_token_id"
    ),
    0: "num_zero_experts num_register_tokens num_kv_shared_layers num_nextn_predict_layers",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}

_LATENT = {"num_key_value_heads": 4}
_DECODER = {"is_decoder": True}
_EXCEPT: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
            "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu", "dots3_note_text",
        ),
        _LATENT,
    ),
    **dict.fromkeys(
        (
            "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
            "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roformer",
            "xlm-roberta", "xlm-roberta-xl",
        ),
        _DECODER,
    ),
    "bailing_hybrid": _LATENT | {
        "num_hidden_layers": 3, "qk_head_dim": 16, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32,
        },
    },
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _LATENT | {
        "n_group": 1, "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"], "shared_experts_intermediate_size": 16,
        "per_layer_config": {
            1: {
                "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16,
                "kv_lora_rank": 16, "head_dim": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
                "v_head_dim": 8,
            },
        },
    },
    "gemma3": {"image_token_index": 80, "boi_token_index": 81, "eoi_token_index": 82},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    **{kind: {"head_dim": 8} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": _DECODER | {
        "attn_layers": ["local", "lsh"], "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "hash_seed": 1,
    },
    "xlstm": {
        "hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0, "v_dim_factor": 1.0,
        "chunk_size": 16, "head_dim": ..., "qk_head_dim": ..., "v_head_dim": ...,
    },
    "xmod": _DECODER | {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "num_key_value_heads": 4, "attention_hidden_size": 64,
        "attention_head_dim": 16, "use_mamba_kernels": False,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "num_hidden_layers": 3, "hybrid_layer_ids": [2], "num_key_value_heads": 4,
        "n_mamba_heads": 8, "attention_hidden_size": 64, "attention_head_dim": 16,
        "kv_channels": 16, "num_query_groups": 4, "use_mamba_kernels": False,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

_SCALED = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.125,
}
_LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_AUXILIARY = {"output_router_logits": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "granite, scaled": _SCALED,
    "granitemoe, scaled": _SCALED,
    "granitemoehybrid, scaled": _SCALED,
    "falcon_h1, scaled": {"lm_head_multiplier": 0.04, "embedding_multiplier": 5.0},
    "falcon, alibi": {"alibi": True},
    "falcon, new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, in sequence": {"parallel_attn": False, "bias": True, "multi_query": False},
    "llama, llama3": {"rope_parameters": _LLAMA_3},
    "llama, yarn": {"rope_parameters": _YARN},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "llama, more embeddings": {"vocab_size": 192},
    "qwen2, sliding": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
    "mistral, sliding": {"sliding_window": 4},
    "gemma2, not capped": {"final_logit_softcapping": None},
    "gemma3_text, capped": {"final_logit_softcapping": 30.0},
    "cohere, not scaled": {"logit_scale": 1.0},
    "opt, projected": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "mixtral, auxiliary loss": _AUXILIARY,
    "qwen2_moe, auxiliary loss": _AUXILIARY,
    "gpt_oss, auxiliary loss": _AUXILIARY,
    "gpt_bigcode, many heads": {"multi_query": False},
    "gpt_neox, in sequence": {"use_parallel_residual": False},
    "gpt2, not tied": {"tie_word_embeddings": False},
    "deepseek_v3, wide queries": {"q_lora_rank": None},
    "stablelm, parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "bert, encoder": {"is_decoder": False},
}
NOT_MADE = {
    "blt": "its config has no tiny form",
    "dots3_note": "its config has no tiny form",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "drafts for another model, whose states it reads",
    "gemma4_unified_assistant": "drafts for another model, whose states it reads",
    "musicgen": "is an encoder-decoder",
    "musicgen_melody": "is an encoder-decoder",
}
"""Of those that transformers lists, what cannot be made from a config here."""
LISTED = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
KINDS = (*(kind for kind in LISTED if kind not in NOT_MADE), *VARIANTS)


def config_of(kind: str, **options: object) -> Any:
    """The config of a tiny model of a kind, or of a variant of one."""
    name = kind.partition(",")[0]
    cls = CONFIG_MAPPING[name]
    given = _EXCEPT.get(name, {}) | VARIANTS.get(kind, {}) | options
    return cls(**_shrunk(cls().to_dict(), given))


def _shrunk(sizes: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The values of a config that are to differ from its defaults."""
    small = {
        name: _SMALL[name]
        for name, value in sizes.items()
        if name in _SMALL and isinstance(value, int) and not isinstance(value, bool)
    }
    types = sizes.get("layer_types")
    if isinstance(types, list):
        kinds = list(dict.fromkeys(types))
        small["layer_types"] = kinds * 2 if len(kinds) == 1 else kinds
        small["num_hidden_layers"] = len(small["layer_types"])
    for name, value in sizes.items():
        if isinstance(value, dict) and "model_type" in value:
            own = _EXCEPT.get(value["model_type"], {}) | given.get(name, {})
            small[name] = _shrunk(value, own) | {"model_type": value["model_type"]}
            given = given | {name: small[name]}
    return {name: value for name, value in (small | given).items() if value is not ...}


def model(kind: str, **options: object) -> Any:
    """A tiny random model, in float32."""
    config = config_of(kind, **options)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    count = sum(p.numel() for p in empty.parameters())
    if count > _LARGEST and not options:
        raise RuntimeError(f"{kind} is still too large: {count:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
