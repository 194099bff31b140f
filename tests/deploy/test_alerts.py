"""Every alert fires on the fault it is for, and stays silent without it."""

import re
from pathlib import Path

import pytest
import yaml

from coconut_serve.metrics import Metrics
from tests.deploy.tools import ALERTS, ROOT, run
from tests.fakes import make_metrics

GROUPS = yaml.safe_load(ALERTS.read_text())["groups"]
RULES = {rule["alert"]: rule for group in GROUPS for rule in group["rules"]}
_OF = 'job="coconut-serve",instance="a"'
_LATENT = f'{_OF},reasoning_mode="latent"'


def ttft(metric: str, labels: str, seconds: float) -> dict[str, str]:
    """A histogram into which an observation a second falls between bounds that hold `seconds`."""
    bounds = [0.1, 0.5, 1, 2.5, 5, 10, 40, 80]
    series = {
        f'coconut_{metric}_bucket{{{labels},le="{bound}"}}': "0+60x40"
        if bound >= seconds
        else "0x40"
        for bound in bounds
    }
    return series | {f'coconut_{metric}_bucket{{{labels},le="+Inf"}}': "0+60x40"}


def requests(errors: str) -> dict[str, str]:
    counts = {"stop": "0+600x40", "rejected": "0+6000x40", "error": errors}
    return {f'coconut_requests_total{{{_LATENT},outcome="{o}"}}': n for o, n in counts.items()}


def gauges(waiting: int, running: int) -> dict[str, str]:
    return {
        f'coconut_requests_waiting{{{_LATENT},reason="kv"}}': f"{waiting // 2}x40",
        f'coconut_requests_waiting{{{_LATENT},reason="capacity"}}': f"{waiting - waiting // 2}x40",
        f"coconut_requests_running{{{_LATENT}}}": f"{running}x40",
    }


def engine(up: int, loaded: int) -> dict[str, str]:
    return {
        f"coconut_engine_up{{{_OF}}}": f"{up}x40",
        f"coconut_model_load_seconds{{{_OF}}}": f"{loaded}x40",
    }


_TTFT, _ITL, _PHASE = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "latent_phase_seconds",
)
_QUEUE_FULL = f'coconut_admission_rejections_total{{{_OF},reason="queue_full"}}'
# alert -> (series with the fault, series without it); the rules are asked after 30 minutes.
CASES: dict[str, tuple[dict[str, str], list[dict[str, str]]]] = {
    "CoconutNotScraped": ({'up{job="other"}': "1x40"}, [{f"up{{{_OF}}}": "0x40"}]),
    "CoconutDown": ({f"up{{{_OF}}}": "0x40"}, [{f"up{{{_OF}}}": "1x40"}]),
    "CoconutEngineDown": (engine(0, 5), [engine(1, 5), engine(0, 0)]),
    "CoconutNotReady": (
        {f"coconut_ready{{{_OF}}}": "0x40"},
        [{f"coconut_ready{{{_OF}}}": "0x25 1x15"}],
    ),
    "CoconutEngineRestarting": (
        {f"coconut_engine_restarts_total{{{_OF}}}": "0x20 1 2 3 3x20"},
        [{f"coconut_engine_restarts_total{{{_OF}}}": "0x25 1x20"}],
    ),
    "CoconutErrorRateHigh": (requests("0+12x40"), [requests("0+3x40"), requests("0x40")]),
    "CoconutRejecting": ({_QUEUE_FULL: "0+30x40"}, [{_QUEUE_FULL: "0+3x40"}]),
    "CoconutQueueHigh": (gauges(40, 8), [gauges(12, 8), gauges(6, 0)]),
    "CoconutTimeToFirstTokenHigh": (ttft(_TTFT, _LATENT, 10), [ttft(_TTFT, _LATENT, 2.5)]),
    "CoconutInterTokenLatencyHigh": (ttft(_ITL, _LATENT, 2.5), [ttft(_ITL, _LATENT, 0.5)]),
    "CoconutLatentPhaseHigh": (ttft(_PHASE, _LATENT, 80), [ttft(_PHASE, _LATENT, 10)]),
    "CoconutKVCacheNearFull": (
        {f"coconut_kv_cache_usage_ratio{{{_OF}}}": "0.99x40"},
        [{f"coconut_kv_cache_usage_ratio{{{_OF}}}": "0.9x40"}],
    ),
    "CoconutPreemptionSpike": (
        {f"coconut_preemptions_total{{{_OF}}}": "0+60x40"},
        [{f"coconut_preemptions_total{{{_OF}}}": "0+6x40"}],
    ),
    "CoconutSlowClients": (
        {f"coconut_slow_client_drops_total{{{_OF}}}": "0+3x40"},
        [{f"coconut_slow_client_drops_total{{{_OF}}}": "0x40"}],
    ),
}


def unit_tests() -> list[dict[str, object]]:
    """Promtool's test groups of CASES."""
    groups: list[dict[str, object]] = []
    for alert, (faulty, healthy) in CASES.items():
        for series, is_firing in [(faulty, True), *((each, False) for each in healthy)]:
            query = f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})'
            check = {
                "expr": query,
                "eval_time": "30m",
                "exp_samples": [{"value": 1}] if is_firing else [],
            }
            given = [{"series": name, "values": values} for name, values in series.items()]
            groups.append({"interval": "1m", "input_series": given, "promql_expr_test": [check]})
    return groups


def test_every_alert_fires_and_stays_silent(tmp_path: Path) -> None:
    assert CASES.keys() == RULES.keys()
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "tests": unit_tests()}))
    assert (done := run("promtool", "check", "rules", str(ALERTS))).returncode == 0, done.stderr
    done = run("promtool", "test", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", RULES)
def test_alert_names_metrics_that_exist_and_a_runbook(alert: str) -> None:
    rule = RULES[alert]
    names = exposed(make_metrics())
    used = set(re.findall(r"coconut_\w+", rule["expr"]))
    assert used <= names, used - names
    assert set(re.findall(r'job="([^"]+)"', rule["expr"])) == {"coconut-serve"}
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    file, _, section = rule["annotations"]["runbook_url"].partition("#")
    assert section == alert.lower()
    assert f"\n## {alert}\n" in (ROOT / file).read_text()


def exposed(metrics: Metrics) -> set[str]:
    """Names of series as a page shows them."""
    names: set[str] = set()
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        names |= {family.name + end for end in suffixes.get(family.type, [""])}
    return names
