"""The CycloneDX ML-BOM of an adapter: what it consists of and was made from, with digests.

Everything in it follows from the adapter's own files, so that it never changes. Scores and verdict
are the version's evidence.

Format: CycloneDX 1.6, https://cyclonedx.org/docs/1.6/json/
"""

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_core.adapter.json_files import read_identity
from pipelines.tracking.version_files import WEIGHTS, digests_in

BILL_OF_MATERIALS = "bom.cdx.json"
ADAPTER, BASE, DATA = "adapter", "base", "training-data"


def bill_of_materials(folder: Path) -> str:
    """Return the ML-BOM of the adapter in a folder, as JSON.

    Raises:
        AdapterError: its sidecar cannot be read.
    """
    identity = read_identity(folder) or {}
    digests = digests_in(folder)
    sha256 = digests[WEIGHTS]
    files = []
    for name, digest in digests.items():
        files.append({"type": "file", "name": name, "hashes": [_sha256(digest)]})
    bill = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'sha256:{sha256}')}",
        "version": 1,
        "metadata": {"component": _adapter(identity, sha256)},
        "components": [_base(identity), _data(identity), *files],
        "dependencies": [
            {"ref": ADAPTER, "dependsOn": [BASE, DATA]},
            {"ref": BASE},
            {"ref": DATA},
        ],
    }
    return json.dumps(bill, indent=2, ensure_ascii=False) + "\n"


def _adapter(identity: Mapping[str, Any], sha256: str) -> dict[str, Any]:
    lineage = identity.get("lineage", {})
    return {
        "type": "machine-learning-model",
        "bom-ref": ADAPTER,
        "name": ADAPTER,
        "version": sha256,
        "hashes": [_sha256(sha256)],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "text-generation",
                "architectureFamily": "LoRA",
                "datasets": [{"ref": DATA}],
            }
        },
        "properties": _properties("lineage", lineage),
    }


def _base(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "machine-learning-model",
        "bom-ref": BASE,
        "name": str(identity.get("base", "")) or "unknown",
        "version": str(identity.get("revision", "")),
        "properties": _properties("fingerprint", identity.get("base_digests", {})),
    }


def _data(identity: Mapping[str, Any]) -> dict[str, Any]:
    digest = str(identity.get("lineage", {}).get("data_digest", ""))
    return {
        "type": "data",
        "bom-ref": DATA,
        "name": "training data",
        "version": digest,
        "data": [{"type": "dataset", "name": "training data"}],
    }


def _properties(group: str, values: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return properties with names that no other tool uses."""
    return [{"name": f"lora:{group}:{name}", "value": str(values[name])} for name in sorted(values)]


def _sha256(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}
