"""Writes a model with random weights: Llama 3's architecture in the size that a benchmark needs.

    python -m benchmarks.random_model /tmp/random-235m

Its speed is that of a trained model of the same shape. Its answers are nonsense, but never end by
themselves: it cannot choose a control token, so a request for N tokens gets exactly N.
"""

import argparse
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.pseudo_words import pseudo_words
from demo.train import CONTROL_TOKENS, make_tokenizer, save_tokenizer

STOP_TOKENS = ["<|end_of_text|>", "<|eot_id|>"]


def write_random_model(
    path: Path,
    *,
    layers: int = 16,
    hidden_size: int = 1024,
    intermediate_size: int = 3584,
    heads: int = 16,
    kv_heads: int = 4,
    vocab_size: int = 8000,
    max_model_len: int = 8192,
    seed: int = 0,
) -> None:
    """Writes config, weights and tokenizer to the folder `path`, as transformers lays them out.

    The default shape has 235 million parameters. They are bfloat16, as Llama 3's are: 0.47 GB. `vocab_size`
    counts the control tokens too.
    """
    tokenizer = make_tokenizer([pseudo_words(50_000, seed)], vocab_size)
    vocabulary = tokenizer.get_vocab()
    stop_ids = [vocabulary[token] for token in STOP_TOKENS]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=len(vocabulary),
        max_position_embeddings=max_model_len,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        bos_token_id=vocabulary["<|begin_of_text|>"],
        eos_token_id=stop_ids,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    forbid_tokens(model, [vocabulary[token] for token in CONTROL_TOKENS])
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=stop_ids, do_sample=True, temperature=0.6, top_p=0.9
    )
    model.bfloat16().save_pretrained(path)
    save_tokenizer(tokenizer, path)


@torch.no_grad()
def forbid_tokens(model: LlamaForCausalLM, token_ids: list[int]) -> None:
    """Gives `token_ids` hugely negative logits, whatever the input.

    Llama has no bias anywhere, so one hidden channel is made into one: every embedding sets it to 1, no
    layer reads or writes it, and the last norm therefore leaves it positive. In the rows of the head that
    belong to `token_ids` it has a large negative weight, and nothing else counts there.
    """
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.input_layernorm.weight[0] = 0.0
        layer.post_attention_layernorm.weight[0] = 0.0
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[token_ids] = 0.0
    model.lm_head.weight[token_ids, 0] = -1000.0


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the folder to write")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--intermediate-size", type=int, default=3584)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=8000)
    parser.add_argument("--max-model-len", type=int, default=8192, help="context, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    write_random_model(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
