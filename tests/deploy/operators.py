"""Check custom resources with models generated from their operators' own definitions.

python tests/deploy/operators.py RENDERED...     in the environment of deploy/test-requirements.txt
"""

import sys
from pathlib import Path

import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor

_MODELS = {each.__name__: each for each in (PrometheusRule, ScaledObject, ServiceMonitor)}

if __name__ == "__main__":
    seen = set()
    for path in sys.argv[1:]:
        for manifest in yaml.safe_load_all(Path(path).read_text()):
            if manifest and manifest["kind"] in _MODELS:
                _MODELS[manifest["kind"]].model_validate(manifest)
                seen.add(manifest["kind"])
    assert seen == _MODELS.keys(), f"no value set has {_MODELS.keys() - seen}"
    print(f"valid for their operators: {', '.join(sorted(seen))}")
