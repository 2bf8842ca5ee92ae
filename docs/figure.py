"""Draw docs/figure.svg: what a plan sends and its busiest rank, beside the baselines.

    placer inspect PLAN --json | python docs/figure.py > docs/figure.svg

The same figures give the same bytes. Colours follow the reader's light or dark theme.
"""

import json
import sys
from collections.abc import Mapping

_NAMES = {"contiguous": "contiguous", "eplb": "EPLB", "placer": "placer"}
_LEFT, _BAR, _GAP, _PANEL = 86, 230, 26, 400
_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1f2328; }
.title { font-weight: 600; } .soft { fill: #57606a; font-size: 12px; }
.contiguous { fill: #6b7178; } .eplb { fill: #d55e00; } .placer { fill: #0072b2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6e8eb; } .soft { fill: #a3abb5; }
  .contiguous { fill: #9aa2ab; } .eplb { fill: #f08a3c; } .placer { fill: #56b4e9; }
}
"""


def draw(sent: Mapping[str, float], busiest: Mapping[str, float]) -> str:
    """Return the figure; values are per placement, and bars begin at zero."""
    panels = (
        ("Copies sent per token and layer", sent),
        ("Busiest GPU: load over the mean", busiest),
    )
    body = "".join(_panel(20 + _PANEL * n, *one) for n, one in enumerate(panels))
    told = "; ".join(
        f"{title}: {', '.join(f'{_NAMES[k]} {v:.3f}' for k, v in values.items())}"
        for title, values in panels
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 142" role="img" '
        f'aria-label="{told}">\n<style>{_STYLE}</style>\n{body}'
        '<text class="soft" x="20" y="134">gpt-oss-20b, SGLang with DeepEP, 8 GPUs, no '
        "redundant experts; sequences that no placement has seen. Shorter is better."
        "</text>\n</svg>\n"
    )


def _panel(x: int, title: str, values: Mapping[str, float]) -> str:
    longest = max(values.values())
    parts = [f'<text class="title" x="{x}" y="20">{title}</text>\n']
    for row, (name, value) in enumerate(values.items()):
        y = 32 + _GAP * row
        width = _BAR * value / longest
        parts.append(
            f'<text x="{x}" y="{y + 14}">{_NAMES[name]}</text>'
            f'<rect class="{name}" x="{x + _LEFT}" y="{y}" width="{width:.1f}" '
            f'height="18" rx="2"/><text x="{x + _LEFT + width + 6:.1f}" y="{y + 14}">'
            f"{value:.3f}</text>\n"
        )
    return "".join(parts)


def main() -> None:
    """Read what ``placer inspect PLAN --json`` prints; write the figure."""
    tables = json.load(sys.stdin)["tables"]
    (rows,) = (rows for title, rows in tables.items() if title.startswith("placements on"))
    by_name = {row["placement"]: row for row in rows}
    columns = ("copies/token", "imbalance")
    # As many digits as are shown, so that the README's table gives the same bytes.
    values = [{n: round(by_name[n][c], 3) for n in _NAMES} for c in columns]
    sys.stdout.write(draw(*values))


if __name__ == "__main__":
    main()
