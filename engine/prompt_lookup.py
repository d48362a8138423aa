"""Guesses of what comes next, out of the text itself."""


class PromptLookup:
    """Finds where a text's last tokens stood before, and proposes what came behind them there.

    Answers that quote their prompt (a summary, an edit of a text or of code) do so for many tokens at a time.
    The method is Saxena's ("Prompt Lookup Decoding", 2023).
    """

    _MATCH = 3
    """Tokens that must have stood there together: fewer do too often by chance."""

    def __init__(self) -> None:
        self._end_of: dict[tuple[int, ...], int] = {}
        """The position behind the last occurrence of each run of tokens, the text's own end left out."""
        self._end = self._MATCH
        """Behind the next run to be noted."""

    def propose(self, token_ids: list[int], count: int) -> list[int]:
        """The tokens that may come next: `count`, or none.

        Args:
            token_ids: the text, which at each call has only grown.
        """
        for end in range(self._end, len(token_ids)):
            self._end_of[tuple(token_ids[end - self._MATCH : end])] = end
        self._end = max(self._end, len(token_ids))
        found = self._end_of.get(tuple(token_ids[-self._MATCH :]))
        if found is None:
            return []
        drafts: list[int] = []
        for position in range(found, found + count):  # what repeats itself at the text's end may go on to
            past_end = position - len(token_ids)
            drafts.append(token_ids[position] if past_end < 0 else drafts[past_end])
        return drafts
