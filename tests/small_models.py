"""Every language model of transformers, small: `from small_models import class_names, small_model, inputs_of`.

A configuration is made of its own defaults, with the sizes replaced that are known by their names; what a family needs
besides is in `_FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

VOCAB_SIZE = 200
KINDS = ("causal", "seq2seq", "masked")

_NAMES: dict[int, str] = {
    VOCAB_SIZE: """
        vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size decoder_vocab_size t2u_vocab_size
        encoder_hash_byte_group_vocab entity_vocab_size unpadded_vocab_size audio_vocab_size char_vocab_size
        unit_hifi_gan_vocab_size
    """,
    32: """
        hidden_size d_model n_embd dim model_dim embed_dim word_embed_proj_dim embedding_size emb_dim
        hidden_dim hidden_size_global dim_model_base lru_width d_latents attention_hidden_size
        true_hidden_size out_hidden_size cross_attention_hidden_size embedding_dim output_dim
        input_embedding_size output_embedding_size prediction_head_size audio_hidden_size adapter_out_dim
        adapter_in_dim pronunciation_embed_dim shape_embed_dim entity_emb_size hidden_size_per_layer_input
        projector_input_dim projector_output_dim conv_output_size speaker_embed_dim encoder_hidden_size
        backbone_hidden_size vision_output_dim qk_head_dim
    """,
    64: """
        intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim moe_intermediate_size dff
        dim_ff ffn_hidden_size feed_forward_size shared_expert_intermediate_size shared_intermediate_size
        intermediate_size_mlp shared_experts_intermediate_size moe_shared_expert_intermediate_size
        dense_intermediate_size mlp_dim expert_ffn_hidden_size speech_encoder_intermediate_size
        t2u_encoder_ffn_dim t2u_decoder_ffn_dim d_inner max_position_embeddings n_positions n_ctx
        max_source_positions max_target_positions context_length max_seq_len max_encoder_position_embeddings
        max_decoder_position_embeddings original_max_position_embeddings model_max_length sliding_window
        attention_window_size local_attention t2u_max_position_embeddings block_size image_size mamba_d_ssm
        tpu_short_seq_length position_bias_max_distance ngram_vocab_size_base num_position_embeddings
    """,
    2: """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers num_attention_heads num_key_value_heads n_head n_heads num_heads
        encoder_attention_heads decoder_attention_heads num_encoder_attention_heads
        num_decoder_attention_heads num_kv_heads kv_n_heads attention_heads n_recurrent_layers
        speech_encoder_layers speech_encoder_attention_heads t2u_encoder_layers t2u_encoder_attention_heads
        t2u_decoder_layers t2u_decoder_attention_heads num_experts_per_tok num_experts_per_token moe_topk
        moe_k moe_top_k index_n_heads swa_num_attention_heads swa_num_key_value_heads linear_num_key_heads
        linear_num_value_heads linear_num_heads depth conf_num_hidden_layers conf_num_attention_heads
        num_self_attention_heads num_cross_attention_heads num_self_attends_per_block n_input_layers
        n_output_layers num_query_groups n_mamba_heads num_global_layers num_layers_per_stack patch_size
        temporal_patch_size
    """,
    4: """
        num_experts n_routed_experts num_local_experts moe_num_experts mamba_n_heads mamba_num_heads
        zero_expert_num time_step_rank num_latents mamba_chunk_size index_topk_blocks rotary_dim
    """,
    16: """
        head_dim d_kv mamba_d_head mamba_head_dim mamba_headdim q_lora_rank kv_lora_rank qk_nope_head_dim
        v_head_dim qk_rope_head_dim index_head_dim dim_head d_head linear_key_head_dim linear_value_head_dim
        linear_head_dim swa_head_dim attention_head_dim attention_head_size kv_channels o_lora_rank
        mamba_dt_rank ple_embed_dim d_rel index_topk state_size mamba_d_state ssm_state_size laurel_rank
        adapter_rank hc_lowrank embedding_rank codebook_dim chunk_size conv_dim num_landmarks
        segment_means_seq_len block_per_row loop_gate_rank gated_norm_rank
    """,
    1: """
        n_group topk_group n_groups mamba_n_groups num_expert_group mamba_ngroups
    """,
}
_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}

# What families need besides, by their `model_type`.
_FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "dory": {"num_hidden_layers": 3, "n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 1}
    | {"layer_types": None},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"adapter_input_size": 32},
    "esm": {"vocab_size": VOCAB_SIZE, "mask_token_id": 3, "pad_token_id": 0},
    "esmc": {"vocab_size": VOCAB_SIZE},
    "falcon_h1": {"mamba_d_head": 16},
    "fsmt": {"langs": ["en", "de"]},
    "funnel": {"block_sizes": [1, 1], "block_repeats": None, "num_decoder_layers": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "led": {"attention_window": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longformer": {"attention_window": 4},
    "mamba2": {"num_heads": 4, "n_groups": 1, "chunk_size": 4},
    "mobilebert": {"intra_bottleneck_size": 32},
    "musicgen": {"num_codebooks": 2},
    "musicgen_decoder": {"num_codebooks": 2},
    "musicgen_melody_decoder": {"num_codebooks": 2},
    "perceiver": {"max_position_embeddings": 8, "qk_channels": 16, "v_channels": 32, "num_blocks": 1},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4}
    | {"indexer_compress_ratio": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": (4, 4), "axial_pos_embds_dim": (16, 16), "attn_layers": ("local", "lsh")}
    | {"num_hidden_layers": 2, "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "num_buckets": 2},
    "roc_bert": {"pronunciation_vocab_size": 160, "shape_vocab_size": 160},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "attention_head_dim": 32, "attention_hidden_size": 64}
    | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
    "zamba2": {"num_hidden_layers": 4, "hybrid_layer_ids": [1, 3], "n_mamba_heads": 4, "attention_head_dim": 32}
    | {"attention_hidden_size": 64}
    | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
}
# Sizes that have to be given even where the default has none.
_GIVEN = ("head_dim", "num_experts_per_tok", "n_routed_experts", "num_key_value_heads")
_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 0, "cls": 1, "sep": 2, "mask": 3, "unk": 4}


def class_names() -> list[tuple[str, str, str]]:
    """`(model_type, class, kind)` of every causal, seq2seq and masked language model of transformers."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
    found: dict[str, tuple[str, str, str]] = {}
    for kind in KINDS:
        for model_type, names in mappings[kind].items():
            for name in [names] if isinstance(names, str) else names:
                own = getattr(transformers, name, None)
                # Several families may share a class.
                if name not in found or (own is not None and own.config_class.model_type == model_type):
                    found[name] = (model_type, name, kind)
    return list(found.values())


def small_config(model_type: str) -> Any:
    """The configuration of a family with small sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[model_type], model_type)


def _small(kind: Any, family: str) -> Any:
    given = _FAMILIES.get(family, {})
    default = kind()
    values: dict[str, Any] = {}
    depth = next((vars(default)[name] for name in _DEPTHS if isinstance(vars(default).get(name), int)), None)
    for name, value in vars(default).items():
        if hasattr(value, "to_diff_dict"):
            values[name] = _small(type(value), value.model_type).to_dict()
        elif isinstance(value, bool) or name.startswith("_"):
            continue
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int | list):
            values[name] = _TOKENS.get(name.removesuffix("_token_id"), 5 + len(values) % 20)
        elif name in _SIZES and (isinstance(value, int) or (value is None and name in _GIVEN)):
            value = _SIZES[name] if value is None else value
            values[name] = min(value, _SIZES[name]) if value > 0 else value
        elif isinstance(value, list | tuple) and depth and len(value) == depth:
            # One layer of each of two kinds, where there are two.
            other = next((one for one in value if one != value[0]), value[0])
            values[name] = [value[0], "full_attention" if "full_attention" in value else other]
    return kind(**{**values, **given})


_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")


def small_model(model_type: str, name: str, seed: int = 0) -> nn.Module:
    """A small model with random weights, without dropout."""
    import transformers

    torch.manual_seed(seed)
    config = small_config(model_type)
    kind = getattr(transformers, name)
    if not isinstance(config, kind.config_class):
        config = next((one for one in vars(config).values() if isinstance(one, kind.config_class)), config)
    if name.endswith(("ForCausalLM", "LMHeadModel", "WithLMHead", "Decoder")) and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return kind(config).eval()


def build(name: str, **given: Any) -> Any:
    """A small model of a class, with changes of its configuration, in training mode."""
    import transformers

    kind = getattr(transformers, name)
    config = small_config(kind.config_class.model_type)
    torch.manual_seed(0)
    return kind(type(config)(**{**config.to_dict(), **given}))


def inputs_of(model: Any, seed: int = 1) -> dict[str, Tensor]:
    """Two lines of eight tokens each, and of six for a decoder."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(30, 150, (2, 8), generator=generator)
    inputs = {"inputs" if model.main_input_name == "inputs" else "input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(30, 150, (2, 6), generator=generator)
    return inputs


def logits_of(model: Any, inputs: Mapping[str, Tensor], grad: bool = False) -> Tensor:
    """Logits of a language model."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(grad):
        found = model(**inputs)
    for name in ("logits", "prediction_logits"):
        if name in found:
            return found[name]
    return found[0]
