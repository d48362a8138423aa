"""The log: lines for people, or JSON for programs."""

import json
import logging
from datetime import datetime
from typing import Any, Literal

from transformers.utils.logging import disable_progress_bar

_OWN_WAYS = ("uvicorn", "uvicorn.access", "transformers")
"""Loggers that come with a form of their own."""


class JsonLines(logging.Formatter):
    """One JSON object a line. What a record has as `fields` stands beside its message, or in its place."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **getattr(record, "fields", {"message": record.getMessage()}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def configure(log_format: Literal["text", "json"]) -> None:
    """Writes everything from INFO on to stderr, libraries' lines in the same form as ours."""
    to_stderr = logging.StreamHandler()
    if log_format == "json":
        to_stderr.setFormatter(JsonLines())
        disable_progress_bar()
    else:
        to_stderr.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[to_stderr])
    logging.captureWarnings(True)
    for name in _OWN_WAYS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
