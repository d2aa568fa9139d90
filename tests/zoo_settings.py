"""What makes the configs of transformers small: a value by the name of a field, and what single classes need beside."""

from __future__ import annotations

from typing import Any

V = 64  # vocabulary
FIRST, LAST = 24, 60  # of the ids that stand for words
D = 32

# What a field of whole numbers becomes, by the first pattern that its whole name matches.
RULES = [
    (r"pad_token_id|pad_index|pad_id", 0),
    (r"bos_token_id|bos_index|decoder_start_token_id", 1),
    (r"eos_token_id|eos_index|sep_token_id", 2),
    (r"image_token_(id|index)|image_patch_id", 3),
    (r"video_token_(id|index)", 4),
    (r"audio_token_(id|index)", 5),
    (r"vision_start_token_id|boi_token_(id|index)|(low_res_)?image_start_token_id|image_bos_token_id", 6),
    (r"vision_end_token_id|eoi_token_(id|index)|image_end_token_id|image_eos_token_id", 7),
    (r"video_start_token_id|audio_(start|bos)_token_id|boa_token_(id|index)|im_start_id", 8),
    (r"video_end_token_id|audio_(end|eos)_token_id|eoa_token_(id|index)|im_end_id|im_newline_id", 9),
    (r"\w*_token_(id|index)", 10),
    (r"(\w+_)?vocab_size|vocab_size_per_layer_input", V),
    (r"(\w+_)?(num_)?(hidden_|encoder_|decoder_)?layers|n_layers?|depth|num_blocks", 2),
    (r"(\w+_)?num_key_value_heads|num_kv_heads|linear_num_key_heads", 2),
    (r"(\w+_)?(num_)?attention_heads|(\w+_)?num_heads|(\w+_)?n_heads?|resampler_heads|linear_num_value_heads", 4),
    (r"mamba_head_dim", 16),
    (r"(\w+_)?head_dim|(\w+_)?dim_head|d_kv|kv_channels|attention_head_size|d_rel", 8),
    (r"(\w+_)?(moe|expert|experts)(\w*)_(intermediate|ffn_hidden)_size|share_expert_dim", 16),
    (r"(\w+_)?intermediate_size(_\w+)?|(\w+_)?ffn_dim|d_ff|dff|dim_ff|ffn_hidden_size|mlp_dim|d_inner", 48),
    (r"feed_forward_size", 48),
    (r"(\w+_)?(hidden_size(_global)?|d_model|n_embd|embed_dim|emb_dim|embedding_size|hidden_dim|dim_model)", D),
    (r"(\w+_)?(projection|output|out|input|in)_dims?|adapter_input_size|projection_hidden_dim", D),
    (r"hidden_size_per_layer_input|laurel_rank|adapter_rank|(\w+_)?lora_rank|gated_norm_rank|hc_lowrank", 8),
    (r"qk_(rope|nope)_head_dim|v_head_dim", 8),
    (r"(num|n)_(local_|routed_)?experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|num_experts_per_token", 2),
    (r"n_group|topk_group|n_shared_experts|(moe_)?num_shared_experts|num_mtp_layers", 1),
    (r"index_topk", 4),
    (r"(\w+_)?max_(\w+_)?position(s|_embeddings)|n_positions|n_ctx|max_seq_len|context_length", 128),
    (r"max_(source|target)_positions", 128),
    (r"(\w+_)?image_size|crop_size", 16),
    (r"patch_size", 4),
    (r"num_position_embeddings|num_patches", 16),
    (r"mamba_d_state|(ssm_)?state_size|mamba_d_ssm|(mamba_)?chunk_size", 8),
    (r"output_channels", 16),
    (r"sliding_window|attention_window_size|local_attention", 8),
]  # fmt: skip
UNSET = {  # fields whose default is None, and which their models need
    "head_dim": 8, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1,
    "sliding_window": 8, "n_group": 1, "topk_group": 1, "mlp_dim": 48,
}  # fmt: skip
FLOATS = {  # so that whatever a model does to its logits shows
    "initializer_range": 0.02, "final_logit_softcapping": 4.0, "logits_soft_cap": 4.0, "output_logit_soft_cap": 4.0,
    "logit_scale": 0.7, "logits_scaling": 1.6, "lm_head_multiplier": 1.7, "output_multiplier": 0.6,
    "logits_mup_width_multiplier": 1.5,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
SQUARE = {"image_size": [16, 16], "patch_size": [4, 4]}
TILES = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
VQ = {
    "embed_dim": 16, "num_embeddings": 8, "latent_channels": 16, "base_channels": 32, "channel_multiplier": (1, 1),
    "num_res_blocks": 1, "resolution": 16, "codebook_size": 8,
}  # fmt: skip
BOTH = ["sliding_attention", "full_attention"]
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": BOTH * 2}

OTHER: dict[str, dict[str, Any]] = {
    "AriaConfig": {"projector_patch_to_query_dict": {16: 4}},
    "BailingHybridConfig": LINEAR,
    "BambaConfig": {"attn_layer_indices": [1]},
    "Blip2Config": {"image_token_index": 3, "num_query_tokens": 4},
    "BltConfig": {"encoder_hash_byte_group_vocab": 16, "patching_threshold": 0.0},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 3} | {f"IMGIMG{chr(65 + i)}Z": 10 + i for i in range(8)}},
    "ChameleonVQVAEConfig": VQ,
    "CodeGenConfig": {"rotary_dim": 4},
    "CohereCompassTextConfig": {"rope_parameters": dict.fromkeys(BOTH, ROPE)},
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": D, "ffn_hidden_size": 16},
    },
    "DeepseekOcr2SamVisionConfig": {"downsample_channels": [16, D]},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "DiffusionGemmaTextConfig": {"num_experts": 4, "top_k_experts": 2},
    "Dots3NoteVisionConfig": {"mlp_layer_types": ["dense", "sparse"]},
    "Emu3Config": {
        "vocabulary_map": {"<image>": 3, "<|extra_200|>": 9} | {f"<|visual token {i:06d}|>": 10 + i for i in range(8)}
    },
    "Emu3VQVAEConfig": VQ,
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [16, 16], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]},
    },
    "EvollaConfig": {
        "aligner_num_add_layers": 1, "aligner_attention_probs_dropout_prob": 0.0, "resampler_depth": 1,
        "protein_encoder_config": {
            "vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
    },
    "FastVlmConfig": {"vision_config": {"model_type": "siglip_vision_model"}},  # in place of timm's
    "Florence2VisionConfig": {
        "depths": (1, 1), "patch_size": (7, 3), "patch_stride": (4, 2), "patch_padding": (3, 1),
        "patch_prenorm": (False, True), "embed_dim": (16, D), "num_heads": (2, 4), "num_groups": (2, 4),
        "window_size": 4,
    },
    "FunAsrNanoAdaptorConfig": {"intermediate_size": D // 4},
    "Gemma3Config": {"mm_tokens_per_image": 4},
    "Gemma3nTextConfig": SHARED,
    "Gemma4AssistantConfig": {
        "text_config": {
            "num_hidden_layers": 2, "layer_types": BOTH, "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        },
    },
    "Gemma4Config": {"vision_config": {"pooling_kernel_size": 2}},
    "Gemma4TextConfig": SHARED,
    "Gemma4UnifiedConfig": {"vision_config": {"pooling_kernel_size": 2, "mm_posemb_size": 16, "output_proj_dims": D}},
    "Gemma4UnifiedTextConfig": SHARED,
    "Glm5NextTextConfig": {
        "index_kpool": 2, "layer_types": ["linear_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "GPTJConfig": {"rotary_dim": 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Granite4VisionConfig": TILES | {
        "downsample_rate": "1/2", "deepstack_layer_map": [[-1, 0]], "spatial_target_layers": [0, 0, 1, 1],
        "vision_config": {"hidden_size": 64},
    },
    "GraniteDoclingVisionConfig": {"scale_factor": 2, "deepstack_visual_indexes": [0]},
    "GraniteMoeHybridConfig": LINEAR,
    "IdeficsConfig": {"freeze_text_layers": False, "freeze_vision_layers": False},
    "InklingTextConfig": {"unpadded_vocab_size": LAST},
    "Inkling2TextConfig": {"unpadded_vocab_size": LAST},
    "InstructBlipConfig": {"image_token_index": 3, "num_query_tokens": 4},
    "InstructBlipVideoConfig": {"video_token_index": 4, "num_query_tokens": 4},
    "InternVLVisionConfig": SQUARE,
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "JanusVQVAEConfig": VQ,
    "KimiLinearConfig": LINEAR,
    "Kosmos2Config": {"latent_query_num": 4},
    "Kosmos2_5Config": {"latent_query_num": 4},
    "Kosmos2_5VisionConfig": {"patch_embed_hidden_size": 48},
    "KyutaiSpeechToTextConfig": {"codebook_vocab_size": 16, "num_codebooks": 2, "audio_pad_token_id": 63},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "Lfm3Config": {"num_hidden_layers": 3},
    "Llama4VisionConfig": {
        "intermediate_size": 128, "projector_input_dim": D, "projector_output_dim": D, "vision_output_dim": D,
    },
    "LlavaNextConfig": TILES,
    "LlavaNextVideoConfig": TILES,
    "LlavaOnevisionConfig": TILES,
    "Mamba2Config": {"head_dim": 16, "n_groups": 2},
    "MimiConfig": {"upsample_groups": 4, "num_filters": 4, "upsampling_ratios": [4, 2]},
    "MiniCPMOcrConfig": {"image_token_id": 3},
    "MiniCPMV4_6Config": {"image_token_id": 3},
    "MiniCPMV4_7Config": {"image_token_id": 3},
    "MllamaTextConfig": {"cross_attention_layers": [1]},
    "MllamaVisionConfig": {"vision_output_dim": 3 * D, "intermediate_layers_indices": [0, 1]},
    "Molmo2AdapterConfig": {"vision_feature_layer": [1, 0]},
    "Molmo2VisionConfig": {"image_size": [16, 16], "num_position_embeddings": 16},
    "MuseGlimmerConfig": {"out_hidden_size": 4 * D},
    "MuseSparkAudioConfig": {"num_hidden_layers": 4, "hidden_sizes": (8, 8, 16, 16), "depths": (1, 1, 1, 1)},
    "MuseSparkConfig": {"out_hidden_size": 4 * D},
    "NemotronConfig": {"num_key_value_heads": 2},
    "NemotronHConfig": {"n_groups": 2},
    "NemotronH_Omni_Reasoning_V3_Config": {
        "image_token_id": 3, "vision_config": {"video_temporal_patch_size": 2, "max_img_size": 16},
    },
    "PaddleOCRTextConfig": {"rope_parameters": ROPE},
    "PerceptionLMConfig": {"vision_config": {"model_type": "siglip_vision_model", "model_args": {"embed_dim": D}}},
    "Phi4MultimodalAudioConfig": {
        "nemo_conv_channels": 8, "ext_pw_out_channel": D, "depthwise_separable_out_channel": D,
    },
    "PI0Config": {
        "vlm_config": {
            "text_config": {"model_type": "gemma"}, "vision_config": {"model_type": "siglip_vision_model"},
        },
    },
    "PPFormulaNetVisionConfig": {"post_conv_out_channels": 16, "post_conv_mid_channels": 16},
    "QianfanOCRVisionConfig": SQUARE,
    "Qwen2_5OmniConfig": {"enable_audio_output": False},
    "Qwen2_5OmniThinkerConfig": {"vision_start_token_id": 6},
    "Qwen3_5MoeTextConfig": LINEAR,
    "Qwen3_5TextConfig": LINEAR,
    "Qwen3NextConfig": LINEAR,
    "Qwen3OmniMoeConfig": {"enable_audio_output": False},
    "Qwen3OmniMoeThinkerConfig": {"vision_start_token_id": 6},
    "Qwen4ExpTextConfig": LINEAR | {
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {
        "is_decoder": True, "hash_seed": 0, "axial_pos_shape": (3, 4), "axial_pos_embds_dim": (8, 24),
    },
    "SamVisionConfig": {"global_attn_indexes": (1,)},
    "UnlimitedOcrSamVisionConfig": {"downsample_channels": (16, D)},
    "VibeVoiceAcousticTokenizerEncoderConfig": {
        "num_filters": 4, "downsampling_ratios": (2, 2), "depths": (1, 1, 1),
    },
    "VipLlavaConfig": {"vision_feature_layers": [-2, -1]},
    "XLMConfig": {"causal": True},
    "xLSTMConfig": {"num_heads": 4, "hidden_size": 128, "chunk_size": 64},
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"]},
    "ZambaConfig": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}  # fmt: skip
