"""Asks the server from Python or from the terminal.

    from client import get_completion
    print(get_completion(prompt="你好"))

    python client.py "你好"    prints one answer
    python client.py           opens a chat; Ctrl-C stops an answer, Ctrl-D leaves

The server keeps no conversation: a follow-up question sends the earlier turns along, as `history`.
"""

import argparse
import contextlib
import io
import ipaddress
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import requests

DEFAULT_URL = "http://127.0.0.1:6006"
CONNECT_TIMEOUT = 10.0  # seconds

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}


class CompletionError(Exception):
    """There is no answer, or not all of it; the text of the exception says why.

    Attributes:
        status: the HTTP status, None if the server could not be reached or the connection broke.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def get_completion(
    prompt: str,
    history: Sequence[Message] | None = None,
    *,
    url: str = DEFAULT_URL,
    api_key: str | None = None,
    timeout: float = 600.0,
    **fields: Any,
) -> str:
    """Returns the model's whole answer to `prompt`.

    Args:
        prompt: the user's question.
        history: the earlier turns of the dialog, oldest first.
        url: where the server is.
        api_key: sent as a bearer token; the environment variable LLAMA_API_KEY if not given.
        timeout: how long the server may stay silent, in seconds.
        fields: any other field of the request: `max_tokens`, `temperature`, `seed`, `stop`, ...

    Raises:
        CompletionError: with the server's own message, if it sent one.
    """
    body = {**fields, "prompt": prompt, "history": list(history or []), "stream": False}
    with _post(body, url, api_key, timeout) as response:
        try:
            answer = json.loads(response.content)  # not response.json(): that believes the charset header
            return str(answer["response"])
        except (ValueError, LookupError, TypeError) as error:
            raise CompletionError(f"{url} is not this server: it answered {response.text[:80]!r}") from error


def stream_completion(
    prompt: str,
    history: Sequence[Message] | None = None,
    *,
    url: str = DEFAULT_URL,
    api_key: str | None = None,
    timeout: float = 600.0,
    **fields: Any,
) -> Iterator[str]:
    """Yields the answer in pieces as the model writes it; their join is the whole answer.

    To stop the model early, stop iterating. The arguments and errors are those of `get_completion`;
    an error can also come after some of the pieces.
    """
    for event in _stream_events(prompt, history, url, api_key, timeout, **fields):
        if event["response"]:
            yield event["response"]


def _stream_events(
    prompt: str,
    history: Sequence[Message] | None,
    url: str,
    api_key: str | None,
    timeout: float = 600.0,
    **fields: Any,
) -> Iterator[dict[str, Any]]:
    """Yields the server-sent events of one answer; the last one has `finish_reason` and `usage`."""
    body = {**fields, "prompt": prompt, "history": list(history or []), "stream": True}
    with _post(body, url, api_key, timeout) as response:
        if not response.headers.get("Content-Type", "").startswith("text/event-stream"):
            raise CompletionError(f"{url} is not this server: it does not stream")
        # One byte at a time, because a larger chunk may wait for the tokens that fill it.
        for line in response.iter_lines(chunk_size=1):
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError:  # the connection broke within an event
                break
            if "error" in event:
                raise CompletionError(event["error"]["message"], event["status"])
            yield event
    raise CompletionError(f"{url} closed the connection before the answer was complete")


@contextlib.contextmanager
def _post(body: dict[str, Any], url: str, api_key: str | None, timeout: float) -> Iterator[requests.Response]:
    """The response to `body`, open for reading. Every failure of HTTP becomes a CompletionError."""
    api_key = api_key or os.environ.get("LLAMA_API_KEY")
    headers = {"Authorization": f"Bearer {api_key}".encode()} if api_key else {}
    try:
        with requests.Session() as session:
            session.trust_env = not _is_local(url)  # http_proxy is for the internet
            with session.post(
                url, json=body, headers=headers, timeout=(CONNECT_TIMEOUT, timeout), stream=True
            ) as response:
                _raise_for_status(response, url)
                yield response
    except requests.exceptions.ChunkedEncodingError as error:
        raise CompletionError(f"{url} closed the connection before the answer was complete") from error
    except requests.exceptions.ProxyError as error:
        raise CompletionError(f"cannot reach {url} through the proxy of the environment") from error
    except requests.Timeout as error:
        raise CompletionError(f"{url} does not answer in time") from error
    except requests.ConnectionError as error:
        raise CompletionError(f"no connection to {url}: is the server running there?") from error
    except (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
    ) as error:
        raise CompletionError(f"{url} is not an address like {DEFAULT_URL}") from error
    except requests.RequestException as error:
        raise CompletionError(f"cannot ask {url}: {error}") from error


def _is_local(url: str) -> bool:
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_private
    except ValueError:  # a name, not an address
        return False


def _raise_for_status(response: requests.Response, url: str) -> None:
    if response.status_code == 200:
        return
    try:
        message = str(json.loads(response.content)["error"]["message"])
    except (ValueError, LookupError, TypeError):  # not ours: the error page of a proxy
        message = f"{url} answered {response.status_code} {response.reason}"
    raise CompletionError(message, response.status_code)


def _print_answer(events: Iterator[dict[str, Any]], pieces: list[str]) -> None:
    """Prints an answer as it comes. `pieces` gets its text, and so keeps it if the answer breaks off."""
    event: dict[str, Any] = {}
    try:
        for event in events:
            pieces.append(event["response"])
            print(event["response"], end="", flush=True)
    finally:
        if event:
            print()
    if event.get("finish_reason") == "length":
        print("[cut short: the answer reached its limit of tokens]", file=sys.stderr)


def chat(history: list[Message], url: str, api_key: str | None) -> None:
    """Talks with the model in the terminal, adding every turn to `history`.

    A stopped answer stays in the history as far as it went, because the user has read it. A question
    that failed leaves nothing behind.
    """
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt:
            continue
        pieces: list[str] = []
        try:
            _print_answer(_stream_events(prompt, history, url, api_key), pieces)
        except KeyboardInterrupt:
            print("[stopped]")
        except CompletionError as error:
            print(f"error: {error}", file=sys.stderr)
            if error.status == 400 and history and history[-1]["role"] == "assistant":
                print("(the dialog has become too long: Ctrl-D ends it)", file=sys.stderr)
            continue
        if answer := "".join(pieces):
            history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Ask a running server, or chat with it.")
    parser.add_argument("prompt", nargs="?", help="one question; without it, a chat opens")
    parser.add_argument("--url", default=DEFAULT_URL, help="where the server is (default: %(default)s)")
    parser.add_argument("--api-key", help="the server's key (default: the variable LLAMA_API_KEY)")
    parser.add_argument("--system", help="instructions that the model follows throughout")
    args = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # what it goes to may have no emoji

    history = [{"role": "system", "content": args.system}] if args.system else []
    try:
        if args.prompt is None:
            with contextlib.suppress(ImportError):  # not on Windows
                import readline  # noqa: F401  (gives `input` editing keys and a history)
            chat(history, args.url, args.api_key)
            return 0
        _print_answer(_stream_events(args.prompt, history, args.url, args.api_key), [])
    except CompletionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads it has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails as it ends
        return 1
    except KeyboardInterrupt:
        return 130  # as the shell reports a command that Ctrl-C ended
    return 0


if __name__ == "__main__":
    sys.exit(main())
