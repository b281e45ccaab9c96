from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.ops.settings import (
    Settings,
    SettingsError,
    default_cache_folder,
    load_settings,
    settings_markdown,
    settings_table,
    unknown_variables,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, _, _ in settings_table():
        monkeypatch.delenv(name, raising=False)


def test_environment_sets_and_override_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHUMB_PORT", "9001")
    assert load_settings().port == 9001
    assert load_settings(port=9002).port == 9002
    assert load_settings(port=None).port == 9001


def test_empty_variable_means_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose files pass unset variables as empty strings."""
    monkeypatch.setenv("RHUMB_REDIS_URL", "")
    assert load_settings().redis_url is None


def test_every_bad_value_is_named_and_none_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHUMB_PORT", "tcp://10.0.0.7:8080")  # what a service link injects
    monkeypatch.setenv("RHUMB_REDIS_URL", "http://:secret@redis")
    with pytest.raises(SettingsError) as caught:
        load_settings(max_top_k=0)
    message = str(caught.value)
    assert {line.split(":")[0] for line in message.splitlines()} == {"RHUMB_PORT", "RHUMB_REDIS_URL", "RHUMB_MAX_TOP_K"}
    assert "secret" not in message
    assert "10.0.0.7" not in message


def test_unknown_override_is_refused() -> None:
    with pytest.raises(SettingsError, match="RHUMB_PROT"):
        load_settings(prot=1)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


def test_every_setting_is_documented() -> None:
    assert all(len(text) > 20 and text.endswith(".") for _, _, text in settings_table())


def test_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs" / "settings.md").read_text("utf-8") == settings_markdown()


def test_misspelt_variable_gets_the_nearest_name() -> None:
    environment = {"RHUMB_PROT": "1", "RHUMB_PORT": "1", "RHUMB_TEST_DATA": "x", "HOME": "/"}
    assert unknown_variables(environment) == ["RHUMB_PROT is no setting: did you mean RHUMB_PORT?"]


def test_secret_does_not_print(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHUMB_REDIS_URL", "redis://:hunter2@redis")
    assert "hunter2" not in repr(load_settings())


@pytest.mark.parametrize("url", ["redis://localhost:abc", "redis://user:se#cret@host:6379/0"])
def test_a_redis_url_that_is_none_is_refused_without_being_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHUMB_REDIS_URL", url)
    with pytest.raises(SettingsError, match=r"RHUMB_REDIS_URL: .*host:port/database") as caught:
        load_settings()
    assert "se" not in str(caught.value).partition("RHUMB_REDIS_URL")[2].partition("(")[0].split()
    assert "cret" not in str(caught.value)


def test_metrics_need_a_port_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RHUMB_METRICS_PORT", "9000")
    assert load_settings(port=9001).metrics_port == 9000
    with pytest.raises(SettingsError, match=r"RHUMB_METRICS_PORT: .*port 9000 is the API's"):
        load_settings(port=9000)


def test_a_user_without_a_home_has_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", staticmethod(homeless))
    assert default_cache_folder().name == f"rhumbline-{os.getuid()}", "temporary folders are everybody's"
