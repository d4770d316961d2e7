"""Tiny random models of many architectures, and what their scores must be."""

import torch
import transformers

from tests.tiny import CHARACTERS

VOCAB = {"vocab_size": len(CHARACTERS) + 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
DECODER = VOCAB | {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's attention on a CPU takes
    "max_position_embeddings": 512,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
GPT = VOCAB | {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512}
LOCAL = {"sliding_window": 16, "query_pre_attn_scalar": 32}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
ARCHITECTURES = {  # class of the configuration, and its settings
    "Llama": DECODER,
    "Qwen2": DECODER | {"tie_word_embeddings": True},
    "Qwen3": DECODER,
    "Mistral": DECODER | {"sliding_window": None},
    "Ministral": DECODER | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "SmolLM3": DECODER,
    "Olmo": DECODER,
    "Olmo2": DECODER,
    "Olmo3": DECODER | {"sliding_window": 16},
    "Phi": DECODER,
    "Phi3": DECODER | {"sliding_window": None},
    "Gemma": DECODER,
    "Gemma2": DECODER | LOCAL | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "Gemma3Text": DECODER | LOCAL,
    "Granite": DECODER | {"logits_scaling": 1.02},
    "Cohere": DECODER | {"logit_scale": 0.5},
    "Cohere2": DECODER | {"logit_scale": 1.0, "sliding_window": 16},
    "Glm": DECODER,
    "Glm4": DECODER,
    "SeedOss": DECODER,
    "Arcee": DECODER,
    "Ernie4_5": DECODER,
    "Helium": DECODER,
    "Nemotron": DECODER,
    "StableLm": DECODER,
    "Apertus": DECODER,
    "HunYuanDenseV1": DECODER,
    "Starcoder2": DECODER | {"sliding_window": None},
    "GPT2": GPT,
    "GPTJ": GPT | {"rotary_dim": 16},
    "GPTNeoX": DECODER,
    "GPTNeo": VOCAB | {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 512,
                       "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "OPT": DECODER | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "Bloom": VOCAB | {"hidden_size": 64, "n_layer": 2, "n_head": 2},
    "Mpt": VOCAB | {"d_model": 64, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
    "Falcon": {key: value for key, value in DECODER.items() if key != "head_dim"} | {"alibi": False},
    "FalconH1": DECODER | {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8,
                           "mamba_n_groups": 1},
    "Mamba": VOCAB | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "RecurrentGemma": DECODER | {"attention_window_size": 16, "lru_width": 64},
    "Llama4Text": DECODER | {"attention_chunk_size": 16, "num_local_experts": 2, "intermediate_size_mlp": 128},
    "Mixtral": DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3Moe": DECODER | EXPERTS | {"num_experts": 4, "tie_word_embeddings": True},
    "Qwen2Moe": DECODER | EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 64},
    "Olmoe": DECODER | {"num_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": DECODER | EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "head_dim": 16,
                                                "first_k_dense_replace": 1},
    "Glm4Moe": DECODER | EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "GptOss": DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
}  # fmt: skip


def make_config(name, **changes):
    """Return the configuration of a model of the table."""
    return getattr(transformers, f"{name}Config")(**ARCHITECTURES[name] | changes)


def make_architecture(name, dtype=torch.float32, *, sharper=1.0, **changes):
    """Return a model of random weights. `sharper` scales its matrices; above 1, its logits are as large as trained."""
    config = make_config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        attention = {"attn_implementation": "eager"} if name in ("Mamba", "RecurrentGemma") else {}
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(sharper)
        if sharper > 1:
            model.get_output_embeddings().weight.mul_(8.0)
    return model.to(dtype)
