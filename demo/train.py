"""Trains the demo model: `python -m demo.train`.

Reads the dialogs beside this file, makes a tokenizer, trains a Llama of three million parameters to
know them by heart, and writes `demo/model/` in the layout of transformers. Fixed seeds and a fixed
number of threads make a second run on the same machine give the same bytes. On a machine that is busy
with other things, `OMP_WAIT_POLICY=PASSIVE` in the environment makes it several times faster.

`python -m demo.train --check` only measures the model that is there.
"""

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from demo.check import check
from demo.dialogs import Augmentation, Dialog, load_dialogs
from engine.chat_format import ChatFormat

MODEL = Path(__file__).with_name("model")
SEED = 0
THREADS = 2
VOCAB_SIZE = 2048
CONTEXT = 2048  # tokens
STEPS = 2000
BATCH_SIZE = 16  # dialogs
PEAK_LEARNING_RATE = 1.5e-3
WARMUP_STEPS = 100
IGNORED = -100  # the label of a token that is not to be learned

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|reserved_special_token_2|>",
    "<|reserved_special_token_3|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer like Llama-3's, with at most `vocab_size` tokens with the control ones."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_REGEX), "isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    bos = CONTROL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": CONTEXT,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def make_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """An untrained Llama, with four query heads to a key/value head as in Llama-3-8B."""
    eos = [tokenizer.token_to_id("<|end_of_text|>"), tokenizer.token_to_id("<|eot_id|>")]
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=eos, do_sample=True, temperature=0.6, top_p=0.9
    )
    return model


def encode_example(dialog: Dialog, chat_format: ChatFormat) -> tuple[list[int], list[int]]:
    """Token ids of a dialog, and labels of the same length: the assistant's turns, else IGNORED."""
    token_ids = chat_format.encode_dialog(dialog)
    labels = [IGNORED] * len(token_ids)
    for i, message in enumerate(dialog):
        if message["role"] == "assistant":
            start = len(chat_format.encode_dialog(dialog[:i]))
            end = start + len(chat_format.encode(message["content"].strip())) + 1  # with its <|eot_id|>
            labels[start:end] = token_ids[start:end]
    return token_ids, labels


def batches(dialogs: list[Dialog], chat_format: ChatFormat) -> Iterator[torch.Tensor]:
    """Yields batches [2, dialogs, tokens] of token ids and labels, with dialogs of like length together."""
    rng = random.Random(SEED)
    augmentation = Augmentation(dialogs, SEED)
    while True:
        examples = [encode_example(augmentation.vary(dialog), chat_format) for dialog in dialogs]
        rng.shuffle(examples)
        examples.sort(key=lambda example: len(example[0]) // 8)
        starts = list(range(0, len(examples), BATCH_SIZE))
        rng.shuffle(starts)
        for start in starts:
            yield pad(examples[start : start + BATCH_SIZE])


def pad(examples: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Examples as one tensor [2, examples, tokens]; what fills it up on the right is never a target."""
    batch = torch.zeros(2, len(examples), max(len(token_ids) for token_ids, _ in examples), dtype=torch.long)
    batch[1] = IGNORED
    for row, (token_ids, labels) in enumerate(examples):
        batch[0, row, : len(token_ids)] = torch.tensor(token_ids)
        batch[1, row, : len(labels)] = torch.tensor(labels)
    return batch


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(model: LlamaForCausalLM, dialogs: list[Dialog], chat_format: ChatFormat, steps: int) -> None:
    """Trains `model` in place."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    model.train()
    for step, (token_ids, labels) in zip(range(steps), batches(dialogs, chat_format), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        hidden = model.model(token_ids[:, :-1], use_cache=False).last_hidden_state
        learned = labels[:, 1:] != IGNORED
        loss = F.cross_entropy(model.lm_head(hidden[learned]), labels[:, 1:][learned])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            seconds = time.monotonic() - started
            print(f"step {step}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Writes the folder `demo/model` in bfloat16; an older one is replaced only by a complete one."""
    with tempfile.TemporaryDirectory(dir=MODEL.parent) as temporary:
        folder = Path(temporary) / "model"
        model.to(torch.bfloat16).save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        if MODEL.exists():
            shutil.move(MODEL, Path(temporary) / "old")
        shutil.move(folder, MODEL)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model, then check it.")
    parser.add_argument("--check", action="store_true", help="only check the model that is there")
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(THREADS)
    dialogs = load_dialogs()
    if not args.check:
        texts = dict.fromkeys(message["content"] for dialog in dialogs for message in dialog)
        tokenizer = make_tokenizer(texts, VOCAB_SIZE)
        model = make_model(tokenizer)
        train(model, dialogs, ChatFormat(tokenizer), STEPS)
        save(model, tokenizer)
    check(MODEL, dialogs)


if __name__ == "__main__":
    main()
