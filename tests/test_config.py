"""A flag of `serve` is declared once; help, file, environment, chart and errors follow."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from coconut_serve import sources
from coconut_serve.arguments import Parser, option
from coconut_serve.cli import build_parser, parse_args
from coconut_serve.config import (
    EngineConfig,
    ServeConfig,
    Settings,
    StubConfig,
    bounds_of,
    flag,
    kind_of,
)
from coconut_serve.errors import StartupError
from deploy import schema

FLAGS = Settings.flags()
BOUNDED = [name for name, field in FLAGS.items() if bounds_of(field)]
_CERTIFICATE, _AUTHORITIES = "--ssl-certfile=c.pem", "--ssl-ca-certs=a.pem"
_NEEDS = {
    "ssl_keyfile": [_CERTIFICATE],
    "ssl_ca_certs": [_CERTIFICATE],
    "ssl_cert_reqs": [_CERTIFICATE, _AUTHORITIES],
}
_VALUES = {  # that some word would not do for
    "allowed_origins": "https://a.example",
    "allowed_reasoning_modes": "cot,latent",
    "custom_histogram_buckets": '{"latent_steps": [1, 2.5]}',
    "kv_cache_memory": "40%",
    "min_trace": "summary",
    "root_path": "/llm",
}


class Toy(Settings):
    """Settings with a flag more."""

    toy_seconds: float = flag("Limits", 1.5, "how long 100% of a toy runs", ge=1, lt=9)


def settings(*words: str, environ: dict[str, str] | None = None) -> Settings:
    return Settings.model_validate(parse_args(["serve", "m", *words], environ or {}))


def value_for(name: str) -> str:
    """A word that the flag takes, and that is not its default."""
    kind, choices = kind_of(FLAGS[name])
    if choices:
        return _VALUES.get(name) or str(choices[-1])
    return _VALUES.get(name) or {bool: "true", int: "7", float: "2.5"}.get(kind, "word")


def help_by_group(parser: argparse.ArgumentParser) -> dict[str, str]:
    """The text of --help under each title."""
    parts = re.split(r"^(\w[\w ]*):$", parser.format_help(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def serve_parser() -> argparse.ArgumentParser:
    [commands] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    parser: argparse.ArgumentParser = commands.choices["serve"]
    return parser


@pytest.mark.parametrize("name", FLAGS)
def test_flag_stands_in_the_help_under_its_group(name: str) -> None:
    field = FLAGS[name]
    shown = help_by_group(serve_parser())[str(field.title)]
    assert re.search(rf"^  {option(name)}\b", shown, flags=re.M)
    assert " ".join((field.description or "").split()) in " ".join(shown.split())


@pytest.mark.parametrize("name", FLAGS)
def test_file_environment_and_command_line_give_the_same_settings(
    name: str, tmp_path: Path
) -> None:
    value, needed = value_for(name), _NEEDS.get(name, [])
    own = option(name) if FLAGS[name].annotation is bool else f"{option(name)}={value}"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({name: yaml.safe_load(value)}))
    given = settings(own, *needed)
    assert given == settings(*needed, environ={f"COCONUT_{name.upper()}": value})
    assert given == settings("--config", str(file), *needed)
    assert given != settings(*needed)


@pytest.mark.parametrize("name", BOUNDED)
def test_value_out_of_range_is_told_with_the_flag_and_the_range(name: str) -> None:
    bounds = bounds_of(FLAGS[name])
    outside = [bounds["ge"] - 1, *([bounds["le"] + 1] if "le" in bounds else [])]
    outside += [bounds["lt"]] if "lt" in bounds else []
    outside += ["nan"] if kind_of(FLAGS[name])[0] is float else []
    high = bounds.get("le", bounds.get("lt"))
    told = f"at least {bounds['ge']}" if high is None else f"in {bounds['ge']}..{high}"
    for value in outside:
        with pytest.raises(StartupError) as caught:
            settings(f"{option(name)}={value}")
        assert caught.value.message == f"{option(name)} must be {told}"
        assert caught.value.param == option(name)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ssl-keyfile=k"], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile=c", "--ssl-cert-reqs=2"], "--ssl-cert-reqs needs --ssl-ca-certs"),
        (["--root-path=llm"], "--root-path must begin with / and not end with it"),
        (["--min-trace=vectors"], "--min-trace must be at most --max-trace"),
        (["--api-key="], "--api-key must not be empty"),
        (["--kv-cache-memory=lots"], "--kv-cache-memory 'lots' is not a size: give bytes, 512MiB,"),
        (["--engine=vllm", "--device=cpu"], "--device cpu: the vllm engine runs where vLLM does"),
        (["--engine=vllm", "--vllm-metric-aliases"], "--vllm-metric-aliases: the vllm engine "),
        (["--engine=stub", "--", "--x"], "--x after -- needs --engine vllm"),
        (["--allowed-reasoning-modes=cot,x"], "--allowed-reasoning-modes: 'x' is not one of none"),
    ],
)
def test_settings_that_do_not_agree_are_refused_by_name(words: list[str], told: str) -> None:
    with pytest.raises(StartupError) as caught:
        settings(*words)
    assert caught.value.message.startswith(told)


def test_records_name_the_flag_too() -> None:
    """Tests, benches and whoever embeds an engine build them; pydantic's error is for nobody."""
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (StubConfig, {"ttft_seconds": -1}, "--stub-ttft-seconds must be at least 0"),
        (EngineConfig, {"model": Path("m"), "block_size": 0}, "--block-size must be at least 1"),
        (EngineConfig, {"model": Path("m"), "dtype": "int8"}, "--dtype: Input should be 'auto', "),
        (ServeConfig, {"port": 70_000}, "--port must be in 0..65535"),
        (ServeConfig, {"api_keys": ("",)}, "--api-key must not be empty"),
        (ServeConfig, {"max_queu": 1}, "--max-queu: "),
    ]
    for record, values, told in wrong:
        with pytest.raises(StartupError) as caught:
            record(**values)
        assert caught.value.message.startswith(told)
        assert caught.value.__cause__ is caught.value.__context__ is None


def test_parts_have_what_the_command_line_says() -> None:
    given = settings("--max-num-seqs=3", "--stub-fail-at-token=5", "--api-key=sk-secret")
    serve = given.part(ServeConfig, served_model_name="name")
    assert (serve.max_num_seqs, serve.served_model_name, serve.api_keys) == (
        3, "name", ("sk-secret",),
    )  # fmt: skip
    assert given.part(EngineConfig, model=Path("m")).max_num_seqs == 3
    assert given.part(StubConfig) == StubConfig(fail_at_token=5)
    assert "sk-secret" not in repr(given) + repr(serve)


def test_keys_are_told_to_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    """Keys of the environment are words in front of the command line, which an error may quote."""
    with pytest.raises(SystemExit):
        settings(environ={"COCONUT_API_KEY": "sk-secret", "COCONUT_MAX_QUEUE": "many"})
    told = capsys.readouterr()
    assert "--max-queue" in told.err
    assert "sk-secret" not in told.out + told.err


def test_new_flag_is_known_everywhere() -> None:
    parser = Parser(prog="toy")
    parser.set_defaults(model="m", more_flags=())
    sources.add_flags(parser, Toy)
    limits = " ".join(help_by_group(parser)["Limits"].split())
    assert "--toy-seconds X how long 100% of a toy runs (default: 1.5)" in limits
    assert "max_queue" in schema.config_keys(Toy)
    config = schema.build(Toy)["properties"]["config"]["properties"]
    assert config["toy_seconds"] == {
        "description": "how long 100% of a toy runs",
        "type": "number",
        "minimum": 1,
        "exclusiveMaximum": 9,
    }
    environ = {"COCONUT_TOY_SECONDS": "2"}
    words = sources.read(argparse.Namespace(config=None), environ, Toy)
    assert words == ["--toy-seconds=2"]
    assert Toy.model_validate(parser.parse_args(words)).toy_seconds == 2
    with pytest.raises(StartupError, match=r"^--toy-seconds must be in 1\.\.9$"):
        Toy.model_validate(parser.parse_args(["--toy-seconds=9"]))
