"""The service's settings: one frozen class, read from ``RHUMB_`` environment variables, every field documented."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.ops.cpus import available_cpus

PREFIX = "RHUMB_"
NOT_OURS = frozenset({"RHUMB_TEST_DATA", "RHUMB_DEBUG"})  # read by the tests, and by the command line itself
REDIS_SCHEMES = ("redis://", "rediss://", "unix://")


class SettingsError(Exception):
    """A setting has a bad value; the message names the variable and the rule, one line each."""


def default_cache_folder() -> Path:
    """Return the user's cache folder for Rhumbline (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rhumbline"
    except RuntimeError:  # a user without a home, as containers have them
        return Path(tempfile.gettempdir()) / f"rhumbline-{os.getuid()}"


class Settings(BaseSettings):
    """Everything that can be set from outside, with its default."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, env_ignore_empty=True, extra="forbid", hide_input_in_errors=True
    )

    bundle: Path | None = Field(None, description="Bundle that `rhumb serve` opens when the command names none.")
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 for every interface.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="Port of its own for `/metrics`; unset, it is served beside the API."
    )
    cache_dir: Path = Field(
        default_factory=default_cache_folder,
        description="Folder for compiled kernels and the demo's bundle; default: the user's cache folder.",
    )

    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="Where the encoder and the decoder run; `cuda` needs the extra `gpu`."
    )
    threads: int = Field(
        default_factory=available_cpus,
        ge=1,
        le=1024,
        description="Threads of one inference, and of one Hamming scan; default: the CPUs this process may use.",
    )
    concurrency: int = Field(
        default_factory=available_cpus,
        ge=1,
        le=1024,
        description="Requests computed at the same time; default: the CPUs this process may use.",
    )
    max_in_flight: int = Field(
        32, ge=1, le=100_000, description="Requests computed or waiting for a thread; one more gets 503 at once."
    )
    queue_seconds: float = Field(
        5.0,
        gt=0,
        le=600,
        description="Seconds a request, or a piece of a large batch, may wait for a thread; then it gets 503.",
    )

    max_body_bytes: int = Field(1 << 20, ge=1024, le=1 << 30, description="Largest request body in bytes; 413 above.")
    body_timeout_seconds: float = Field(
        5.0, gt=0, le=600, description="Seconds a client may take to send its headers, and its body; 408 above."
    )
    max_connections: int = Field(
        1024, ge=1, le=1_000_000, description="Open connections; further ones get 503 without being read."
    )
    max_queries: int = Field(64, ge=1, le=10_000, description="Most queries in one batch.")
    max_query_characters: int = Field(4096, ge=1, le=1_000_000, description="Longest query in characters.")
    max_top_k: int = Field(1000, ge=1, le=1000, description="Largest `top_k` of a request.")
    max_hamming_top_k: int = Field(
        10_000, ge=1, le=10_000, description="Largest `top_k` of a request to `/v1/hamming/search`."
    )
    max_embedding_inputs: int = Field(
        2048,
        ge=1,
        le=10_000,
        description="Most texts of a request to `/v1/embeddings`; they too have to fit `RHUMB_MAX_BODY_BYTES`, and are "
        "computed `RHUMB_MAX_QUERIES` at a time.",
    )
    ready_timeout_seconds: float = Field(
        5.0, gt=0, le=600, description="Seconds the canary query of `/readyz` may take before the answer is 503."
    )

    redis_url: SecretStr | None = Field(
        None, description="Shared answer cache, e.g. `redis://redis:6379/0`; unset, each process keeps its own."
    )
    redis_timeout_seconds: float = Field(
        0.05, gt=0, le=5, description="Seconds for one Redis operation; slower is a miss."
    )
    redis_connections: int = Field(16, ge=1, le=10_000, description="Most connections to Redis.")
    cache_entries: int = Field(
        10_000, ge=0, le=100_000_000, description="Answers kept in this process; 0 turns the answer cache off."
    )
    cache_bytes: int = Field(64 << 20, ge=0, le=1 << 40, description="Bytes of answers kept in this process.")
    cache_ttl_seconds: float = Field(3600.0, gt=0, le=31_536_000, description="Seconds an answer stays in the cache.")

    drain_seconds: float = Field(
        3.0, ge=0, le=600, description="Seconds of serving on after readiness went down, so that balancers notice."
    )
    shutdown_seconds: float = Field(
        20.0, gt=0, le=3600, description="Seconds that running requests get to finish at shutdown."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level to log.")
    log_format: Literal["text", "json"] = Field("text", description="Log lines for people or for machines.")

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not url.get_secret_value().startswith(REDIS_SCHEMES):
            raise ValueError(f"a Redis URL starts with {', '.join(REDIS_SCHEMES)}")
        try:
            _ = urlsplit(url.get_secret_value() if url else "").port
        except ValueError:  # its text would show parts of a password
            raise ValueError("a Redis URL ends in host:port/database; write # / ? @ in a password as %XX") from None
        return url

    @field_validator("metrics_port")
    @classmethod
    def _ports_differ(cls, metrics_port: int | None, info: ValidationInfo) -> int | None:
        if metrics_port is not None and metrics_port == info.data.get("port"):
            raise ValueError(f"port {metrics_port} is the API's: choose another, or leave it unset")
        return metrics_port


def load_settings(**overrides: object) -> Settings:
    """Read the settings from the environment; an override that is not None wins.

    Raises:
        SettingsError: a value breaks its rule (all of them are named), without showing the value: it may be a secret.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)  # type: ignore[arg-type]  # checked by pydantic, that is the point
    except ValidationError as error:
        raise SettingsError("\n".join(_lines(error))) from None


def _lines(error: ValidationError) -> Iterator[str]:
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        name = str(problem["loc"][0]) if problem["loc"] else ""
        meaning = Settings.model_fields[name].description if name in Settings.model_fields else "unknown setting"
        yield f"{PREFIX}{name.upper()}: {problem['msg']} ({meaning})"


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return one warning for each ``RHUMB_`` variable that is no setting, with the nearest name."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    warnings = []
    for name in sorted(environment):
        if name.upper().startswith(PREFIX) and name.upper() not in NOT_OURS.union(known):
            nearest = difflib.get_close_matches(name.upper(), known, n=1)
            warnings.append(f"{name} is no setting" + (f": did you mean {nearest[0]}?" if nearest else ""))
    return warnings


def settings_table() -> list[tuple[str, str, str]]:
    """Return (variable, default, description) of every setting, in the order of the class."""
    rows = Settings.model_fields.items()
    return [(PREFIX + name.upper(), _default(field), str(field.description)) for name, field in rows]


def settings_markdown() -> str:
    """Return the page ``docs/settings.md``."""
    head = [
        "# Settings",
        "",
        "Environment variables; `rhumb settings` prints this table with the values in force. Options of a command win.",
        "This page is made by `rhumb settings --markdown`, and a test holds it to the code. Kubernetes makes variables",
        "of its own for a Service named `rhumb` (`RHUMB_PORT=tcp://…`): name it otherwise, or set",
        "`enableServiceLinks: false`.",
        "",
        "| variable | default | meaning |",
        "|---|---|---|",
    ]
    rows = [f"| `{name}` | {f'`{default}`' if default else ''} | {text} |" for name, default, text in settings_table()]
    return "\n".join([*head, *rows, ""])


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None or field.default is None:
        return ""  # depends on the machine, or unset; the description says which
    return str(field.default)
