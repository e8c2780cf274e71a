"""Where a configuration comes from: a preset or a YAML file, then dotted overrides."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from astropt_ds.config import Config, ModalityConfig, ModelConfig
from astropt_ds.errors import UserError
from astropt_ds.section import Section

PRESETS = Path(__file__).parent / "presets"


def load_config(source: str | Path, overrides: list[str] | None = None) -> Config:
    """A validated configuration from a preset's name or a YAML file, then dotted overrides.

    Raises:
        UserError: no such preset or file, not YAML, or keys and values that do not fit.
    """
    values = _read(source, overrides)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _refusal(source, [(item["loc"], item) for item in error.errors()]) from None


def load_model_config(source: str | Path, overrides: list[str] | None = None) -> ModelConfig:
    """The section ``model`` alone, which need not fit the rest.

    Raises:
        UserError: as :func:`load_config`.
    """
    values = _read(source, overrides).get("model")
    try:
        return ModelConfig.model_validate({} if values is None else values)
    except ValidationError as error:
        faults = [(("model", *item["loc"]), item) for item in error.errors()]
        raise _refusal(source, faults) from None


def parse_command_line(argv: list[str]) -> Config | None:
    """The configuration that a training command line asks for.

    Returns None after ``--print-config``, which has then been obeyed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m astropt_ds.train",
        description="Pretrain AstroPT. Presets: " + " ".join(preset_names()),
        epilog="Example: --config 1m data.path=shards run.dir=runs/1m run.steps=200 zero.stage=3",
    )
    parser.add_argument("--config", required=True, help="a preset's name or a YAML file")
    parser.add_argument("--print-config", action="store_true", help="print the result and exit")
    # the deepspeed launcher passes it; the rank comes from the environment, as with torchrun
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return None
    return config


def preset_names() -> list[str]:
    """The shipped presets, smallest model first."""
    names = (path.stem for path in PRESETS.glob("*.yaml"))
    return sorted(names, key=lambda name: (not name[0].isdigit(), len(name), name))


def _read(source: str | Path, overrides: list[str] | None) -> dict[str, Any]:
    values = _read_yaml(source)
    for override in overrides or []:
        _apply(values, override)
    return values


def _refusal(source: str | Path, faults: list[tuple[tuple[Any, ...], Any]]) -> UserError:
    told = dict.fromkeys(_describe(place, item) for place, item in faults)
    return UserError(f"configuration {source}: {'; '.join(told)}")


def _read_yaml(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESETS / f"{source}.yaml"
        if not path.is_file():
            raise UserError(
                f"--config {source}: no such preset; one of {' '.join(preset_names())}, "
                "or the path of a .yaml file"
            )
    try:
        values = _parse(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {source}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {source}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {source}: holds no mapping of keys")
    return values


def _parse(text: str) -> Any:
    """YAML with every scalar as it is written, except null.

    The types of :class:`Config` say what a value is; YAML's own guesses would turn ``off`` into
    false and the folder ``2024_10_05`` into a number.
    """

    def with_null(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: with_null(item) for key, item in value.items()}
        if isinstance(value, list):
            return [with_null(item) for item in value]
        return None if value in ("", "~", "null") else value

    return with_null(yaml.load(text, Loader=yaml.BaseLoader))


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: key.sub=value would be right")
    try:
        value = _parse(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not YAML") from None
    *parents, leaf = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise UserError(f"override {override!r}: {parent!r} is a value, not a section")
    section[leaf] = value


def _describe(place: tuple[Any, ...], item: Any) -> str:
    """One validation error in words: the key, what is wrong with it, what would be right."""
    key = ".".join(map(str, place))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, _keys(Config), n=1, cutoff=0.0)
        return f"unknown key {key!r}; did you mean {near[0]!r}?"
    if item["type"] == "model_type":
        return f"{key} is a section; {key}.KEY=value would be right"
    if item["type"] == "missing":
        return f"{key} is missing"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={item['input']} {message}"


def _keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key below a section."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if name == "modalities":
            keys += [prefix + name, *_keys(ModalityConfig, f"{prefix}{name}.images.")]
        elif isinstance(annotation, type) and issubclass(annotation, Section):
            keys += [prefix + name, *_keys(annotation, f"{prefix}{name}.")]
        else:
            keys.append(prefix + name)
    return keys
