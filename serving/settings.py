"""Every knob, once: its name, default, bounds and meaning. Set by a LLAMA_* variable or a --flag."""

import argparse
import os
import sys
from collections.abc import Sequence as Seq
from functools import cached_property
from pathlib import Path
from typing import Literal, NoReturn, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliApp, CliSettingsSource, SettingsConfigDict

from engine.weights import default_models_folder, find_model

DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"


class Settings(BaseSettings):
    """A flag wins over its variable, and that over the default."""

    model_config = SettingsConfigDict(
        env_prefix="LLAMA_",
        use_attribute_docstrings=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        extra="forbid",
        frozen=True,
    )

    model: str = ""
    """folder of the model, or "demo"; empty: what model_download.py puts into the models folder"""
    models_folder: Path = Field(default_factory=default_models_folder)
    """where models are kept"""
    served_model_name: str = ""
    """names of the model in /v1, separated by commas; empty: the folder's"""
    host: str = "0.0.0.0"
    """address to listen on; 127.0.0.1 is reached from this machine only"""
    port: int = Field(6006, ge=0, le=65535)
    """port to listen on; 0 takes one that is free"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where the model runs; auto: on the GPU if there is one"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """type that is computed in; auto: bfloat16 on a GPU, float32 on the CPU"""
    quantization: Literal["none", "int8"] = "none"
    """int8: a byte for each weight; on the CPU that is faster for few requests at once"""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads of the engine; 0: as many as there are cores"""
    max_model_len: int = Field(0, ge=0)
    """most tokens of a prompt and its answer together; 0: what the model was trained for"""
    max_queue: int = Field(256, ge=1)
    """most requests that wait; those beyond are refused with 429"""
    max_per_key: int = Field(0, ge=0)
    """most requests in flight with one API key; 0: half of max_queue if there are several keys"""
    request_timeout: float = Field(600, ge=0)
    """seconds that an answer may take, its wait included, before it ends with 504; 0 is no limit"""
    drain_timeout: float = Field(30, ge=0)
    """seconds that answers in flight have to finish after SIGTERM or Ctrl-C"""
    api_key: SecretStr | None = None
    """keys that clients must send one of, separated by commas; without any, anybody may use the server"""
    api_key_file: Path | None = None
    """file with more of them, one in a line"""
    cors_origin: str = ""
    """web pages that may use the server, as https://example.com, separated by commas; * is any"""
    max_num_seqs: int = Field(256, ge=1, le=4096)
    """most requests that run at once; no more than max_batch_tokens, as each takes a token of it"""
    max_batch_tokens: int = Field(0, ge=0)
    """most tokens computed in a step; 0: 2048 on a GPU, 80 on the CPU"""
    kv_cache_tokens: int = Field(0, ge=0)
    """tokens that the KV cache holds; 0: as many as there is memory for"""
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    """share of the GPU's memory that may be used in all"""
    speculate: int = Field(0, ge=0, le=32)
    """most tokens of an answer guessed in a step, where it repeats its prompt; the answer stays the same"""
    max_body_bytes: int = Field(4_194_304, ge=1024)
    """largest request body; one beyond is refused with 413"""
    log_content: bool = False
    """log prompts and answers too"""
    log_format: Literal["text", "json"] = "text"
    """form of the log's lines: text for people, json for programs"""

    @property
    def model_path(self) -> Path:
        """The folder of the model to serve."""
        if self.model == "demo":
            return DEMO_MODEL
        return Path(self.model) if self.model else find_model(self.models_folder)

    @cached_property
    def model_names(self) -> list[str]:
        """What the model is called in /v1. The first is its name, the others are aliases."""
        own = "demo" if self.model == "demo" else self.model_path.resolve().name
        return list(dict.fromkeys([*_split(self.served_model_name), own]))

    @field_validator("api_key", "api_key_file")
    @classmethod
    def _holds_keys(cls, given: SecretStr | Path | None) -> SecretStr | Path | None:
        if given is not None and not _keys_in(given):
            raise ValueError("no key is in it")
        return given

    @cached_property
    def api_keys(self) -> frozenset[str]:
        """All keys. There is no need of one if there are none."""
        return _keys_in(self.api_key) | _keys_in(self.api_key_file)

    @property
    def requests_per_key(self) -> int:
        """The most requests that may be in flight with one key; one for several answers counts as several."""
        running = self.max_queue + self.max_num_seqs
        return self.max_per_key or (running if len(self.api_keys) == 1 else max(1, self.max_queue // 2))

    @property
    def cors_origins(self) -> list[str]:
        """Web pages of other hosts that may use the server."""
        return _split(self.cors_origin)

    @property
    def is_public(self) -> bool:
        """Whether other machines can reach the server."""
        return self.host not in ("127.0.0.1", "::1", "localhost")

    @classmethod
    def unknown_variables(cls) -> list[str]:
        """Names of LLAMA_* variables that are set and are no settings, as misspelled ones are not."""
        prefix = cls.model_config["env_prefix"]
        own = {prefix + name.upper() for name in cls.model_fields}
        return sorted(name for name in os.environ if name.startswith(prefix) and name.upper() not in own)

    @classmethod
    def from_command_line(cls, arguments: Seq[str] | None = None, *, program: str = "api.py") -> Self:
        """Reads flags and variables. Where one is wrong, says which in one line and exits with 2."""
        parser = _Parser(prog=program, description="Serves Llama-3-8B-Instruct over HTTP.")
        source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(cls, root_parser=parser)
        try:
            return CliApp.run(
                cls,
                cli_args=list(sys.argv[1:] if arguments is None else arguments),
                cli_settings_source=source,
            )
        except ValidationError as error:
            fault = error.errors()[0]
            name = "-".join(str(part) for part in fault["loc"]).replace("_", "-")
            parser.error(f"--{name}: {fault['msg']}, not {fault['input']!r}")


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _keys_in(given: SecretStr | Path | None) -> frozenset[str]:
    if given is None:
        return frozenset()
    if isinstance(given, SecretStr):
        return frozenset(_split(given.get_secret_value()))
    try:
        lines = given.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"can't be read: {error}") from error
    return frozenset(line.strip() for line in lines if line.strip())


def hide_key() -> None:
    """Starts the process anew without a key among its arguments, where every user of the machine can read it,
    but in its environment, where only its own user can."""
    arguments, keys = [], []
    given = iter(sys.argv)
    for argument in given:
        name, equals, value = argument.partition("=")
        if name in ("--api-key", "--api_key"):
            keys.append(value if equals else next(given, ""))
            if not equals and (not keys[-1] or keys[-1].startswith("-")):
                return  # there is no key: the parser says so
        else:
            arguments.append(argument)
    if keys:
        os.environ["LLAMA_API_KEY"] = ",".join(keys)
        os.execv(sys.executable, [sys.executable, *arguments])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")
