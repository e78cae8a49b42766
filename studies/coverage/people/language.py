"""Models of text, sound and time series of transformers."""

from __future__ import annotations

from typing import Any

import torch

from studies.coverage.people.entry import ENCODER_DECODER, Entry, tokens
from studies.coverage.people.vision import SMALL, of_transformers

_BERT: dict[str, Any] = {**SMALL, "vocab_size": 100, "max_position_embeddings": 32, "type_vocab_size": 2}
_LLAMA: dict[str, Any] = {
    **SMALL,
    "vocab_size": 100,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SEQ2SEQ: dict[str, Any] = {"vocab_size": 100, **ENCODER_DECODER, "max_position_embeddings": 32}
_WAVE: dict[str, Any] = {
    **SMALL,
    "conv_dim": [16, 16, 24],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
    "classifier_proj_size": 32,
}


def _causal() -> dict[str, Any]:
    return tokens(use_cache=False)


def _pairs() -> dict[str, Any]:
    return tokens(decoder_input_ids=torch.randint(3, 100, (2, 6)), use_cache=False)


def _waves() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1600)}


def _llama(name: str, kind: str, heads: int = 4, **more: Any) -> Entry:
    """A decoder with two key heads a layer: these are what can go."""
    return of_transformers(name, kind, {**_LLAMA, **more}, _causal, heads=heads)


ENTRIES = [
    of_transformers("bert", "BertForSequenceClassification", _BERT, tokens),
    of_transformers("bert-mlm", "BertForMaskedLM", _BERT, tokens),
    of_transformers("distilbert", "DistilBertForSequenceClassification",
                    {"vocab_size": 100, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128,
                     "max_position_embeddings": 32}, tokens),
    of_transformers("roberta", "RobertaForSequenceClassification", _BERT, tokens),
    of_transformers("albert", "AlbertForSequenceClassification", {**_BERT, "embedding_size": 32}, tokens),
    of_transformers("deberta", "DebertaForSequenceClassification",
                    {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, tokens),
    of_transformers("deberta-v2", "DebertaV2ForSequenceClassification",
                    {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, tokens),
    of_transformers("electra", "ElectraForSequenceClassification", {**_BERT, "embedding_size": 32}, tokens),
    of_transformers("mpnet", "MPNetForSequenceClassification", _BERT, tokens),
    of_transformers("modernbert", "ModernBertForSequenceClassification",
                    {**_BERT, "pad_token_id": 0, "local_attention": 8}, tokens),
    of_transformers("squeezebert", "SqueezeBertForSequenceClassification",
                    {**_BERT, "embedding_size": 64, "q_groups": 2, "k_groups": 2, "v_groups": 2,
                     "post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2}, tokens),
    of_transformers("mobilebert", "MobileBertForSequenceClassification",
                    {**_BERT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}, tokens),
    of_transformers("fnet", "FNetForSequenceClassification", _BERT,
                    lambda: {"input_ids": tokens()["input_ids"]}),
    of_transformers("longformer", "LongformerForSequenceClassification",
                    {**_BERT, "attention_window": 4, "pad_token_id": 0}, tokens),
    of_transformers("xlnet", "XLNetForSequenceClassification",
                    {"vocab_size": 100, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
                    lambda: tokens(use_mems=False)),
    of_transformers("gpt2", "GPT2LMHeadModel",
                    {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}, _causal),
    of_transformers("gpt-neox", "GPTNeoXForCausalLM", _BERT, _causal),
    of_transformers("gptj", "GPTJForCausalLM",
                    {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 8},
                    _causal),
    of_transformers("opt", "OPTForCausalLM",
                    {**SMALL, "vocab_size": 100, "ffn_dim": 128, "word_embed_proj_dim": 64,
                     "max_position_embeddings": 32}, _causal),
    of_transformers("bloom", "BloomForCausalLM",
                    {"vocab_size": 100, "hidden_size": 64, "n_layer": 2, "n_head": 4}, _causal),
    of_transformers("falcon", "FalconForCausalLM",
                    {**SMALL, "vocab_size": 100, "multi_query": False, "new_decoder_architecture": False}, _causal),
    of_transformers("phi", "PhiForCausalLM", {**_BERT, "pad_token_id": 0}, _causal),
    _llama("llama", "LlamaForCausalLM"),
    _llama("mistral", "MistralForCausalLM"),
    _llama("qwen2", "Qwen2ForCausalLM"),
    _llama("qwen3", "Qwen3ForCausalLM"),
    _llama("gemma", "GemmaForCausalLM"),
    _llama("gemma2", "Gemma2ForCausalLM"),
    _llama("gemma3", "Gemma3ForCausalLM"),
    _llama("phi3", "Phi3ForCausalLM"),
    _llama("olmo2", "Olmo2ForCausalLM"),
    _llama("smollm3", "SmolLM3ForCausalLM"),
    _llama("stablelm", "StableLmForCausalLM"),
    _llama("mixtral", "MixtralForCausalLM", num_local_experts=4),
    _llama("qwen2-moe", "Qwen2MoeForCausalLM", num_experts=4, moe_intermediate_size=64,
           shared_expert_intermediate_size=64, num_experts_per_tok=2),
    _llama("gpt-oss", "GptOssForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    _llama("deepseek-v3", "DeepseekV3ForCausalLM", heads=8, num_key_value_heads=4, head_dim=8, q_lora_rank=32,
           kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, n_routed_experts=4, n_group=1,
           topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32, first_k_dense_replace=1),
    of_transformers("mamba", "MambaForCausalLM",
                    {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, _causal),
    of_transformers("mamba2", "Mamba2ForCausalLM",
                    {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4,
                     "head_dim": 16, "n_groups": 1, "chunk_size": 8}, _causal),
    of_transformers("t5", "T5ForConditionalGeneration",
                    {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
                    _pairs),
    of_transformers("bart", "BartForConditionalGeneration", _SEQ2SEQ, _pairs),
    of_transformers("marian", "MarianMTModel", {**_SEQ2SEQ, "pad_token_id": 0, "decoder_start_token_id": 0}, _pairs),
    of_transformers("wav2vec2", "Wav2Vec2ForSequenceClassification", _WAVE, _waves),
    of_transformers("wav2vec2-ctc", "Wav2Vec2ForCTC", {**_WAVE, "vocab_size": 30}, _waves),
    of_transformers("hubert", "HubertForSequenceClassification", _WAVE, _waves),
    of_transformers("wavlm", "WavLMForSequenceClassification", _WAVE, _waves),
    of_transformers("conformer", "Wav2Vec2ConformerForSequenceClassification", _WAVE, _waves),
    of_transformers("w2v-bert", "Wav2Vec2BertForCTC",
                    {**SMALL, "vocab_size": 30, "feature_projection_input_dim": 32, "mask_time_prob": 0.0},
                    lambda: {"input_features": torch.randn(2, 20, 32)}),
    of_transformers("sew", "SEWForCTC", {**_WAVE, "vocab_size": 30, "squeeze_factor": 2}, _waves),
    of_transformers("ast", "ASTForAudioClassification",
                    {**SMALL, "max_length": 64, "num_mel_bins": 32, "patch_size": 8, "frequency_stride": 8,
                     "time_stride": 8}, lambda: {"input_values": torch.randn(2, 64, 32)}),
    of_transformers("whisper", "WhisperForConditionalGeneration",
                    {**_SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 16,
                     "pad_token_id": 0, "decoder_start_token_id": 1},
                    lambda: {"input_features": torch.randn(2, 16, 40),
                             "decoder_input_ids": torch.randint(3, 100, (2, 6)), "use_cache": False}),
    of_transformers("speech2text", "Speech2TextForConditionalGeneration",
                    {**_SEQ2SEQ, "input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 40,
                     "max_target_positions": 16},
                    lambda: {"input_features": torch.randn(2, 40, 16),
                             "decoder_input_ids": torch.randint(3, 100, (2, 6)), "use_cache": False}),
    of_transformers("patchtst", "PatchTSTForPrediction",
                    {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8,
                     "prediction_length": 8, "d_model": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
                     "ffn_dim": 64, "loss": "mse"}, lambda: {"past_values": torch.randn(2, 32, 3)}),
    of_transformers("patchtsmixer", "PatchTSMixerForPrediction",
                    {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8,
                     "prediction_length": 8, "d_model": 16, "num_layers": 2},
                    lambda: {"past_values": torch.randn(2, 32, 3)}),
    of_transformers("decision-transformer", "DecisionTransformerModel",
                    {"state_dim": 5, "act_dim": 3, "hidden_size": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
                     "max_ep_len": 32},
                    lambda: {"states": torch.randn(2, 6, 5), "actions": torch.randn(2, 6, 3),
                             "rewards": torch.randn(2, 6, 1), "returns_to_go": torch.randn(2, 6, 1),
                             "timesteps": torch.arange(6).repeat(2, 1), "attention_mask": torch.ones(2, 6)}),
]  # fmt: skip
