"""What the chart renders, with the real helm."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from coconut_serve.cli import parse_args
from deploy.schema import config_keys
from tests.deploy.tools import ALERTS, CHART, VALUE_SETS, Manifest, helm, one, render, run

ALWAYS = {"ConfigMap", "Deployment", "Pod", "Service", "ServiceAccount"}  # the Pod is helm's test
OPTIONAL = {
    "HorizontalPodAutoscaler": ['autoscaling={"enabled":true}'],
    "HTTPRoute": ['httpRoute={"enabled":true,"parentRefs":[{"name":"g"}]}'],
    "Ingress": ['ingress={"enabled":true}'],
    "LeaderWorkerSet": [
        'engine="vllm"',
        'gpu={"enabled":true}',
        'vllm={"nodes":2,"tensorParallelSize":2}',
    ],
    "NetworkPolicy": ['networkPolicy={"enabled":true}'],
    "PersistentVolumeClaim": ['model={"claim":{"enabled":true}}'],
    "PodDisruptionBudget": ["replicas=2"],
    "PrometheusRule": ['metrics={"prometheusRule":{"enabled":true}}'],
    "ScaledObject": ['autoscaling={"enabled":true,"kind":"keda"}'],
    "Secret": ['auth={"apiKeys":["k"]}'],
    "ServiceMonitor": ['metrics={"serviceMonitor":{"enabled":true}}'],
}  # fmt: skip


def pod(manifests: list[Manifest]) -> dict[str, Any]:
    spec: dict[str, Any] = one(manifests, "Deployment")["spec"]["template"]["spec"]
    return spec


def server(manifests: list[Manifest]) -> dict[str, Any]:
    [container] = pod(manifests)["containers"]
    return dict(container)


@pytest.mark.parametrize("values", [None, *VALUE_SETS])
def test_lint_finds_nothing(values: str | None) -> None:
    words = ["--strict"] + (["--values", str(CHART / "ci" / values)] if values else [])
    done = run("helm", "lint", str(CHART), *words, "--kube-version", "1.31")
    complaints = [line for line in done.stdout.splitlines() if "[ERROR]" in line]
    # lint cannot be told which APIs there are: ours are asked for by name, and refused so.
    assert all("the cluster has no" in line for line in complaints), done.stdout


@pytest.mark.parametrize("kind", OPTIONAL)
def test_optional_object_is_absent_until_asked_for(kind: str) -> None:
    assert {each["kind"] for each in render()} == ALWAYS
    kinds = {each["kind"] for each in render(*OPTIONAL[kind])}
    assert kinds - ALWAYS == {kind}


def test_dashboard_and_extra_objects_are_absent_until_asked_for() -> None:
    assert len([m for m in render() if m["kind"] == "ConfigMap"]) == 1
    shown = render('metrics={"dashboard":{"enabled":true}}')
    [dashboard] = [m for m in shown if m["metadata"]["name"].endswith("-dashboard")]
    assert json.loads(dashboard["data"]["coconut-serve.json"])["title"] == "coconut-serve"
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("replicas=0", "minimum"),
        ("replicaCount=2", "replicaCount"),
        ('engine="tgi"', "engine"),
        ('config={"max_quue":1}', "max_quue"),
        ('config={"max_queue":"many"}', "got string, want integer"),
        ('config={"port":1}', "port"),
        ('vllm={"pipelineParallelSize":2}', "pipelineParallelSize"),
        ('vllm={"extraFlags":["--pipeline-parallel-size=2"]}', "'not' failed"),
        ('auth={"apiKeys":["a,b"]}', "pattern"),
        ('auth={"apiKeys":["a"],"existingSecret":"b"}', "not both"),
        ('metrics={"port":8000}', "'not' failed"),
        ('httpRoute={"enabled":true}', "minItems"),
        ('image={"digest":"latest"}', "pattern"),
        ('autoscaling={"kvCacheUsageRatio":90}', "maximum"),
        ('engine="vllm"', "needs gpu.enabled"),
        ('vllm={"nodes":2}', "needs engine: vllm"),
        ('model={"image":"a","existingClaim":"b"}', "one volume"),
    ],
)
def test_wrong_values_are_refused(setting: str, message: str) -> None:
    done = helm("template", sets=(setting,))
    assert done.returncode != 0
    assert message in done.stderr


def test_missing_operator_is_named_not_passed_over() -> None:
    for kind in (
        "ServiceMonitor",
        "PrometheusRule",
        "ScaledObject",
        "HTTPRoute",
        "LeaderWorkerSet",
    ):
        done = helm("template", sets=tuple(OPTIONAL[kind]), apis=())
        assert done.returncode != 0
        assert "the cluster has no" in done.stderr
        assert f"/{kind};" in done.stderr


def test_pod_meets_the_restricted_standard() -> None:
    for manifests in (render(), render(values="gpu-values.yaml")):
        spec = pod(manifests)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 10001
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert not spec.get("hostNetwork")
        asking = one(manifests, "Pod")["spec"]
        for container in [
            *spec["containers"],
            *spec.get("initContainers", []),
            *asking["containers"],
        ]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
        volumes = {each["name"]: each for each in spec["volumes"]}
        mounts = {each["name"] for each in spec["containers"][0]["volumeMounts"]}
        assert mounts == volumes.keys()
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


def test_probes_and_drain_fit_together() -> None:
    manifests = render("drainSeconds=90", "startupSeconds=300")
    container = server(manifests)
    assert container["startupProbe"]["httpGet"]["path"] == "/health"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] == 300
    [_, wait] = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod(manifests)["terminationGracePeriodSeconds"] >= 90 + int(wait) + 10
    config = yaml.safe_load(one(manifests, "ConfigMap")["data"]["config.yaml"])
    assert config["drain_seconds"] == 90


def test_config_is_what_the_server_reads(tmp_path: Path) -> None:
    manifests = render('config={"max_queue":5,"no_prefix_caching":true}')
    file = tmp_path / "config.yaml"
    file.write_text(one(manifests, "ConfigMap")["data"]["config.yaml"])
    words = [
        w.replace("/etc/coconut-serve/config.yaml", str(file)) for w in server(manifests)["args"]
    ]
    args = parse_args(words, {})
    assert (args.model, args.engine, args.host, args.port) == ("demo", "native", "0.0.0.0", 8000)
    assert (args.max_queue, args.no_prefix_caching, args.metrics_port) == (5, True, 9000)
    assert args.log_format == "json"
    assert "max_num_seqs" in config_keys()


def test_changed_config_or_secret_restarts_the_pods() -> None:
    def sums(*sets: str) -> dict[str, str]:
        found: dict[str, str] = one(render(*sets), "Deployment")["spec"]["template"]["metadata"][
            "annotations"
        ]
        return found

    assert sums() != sums('config={"max_queue":5}')
    assert sums('auth={"apiKeys":["a"]}') != sums('auth={"apiKeys":["b"]}')


def test_gpus_follow_from_the_engine() -> None:
    def limits(*sets: str) -> dict[str, Any]:
        found: dict[str, Any] = server(render(*sets))["resources"]["limits"]
        return found

    assert "nvidia.com/gpu" not in limits()
    assert limits('gpu={"enabled":true}')["nvidia.com/gpu"] == 1
    vllm = ('engine="vllm"', 'gpu={"enabled":true}')
    assert limits(*vllm, 'vllm={"tensorParallelSize":4}')["nvidia.com/gpu"] == 4
    assert server(render('gpu={"enabled":true}'))["image"].endswith("-cuda")
    assert server(render())["image"].endswith("-cpu")


def test_vllm_flags_come_after_ours() -> None:
    words = server(render(values="vllm-values.yaml"))["args"]
    at = words.index("--")
    assert words[at + 1 :] == ["--tensor-parallel-size=4", "--quantization=fp8"]


def test_nodes_share_one_server_and_only_leaders_are_asked() -> None:
    manifests = render(values="multi-node-values.yaml")
    spec = one(manifests, "LeaderWorkerSet")["spec"]["leaderWorkerTemplate"]
    leader, worker = spec["leaderTemplate"], spec["workerTemplate"]
    assert spec["size"] == 2
    for template in (leader, worker):
        [container] = template["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        assert {"name": "COCONUT_VLLM", "value": "1"} in container["env"]
    selector = one(manifests, "Service")["spec"]["selector"]
    assert selector.items() <= leader["metadata"]["labels"].items()
    assert not selector.items() <= worker["metadata"]["labels"].items()
    assert "livenessProbe" not in worker["spec"]["containers"][0]
    assert not [m for m in manifests if m["kind"] == "Deployment"]


def test_autoscalers_follow_the_queue_metric_and_own_the_replicas() -> None:
    for kind, scaler in (("hpa", "HorizontalPodAutoscaler"), ("keda", "ScaledObject")):
        manifests = render(f'autoscaling={{"enabled":true,"kind":"{kind}","minReplicas":2}}')
        assert "replicas" not in one(manifests, "Deployment")["spec"]
        spec = one(manifests, scaler)["spec"]
        assert "coconut_requests_waiting" in json.dumps(spec)
        assert spec["scaleTargetRef"]["name"] == "coconut-coconut-serve"
        assert one(manifests, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_rules_are_those_of_the_plain_file_for_this_release() -> None:
    spec = one(render('metrics={"prometheusRule":{"enabled":true}}'), "PrometheusRule")["spec"]
    job = 'job="coconut-coconut-serve",namespace="prod"'
    text = ALERTS.read_text().replace('job="coconut-serve"', job)
    assert spec == yaml.safe_load(text)


def test_network_policy_opens_no_more_than_asked() -> None:
    spec = one(render('networkPolicy={"enabled":true}'), "NetworkPolicy")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert [p["port"] for rule in spec["egress"] for p in rule["ports"]] == [53, 53]
    [http, metrics] = spec["ingress"]
    assert [p["port"] for p in http["ports"]] == ["http"]
    assert [p["port"] for p in metrics["ports"]] == ["metrics"]
    ingress = one(render(values="multi-node-values.yaml"), "NetworkPolicy")["spec"]["ingress"]
    assert any("ports" not in rule for rule in ingress), "Ray uses many ports within the group"


def test_keys_reach_the_server_only_as_a_secret() -> None:
    manifests = render('auth={"apiKeys":["first","second"]}')
    assert one(manifests, "Secret")["stringData"] == {"api-keys": "first,second"}
    rest = [m for m in manifests if m["kind"] != "Secret"]
    assert "first" not in yaml.safe_dump_all(rest)
    [key] = [e for e in server(manifests)["env"] if e["name"] == "COCONUT_API_KEY"]
    assert key["valueFrom"]["secretKeyRef"]["name"] == "coconut-coconut-serve-keys"
    given = server(render('auth={"existingSecret":"mine"}'))["env"]
    assert "mine" in [
        e["valueFrom"]["secretKeyRef"]["name"] for e in given if e["name"] == "COCONUT_API_KEY"
    ]


def test_weights_are_fetched_once_into_what_the_server_mounts() -> None:
    manifests = render(values="gpu-values.yaml")
    spec = pod(manifests)
    [download] = spec["initContainers"]
    assert {"name": "models", "mountPath": "/models"} in download["volumeMounts"]
    assert {"name": "models", "mountPath": "/models", "readOnly": True} in spec["containers"][0][
        "volumeMounts"
    ]
    claim = one(manifests, "PersistentVolumeClaim")["metadata"]
    assert {"name": "models", "persistentVolumeClaim": {"claimName": claim["name"]}} in spec[
        "volumes"
    ]
    assert claim["annotations"]["helm.sh/resource-policy"] == "keep"
    assert "HF_TOKEN" in [e["name"] for e in download["env"]]
    assert "HF_TOKEN" not in [e["name"] for e in spec["containers"][0]["env"]]


@pytest.mark.parametrize("values", VALUE_SETS)
def test_custom_resources_match_their_schemas(values: str) -> None:
    for manifest in render(values=values):
        schema = Path(__file__).parent / "crds" / f"{manifest['kind']}.json"
        if schema.exists():
            jsonschema.validate(manifest, json.loads(schema.read_text()))


def test_schemas_of_custom_resources_refuse_a_misspelt_field() -> None:
    for schema in (Path(__file__).parent / "crds").glob("*.json"):
        manifest = json.loads(json.dumps(one(render(*OPTIONAL[schema.stem]), schema.stem)))
        jsonschema.validate(manifest, json.loads(schema.read_text()))
        manifest["spec"]["polingInterval"] = 1
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(manifest, json.loads(schema.read_text()))


@pytest.mark.parametrize("values", VALUE_SETS)
def test_value_set_uses_pinned_images_and_its_own_namespace(values: str) -> None:
    for manifest in render(values=values):
        assert ":latest" not in json.dumps(manifest)
        assert manifest["metadata"].get("namespace", "prod") == "prod"
