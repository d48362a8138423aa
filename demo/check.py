"""How well the demo model knows its dialogs."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from demo.dialogs import Dialog, Turn, prompts_and_answers
from engine.chat_format import ChatFormat

BATCH_SIZE = 64
MAX_TOKENS = 512
SAMPLED_PROMPTS = 100
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None}
SERVER_DEFAULTS: dict[str, Any] = {
    "do_sample": True,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 0,
    "repetition_penalty": 1.1,
}


def check(folder: Path, dialogs: list[Dialog]) -> None:
    """Prints how many answers are word for word those of `dialogs`, greedy and with the server's sampling.

    Raises:
        SystemExit: if the model is not good enough to be shipped.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat_format = ChatFormat.from_pretrained(folder)
    turns = prompts_and_answers(dialogs)
    exact, ended = accuracy(model, chat_format, turns, GREEDY)
    print(f"greedy: {exact:.1%} of {len(turns)} answers word for word, {ended:.1%} ended by themselves")
    sample = random.Random(0).sample(turns, SAMPLED_PROMPTS)
    torch.manual_seed(0)
    sampled_exact, sampled_ended = accuracy(model, chat_format, sample, SERVER_DEFAULTS)
    print(f"sampled: {sampled_exact:.1%} of {len(sample)} word for word, {sampled_ended:.1%} ended")
    print(f"size: {model.num_parameters():,} parameters, {folder_size(folder):,} bytes")
    if exact < 0.95 or ended < 1 or sampled_exact < 0.85:
        raise SystemExit("not good enough: at least 95% greedy, 85% sampled, and every answer ended")


def accuracy(
    model: LlamaForCausalLM, chat_format: ChatFormat, turns: list[Turn], sampling: dict[str, Any]
) -> tuple[float, float]:
    """The share of `turns` answered word for word, and the share that ended before MAX_TOKENS."""
    exact = ended = 0
    by_length = sorted(turns, key=lambda turn: len(turn[1]))
    for start in range(0, len(by_length), BATCH_SIZE):
        batch = by_length[start : start + BATCH_SIZE]
        answers = generate(model, chat_format, [prompt for prompt, _ in batch], sampling)
        for (prompt, expected), (answer, stopped) in zip(batch, answers, strict=True):
            exact += answer == expected
            ended += stopped
            if answer != expected:
                print(f"  {prompt[-1]['content']!r}: {answer!r}, not {expected!r}")
    return exact / len(turns), ended / len(turns)


@torch.inference_mode()
def generate(
    model: LlamaForCausalLM, chat_format: ChatFormat, prompts: list[Dialog], sampling: dict[str, Any]
) -> list[tuple[str, bool]]:
    """The model's answer to each prompt, and whether it ended by itself."""
    encoded = [chat_format.encode_dialog(prompt) for prompt in prompts]
    length = max(map(len, encoded))
    pad = min(chat_format.stop_token_ids)
    token_ids = torch.tensor([[pad] * (length - len(ids)) + ids for ids in encoded])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in encoded])
    output = model.generate(
        token_ids, attention_mask=mask, pad_token_id=pad, max_new_tokens=MAX_TOKENS, **sampling
    )
    return [cut_at_stop(ids, chat_format) for ids in output[:, length:].tolist()]


def cut_at_stop(token_ids: list[int], chat_format: ChatFormat) -> tuple[str, bool]:
    """The text before the first stop token, and whether there is one."""
    stops = [i for i, token_id in enumerate(token_ids) if token_id in chat_format.stop_token_ids]
    text: str = chat_format.tokenizer.decode(token_ids[: stops[0] if stops else None])
    return text, bool(stops)


def folder_size(folder: Path) -> int:
    """Bytes of all files in `folder`."""
    return sum(path.stat().st_size for path in folder.iterdir())
