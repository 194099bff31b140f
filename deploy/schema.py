"""Schema of the Helm chart's values; `config` is generated from the server's flags."""

from typing import Any

from pydantic.fields import FieldInfo

from coconut_serve.config import Settings, bounds_of, kind_of

Schema = dict[str, Any]

# Flags that the chart sets itself, or that come from a Secret. Probes, Service and Ingress speak
# plain HTTP to a port: TLS ends at the Ingress or Gateway.
_CHART_SETS = frozenset({
    "engine", "host", "port", "metrics_port", "log_format",
    "drain_seconds", "api_key", "served_model_name", "uds", "ssl_certfile", "ssl_keyfile",
    "ssl_ca_certs", "ssl_cert_reqs",
})  # fmt: skip
_TEXT: Schema = {"type": "string"}
_FULL: Schema = {"type": "string", "minLength": 1}
_FLAG: Schema = {"type": "boolean"}
_MAPPING: Schema = {"type": "object"}
_STRINGS: Schema = {"type": "object", "additionalProperties": _TEXT}
_NAME: Schema = {
    "type": "string",
    "pattern": "^$|^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
    "maxLength": 253,
}
_QUANTITY: Schema = {
    "type": ["string", "number"],
    "pattern": "^[0-9.]+(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$",
}
_LIMITS = {"ge": "minimum", "le": "maximum", "lt": "exclusiveMaximum"}
_SIZES = r"^(--(pipeline|tensor|data)[-_]parallel[-_]size|-pp|-tp|-dp)(=|$)"
_NO_PIPELINE = (
    "There is no pipelineParallelSize: our hooks need every layer in one worker, and the engine "
    "refuses to start with more. Use tensor parallelism, also over nodes."
)


def _integer(low: int = 0, high: int | None = None) -> Schema:
    return {"type": "integer", "minimum": low} | ({} if high is None else {"maximum": high})


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _array(item: Schema = _TEXT, **more: Any) -> Schema:
    return {"type": "array", "items": item, **more}


_PORT = _integer(1, 65535)
_OBJECTS = _array(_MAPPING)


def build(settings: type[Settings] = Settings) -> Schema:
    groups = _naming(settings) | _model() | _exposure() | _operation() | _pod()
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of coconut-serve",
        **_object(**groups),
    }


def config_keys(settings: type[Settings] = Settings) -> dict[str, FieldInfo]:
    """List the server's flags that `config` accepts."""
    return {name: own for name, own in settings.flags().items() if name not in _CHART_SETS}


def _flag(field: FieldInfo) -> Schema:
    schema: Schema = {"description": field.description}
    kind, choices = kind_of(field)
    if choices:
        return schema | {"enum": list(choices)}
    if isinstance(field.default, tuple):
        return schema | _array(_FULL)
    kinds = {bool: "boolean", int: "integer", float: "number"}
    limits = {_LIMITS[key]: bound for key, bound in bounds_of(field).items()}
    return schema | {"type": kinds.get(kind, "string")} | limits


def _naming(settings: type[Settings]) -> dict[str, Schema]:
    return {
        "global": _MAPPING,
        "nameOverride": {"type": "string", "maxLength": 63},
        "fullnameOverride": {"type": "string", "maxLength": 52},
        "replicas": _integer(1),
        "engine": {"enum": ["native", "vllm", "stub"]},
        "config": _object(**{name: _flag(own) for name, own in config_keys(settings).items()}),
        "drainSeconds": {"type": "number", "minimum": 0, "maximum": 3600},
        "startupSeconds": _integer(10, 3600),
        "image": _object(
            repository=_FULL,
            tag=_TEXT,
            digest={"type": "string", "pattern": "^$|^sha256:[0-9a-f]{64}$"},
            pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
            pullSecrets=_array(),
        ),
    }


def _model() -> dict[str, Schema]:
    modes = ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]
    flag = {"type": "string", "not": {"pattern": _SIZES}}
    return {
        "model": _object(
            name=_FULL,
            servedName=_TEXT,
            fromHub=_FLAG,
            existingClaim=_NAME,
            image=_TEXT,
            claim=_object(
                enabled=_FLAG,
                size=_QUANTITY,
                storageClassName=_TEXT,
                accessModes=_array({"enum": modes}, minItems=1),
            ),
            download=_object(
                repository=_TEXT,
                revision={"type": "string", "pattern": "^[A-Za-z0-9._-]+$"},
                image=_TEXT,
                command=_array(),
            ),
            tokenSecret=_object(name=_NAME, key=_FULL),
        ),
        "vllm": _object(
            tensorParallelSize=_integer(1),
            dataParallelSize=_integer(1),
            nodes=_integer(1),
            extraFlags=_array(flag),
        )
        | {"description": _NO_PIPELINE},
        "gpu": _object(enabled=_FLAG, resourceName=_FULL, runtimeClassName=_TEXT),
    }


def _exposure() -> dict[str, Schema]:
    key = {"type": "string", "pattern": "^[^,]+$"}
    needs_parent = {
        "if": {"properties": {"enabled": {"const": True}}, "required": ["enabled"]},
        "then": {"properties": {"parentRefs": {"minItems": 1}}},
    }
    return {
        "auth": _object(
            apiKeys=_array(key),
            existingSecret=_NAME,
            key={"type": "string", "pattern": "^[-._a-zA-Z0-9]+$"},
        ),
        "service": _object(
            type={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
            port=_PORT,
            annotations=_STRINGS,
        ),
        "serviceAccount": _object(create=_FLAG, name=_NAME, annotations=_STRINGS),
        "ingress": _object(
            enabled=_FLAG,
            className=_TEXT,
            hosts=_array(_FULL, minItems=1),
            tls=_array(_object(hosts=_array(), secretName=_TEXT)),
            annotations=_STRINGS,
        ),
        "httpRoute": _object(
            enabled=_FLAG,
            parentRefs=_array({"type": "object", "required": ["name"]}),
            hostnames=_array(),
            annotations=_STRINGS,
        )
        | needs_parent,
        "networkPolicy": _object(
            **{"enabled": _FLAG, "from": _OBJECTS, "metricsFrom": _OBJECTS, "egress": _OBJECTS}
        ),
    }


def _operation() -> dict[str, Schema]:
    share = {"type": "string", "pattern": "^[0-9]+%$"}
    return {
        "autoscaling": _object(
            enabled=_FLAG,
            kind={"enum": ["hpa", "keda"]},
            minReplicas=_integer(1),
            maxReplicas=_integer(1),
            waitingPerPod=_integer(1),
            kvCacheUsageRatio={"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            prometheusAddress={"type": "string", "pattern": "^https?://"},
            scaleDownSeconds=_integer(0, 3600),
        ),
        "podDisruptionBudget": _object(maxUnavailable={"anyOf": [_integer(1), share]}),
        "metrics": _object(
            port=_PORT | {"not": {"const": 8000}},
            serviceMonitor=_object(
                enabled=_FLAG,
                interval={"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
                labels=_STRINGS,
            ),
            prometheusRule=_object(enabled=_FLAG, labels=_STRINGS, runbookUrl=_FULL),
            dashboard=_object(enabled=_FLAG, labels=_STRINGS, annotations=_STRINGS),
        ),
    }


def _pod() -> dict[str, Schema]:
    amounts = {"type": "object", "additionalProperties": _QUANTITY}
    return {
        "resources": _object(requests=amounts, limits=amounts, claims=_OBJECTS),
        "shmSize": _QUANTITY,
        "cacheSize": _QUANTITY,
        "updateStrategy": _object(
            type={"enum": ["RollingUpdate", "Recreate"]}, rollingUpdate={"type": ["object", "null"]}
        ),
        **dict.fromkeys(("podAnnotations", "podLabels", "nodeSelector"), _STRINGS),
        **dict.fromkeys(("affinity", "podSecurityContext", "securityContext"), _MAPPING),
        **dict.fromkeys(("tolerations", "topologySpreadConstraints"), _OBJECTS),
        **dict.fromkeys(("extraVolumes", "extraVolumeMounts", "extraObjects"), _OBJECTS),
        "priorityClassName": _TEXT,
        "extraArgs": _array(),
        "extraEnv": _array({"type": "object", "required": ["name"]}),
    }
