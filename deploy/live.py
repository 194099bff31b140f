"""Checks against what runs; called by deploy/test.sh.

python -m deploy.live stop URL COMMAND...     stop the server while it streams: nothing is lost
python -m deploy.live panels PROMETHEUS       every query of the dashboard has data
python -m deploy.live rules PROMETHEUS        every alert is loaded and can be evaluated
python -m deploy.live pod MANIFESTS IMAGE     the pod of a rendered chart, for podman play kube
"""

import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from coconut_serve.commands.measure import Record, Target, ask
from deploy.generate import CHART


def stop(url: str, command: list[str]) -> None:
    """Run `command`, which stops the server, during a stream, which must still finish."""
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": "Count to a hundred."}],
        "max_tokens": 200,
        "min_tokens": 200,
        "reasoning_mode": "latent",
        "stream": True,
        "return_token_ids": True,
    }
    target = Target(url=url, api_key=os.environ.get("COCONUT_API_KEY", ""))
    begun = threading.Event()
    records: list[Record] = []

    def on_chunk(number: int) -> bool:
        if number == 5:
            begun.set()
        return True

    thread = threading.Thread(target=lambda: records.append(ask(target, body, on_chunk=on_chunk)))
    thread.start()
    assert begun.wait(60), "the stream did not begin"
    stopping = subprocess.Popen(command)
    time.sleep(0.5)
    late = ask(replace(target, timeout_seconds=5), body)
    thread.join()
    assert stopping.wait(60) == 0, "the stop command failed"
    [record] = records
    assert record.is_ok, f"the stream was cut: {record.error}"
    assert record.num_answer_tokens == 200
    assert late.status in (0, 503), f"a request after the signal got {late.status}"
    told = late.status or "no connection"
    print(f"stopped after 200 tokens of a running stream; a late request got {told}")


def panels(prometheus: str) -> None:
    """Check that every query of the dashboard returns data."""
    dashboard = json.loads((CHART / "dashboards" / "coconut-serve.json").read_text())
    silent, count = [], 0
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"].replace("$__rate_interval", "30s")
            query = query.replace("$job", ".+").replace("$model", ".+")
            count += 1
            if not _query(prometheus, query):
                silent.append(f"{panel['title']}: {query}")
    assert not silent, "no data for:\n" + "\n".join(silent)
    print(f"{count} queries of the dashboard return data")


def _query(prometheus: str, query: str) -> list[Any]:
    path = "/api/v1/query?" + urllib.parse.urlencode({"query": query})
    status, text = Target(url=prometheus).get(path)
    assert status == 200, f"{query}: {text}"
    result: list[Any] = json.loads(text)["data"]["result"]
    return result


def rules(prometheus: str) -> None:
    """Check that the alerts are loaded, healthy and silent."""
    _, text = Target(url=prometheus).get("/api/v1/rules")
    found = [rule for group in json.loads(text)["data"]["groups"] for rule in group["rules"]]
    assert len(found) >= 14, f"{len(found)} rules"
    wrong = [rule["name"] for rule in found if rule["health"] != "ok" or rule["state"] == "firing"]
    assert not wrong, f"not healthy and silent: {wrong}"
    print(f"{len(found)} alerts are evaluated, none fires")


def pod(rendered: str, image: str) -> None:
    """Print a rendered chart's ConfigMap and Deployment, adapted to podman and the host's net."""
    kept = []
    for manifest in yaml.safe_load_all(Path(rendered).read_text()):
        if manifest["kind"] not in ("ConfigMap", "Deployment"):
            continue
        manifest["metadata"].pop("namespace")
        if manifest["kind"] == "Deployment":
            spec = manifest["spec"]["template"]["spec"]
            del spec["topologySpreadConstraints"]
            [container] = spec["containers"]
            container["image"] = image
            del container["ports"]  # not needed in the host's network
            del container["startupProbe"], container["readinessProbe"]  # podman supports one probe
            # For httpGet, podman would call curl, which the image lacks.
            del container["livenessProbe"]["httpGet"]
            container["livenessProbe"]["exec"] = {"command": ["coconut-serve", "healthcheck"]}
        kept.append(manifest)
    print(yaml.safe_dump_all(kept))


def main(argv: list[str]) -> int:
    """Run a check and return the exit status."""
    match argv:
        case ["stop", url, *command] if command:
            stop(url, command)
        case ["panels", url]:
            panels(url)
        case ["rules", url]:
            rules(url)
        case ["pod", rendered, image]:
            pod(rendered, image)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
