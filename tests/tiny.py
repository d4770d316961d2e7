"""A language model of 100k parameters and a character tokenizer, built in code without downloads or files."""

import string
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"


def make_tiny_tokenizer(vocab_size: int = len(CHARACTERS) + 2) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per printable character; other characters are an error.

    A larger vocabulary is filled with tokens that no text contains.
    """
    fillers = (f"<{index}>" for index in range(vocab_size - len(CHARACTERS) - 2))
    vocab = {token: index for index, token in enumerate([PAD, EOS, *CHARACTERS, *fillers])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_max_length=512, padding_side="left"
    )


def make_tiny_policy(seed: int = 0, vocab_size: int = len(CHARACTERS) + 2) -> LlamaForCausalLM:
    """Return a Llama of two layers; 32 is the smallest head_dim that vLLM's CPU attention takes."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save_tiny(directory: Path, seed: int = 0) -> Path:
    """Save policy and tokenizer into a folder that `from_pretrained` and vLLM load."""
    make_tiny_policy(seed).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    return directory
