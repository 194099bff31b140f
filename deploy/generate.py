"""Writes the generated files, or with --check compares: the chart's schema, dashboard and table.

python -m deploy.generate [--check]
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from deploy import dashboard, schema

CHART = Path(__file__).parent / "helm" / "coconut-serve"
_HEAD = "| value | default | |\n|---|---|---|\n"


def values_table(text: str) -> str:
    """Render a row for each value of values.yaml, with the `# --` comment above it."""
    told = _comments(text)
    values: dict[str, Any] = yaml.safe_load(text)
    rows: list[str] = []
    for name, value in values.items():
        nested = isinstance(value, dict) and any(key.startswith(f"{name}.") for key in told)
        parts = {f"{name}.{key}": v for key, v in value.items()} if nested else {name: value}
        if nested and name in told:
            rows.append(f"| `{name}` | | {told[name]} |")
        for path, default in parts.items():
            shown = json.dumps(default, ensure_ascii=False)
            rows.append(f"| `{path}` | `{shown}` | {told.get(path, '')} |")
    return _HEAD + "\n".join(rows) + "\n"


def _comments(text: str) -> dict[str, str]:
    """Find the `# --` comment above each key of the first two levels."""
    told: dict[str, str] = {}
    parent, comment = "", ""
    for line in text.splitlines():
        stripped = line.strip()
        key = re.match(r"( *)([A-Za-z]+):", line)
        if stripped.startswith("# -- "):
            comment = stripped.removeprefix("# -- ")
        elif key and len(key[1]) <= 2:
            parent = key[2] if not key[1] else parent
            path = key[2] if not key[1] else f"{parent}.{key[2]}"
            if comment or key[1]:
                told[path] = comment
            comment = ""
    return told


def outputs() -> dict[Path, str]:
    """Map every generated file to its expected contents."""
    readme = (CHART / "README.md").read_text()
    before, _, after = readme.partition(_HEAD)
    rest = re.sub(r"^(\|.*\n)*", "", after)
    table = values_table((CHART / "values.yaml").read_text())
    return {
        CHART / "values.schema.json": json.dumps(schema.build(), indent=1) + "\n",
        CHART / "dashboards" / "coconut-serve.json": json.dumps(dashboard.build(), indent=1) + "\n",
        CHART / "README.md": before + table + rest,
    }


def main(argv: list[str]) -> int:
    """Write, or with --check compare, and return the exit status."""
    stale = [path for path, text in outputs().items() if not _is_current(path, text)]
    for path in stale:
        if "--check" in argv:
            print(f"{path} is stale: run python -m deploy.generate", file=sys.stderr)
        else:
            path.write_text(outputs()[path])
    return 1 if stale and "--check" in argv else 0


def _is_current(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
