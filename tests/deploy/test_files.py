"""What the image, the compose file and the script refer to exists and agrees."""

import re
import tomllib

import yaml

from coconut_serve.cli import parse_args
from tests.deploy.tools import ALERTS, CHART, ROOT

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_image_runs_as_nobody_in_particular_and_stops_by_signal() -> None:
    assert "USER 10001:10001" in DOCKERFILE
    assert DOCKERFILE.rstrip().endswith("USER 10001:10001"), "the last target too"
    assert 'ENTRYPOINT ["coconut-serve"]' in DOCKERFILE
    assert 'CMD ["coconut-serve", "healthcheck"]' in DOCKERFILE
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE
    assert "COCONUT_COMMIT=${REVISION}" in DOCKERFILE
    assert re.findall(r"FROM \S+ AS (cpu|cuda|test)$", DOCKERFILE, re.MULTILINE) == [
        "cpu",
        "test",
        "cuda",
    ]
    assert "--mount" not in DOCKERFILE, "buildah and old dockers must build it"
    assert "# syntax" not in DOCKERFILE


def test_copied_files_pass_the_ignore_file() -> None:
    allowed = re.findall(r"^!(\S+)", (DEPLOY / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            top = source.split("/")[0]
            assert (ROOT / source).exists(), source
            assert any(each.split("/")[0] == top for each in allowed), source


def test_constraints_pin_every_line() -> None:
    lines = (DEPLOY / "constraints.txt").read_text().splitlines()
    assert all(re.fullmatch(r"#.*|[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert "torch==2.13.0" in lines


def test_image_installs_files_of_known_hashes_at_the_versions_of_the_constraints() -> None:
    """`make lock` writes requirements.txt; torch is not in it, see there."""
    assert "pip install --require-hashes -r /tmp/requirements.txt" in DOCKERFILE
    text = (DEPLOY / "requirements.txt").read_text()
    pins = dict(re.findall(r"^([a-z0-9-]+)==([\w.]+)", text, re.MULTILINE))
    constraints = (DEPLOY / "constraints.txt").read_text()
    known = dict(re.findall(r"^([a-z0-9-]+)==([\w.]+)$", constraints, re.MULTILINE))
    assert {n: v for n, v in pins.items() if n in known} == {
        n: known[n] for n in pins if n in known
    }
    extras = {name.split("[")[0] for name in pins.keys() - known.keys()}
    assert extras <= {"colorama", "httpx2-jsfetch"}, "for other systems alone"
    for block in re.split(r"\n(?=[a-z])", text)[1:]:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["otlp"], "uvloop"]
    names = {re.split(r"[<>=]", each)[0] for each in needed}
    assert names - pins.keys() == {"torch"}, "run make lock"


def test_compose_is_hardened_and_mounts_what_exists() -> None:
    server = COMPOSE["services"]["coconut"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert all(f"\nARG {name}" in DOCKERFILE for name in server["build"]["args"])
    args = parse_args([word.replace("${MODEL:-demo}", "demo") for word in server["command"]], {})
    assert args.metrics_port == 9000
    assert int(server["stop_grace_period"].rstrip("s")) > args.drain_seconds
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert not service["image"].endswith(":latest"), name
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source


def test_prometheus_scrapes_the_job_of_the_alerts() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert f'job="{job["job_name"]}"' in ALERTS.read_text()
    assert job["static_configs"][0]["targets"] == ["coconut:9000"]
    dashboards = yaml.safe_load((DEPLOY / "grafana" / "dashboards.yaml").read_text())
    mounts = COMPOSE["services"]["grafana"]["volumes"]
    path = dashboards["providers"][0]["options"]["path"]
    assert f"./{(CHART / 'dashboards').relative_to(DEPLOY)}:{path}:ro" in mounts
