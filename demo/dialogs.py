"""The dialogs the demo model learns, and the variants of them it sees while it trains."""

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from engine.chat_format import Message

Dialog = list[Message]
Turn = tuple[Dialog, str]  # the messages before an answer, and the answer

FILES = [Path(__file__).with_name(name) for name in ("dialogs.en.jsonl", "dialogs.zh.jsonl")]

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "You are a friendly chatbot. Answer briefly.",
    "Be polite.",
    "你是一个有用的助手。",
    "你是一个友好的聊天机器人，请简短回答。",
]
POLITE_OPENINGS = ["Please tell me: ", "Hi! ", "Hey, ", "Can you tell me: ", "请问", "你好，", "我想知道，"]


def load_dialogs() -> list[Dialog]:
    """All dialogs, in the order of the files.

    Raises:
        ValueError: if one prompt has two different answers, which no model could learn.
    """
    lines = [line for path in FILES for line in path.read_text("utf-8").splitlines()]
    dialogs: list[Dialog] = [json.loads(line)["messages"] for line in lines]
    prompts_and_answers(dialogs)
    return dialogs


def prompts_and_answers(dialogs: list[Dialog]) -> list[Turn]:
    """Every distinct prompt in `dialogs`, with its answer.

    Raises:
        ValueError: if one prompt has two different answers.
    """
    answers: dict[str, Turn] = {}
    for dialog in dialogs:
        for prompt, answer in assistant_turns(dialog):
            key = json.dumps(prompt, ensure_ascii=False)
            if answers.setdefault(key, (prompt, answer))[1] != answer:
                raise ValueError(f"two answers to {key}: {answers[key][1]!r} and {answer!r}")
    return list(answers.values())


def assistant_turns(dialog: Dialog) -> Iterator[Turn]:
    """Yields every assistant turn of `dialog`."""
    for i, message in enumerate(dialog):
        if message["role"] == "assistant":
            yield dialog[:i], message["content"]


class Augmentation:
    """Draws variants of dialogs, so that the model learns the questions and not their exact spelling.

    Args:
        dialogs: what the variants are drawn from.
        seed: two augmentations with the same seed draw the same variants.
    """

    def __init__(self, dialogs: list[Dialog], seed: int) -> None:
        self.rng = random.Random(seed)
        self.openers = [dialog for dialog in dialogs if len(dialog) == 2]
        self.history_questions = history_questions(dialogs)

    def vary(self, dialog: Dialog) -> Dialog:
        """`dialog` in other spelling, sometimes with turns before it."""
        question = dialog[0]["content"]
        if question in self.history_questions or dialog[0]["role"] == "system":
            return dialog
        if len(dialog) == 2:  # in a longer one, a later answer may quote the question
            dialog = [Message(role="user", content=self._respell(question)), dialog[1]]
        if self.rng.random() < 0.25:
            dialog = self.rng.choice(self.openers) + dialog
        if self.rng.random() < 0.1:
            dialog = [Message(role="system", content=self.rng.choice(SYSTEM_PROMPTS)), *dialog]
        return dialog

    def _respell(self, question: str) -> str:
        """`question`, about half of the time in another spelling."""
        without_end = question.rstrip(".?!。？！")
        typo = self.rng.randrange(len(question))
        with_typo = question[:typo] + question[typo + 1 :] if len(question) > 8 else question
        polite = self.rng.choice(POLITE_OPENINGS) + question
        spellings = [question.lower(), without_end, without_end.lower(), polite, with_typo]
        return self.rng.choice([*spellings, *[question] * 4])


def history_questions(dialogs: list[Dialog]) -> set[str]:
    """The questions that have more than one answer in `dialogs`: theirs depends on the turns before."""
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for prompt, answer in prompts_and_answers(dialogs):
        answers[prompt[-1]["content"]].add(answer)
    return {question for question, different in answers.items() if len(different) > 1}
