"""Runtime maps: a plan in the format that an engine loads at start."""

from placer.runtime_map.maps import RUNTIMES, MapReport, WrittenMap, export_map, verify_map

__all__ = ["RUNTIMES", "MapReport", "WrittenMap", "export_map", "verify_map"]
