"""model_download.py against a hub on this machine, through the real modelscope client.

Each run is a process of its own, as for a user; the client reads its limits from the environment.
"""

import contextlib
import json
import os
import pty
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import model_download
from engine.weights import MODEL_ID, problems
from tests.hub import LISTING, Fault, Hub, flip

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "model_download.py"
RESUMES = "Run the same command again"
CLIENT_CHUNK = 1024 * 1024  # the client writes at least this often
WRITE_BUFFER = 8192  # and what Python may hold back of it
SHARD = "model-00001-of-00003.safetensors"
OTHER_SHARD = "model-00002-of-00003.safetensors"
DEADLINE = 60.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small Llama in the real repository's layout, Meta's second copy of the weights included."""
    folder = tmp_path_factory.mktemp("hub")
    save_model(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert SHARD in files
    assert OTHER_SHARD in files
    return files | {
        "README.md": b"# A small model\n",
        "original/params.json": b"{}",
        "original/consolidated.00.pth": bytes(4_000_000),
    }


def save_model(folder: Path) -> None:
    """Random weights, but everything a server needs to answer with them."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.models import make_tokenizer

    tokenizer = make_tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    ).save_pretrained(folder)
    stop = [tokenizer.token_to_id(token) for token in ("<|end_of_text|>", "<|eot_id|>")]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"),
        eos_token_id=stop,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=stop)
    model.save_pretrained(folder, max_shard_size="4MB")


@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    with Hub(MODEL_ID, files) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path, files: dict[str, bytes]) -> Iterator[Path]:
    """A models folder. Whatever a test does: a file under its final name there is whole."""
    yield tmp_path / "weights"
    model = tmp_path / "weights" / MODEL_ID
    for path in model.rglob("*"):
        if path.is_file() and path.suffix != ".incomplete":
            assert path.read_bytes() == files[path.relative_to(model).as_posix()], f"{path} is not whole"


def environment(hub_url: str, folder: Path, **changes: str) -> dict[str, str]:
    """Short delays, and nothing of this machine's own proxies, tokens and caches."""
    client = {
        "MODELSCOPE_ENDPOINT": hub_url,
        "MODELSCOPE_HOME": str(folder.parent / "modelscope-home"),
        "MODELSCOPE_CACHE": str(folder.parent / "modelscope-cache"),
        "MODELSCOPE_DOWNLOAD_RETRY_MAX_DELAY_SECONDS": "1",
        "MODELSCOPE_REPO_TREE_PAGE_RETRY_MAX_DELAY_SECONDS": "1",
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "2",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    own = ("MODELSCOPE_", "LLAMA_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    return inherited | client | changes


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--models-folder", str(folder), *options]


def run(
    hub_url: str,
    folder: Path,
    *options: str,
    preexec_fn: Callable[[], None] | None = None,
    **environment_changes: str,
) -> subprocess.CompletedProcess[str]:
    """Runs the script to its end; whatever happens, it never shows a traceback."""
    result = subprocess.run(
        command(folder, *options),
        env=environment(hub_url, folder, **environment_changes),
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        preexec_fn=preexec_fn,
    )
    assert "Traceback" not in result.stderr
    return result


@contextlib.contextmanager
def started(hub_url: str, folder: Path, **environment_changes: str) -> Iterator[subprocess.Popen[str]]:
    """The script, running."""
    with subprocess.Popen(
        command(folder),
        env=environment(hub_url, folder, **environment_changes),
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if not path.startswith("original/")}


def assert_complete(folder: Path, files: dict[str, bytes]) -> None:
    """Exactly the hub's files are there, and nothing else."""
    model = folder / MODEL_ID
    present = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert present == set(wanted(files))
    assert problems(model) == []


def write_complete(folder: Path, files: dict[str, bytes]) -> Path:
    """What a download leaves, without one."""
    model = folder / MODEL_ID
    model.mkdir(parents=True)
    for path, content in wanted(files).items():
        (model / path).write_bytes(content)
    return model


def partial(folder: Path) -> Path:
    """Where the client keeps what it has of SHARD."""
    return folder / MODEL_ID / f"{SHARD}.incomplete"


def wait_until_only_shard_is_missing(hub: Hub, folder: Path, at_least: int) -> None:
    """Until the rest is complete and so many bytes of SHARD are on disk: no byte is between hub and disk."""
    model = folder / MODEL_ID
    rest = [model / path for path in wanted(hub.files) if path != SHARD]
    wait_until(lambda: all(path.exists() for path in rest))
    wait_until(lambda: partial(folder).exists() and partial(folder).stat().st_size >= at_least)


# ---- The download


def test_a_fresh_download_is_complete_and_names_the_next_command(hub: Hub, folder: Path) -> None:
    result = run(hub.url, folder)
    assert result.returncode == 0, result.stderr
    assert_complete(folder, hub.files)
    assert hub.served == {path: len(content) for path, content in wanted(hub.files).items()}
    assert result.stdout.endswith(f"Start the server with:  python api.py --model {folder / MODEL_ID}\n")


def test_it_goes_where_the_api_looks_and_then_the_next_command_is_short(hub: Hub, folder: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=environment(hub.url, folder, LLAMA_MODELS_FOLDER=str(folder)),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("Start the server with:  python api.py\n")
    assert_complete(folder, hub.files)


def test_it_reads_no_other_settings_of_the_server(
    folder: Path, files: dict[str, bytes], tmp_path: Path
) -> None:
    write_complete(folder, files)
    for models_folder, code in ((folder, 0), (tmp_path / "none", 1), (Path(__file__), 2)):
        changes = {"LLAMA_MODELS_FOLDER": str(models_folder), "LLAMA_PORT": "abc"}
        result = subprocess.run(
            [sys.executable, str(SCRIPT), "--check"],
            env=environment("", folder, **changes),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert result.returncode == code, result.stderr
        assert "api.py" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("model_download.py: error: --models-folder: ")


def test_a_second_run_fetches_nothing(hub: Hub, folder: Path) -> None:
    assert run(hub.url, folder).returncode == 0
    hub.served.clear()
    assert run(hub.url, folder).returncode == 0
    assert hub.served == {}


@pytest.mark.parametrize(
    "place",
    ["{owner}/{name}", "models/{owner}--{name}/snapshots/master"],
)
def test_a_download_begun_in_any_of_modelscopes_places_is_completed_there(
    hub: Hub, tmp_path: Path, place: str
) -> None:
    owner, name = MODEL_ID.split("/")
    model = tmp_path / "cache" / place.format(owner=owner, name=name)
    model.mkdir(parents=True)
    (model / SHARD).write_bytes(hub.files[SHARD])
    result = run(hub.url, tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    assert SHARD not in hub.served
    assert problems(model) == []
    assert f"Complete: {model}\n" in result.stdout


def test_a_flipped_byte_in_a_finished_shard_is_found_and_mended(hub: Hub, folder: Path) -> None:
    shard = write_complete(folder, hub.files) / SHARD
    shard.write_bytes(flip(shard.read_bytes(), 3_000_000))
    assert run(hub.url, folder).returncode == 0
    assert_complete(folder, hub.files)
    assert hub.served == {SHARD: len(hub.files[SHARD])}


def test_a_shard_that_the_user_keeps_on_another_disk_stays_there(hub: Hub, folder: Path) -> None:
    shard = write_complete(folder, hub.files) / SHARD
    shard.symlink_to(shard.rename(folder / "elsewhere"))
    assert run(hub.url, folder).returncode == 0
    assert hub.served == {}
    assert shard.is_symlink()


# ---- Interruptions


def test_a_connection_cut_three_times_in_the_middle_of_a_shard_costs_nothing(hub: Hub, folder: Path) -> None:
    for after in (1_000_000, 2_000_000, 3_000_000):
        hub.add(Fault(SHARD, "cut", after=after))
    result = run(hub.url, folder)
    assert result.returncode == 0, result.stderr
    assert_complete(folder, hub.files)
    assert hub.served[SHARD] - len(hub.files[SHARD]) < CLIENT_CHUNK


def test_after_a_sigkill_the_next_run_resumes(hub: Hub, folder: Path) -> None:
    hub.add(Fault(SHARD, "hold", after=3_000_000))
    with started(hub.url, folder) as process:
        wait_until_only_shard_is_missing(hub, folder, 3_000_000 - WRITE_BUFFER)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert not (folder / MODEL_ID / SHARD).exists()
    result = run(hub.url, folder)
    assert result.returncode == 0, result.stderr
    assert_complete(folder, hub.files)
    served_again = sum(hub.served.values()) - sum(map(len, wanted(hub.files).values()))
    assert 0 <= served_again < CLIENT_CHUNK


def test_ctrl_c_ends_it_and_the_same_command_resumes(hub: Hub, folder: Path) -> None:
    hub.add(Fault(SHARD, "hold", after=3_000_000))
    with started(hub.url, folder) as process:
        wait_until_only_shard_is_missing(hub, folder, 3_000_000 - WRITE_BUFFER)
        process.send_signal(signal.SIGINT)
        # The hub is still holding: that the process ends at all shows that it waits for nobody.
        _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert errors == f"\nStopped. {model_download.RESUME}\n"
    assert run(hub.url, folder).returncode == 0
    assert_complete(folder, hub.files)
    assert hub.served[SHARD] - len(hub.files[SHARD]) < CLIENT_CHUNK


def test_two_runs_at_once_share_the_work(hub: Hub, folder: Path) -> None:
    fault = hub.add(Fault(SHARD, "hold", after=1_000_000))
    with started(hub.url, folder) as first, started(hub.url, folder) as second:
        assert fault.reached.wait(DEADLINE)
        wait_until(lambda: hub.listings == 2)
        fault.release.set()
        assert first.communicate(timeout=DEADLINE)[1] == ""
        assert second.communicate(timeout=DEADLINE)[1] == ""
    assert (first.returncode, second.returncode) == (0, 0)
    assert_complete(folder, hub.files)
    assert sum(hub.served.values()) - sum(map(len, wanted(hub.files).values())) < CLIENT_CHUNK


def test_a_stalled_connection_is_given_up_and_resumed_later(hub: Hub, folder: Path) -> None:
    hub.add(Fault(SHARD, "hold", after=3_000_000))
    result = run(hub.url, folder, MODELSCOPE_DOWNLOAD_TIMEOUT="2", MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    assert result.returncode == 1
    assert f"Not complete: {SHARD}\n" in result.stderr
    assert RESUMES in result.stderr
    assert not (folder / MODEL_ID / SHARD).exists()
    assert partial(folder).stat().st_size == 3_000_000
    assert run(hub.url, folder).returncode == 0
    assert hub.served[SHARD] == len(hub.files[SHARD])


# ---- The disk


def test_too_little_space_is_refused_before_the_first_byte(hub: Hub, folder: Path) -> None:
    hub.listing[0]["Size"] = 10**18
    result = run(hub.url, folder)
    assert result.returncode == 1
    assert "Not enough space: 1,000,000,0" in result.stderr
    assert " GB still to fetch, " in result.stderr
    assert f" free on {folder.parent}.\n" in result.stderr
    assert hub.served == {}
    assert not folder.exists()


def test_what_is_here_already_needs_no_space(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    model_download.check_space(tmp_path / "model", free // 2)
    with pytest.raises(model_download.IncompleteError, match="Not enough space"):
        model_download.check_space(tmp_path / "model", free * 2)
    (tmp_path / "done").write_bytes(b"12345")
    (tmp_path / "begun.incomplete").write_bytes(b"123")
    names = ("done", "begun", "absent")
    assert [model_download.bytes_here(tmp_path / name, 5) for name in names] == [5, 3, 0]


def test_where_there_is_a_data_disk_it_is_suggested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_download, "AUTODL_DATA_DISK", tmp_path / "data")
    monkeypatch.setattr(model_download, "default_models_folder", lambda: tmp_path / "data")
    with pytest.raises(model_download.IncompleteError, match=f"--models-folder {tmp_path / 'data'}"):
        model_download.check_space(tmp_path / "system", 10**18)
    with pytest.raises(model_download.IncompleteError, match="Make room"):
        model_download.check_space(tmp_path / "data" / "model", 10**18)


def test_a_full_quota_says_so_and_the_next_run_resumes(hub: Hub, folder: Path) -> None:
    def limit_files_to_2_mb() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))

    result = run(hub.url, folder, preexec_fn=limit_files_to_2_mb, MODELSCOPE_DOWNLOAD_MAX_RETRIES="0")
    assert result.returncode == 1
    assert "The disk or your quota is full." in result.stderr
    assert not (folder / MODEL_ID / SHARD).exists()
    assert partial(folder).stat().st_size == 2_000_000
    hub.served.clear()
    assert run(hub.url, folder).returncode == 0
    assert_complete(folder, hub.files)
    assert hub.served[SHARD] == len(hub.files[SHARD]) - 2_000_000


def test_a_disk_that_fills_up_under_way_says_so_and_the_next_run_resumes(hub: Hub, folder: Path) -> None:
    fault = hub.add(Fault(SHARD, "hold", after=1_000_000))
    with small_disk(folder, megabytes=24), started(hub.url, folder) as process:
        assert fault.reached.wait(DEADLINE)
        filler = folder / "filler"
        with contextlib.suppress(OSError):
            filler.write_bytes(bytes(24_000_000))
        fault.release.set()
        _, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 1
        assert "The disk or your quota is full." in errors
        assert not (folder / MODEL_ID / SHARD).exists()
        filler.unlink()
        assert run(hub.url, folder).returncode == 0
        assert_complete(folder, hub.files)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs; the quota test covers the same path")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---- The hub


ADVICE = {
    401: "Set MODELSCOPE_API_TOKEN to a valid one.",
    403: "Accept the model's licence on its page",
    404: "Check --model-id, --revision and your token.",
    429: "Run the same command again in 3 seconds",
    503: "The hub is out of order (503).",
}


@pytest.mark.parametrize(
    ("path", "status"), [*((LISTING, status) for status in ADVICE), (SHARD, 403), (SHARD, 429), (SHARD, 503)]
)
def test_a_refusal_of_the_hub_is_said_with_what_to_do(hub: Hub, folder: Path, path: str, status: int) -> None:
    hub.add(Fault(path, "status", status=status, retry_after=3 if status == 429 else None, times=99))
    result = run(
        hub.url, folder, MODELSCOPE_DOWNLOAD_MAX_RETRIES="0", MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS="1"
    )
    assert result.returncode == 1
    assert ADVICE[status] in result.stderr
    assert not (folder / MODEL_ID / SHARD).exists()
    if path == LISTING:
        assert not folder.exists()
    else:
        assert f"Not complete: {SHARD}\n" in result.stderr
        assert (folder / MODEL_ID / OTHER_SHARD).exists()


def test_a_refusal_that_passes_is_waited_out(hub: Hub, folder: Path) -> None:
    hub.add(Fault(LISTING, "status", status=503))
    hub.add(Fault(SHARD, "status", status=429, retry_after=1))
    hub.add(Fault(SHARD, "status", status=503))
    result = run(hub.url, folder)
    assert result.returncode == 0, result.stderr
    assert_complete(folder, hub.files)


def test_a_model_that_the_hub_does_not_have(hub: Hub, folder: Path) -> None:
    result = run(hub.url, folder, "--model-id", "LLM-Research/No-Such-Model")
    assert result.returncode == 1
    assert result.stderr == "The hub has no such model (404). Check --model-id, --revision and your token.\n"
    assert not folder.exists()


def test_a_hub_that_is_down(folder: Path) -> None:
    result = run(f"http://127.0.0.1:{free_port()}", folder)
    assert result.returncode == 1
    assert result.stderr == (
        f"No connection to the hub, or it broke off. Check the network and proxy. {model_download.RESUME}\n"
    )
    assert not folder.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Please log in to this network</html>",
        b"[]",
        b'{"Data": {"Files": []}}',
        b'{"Data": {"Files": [{"Path": 7, "Size": "many"}]}}',
    ],
)
def test_a_listing_that_makes_no_sense(hub: Hub, folder: Path, body: bytes) -> None:
    hub.add(Fault(LISTING, "body", body=body))
    result = run(hub.url, folder)
    assert result.returncode == 1
    assert "Check " in result.stderr
    assert not folder.exists()


@pytest.mark.parametrize("path", ["../escaped", "a/../../escaped", "{tmp}/escaped", "a\x1b[2Jb"])
def test_a_listing_that_leads_out_of_the_folder_is_refused_and_nothing_is_written(
    hub: Hub, tmp_path: Path, folder: Path, path: str
) -> None:
    path = path.format(tmp=tmp_path)
    hub.listing.append({"Path": path, "Type": "blob", "Size": 4, "Sha256": None})
    hub.files = {**hub.files, path: b"evil"}
    result = run(hub.url, folder)
    assert result.returncode == 1
    assert result.stderr.startswith("Refused: the hub lists ")
    assert "\x1b" not in result.stderr
    assert hub.served == {}
    assert not folder.exists()
    assert not list(tmp_path.rglob("escaped"))


def test_original_is_not_fetched_however_it_is_written(hub: Hub, folder: Path) -> None:
    hub.files = {**hub.files, "./original/more.pth": b"more"}
    hub.listing.append({"Path": "./original/more.pth", "Type": "blob", "Size": 4, "Sha256": None})
    assert run(hub.url, folder).returncode == 0
    assert not (folder / MODEL_ID / "original").exists()


def test_bytes_that_do_not_match_the_hubs_sha256_are_never_kept(hub: Hub, folder: Path) -> None:
    hub.add(Fault("config.json", "flip", after=20, times=99))
    result = run(hub.url, folder)
    assert result.returncode == 1
    assert result.stderr.startswith("Not complete: config.json\nWhat the hub sent is not what it lists")
    assert not (folder / MODEL_ID / "config.json").exists()


def test_a_hub_whose_own_copy_is_not_whole(hub: Hub, folder: Path) -> None:
    hub.listing = [entry for entry in hub.listing if entry["Path"] != SHARD]
    result = run(hub.url, folder)
    assert result.returncode == 1
    assert f"{SHARD}: missing\n" in result.stderr
    assert "try another --revision" in result.stderr


# ---- The command line


def test_check_asks_no_network_and_names_what_is_missing(hub: Hub, folder: Path) -> None:
    result = run(hub.url, folder, "--check")
    assert result.returncode == 1
    assert "no such folder" in result.stderr
    model = write_complete(folder, hub.files)
    assert run(hub.url, folder, "--check").returncode == 0
    (model / SHARD).unlink()
    result = run(hub.url, folder, "--check")
    assert result.returncode == 1
    assert f"{SHARD}: missing\nRun the same command without --check to complete it.\n" in result.stderr
    assert hub.requests == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--parallel", "0"],
        ["--parallel", "many"],
        ["--model-id", "../.."],
        ["--model-id", "Meta-Llama-3-8B-Instruct"],
        ["--models-folder", __file__],
        ["--unknown"],
        ["surplus"],
    ],
)
def test_wrong_use_ends_with_2_and_one_line(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        model_download.main(options)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_the_token_is_sent_and_never_shown(hub: Hub, folder: Path) -> None:
    hub.add(Fault(LISTING, "status", status=403))
    result = run(hub.url, folder, "--token", "ms-secret-token")
    assert hub.tokens == {"Bearer ms-secret-token"}
    assert "secret" not in result.stdout + result.stderr


# ---- Progress


def test_where_the_output_is_no_terminal_it_is_plain_lines(hub: Hub, folder: Path) -> None:
    output = run(hub.url, folder).stdout
    assert "\x1b" not in output
    assert "\r" not in output
    for path in wanted(hub.files):
        assert len([line for line in output.splitlines() if line.endswith(f"  {path}")]) == 1
    assert "100.0% of " in output


def test_on_a_terminal_there_is_a_line_a_file_and_a_total_with_speed_and_time_left(
    hub: Hub, folder: Path
) -> None:
    fault = hub.add(Fault(SHARD, "hold", after=3_000_000))
    terminal, end = pty.openpty()
    with subprocess.Popen(
        command(folder), env=environment(hub.url, folder), stdout=end, stderr=end
    ) as process:
        os.close(end)
        shown = ""
        while f"  {SHARD}" not in shown:
            shown += os.read(terminal, 65536).decode()
        fault.release.set()
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(terminal, 65536):
                shown += data.decode()
    os.close(terminal)
    assert process.returncode == 0
    size = model_download.amount(len(hub.files[SHARD]))
    assert re.search(rf"\d\d\.\d% of +{size}  {SHARD}\r\n", shown)
    assert re.search(rf"100\.0% of +{size}  {SHARD}\r\n", shown)
    assert re.search(
        r"\d\d\.\d% of +[\d.]+ MB  total, [\d.]+ [kM]?B/s, [\d:?]+ left\r\n\x1b\[\dF\x1b\[J", shown
    )


# ---- And then

needs_api = pytest.mark.skipif(not (REPOSITORY / "api.py").exists(), reason="api.py is not written yet")


@needs_api
def test_api_starts_on_what_was_downloaded_and_answers(hub: Hub, folder: Path) -> None:
    assert run(hub.url, folder).returncode == 0
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(api_command(folder / MODEL_ID, port), cwd=REPOSITORY) as server:
        try:
            wait_until(lambda: server.poll() is not None or is_healthy(url))
            assert server.poll() is None
            body = json.dumps({"prompt": "你好", "max_tokens": 8}).encode()
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=DEADLINE) as response:
                answer = json.load(response)
        finally:
            server.terminate()
    assert answer["status"] == 200
    assert answer["usage"]["completion_tokens"] >= 1


@needs_api
def test_api_names_each_missing_file_and_the_command_that_mends_it(
    files: dict[str, bytes], folder: Path
) -> None:
    model = write_complete(folder, files)
    (model / SHARD).unlink()
    (model / OTHER_SHARD).rename(model / f"{OTHER_SHARD}.incomplete")
    result = subprocess.run(
        api_command(model, free_port()),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert result.returncode != 0
    for text in (f"{SHARD}: missing", f"{OTHER_SHARD}: missing", "python model_download.py"):
        assert text in result.stderr
    assert "Traceback" not in result.stderr


def api_command(model: Path, port: int) -> list[str]:
    return [sys.executable, "api.py", "--model", str(model), "--port", str(port), "--device", "cpu"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=DEADLINE) as response:
            return bool(response.status == 200)
    except OSError:
        return False
