"""The pod templates of LeaderWorkerSets as Deployments, which a validator knows."""

import sys
from pathlib import Path

import yaml

if __name__ == "__main__":
    for manifest in yaml.safe_load_all(Path(sys.argv[1]).read_text()):
        if manifest and manifest["kind"] == "LeaderWorkerSet":
            parts = manifest["spec"]["leaderWorkerTemplate"]
            for template in (parts["leaderTemplate"], parts["workerTemplate"]):
                labels = template["metadata"]["labels"]
                spec = {"selector": {"matchLabels": labels}, "template": template}
                head = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}}
                print("---\n" + yaml.safe_dump({**head, "spec": spec}))
    print("---\n{apiVersion: v1, kind: ConfigMap, metadata: {name: not-empty}}")
