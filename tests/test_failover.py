"""What the middleware of Ray's proxies makes of replicas that refuse or die, with stand-ins for the proxy."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from deploy.failover import Failover

Attempt = Callable[[Scope, bytes, Send], Awaitable[None]]
"""What a proxy does with a request whose body it has read. It sends nothing if the replica dies at once."""

BODY = [
    {"type": "http.request", "body": b'{"prompt": ', "more_body": True},
    {"type": "http.request", "body": b'"x"}', "more_body": False},
]


def answer(
    status: int, *body: bytes, kind: str = "application/json", dies: bool = False, **more: str
) -> Attempt:
    """One that begins an answer, and then perhaps does not end it."""

    async def attempt(scope: Scope, _: bytes, send: Send) -> None:
        named = {"content-type": kind, "x-request-id": "it"} | more
        headers = [(name.encode(), value.encode()) for name, value in named.items()]
        await send({"type": "http.response.start", "status": status, "headers": [*headers, headers[1]]})
        for n, chunk in enumerate(body, 1):
            more_body = dies or n < len(body)
            await send({"type": "http.response.body", "body": chunk, "more_body": more_body})

    return attempt


def stream(*events: bytes, dies: bool = False) -> Attempt:
    return answer(200, *events, kind="text/event-stream; charset=utf-8", dies=dies)


async def death(scope: Scope, body: bytes, send: Send) -> None:
    pass


class Client:
    """What it has sent and got."""

    def __init__(self, *attempts: Attempt, leaves: bool = False, **headers: str) -> None:
        self.seen: list[tuple[dict[bytes, bytes], bytes]] = []
        self.got: list[Message] = []
        coming = iter(attempts)
        sent = iter([*BODY, {"type": "http.disconnect"}] if leaves else BODY)

        async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
            body, more_body = b"", True
            while more_body:
                message = await receive()
                body += message["body"]
                more_body = message["more_body"]
            if leaves:
                assert (await receive())["type"] == "http.disconnect"
            self.seen.append((dict(scope["headers"]), body))
            await next(coming, death)(scope, body, send)

        async def receive() -> Message:
            return next(sent)

        async def send(message: Message) -> None:
            self.got.append(message)

        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/", "headers": [*pairs, (b"x-request-id", b"it")]}
        asyncio.run(Failover(proxy)(scope, receive, send))

    @property
    def head(self) -> tuple[int, dict[bytes, bytes]]:
        [head] = [message for message in self.got if message["type"] == "http.response.start"]
        names = [name for name, _ in head["headers"]]
        assert len(names) == len(set(names))
        return head["status"], dict(head["headers"])

    @property
    def text(self) -> bytes:
        *chunks, last = [message for message in self.got if message["type"] == "http.response.body"]
        assert not last.get("more_body")
        return b"".join(message["body"] for message in [*chunks, last])


def assert_refused(client: Client) -> None:
    status, headers = client.head
    assert status == json.loads(client.text)["status"] == 503
    assert int(headers[b"retry-after"]) >= 1
    assert headers[b"x-request-id"] == b"it"


def test_a_request_that_kills_replicas_kills_two_and_no_more() -> None:
    client = Client(*[death] * 9)
    assert len(client.seen) == 2
    assert_refused(client)


def test_a_dead_replicas_request_goes_to_another_as_it_came_but_without_its_session() -> None:
    client = Client(death, answer(200, b"{}"), x_session_id="s", authorization="Bearer k")
    (first, body), (second, body_again) = client.seen
    assert body == body_again == b'{"prompt": "x"}'
    assert first[b"x-session-id"] == b"s"
    assert second == {name: value for name, value in first.items() if name != b"x-session-id"}
    assert (client.head[0], client.text) == (200, b"{}")


def test_what_one_replica_refuses_another_may_take() -> None:
    for status in (429, 503):
        client = Client(answer(status, b"{}"), answer(200, b"{1}"))
        assert (client.head[0], client.text) == (200, b"{1}")


def test_the_last_refusal_is_the_replicas_own() -> None:
    client = Client(*[answer(429, b"{busy}", retry_after="7")] * 9)
    assert len(client.seen) == 2
    assert (client.head[0], client.text) == (429, b"{busy}")


def test_no_other_answer_is_asked_for_twice() -> None:
    for status in (200, 400, 401, 422, 500, 504):
        client = Client(answer(status, b"{}"))
        assert len(client.seen) == 1
        assert client.head[0] == status


def test_a_stream_that_has_begun_ends_with_an_error_event() -> None:
    client = Client(stream(b"data: 1\n\n", b"data: 2\n\n", dies=True), stream(b"never"))
    assert len(client.seen) == 1
    one, two, error, end = client.text.decode().split("\n\n")
    assert (one, two, end) == ("data: 1", "data: 2", "")
    assert json.loads(error.removeprefix("data: "))["status"] == 503


def test_a_stream_without_an_event_goes_on_with_another_replicas() -> None:
    client = Client(stream(dies=True), stream(b"data: 1\n\n", b"data: [DONE]\n\n"))
    assert client.got[0]["type"] == "http.response.start"  # at once: the client sees that it waits in a queue
    assert (client.head[0], client.text) == (200, b"data: 1\n\ndata: [DONE]\n\n")


def test_a_stream_that_finds_no_other_replica_ends_with_an_error_event() -> None:
    for last in (death, answer(429, b"{}"), answer(503, b"text", kind="text/plain")):
        client = Client(stream(dies=True), last)
        assert client.head[0] == 200
        assert json.loads(client.text.removeprefix(b"data: "))["status"] == 503


def test_what_ray_says_itself_is_said_in_our_words() -> None:
    for status in (404, 408, 429, 503):
        client = Client(*[answer(status, b"Path '/' not found", kind="text/plain")] * 9)
        assert len(client.seen) == (1 if status == 408 else 2)
        assert_refused(client)


def test_nothing_is_done_for_a_client_that_has_left() -> None:
    client = Client(death, leaves=True)
    assert len(client.seen) == 1
    assert not client.got


def test_a_client_has_no_say_in_what_is_rays() -> None:
    hints: dict[str, Any] = {"x_request_timeout_seconds": "0.001", "x_request_disconnect_disabled": "?1"}
    client = Client(answer(200, b"{}"), **hints)
    assert set(client.seen[0][0]) == {b"x-request-id"}
