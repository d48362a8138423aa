"""Made-up words: text that a tokenizer can be trained on and that no cache has seen."""

import random

CONSONANTS = "bcdfghjklmnpqrstvwz"
VOWELS = "aeiou"


def pseudo_words(count: int, seed: int) -> str:
    """`count` words of one to four syllables, with spaces between them; the same for the same seed."""
    rng = random.Random(seed)
    words = []
    for _ in range(count):
        syllables = rng.randint(1, 4)
        words.append("".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(syllables)))
    return " ".join(words)
