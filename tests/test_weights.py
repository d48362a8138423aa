"""Where a model is looked for, and what counts as complete. The shards here have headers and no weights."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import weights
from engine.weights import MODEL_ID, default_models_folder, download_command, find_model, problems

SHARDS = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
GIGABYTE = 10**9


def header(size: int) -> bytes:
    """The start of a safetensors file with one tensor of `size` bytes."""
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    content = json.dumps({"__metadata__": {"format": "pt"}, "weight": tensor}).encode()
    return len(content).to_bytes(8, "little") + content


def write_shard(path: Path, size: int) -> None:
    """A shard of `size` bytes of weights, all holes: it takes no space and no time."""
    path.write_bytes(header(size))
    with path.open("r+b") as file:
        file.truncate(len(header(size)) + size)


def write_index(model: Path, weight_map: Any) -> None:
    (model / weights.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_model(model: Path, shard_bytes: int = 1000) -> Path:
    model.mkdir(parents=True)
    for name in weights.REQUIRED_JSON:
        (model / name).write_text("{}")
    for name in SHARDS:
        write_shard(model / name, shard_bytes)
    write_index(model, {f"layer {name}": name for name in SHARDS})
    return model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


# ---- Completeness


def test_a_complete_model_has_no_problems(model: Path) -> None:
    assert problems(model) == []


def test_a_single_file_needs_no_index(model: Path) -> None:
    for path in model.glob("model*"):
        path.unlink()
    write_shard(model / weights.SINGLE_FILE, 1000)
    assert problems(model) == []
    write_shard(model / weights.SINGLE_FILE, 0)
    assert problems(model) == []


def test_the_data_is_not_read(tmp_path: Path) -> None:
    # As large as Llama-3-8B: reading it would take a minute.
    assert problems(write_model(tmp_path / "model", shard_bytes=4 * GIGABYTE)) == []


def test_every_file_has_its_own_line_with_both_sizes(model: Path) -> None:
    (model / SHARDS[0]).unlink()
    with (model / SHARDS[1]).open("r+b") as file:
        file.truncate(500)
    with (model / SHARDS[3]).open("ab") as file:
        file.write(b"more")
    (model / "config.json").unlink()
    whole = len(header(1000)) + 1000
    assert problems(model) == [
        "config.json: missing",
        f"{SHARDS[0]}: missing",
        f"{SHARDS[1]}: 500 bytes, expected {whole:,}",
        f"{SHARDS[3]}: {whole + 4:,} bytes, expected {whole:,}",
    ]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert problems(tmp_path / "model") == [f"{tmp_path / 'model'}: no such folder"]


def test_folders_in_the_place_of_files(model: Path) -> None:
    for name in ("config.json", SHARDS[0]):
        (model / name).unlink()
        (model / name).mkdir()
    reason = "not readable (Is a directory)"
    assert problems(model) == [f"config.json: {reason}", f"{SHARDS[0]}: {reason}"]


@pytest.mark.parametrize("name", weights.REQUIRED_JSON)
@pytest.mark.parametrize("content", [b"", b'{"half', b"[]", b"\xff\xfe", b"[" * 100_000])
def test_json_that_is_damaged(model: Path, name: str, content: bytes) -> None:
    (model / name).write_bytes(content)
    [problem] = problems(model)
    assert problem.startswith(f"{name}: damaged, {len(content):,} bytes")


def test_optional_json_may_be_missing_but_not_damaged(model: Path) -> None:
    (model / "generation_config.json").write_text('{"half')
    assert problems(model) == ["generation_config.json: damaged, 6 bytes (not valid JSON)"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (1000).to_bytes(8, "little") + b"{}",
        (6).to_bytes(8, "little") + b'{"half',
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xff",
        *(
            len(text).to_bytes(8, "little") + text
            for text in (
                b'{"weight": 7}',
                b'{"weight": {}}',
                b'{"weight": {"data_offsets": 7}}',
                b'{"weight": {"data_offsets": [0]}}',
                b'{"weight": {"data_offsets": [0, "8"]}}',
                b'{"weight": {"data_offsets": [0, -8]}}',
                b'{"weight": {"data_offsets": [0, 8.5]}}',
            )
        ),
    ],
)
def test_a_shard_whose_header_is_damaged(model: Path, content: bytes) -> None:
    (model / SHARDS[2]).write_bytes(content)
    [problem] = problems(model)
    assert problem.startswith(f"{SHARDS[2]}: damaged, {len(content)} bytes")


def test_a_header_longer_than_the_format_allows_is_not_read(model: Path) -> None:
    with (model / SHARDS[2]).open("r+b") as file:
        file.write((50 * GIGABYTE).to_bytes(8, "little"))
        file.truncate(60 * GIGABYTE)
    [problem] = problems(model)
    assert problem.startswith(f"{SHARDS[2]}: damaged, 60,000,000,000 bytes")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "sub/../../x.safetensors",
        "",
        "..",
        "pytorch.bin",
        "x" * 300 + ".safetensors",
    ],
)
@pytest.mark.parametrize("as_weight", [True, False])
def test_an_index_that_names_other_things_than_shards_beside_it(
    model: Path, name: str, as_weight: bool
) -> None:
    write_index(model, {"layer": name, "other": SHARDS[0]} if as_weight else {"layer": {"name": name}})
    [problem] = problems(model)
    assert problem.startswith(f"{weights.INDEX}: damaged, ")


@pytest.mark.parametrize("index", ["", '{"weight', "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_damaged(model: Path, index: str) -> None:
    (model / weights.INDEX).write_text(index)
    [problem] = problems(model)
    assert problem.startswith(f"{weights.INDEX}: damaged, ")


def test_neither_index_nor_single_file(model: Path) -> None:
    (model / weights.INDEX).unlink()
    assert problems(model) == [f"{weights.INDEX}: missing"]


def test_no_damage_makes_the_check_fail_itself(model: Path) -> None:
    chance = random.Random(0)
    for path in [model / SHARDS[0], model / weights.INDEX, model / "config.json"]:
        whole = path.read_bytes()
        for _ in range(300):
            damaged = bytearray(whole[: chance.randrange(len(whole))])
            for _ in range(chance.randrange(4)):
                if damaged:
                    damaged[chance.randrange(min(200, len(damaged)))] = chance.randrange(256)
            path.write_bytes(damaged)
            assert all(line.isprintable() for line in problems(model))
        path.write_bytes(whole)
    assert problems(model) == []


# ---- Places


@pytest.mark.parametrize(
    "place",
    [
        "owner/some.name-1",
        "owner/some___name-1",
        "models/owner/some___name-1",
        "hub/owner/some___name-1",
        "hub/models/owner/some___name-1",
        "models/owner--some.name-1/snapshots/master",
        "models/owner--some.name-1/snapshots/v1",
    ],
)
def test_a_model_is_found_wherever_modelscope_put_it(tmp_path: Path, place: str) -> None:
    write_model(tmp_path / place)
    (tmp_path / "owner/some.name-1").mkdir(parents=True, exist_ok=True)  # an empty folder is no model
    assert find_model(tmp_path, "owner/some.name-1") == tmp_path / place


def test_a_folder_that_is_closed_to_the_user_has_no_model(tmp_path: Path) -> None:
    model = write_model(tmp_path / "closed" / MODEL_ID)
    model.parent.parent.chmod(0)
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)  # root may enter any
    try:
        assert find_model(tmp_path / "closed") == model
        assert problems(model) == [f"{model}: this user may not look into it"]
    finally:
        os.seteuid(was)
        model.parent.parent.chmod(0o700)


def test_a_complete_model_is_preferred_to_one_begun(tmp_path: Path) -> None:
    begun = tmp_path / MODEL_ID
    begun.mkdir(parents=True)
    (begun / "config.json").write_text("{}")
    assert find_model(tmp_path) == begun
    owner, name = MODEL_ID.split("/")
    other = write_model(tmp_path / "models" / f"{owner}--{name}" / "snapshots" / "v1")
    assert find_model(tmp_path) == other
    master = write_model(other.with_name("master"))
    assert find_model(tmp_path) == master


def test_how_to_sample_is_what_the_models_makers_advise(model: Path) -> None:
    assert weights.sampling_defaults(model) == {}
    advice = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "eos_token_id": [1, 2]}
    (model / "generation_config.json").write_text(json.dumps(advice))
    assert weights.sampling_defaults(model) == {"temperature": 0.6, "top_p": 0.9}
    (model / "generation_config.json").write_text(json.dumps(advice | {"do_sample": False}))
    assert weights.sampling_defaults(model) == {"temperature": 0}


def test_where_there_is_none_the_tutorials_place_is_to_be_filled(tmp_path: Path) -> None:
    assert find_model(tmp_path / "models") == tmp_path / "models" / MODEL_ID


def test_the_command_that_completes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(weights, "AUTODL_DATA_DISK", tmp_path / "absent")
    assert download_command(Path("models") / MODEL_ID) == "python model_download.py"
    assert download_command(tmp_path / "of my own") is None
    elsewhere = tmp_path / "other disk"
    expected = f"python model_download.py --models-folder '{elsewhere}'"
    assert download_command(elsewhere / MODEL_ID) == expected
    cached = elsewhere / "models" / MODEL_ID.replace("/", "--") / "snapshots" / "master"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text("{}")
    assert download_command(cached) == expected


@pytest.mark.parametrize(
    "model_id", ["", "name", "a/b/c", "../..", "a/..", "/a", "a/", "a/b\n", "a b/c", "-a/b"]
)
def test_a_model_id_that_is_none(tmp_path: Path, model_id: str) -> None:
    with pytest.raises(ValueError, match="owner/name"):
        find_model(tmp_path, model_id)


def test_the_data_disk_is_the_default_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "AUTODL_DATA_DISK", tmp_path)
    assert default_models_folder() == tmp_path
    monkeypatch.setattr(weights, "AUTODL_DATA_DISK", tmp_path / "absent")
    assert default_models_folder() == Path("models")


def test_the_check_needs_neither_torch_nor_fastapi() -> None:
    check = "import sys, engine.weights; sys.exit(bool({'torch', 'fastapi'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parent.parent)
