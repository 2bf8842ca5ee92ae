"""The last line of a solver's log: why it stopped."""

from placer.placement import SolverReport

_REASONS = {
    "proved": "the plan is proved optimal",
    "step_limit": "the search did all of its steps",
    "time_limit": "the time limit was reached",
    "interrupted": "Ctrl-C was pressed",
}


def ending_line(report: SolverReport) -> str:
    """Say why the search stopped, and the gap to the best that can be proved."""
    reason = _REASONS.get(report.termination or "", "nothing is left to do")
    gap = ""
    if report.gap:
        least = max(report.gap, 0.001)  # a gap that is left is never shown as none
        gap = f"; no plan can be more than {least:.1%} better"
    return f"solve: {reason}{gap}"
