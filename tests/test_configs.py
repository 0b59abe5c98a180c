"""Settings: where values come from, what is refused, and the files in configs/."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server import cli
from server.config import DEMO_CHECKPOINT, SECTIONS, SettingsError, commented_toml, load_settings

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "configs").glob("*.toml"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EASEL_")]:
        monkeypatch.delenv(name)


def _file(folder: Path, text: str) -> Path:
    path = folder / "easel.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_there_are_config_files() -> None:
    assert {path.name for path in FILES} >= {"demo.toml", "diffusiongemma-bf16.toml"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_config_file_loads(path: Path) -> None:
    settings = load_settings({}, path)
    written = tomllib.loads(path.read_text(encoding="utf-8"))
    for table, values in written.items():
        for name, value in values.items():
            loaded = getattr(getattr(settings, table), name)
            assert (list(loaded) if isinstance(loaded, tuple) else loaded) == value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_config_file_says_what_the_fields_say(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    title = re.match(r"(?:# .*\n)+", text)
    assert title, "a config file opens with a comment that says what it is for"
    lines = "\n".join(line.removeprefix("# ") for line in title[0].splitlines())
    assert text == commented_toml(lines, tomllib.loads(text)), "write this file anew with commented_toml"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_commented_value_can_be_switched_on(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    names = {name for section in SECTIONS.values() for name in section.model_fields}
    on = re.sub(r"^# (\w+ = )", lambda match: match[1] if match[1][:-3] in names else match[0], text, flags=re.M)
    assert set(re.findall(r"^(\w+) =", on, flags=re.M)) == names
    load_settings({}, _file(tmp_path, on))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_typo_in_any_config_file_fails(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("[engine]", '[engine]\nmodle = "x"')
    with pytest.raises(SettingsError, match=r"unknown key 'modle' in \[engine\]; did you mean 'model'\?"):
        load_settings({}, _file(tmp_path, text))


def test_defaults() -> None:
    settings = load_settings({})
    assert (settings.server.host, settings.server.port, settings.server.alias) == ("127.0.0.1", 8000, ())
    assert settings.engine.model == str(DEMO_CHECKPOINT)
    assert DEMO_CHECKPOINT == ROOT / "engine" / "demo" / "checkpoint"


def test_precedence_default_file_environment_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _file(tmp_path, '[server]\nport = 1\nhost = "file"\n[engine]\nmodel = "file"\ndtype = "float32"\n')
    monkeypatch.setenv("EASEL_PORT", "2")
    monkeypatch.setenv("EASEL_MODEL", "environment")
    settings = load_settings({"port": 3, "model": None}, file)
    assert settings.server.port == 3
    assert settings.engine.model == "environment"
    assert (settings.server.host, settings.engine.dtype) == ("file", "float32")
    assert settings.engine.device == "auto"


def test_flag_of_zero_is_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASEL_PORT", "2")
    assert load_settings({"port": 0}).server.port == 0


def test_lists_in_the_environment_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASEL_ALIAS", "gpt-4o, local ,")
    assert load_settings({}).server.alias == ("gpt-4o", "local")


def test_empty_environment_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASEL_API_KEY", "")
    assert load_settings({}).server.api_key == ()


def test_the_secret_stays_out_of_the_log_and_of_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EASEL_API_KEY", "very-secret")
    settings = load_settings({})
    assert settings.server.keys() == ("very-secret",)
    assert "very-secret" not in settings.as_line() + repr(settings)


def test_settings_are_frozen() -> None:
    settings = load_settings({})
    with pytest.raises(Exception, match="frozen"):
        settings.server.port = 1


def test_engine_options_carry_every_engine_setting() -> None:
    flags = {"model": "m", "device": "cuda:1", "dtype": "bfloat16", "kernels": "reference", "context": 77}
    quantised = {"quantize": "nvfp4", "quantize_dense": "fp8"}
    sizes = {"slots": 2, "kv_memory": 1.5, "max_waiting": 3}
    options = load_settings({**flags, **quantised, **sizes}).engine.options(progress=False)
    assert (options.slots, options.kv_memory) == (2, 1.5)
    assert (options.quantize, options.quantize_dense) == ("nvfp4", "fp8")
    assert (options.model, options.device, options.dtype, options.kernels) == ("m", "cuda:1", "bfloat16", "reference")
    assert (options.context_length, options.max_waiting, options.progress) == (77, 3, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1", r"unknown key 'prot' in \[server\]; did you mean 'port'\?"),
        ("[engine]\nport = 1", r"unknown key 'port' in \[engine\]; it belongs in \[server\]"),
        ("port = 1", r"unknown table or key 'port'; it belongs in \[server\]"),
        ("[sever]\nport = 1", r"unknown table or key 'sever'; did you mean 'server'\?"),
        ("server = 1", r"unknown table or key 'server'"),
        ("[engine]\nzzzzzz = 1", r"unknown key 'zzzzzz' in \[engine\]; known are context, device"),
        ("[server]\nport = 99999", r"easel.toml: port: .*65535 \(got 99999\)"),
        ('[engine]\ndtype = "float16"', r"easel.toml: dtype: .*'bfloat16' \(got 'float16'\)"),
        ("[server", "is not valid TOML"),
    ],
)
def test_a_bad_file_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings({}, _file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read the config file"):
        load_settings({}, tmp_path / "none.toml")


def test_a_bad_value_names_the_place_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"^--max-waiting: "):
        load_settings({"max_waiting": 0})
    monkeypatch.setenv("EASEL_DEVICE", "gpu")
    with pytest.raises(SettingsError, match=r"^EASEL_DEVICE: .*\(got 'gpu'\)"):
        load_settings({})


def test_unknown_environment_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASEL_PROT", "1")
    with pytest.raises(SettingsError, match=r"EASEL_PROT; did you mean 'EASEL_PORT'\?"):
        load_settings({})


def test_the_file_can_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _file(tmp_path, '[engine]\nmodel = "named-by-a-file"\n')
    monkeypatch.setenv("EASEL_CONFIG", str(file))
    told = CliRunner().invoke(cli.app, ["check", "--port", "0"])
    assert "named-by-a-file: no such folder" in told.output
    monkeypatch.setenv("EASEL_CONFIG", "")
    assert "named-by-a-file" not in CliRunner().invoke(cli.app, ["check", "--port", "0"]).output
