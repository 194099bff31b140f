"""The dashboard: ids, units, variables, and only metrics that exist."""

import json
import os
import re

from coconut_serve.server.observe import watch_process
from deploy.generate import CHART, outputs
from tests.deploy.test_alerts import exposed
from tests.fakes import make_metrics

DASHBOARD = json.loads((CHART / "dashboards" / "coconut-serve.json").read_text())
GRAPHS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_generated_files_are_current() -> None:
    for path, text in outputs().items():
        assert path.read_text() == text, f"{path.name}: run python -m deploy.generate"


def test_values_stay_a_page() -> None:
    assert len((CHART / "values.yaml").read_text().splitlines()) <= 150


def test_panels_have_own_ids_titles_units_and_room() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert len(set(titles)) == len(titles)
    assert all(panel["fieldConfig"]["defaults"]["unit"] for panel in GRAPHS)
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24


def test_every_query_uses_the_variables_and_existing_metrics() -> None:
    metrics = make_metrics()
    watch_process(metrics, os.getpid)
    names = exposed(metrics)
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    for panel in GRAPHS:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            query = target["expr"]
            assert target["datasource"]["uid"] == "${datasource}"
            assert set(re.findall(r"coconut_\w+", query)) <= names, query
            assert set(re.findall(r"\$(\w+)", query)) <= variables | {"__rate_interval"}
            assert "$job" in query, query
            if "rate(" in query:
                assert "[$__rate_interval]" in query
