"""Where a model lies on disk, and whether all of it is there.

Sizes and headers only, no hashing: milliseconds for an 8B model, so the server asks at every start.
"""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

MODEL_ID = "LLM-Research/Meta-Llama-3-8B-Instruct"
AUTODL_DATA_DISK = Path("/root/autodl-tmp")

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
SHARD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}\.safetensors")  # beside the index, never elsewhere
REQUIRED_JSON = ("config.json", "tokenizer.json")
OPTIONAL_JSON = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")

# The safetensors library refuses a longer header, so a longer one is damage or an attack.
MAX_HEADER_BYTES = 100_000_000


def default_models_folder() -> Path:
    """AutoDL's data disk where there is one (its system disk is too small), else `./models`."""
    # os.path answers False where pathlib raises: /root is closed to other users.
    return AUTODL_DATA_DISK if os.path.isdir(AUTODL_DATA_DISK) else Path("models")


def find_model(models_folder: Path, model_id: str = MODEL_ID) -> Path:
    """The folder of `model_id` under `models_folder`: a complete one, else one begun, else the one to fill.

    Looks at the tutorial's place `{owner}/{name}` first, then where modelscope's client has put models
    over the years (modelscope_hub/_download.py, `_find_legacy_repo_dir` and `_repo_cache_dir_path`).

    Raises:
        ValueError: if `model_id` is not of the form `owner/name`.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model_id):
        raise ValueError(f"the model id {model_id!r} is not of the form owner/name")
    owner, name = model_id.split("/")
    dotless = name.replace(".", "___")
    # Of several revisions the client's default comes first.
    snapshots = _entries(models_folder / "models" / f"{owner}--{name}" / "snapshots")
    places = [
        models_folder / owner / name,
        models_folder / owner / dotless,
        models_folder / "models" / owner / dotless,
        models_folder / "hub" / owner / dotless,
        models_folder / "hub" / "models" / owner / dotless,
        *sorted(snapshots, key=lambda snapshot: (snapshot.name != "master", snapshot.name)),
    ]
    begun = [place for place in places if _entries(place)]
    complete = (place for place in begun if not problems(place))
    return next(complete, begun[0] if begun else places[0])


def download_command(model: Path) -> str | None:
    """The command that completes the folder `model`; None if there is none, as for a model of one's own."""
    for folder in model.absolute().parents:
        if find_model(folder) == model.absolute():
            command = "python model_download.py"
            is_default = folder == default_models_folder().absolute()
            return command if is_default else f"{command} --models-folder {shlex.quote(str(folder))}"
    return None


def problems(model: Path) -> list[str]:
    """What keeps the folder `model` from being loaded: one line a file, none if it is complete.

    Each shard must have the size that its own header announces; the JSON files must be readable.
    """
    try:
        os.listdir(model)
    except PermissionError:
        return [f"{model}: this user may not look into it"]
    except OSError:
        return [f"{model}: no such folder"]
    found = [_json_problem(model / name) for name in REQUIRED_JSON]
    found += [_json_problem(model / name) for name in OPTIONAL_JSON if os.path.exists(model / name)]
    try:
        found += [_shard_problem(model / name) for name in shard_names(model)]
    except ValueError as error:
        found.append(str(error))
    return [problem for problem in found if problem]


def sampling_defaults(model: Path) -> dict[str, float]:
    """How the model's makers advise to sample from it: what generation_config.json says of it."""
    path = model / "generation_config.json"
    advice = _read_json(path) if path.exists() else {}
    if advice.get("do_sample") is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    return {name: advice[name] for name in names if advice.get(name) is not None}


def model_type(model: Path) -> str:
    """The architecture that config.json names, as transformers calls it; empty if it names none."""
    return str(_read_json(model / "config.json").get("model_type", ""))


def trained_context(model: Path) -> int:
    """The most tokens that the model was trained for."""
    config = _read_json(model / "config.json")
    return int(config.get("max_position_embeddings") or 2048)  # as transformers does where it is not said


def shard_names(model: Path) -> list[str]:
    """The names of the safetensors files that hold the weights, as transformers would choose them.

    Raises:
        ValueError: if the index is missing, not readable, or names anything but files beside it.
    """
    if os.path.exists(model / SINGLE_FILE):
        return [SINGLE_FILE]
    index = _read_json(model / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{INDEX}: damaged, it has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise ValueError(f"{INDEX}: damaged, {name!r:.80} is not a safetensors file beside it")
    return sorted(set(weight_map.values()))


def expected_size(shard: Path) -> int:
    """The size in bytes that a safetensors file must have, from its own header.

    The format (github.com/huggingface/safetensors, README, "Format"): 8 bytes with the header's length,
    little-endian; the header, JSON, with the `data_offsets` of each tensor; the data.

    Raises:
        ValueError: if the header is cut off or not that of a safetensors file.
        OSError: if the file can't be read.
    """
    with shard.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes > shard.stat().st_size:
            raise ValueError("its header is cut off or not that of a safetensors file")
        header = _parse_json(file.read(header_bytes))
    ends = [_data_end(tensor) for name, tensor in header.items() if name != "__metadata__"]
    return 8 + header_bytes + max(ends, default=0)


def _data_end(tensor: Any) -> int:
    match tensor:
        case {"data_offsets": [int(), int(end)]} if end >= 0:
            return end
    raise ValueError("its header is not that of a safetensors file")


def _shard_problem(shard: Path) -> str | None:
    try:
        actual, expected = shard.stat().st_size, expected_size(shard)
    except FileNotFoundError:
        return f"{shard.name}: missing"
    except OSError as error:
        return f"{shard.name}: not readable ({error.strerror})"
    except ValueError as error:
        return f"{shard.name}: damaged, {shard.stat().st_size:,} bytes ({error})"
    return None if actual == expected else f"{shard.name}: {actual:,} bytes, expected {expected:,}"


def _json_problem(path: Path) -> str | None:
    try:
        _read_json(path)
    except ValueError as error:
        return str(error)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError names the file and what is wrong with it."""
    try:
        content = path.read_bytes()
        return _parse_json(content)
    except FileNotFoundError:
        raise ValueError(f"{path.name}: missing") from None
    except OSError as error:
        raise ValueError(f"{path.name}: not readable ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: damaged, {len(content):,} bytes ({error})") from error


def _parse_json(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError("not valid JSON") from error
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing if there is none, or if it is closed to this user."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []
