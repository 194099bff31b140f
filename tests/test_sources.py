"""Settings from the environment, beside what Kubernetes puts there."""

import logging

import pytest

from coconut_serve.cli import parse_args
from coconut_serve.commands import healthcheck
from coconut_serve.errors import StartupError


def links(service: str) -> dict[str, str]:
    """The variables of a Service, as the kubelet names them."""
    prefix = service.upper().replace("-", "_")
    read = {f"{prefix}_SERVICE_HOST": "10.0.0.1", f"{prefix}_SERVICE_PORT": "80"}
    read |= {f"{prefix}_SERVICE_PORT_HTTP_KEYS": "80", f"{prefix}_PORT": "tcp://10.0.0.1:80"}
    for name in (f"{prefix}_PORT_80_TCP", f"{prefix}_PORT_53_UDP"):
        read |= {name: "tcp://10.0.0.1:80", f"{name}_PROTO": "tcp", f"{name}_PORT": "80"}
        read[f"{name}_ADDR"] = "10.0.0.1"
    return read


@pytest.mark.parametrize(
    "service",
    ["coconut", "coconut-key", "coconut-api-key", "coconut-max-queue", "coconut-metrics",
     "coconut-port", "coconut-keys-eu-1", "coconut-host", "coconut-ssl-keyfile"],
)  # fmt: skip
def test_link_variables_are_never_settings(service: str, caplog: pytest.LogCaptureFixture) -> None:
    """A Service called coconut-key stopped the start: COCONUT_KEY_SERVICE_HOST is no setting."""
    assert parse_args(["serve"], links(service)) == parse_args(["serve"], {})
    assert not caplog.records, "and seven lines a Service say nothing"


def test_port_of_a_number_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = links("coconut") | {"COCONUT_PORT": "9001", "COCONUT_METRICS_PORT": "9002"}
    args = parse_args(["serve"], environ)
    assert (args.port, args.metrics_port) == (9001, 9002)
    for value, port in (("9001", 9001), ("tcp://10.0.0.1:80", 8000)):
        monkeypatch.setenv("COCONUT_PORT", value)
        assert healthcheck._default_url() == f"http://127.0.0.1:{port}"


def test_misspelt_settings_get_a_suggestion(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    parse_args(["serve"], {"COCONUT_MAX_QUUE": "1", "COCONUT_ZZ": "1"})
    told = [record.getMessage() for record in caplog.records]
    assert told[0].endswith("did you mean COCONUT_MAX_QUEUE?")
    assert "COCONUT_ZZ" in told[1]
    for name in ("COCONUT_KEY", "COCONUT_APIKEY", "COCONUT_SERVICE_KEY"):
        with pytest.raises(StartupError, match="did you mean COCONUT_API_KEY"):
            parse_args(["serve"], {name: "sk"})


def test_lists_of_the_command_line_win_over_the_environment() -> None:
    """A "*" of the environment could not be narrowed: lists were joined."""
    words = ["serve", "--allowed-origins", "https://a.example"]
    args = parse_args(words, {"COCONUT_ALLOWED_ORIGINS": "*"})
    assert args.allowed_origins == ["https://a.example"]
