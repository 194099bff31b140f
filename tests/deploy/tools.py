"""What the tests of deploy/ share: the tools they need, and the rendered chart.

The tools are not Python packages; a test that needs one that is not there is skipped and says so.
`make deploy-test` gets them all, and sets DEPLOY_TEST, under which nothing is skipped.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "coconut-serve"
ALERTS = CHART / "alerts" / "alerts.yaml"
VALUE_SETS = sorted(path.name for path in (CHART / "ci").glob("*-values.yaml"))
APIS = (
    "monitoring.coreos.com/v1",
    "keda.sh/v1alpha1",
    "gateway.networking.k8s.io/v1",
    "leaderworkerset.x-k8s.io/v1",
)
Manifest = dict[str, Any]


def tool(name: str) -> str:
    """The path of a program; the test is skipped without it."""
    found = shutil.which(name)
    if found is None:
        assert not os.environ.get("DEPLOY_TEST"), f"{name} is not on PATH"
        pytest.skip(f"{name} is not on PATH: make deploy-test gets it")
    return found


def run(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program of `tool`."""
    return subprocess.run(
        [tool(words[0]), *words[1:]], capture_output=True, text=True, check=False, input=text
    )


def render(*sets: str, values: str | None = None, apis: tuple[str, ...] = APIS) -> list[Manifest]:
    """The chart's manifests under a value set of ci/ and --set words."""
    return list(_render(sets, values, apis))


@functools.cache
def _render(
    sets: tuple[str, ...], values: str | None, apis: tuple[str, ...]
) -> tuple[Manifest, ...]:
    done = helm("template", sets=sets, values=values, apis=apis)
    assert done.returncode == 0, done.stderr
    return tuple(each for each in yaml.safe_load_all(done.stdout) if each)


def helm(
    command: str,
    *,
    sets: tuple[str, ...] = (),
    values: str | None = None,
    apis: tuple[str, ...] = APIS,
) -> subprocess.CompletedProcess[str]:
    """Run helm on the chart."""
    words = ["helm", command, *(["coconut"] if command == "template" else []), str(CHART)]
    words += ["--namespace", "prod"]
    words += [w for each in sets for w in ("--set-json", each)]
    words += ["--values", str(CHART / "ci" / values)] if values else []
    words += [w for api in apis for w in ("--api-versions", api)] if command == "template" else []
    return run(*words)


def one(manifests: list[Manifest], kind: str) -> Manifest:
    """The only manifest of a kind."""
    [found] = [each for each in manifests if each["kind"] == kind]
    return found
