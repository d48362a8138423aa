"""Small models and tokenizers of the real architecture, made on the spot."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.random_model import forbid_tokens
from demo.train import CONTROL_TOKENS, LLAMA3_REGEX
from engine.int8_linear import quantize

# What Meta's tokenizer gives for the words of its own test of the chat format.
GOLDEN_WORDS = {
    "system": 9125, "user": 882, "assistant": 78191, "\n\n": 271, "This": 2028, " is": 374, " a": 264,
    " test": 1296, " sentence": 11914, ".": 13, " response": 2077,
}  # fmt: skip


def byte_characters() -> list[str]:
    """The characters that stand for bytes, in the order of the first 256 ids of Llama 3."""
    return sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (ord(c) >= 256, ord(c)))


def make_tokenizer(words: dict[str, int] | None = None, vocab_size: int = 256) -> Tokenizer:
    """A tokenizer with Llama 3's rules that knows single bytes, `words`, and nothing else.

    Args:
        words: text -> id, of tokens longer than a byte.
        vocab_size: the id of the first control token.
    """
    alphabet = byte_characters()
    vocab = {character: i for i, character in enumerate(alphabet)}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for word, token_id in (words or {}).items():
        vocab[byte_level.pre_tokenize_str(word)[0][0]] = token_id
    used = set(vocab.values())
    vocab |= {f"unused {i}": i for i in range(vocab_size) if i not in used}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated"),
        byte_level,
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    return tokenizer


SHAPES = {
    "gqa-2": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    "mqa-tied": {
        "num_hidden_layers": 3,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}


def make_model(
    folder: Path,
    shape: str = "gqa-2",
    *,
    context: int = 512,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a model with random weights and its tokenizer into `folder`, and returns it."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        initializer_range=0.2,
        bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
        eos_token_id=[tokenizer.token_to_id("<|end_of_text|>"), tokenizer.token_to_id("<|eot_id|>")],
        pad_token_id=None,
        **SHAPES[shape],
    )
    model = LlamaForCausalLM(config)
    if not config.tie_word_embeddings:
        forbid_tokens(model, list(range(256, config.vocab_size)))
    model.to(dtype).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def quantized_copy(model: Path, folder: Path) -> Path:
    """The same model with weights that int8 can hold, on disk as any other."""
    loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    for module in loaded.modules():
        if isinstance(module, nn.Linear):
            weight, scale = quantize(module.weight.detach())
            module.weight.data.copy_(weight * scale.float().unsqueeze(1))
    loaded.save_pretrained(folder)
    return folder
