"""Plain maps, for your own programs: one CSV row per slot, or one JSON object."""

import csv
import io
import json
from pathlib import Path
from typing import Literal

from placer.errors import PlacerError
from placer.run.documents import (
    SCHEMA_VERSION,
    Count,
    Document,
    ExpertId,
    NumExperts,
    NumRanks,
    of_this_version,
    read_json,
    shown,
    validated,
)
from placer.run.files import read_text
from placer.runtime_map.runtime import MapSource, ParsedMap, Runtime


class PlacementMap(Document, frozen=True, kw_only=True):
    """The JSON object of a plain map; see ``docs/formats.md``."""

    schema_version: Literal[2]
    kind: Literal["placement_map"]
    num_ranks: NumRanks
    num_nodes: NumRanks
    layer_ids: list[Count] | None
    num_experts: list[NumExperts]
    physical_to_logical_map: list[list[ExpertId]]


_COLUMNS = ("moe_layer", "layer_id", "rank", "slot", "expert")


def _csv_rows(source: MapSource) -> list[tuple[str, ...]]:
    num_ranks = source.placement.num_ranks
    rows = []
    for layer, slots in enumerate(source.placement.to_json()):
        layer_id = source.model.layer_ids[layer] if source.model.layer_ids else ""
        for slot, expert in enumerate(slots):
            rank = slot * num_ranks // len(slots)
            rows.append(tuple(map(str, (layer, layer_id, rank, slot, expert))))
    return rows


def _write_csv(source: MapSource, path: Path, _suffix: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows((_COLUMNS, *_csv_rows(source)))


def _csv_lines(path: Path) -> list[tuple[str, ...]]:
    try:
        text = read_text(path, what="map").removeprefix("\ufeff")
        stream = io.StringIO(text, newline="")
        header, *lines = [tuple(line) for line in csv.reader(stream)]
    except (ValueError, csv.Error) as error:
        raise PlacerError(f"it is not a CSV with a header: {error}") from error
    if header != _COLUMNS:
        raise PlacerError(f"its columns are {shown(header)}, not {shown(_COLUMNS)}")
    return lines


def _parse_csv(path: Path, _suffix: str) -> ParsedMap:
    rows: list[list[int]] = []
    layer_ids = []
    for number, line in enumerate(_csv_lines(path), 2):
        try:
            layer, layer_id, expert = int(line[0]), line[1], int(line[4])
        except (ValueError, IndexError) as error:
            raise PlacerError(f"line {number}: {error}") from error
        if layer == len(rows):
            rows.append([])
            layer_ids.append(layer_id)
        if layer != len(rows) - 1:
            raise PlacerError(f"line {number}: layer {layer} is in the wrong place")
        rows[layer].append(expert)
    if not rows:
        raise PlacerError("it has no slots")
    if not all(one.isdecimal() for one in layer_ids):
        return ParsedMap(rows=rows)
    return ParsedMap(rows=rows, layer_ids=tuple(int(one) for one in layer_ids))


def _read_csv(source: MapSource, path: Path, _suffix: str) -> list[list[int]]:
    lines = _csv_lines(path)
    rows: list[list[int]] = [[] for _ in source.placement.num_experts]
    for number, line in enumerate(lines, 2):
        try:
            layer, expert = int(line[0]), int(line[-1])
            rows[layer].append(expert)
        except (ValueError, IndexError) as error:
            raise PlacerError(f"line {number}: {error}") from error
    # Line by line: rank, slot and layer number must be those of the plan too.
    for number, pair in enumerate(zip(lines, _csv_rows(source), strict=False), 2):
        if pair[0] != pair[1]:
            raise PlacerError(
                f"line {number} is {shown(pair[0])}, in the plan {shown(pair[1])}"
            )
    return rows


def _map_of(source: MapSource) -> PlacementMap:
    layer_ids = source.model.layer_ids
    return PlacementMap(
        schema_version=SCHEMA_VERSION,
        kind="placement_map",
        num_ranks=source.placement.num_ranks,
        num_nodes=source.placement.num_nodes,
        layer_ids=None if layer_ids is None else list(layer_ids),
        num_experts=list(source.placement.num_experts),
        physical_to_logical_map=source.placement.to_json(),
    )


def _write_json(source: MapSource, path: Path, _suffix: str) -> None:
    path.write_text(json.dumps(_map_of(source).to_json()) + "\n", encoding="utf-8")


def _read_json(source: MapSource, path: Path, _suffix: str) -> list[list[int]]:
    found, expected = _placement_map(path), _map_of(source)
    for name in ("num_ranks", "num_nodes", "layer_ids", "num_experts"):
        own, planned = getattr(found, name), getattr(expected, name)
        if own != planned:
            raise PlacerError(f"{name} is {own}, in the plan {planned}")
    return found.physical_to_logical_map


def _parse_json(path: Path, _suffix: str) -> ParsedMap:
    found = _placement_map(path)
    return ParsedMap(
        rows=found.physical_to_logical_map,
        layer_ids=None if found.layer_ids is None else tuple(found.layer_ids),
        num_experts=tuple(found.num_experts),
    )


def _placement_map(path: Path) -> PlacementMap:
    where, again = f"map {path}", f"placer export json PLAN --out {path}"
    value = of_this_version(read_json(path, "map"), where, again)
    return validated(value, PlacementMap, where, again)


CSV = Runtime(
    needs_model=False,
    write=_write_csv,
    read=_read_csv,
    parse=_parse_csv,
)
JSON = Runtime(
    needs_model=False,
    write=_write_json,
    read=_read_json,
    parse=_parse_json,
)
