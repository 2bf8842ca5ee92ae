"""Write the JSON Schemas beside this file: python docs/schemas/write.py."""

import json
from pathlib import Path

import msgspec

from placer.affinity.affinity import AffinityFile
from placer.checkpoint.deepspeed_record import DeepspeedRecord
from placer.checkpoint.ranks import RankRecord
from placer.checkpoint.record import RecordFile
from placer.placement.plan_file import PlanFile
from placer.planning.certificate_file import CertificateFile
from placer.run.documents import Document
from placer.runtime_map.eplb import EplbHeader
from placer.runtime_map.plain import PlacementMap
from placer.table.table import TableFile
from placer.target.hardware import HardwareFile
from placer.trace.header import TraceFile

KINDS: dict[str, type[msgspec.Struct]] = {
    "affinity-header": AffinityFile,
    "certificate": CertificateFile,
    "deepspeed-record": DeepspeedRecord,
    "eplb-map-header": EplbHeader,
    "export-record": RecordFile,
    "hardware": HardwareFile,
    "placement-map": PlacementMap,
    "plan": PlanFile,
    "rank-record": RankRecord,
    "table-header": TableFile,
    "trace": TraceFile,
}


def schema_text(name: str) -> str:
    """Return the JSON Schema of a kind of file, as its file holds it."""
    schema = msgspec.json.schema(KINDS[name])
    for one in _all_documents(Document):
        found = schema["$defs"].get(one.__name__)
        if found is not None:
            # Their defaults are for code alone; what may be left out is UNSET there.
            fields = zip(one.__struct_fields__, msgspec.structs.fields(one), strict=True)
            found["required"] = [n for n, f in fields if f.default is not msgspec.UNSET]
            for value in found["properties"].values():
                value.pop("default", None)
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def _all_documents(root: type[Document]) -> list[type[Document]]:
    return [x for one in root.__subclasses__() for x in (one, *_all_documents(one))]


if __name__ == "__main__":
    for kind in KINDS:
        path = Path(__file__).with_name(f"{kind}.json")
        path.write_text(schema_text(kind), encoding="utf-8")
