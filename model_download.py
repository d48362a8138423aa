"""Fetch Llama-3-8B-Instruct from ModelScope, whole and verified, to where api.py looks for it.

    python model_download.py            fetch what is missing; run it again after any interruption
    python model_download.py --check    look at what is here, without the network

Exit code: 0 the model is complete, 1 it is not (the same command resumes), 2 wrong use.
"""

import argparse
import errno
import os
import shlex
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from engine.weights import AUTODL_DATA_DISK, MODEL_ID, default_models_folder, find_model, problems

RESUME = "Run the same command again: it continues where it stopped."

# Read by the modelscope client when it is imported; a value of your own wins. Its limits of an hour a file
# and ten minutes' wait for another run are too short for 5 GB on a slow line; its progress bars are not ours.
CLIENT_SETTINGS = {
    "MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT": "86400",
    "MODELSCOPE_DOWNLOAD_FILE_LOCK_TIMEOUT_SECONDS": "86400",
    "MODELSCOPE_LOG_LEVEL": "CRITICAL",
    "TQDM_DISABLE": "1",
}


class IncompleteError(Exception):
    """The model is not complete; the text says why, and what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Downloads or checks as the command line says; returns the exit code."""
    options = parse(arguments)
    model = find_model(options.models_folder, options.model_id).absolute()
    try:
        if not options.check:
            download(model, options)
        if missing := problems(model):
            raise IncompleteError("\n".join([f"{model} is not complete:", *missing, next_step(options)]))
    except IncompleteError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nStopped. {RESUME}", file=sys.stderr)
        return 1
    print(f"Complete: {model}\nStart the server with:  {server_command(model)}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; ends the program with code 2 if one is wrong."""
    parser = argparse.ArgumentParser(description="Fetch a model from ModelScope, whole and verified.")
    add = parser.add_argument
    add("--model-id", default=MODEL_ID, metavar="OWNER/NAME", help="default: %(default)s")
    add("--revision", default="master", help="branch, tag or commit; default: %(default)s")
    add(
        "--models-folder",
        type=Path,
        default=models_folder(),
        metavar="FOLDER",
        help="the model goes to FOLDER/OWNER/NAME; default: %(default)s, where api.py looks",
    )
    add("--token", help="your ModelScope token; better set MODELSCOPE_API_TOKEN, which no other user sees")
    add("--parallel", type=int, default=4, metavar="N", help="files at a time, 1 to 16; default: %(default)s")
    add("--check", action="store_true", help="only look whether the model is complete; no network")
    options = parser.parse_args(arguments)
    if not 1 <= options.parallel <= 16:
        parser.error("--parallel must be from 1 to 16")
    if os.path.exists(options.models_folder) and not os.path.isdir(options.models_folder):
        parser.error(f"--models-folder: {options.models_folder} is not a folder")
    try:
        find_model(options.models_folder, options.model_id)
    except ValueError as error:
        parser.error(str(error))
    return options


def models_folder() -> Path:
    """Where api.py looks, by its setting of this name."""
    return Path(os.environ.get("LLAMA_MODELS_FOLDER", default_models_folder()))


def next_step(options: argparse.Namespace) -> str:
    """What to do about a model that is not complete."""
    if options.check:
        return "Run the same command without --check to complete it."
    return "Every file is as the hub has it, so the hub's copy is not whole: try another --revision."


def server_command(model: Path) -> str:
    """The command that serves `model`."""
    is_default = "LLAMA_MODEL" not in os.environ and model == find_model(models_folder()).absolute()
    return "python api.py" if is_default else f"python api.py --model {shlex.quote(str(model))}"


# ---- The download


def download(model: Path, options: argparse.Namespace) -> None:
    """Brings the folder `model` to what the hub lists; the client resumes, and verifies size and sha256.

    Raises:
        IncompleteError: if that did not succeed.
    """
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from modelscope_hub import HubApi

    try:
        hub = HubApi(token=options.token)
        print(f"{options.model_id}, revision {options.revision}, goes to {model}", flush=True)
        files = wanted_files(hub.list_repo_files(options.model_id, "model", revision=options.revision), model)
        here = sum(bytes_here(model / file.path, file.size) for file in files)
        check_space(model, sum(file.size for file in files) - here)
        if here:
            print("Some of it is here already; complete files are verified first.", flush=True)
        with Progress({file.path: file.size for file in files}, model, sys.stdout) as progress:
            hub.download_repo(
                options.model_id,
                "model",
                revision=options.revision,
                local_dir=model,
                max_workers=options.parallel,
                # The listing that was checked is the one that is used: the hub isn't asked again.
                file_list=[{"Path": f.path, "Size": f.size or None, "Sha256": f.sha256} for f in files],
                progress_callbacks=[progress.begin],
            )
    except IncompleteError:
        raise
    except Exception as error:  # the client lets errors of requests, urllib3, json and the system through
        raise IncompleteError(explain(error)) from error


def wanted_files(listing: list[Any], model: Path) -> list[Any]:
    """The files of the hub's listing, without Meta's `original/` checkpoint: the same weights once more.

    Raises:
        IncompleteError: if there is none, or one would be written outside the folder `model`.
    """
    files = [file for file in listing if not file.is_dir and not is_original(file.path)]
    for file in files:
        if not is_inside(model, file.path):
            raise IncompleteError(
                f"Refused: the hub lists {file.path!r}, which leads out of {model}. Nothing was written.\n"
                "Do not trust this copy of the model: check --model-id and MODELSCOPE_ENDPOINT."
            )
    if not files:
        raise IncompleteError("The hub lists no files there. Check --model-id and --revision.")
    return files


def is_original(path: str) -> bool:
    """Whether a path of the listing lies in `original/`, however it is written."""
    return PurePosixPath(path).parts[:1] == ("original",)


def is_inside(folder: Path, path: str) -> bool:
    """Whether `path`, as the hub lists it, names a file in the absolute `folder`.

    A link that the user made there is the user's will: paths are compared as they are written.
    """
    # An unprintable path could play tricks on the terminal.
    return path.isprintable() and ".." not in Path(path).parts and folder in (folder / path).parents


def bytes_here(file: Path, size: int) -> int:
    """How much of a file of `size` bytes is on disk: all, what the client kept of a cut download, or 0."""
    if file.is_file() and file.stat().st_size == size:
        return size
    partial = file.with_name(file.name + ".incomplete")
    return min(partial.stat().st_size, size) if partial.is_file() else 0


def check_space(model: Path, missing: int) -> None:
    """Raises IncompleteError if the disk of the folder `model` can't take `missing` bytes more."""
    disk = next(folder for folder in (model, *model.parents) if folder.exists())
    free = shutil.disk_usage(disk).free
    if missing <= free:
        return
    advice = "Make room there, or choose another disk with --models-folder."
    if default_models_folder() == AUTODL_DATA_DISK and not model.is_relative_to(AUTODL_DATA_DISK):
        advice = f"Use the data disk: --models-folder {AUTODL_DATA_DISK}"
    raise IncompleteError(
        f"Not enough space: {amount(missing)} still to fetch, {amount(free)} free on {disk}.\n{advice}"
    )


# ---- What went wrong


def explain(error: Exception) -> str:
    """What happened and what to do about it, for any error that a download can end with."""
    from modelscope_hub import FileDownloadError

    if not isinstance(error, FileDownloadError):
        return advice_for(error)
    by_advice: dict[str, list[str]] = {}
    for path, cause in error.failed_files.items():
        by_advice.setdefault(advice_for(cause), []).append(path)
    return "\n".join(f"Not complete: {', '.join(paths)}\n{advice}" for advice, paths in by_advice.items())


def advice_for(error: BaseException) -> str:
    """One error of the client or the system, said to the user."""
    import modelscope_hub as client
    from requests import RequestException

    match error:
        case _ if is_disk_full(error):
            return f"The disk or your quota is full. Make room, or use --models-folder. {RESUME}"
        case client.AuthenticationError():
            return "The hub does not accept the token (401). Set MODELSCOPE_API_TOKEN to a valid one."
        case client.PermissionDeniedError():
            return "The hub refuses access (403). Accept the model's licence on its page and set your token."
        case client.NotExistError():
            return "The hub has no such model (404). Check --model-id, --revision and your token."
        case client.RateLimitError():
            wait = f"in {error.retry_after} seconds" if error.retry_after else "in a few minutes"
            return f"The hub is busy and asks to wait (429). Run the same command again {wait}: it resumes."
        case client.ServerError():
            return f"The hub is out of order ({error.status_code}). Try later. {RESUME}"
        case client.FileIntegrityError():
            return f"What the hub sent is not what it lists (size or sha256), so it was dropped. {RESUME}"
        case client.RequestTimeoutError():
            return f"The hub stopped answering. Check the network. {RESUME}"
        case client.NetworkError() | RequestException():
            return f"No connection to the hub, or it broke off. Check the network and proxy. {RESUME}"
        case OSError():
            return f"Cannot write: {error}. Mend that, or use --models-folder. {RESUME}"
    return (
        f"An answer of the hub that makes no sense, or a bug here: {error!r:.200}. Check MODELSCOPE_ENDPOINT."
    )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk, or a limit set for the user, is behind `error`: the client calls that network."""
    while error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__
    return False


# ---- What the terminal shows


def amount(size: float) -> str:
    """A number of bytes for people: 512 B, 3.20 MB, 4.98 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:.0f} B"


def percent(done: int, total: int) -> str:
    """How much of `total` is done, always as wide."""
    return f"{done / total if total else 1:6.1%}"


class Progress:
    """A line for each file that has arrived, under it those under way and the total, redrawn in place.

    Where the output is not a terminal: the lines of the files, and the total twice a minute.

    Args:
        sizes: the bytes of each file.
        folder: where the files arrive.
        out: where to write.
    """

    def __init__(self, sizes: dict[str, int], folder: Path, out: TextIO) -> None:
        self.sizes = sizes
        self.folder = folder
        self.here = {path: bytes_here(folder / path, size) for path, size in sizes.items()}
        self.out = out
        self.under_way: list[str] = []
        self.arrived: list[str] = []
        self._samples = deque([(time.monotonic(), sum(self.here.values()))], maxlen=20)  # ten seconds
        self._lines_to_redraw = 0
        self._next_total = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def begin(self, path: str, size: int) -> "FileProgress":
        """What modelscope calls when it starts to fetch a file (its `progress_callbacks`)."""
        self.under_way.append(path)
        return FileProgress(self, path)

    def end(self, path: str) -> None:
        """A file has arrived, or its download failed."""
        self.under_way.remove(path)
        self.here[path] = bytes_here(self.folder / path, self.sizes[path])
        if (self.folder / path).exists():
            self.arrived.append(path)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._next_total = 0.0
        self._draw()

    def _run(self) -> None:
        while not self._stop.wait(0.5):
            self._draw()

    def _draw(self) -> None:
        arrived, self.arrived = self.arrived, []
        lines = [self._file_line(path) for path in arrived]
        total = self._total_line()
        if self.out.isatty():
            columns = shutil.get_terminal_size().columns - 1  # a line that wraps could not be redrawn
            moving = [line[:columns] for line in [*map(self._file_line, self.under_way), total]]
            up = f"\x1b[{self._lines_to_redraw}F\x1b[J" if self._lines_to_redraw else ""
            self.out.write(up + "".join(f"{line}\n" for line in [*lines, *moving]))
            self._lines_to_redraw = len(moving)
        else:
            if time.monotonic() >= self._next_total:
                lines.append(total)
                self._next_total = time.monotonic() + 30
            self.out.write("".join(f"{line}\n" for line in lines))
        self.out.flush()

    def _file_line(self, path: str) -> str:
        return f"{percent(self.here[path], self.sizes[path])} of {amount(self.sizes[path]):>9}  {path}"

    def _total_line(self) -> str:
        done, total = sum(self.here.values()), sum(self.sizes.values())
        self._samples.append((time.monotonic(), done))
        (then, had), (now, has) = self._samples[0], self._samples[-1]
        speed = max(0.0, (has - had) / (now - then)) if now > then else 0.0
        left = timedelta(seconds=(total - done) // speed) if speed >= 1 else "?"
        return f"{percent(done, total)} of {amount(total):>9}  total, {amount(speed)}/s, {left} left"


class FileProgress:
    """Counts the bytes of one file; modelscope calls it from its download threads."""

    def __init__(self, progress: Progress, path: str) -> None:
        self.progress = progress
        self.path = path
        self.received = 0

    def update(self, size: int) -> None:
        """`size` bytes more; when a download is resumed, at first those that are here already."""
        self.received += size
        self.progress.here[self.path] = self.received

    def end(self) -> None:
        """The client has finished with the file, or given up."""
        self.progress.end(self.path)


if __name__ == "__main__":
    sys.exit(main())
