"""The tables that ``published_cells.py`` prints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .measure import Outcome

_KINDS = ("values", "lengths", "resets", "chunks")


def family_table(family: str, outcomes: Sequence[Outcome]) -> str:
    """Return a line for each case of a family."""
    head = f"{'':34} {'inference':9} {'training':8} {'f64':4} {'grad':4} {'x f32':>5} len res chk str {'s':>5}"
    return "\n".join([f"\n{family}", head, *(_line(outcome) for outcome in outcomes)])


def _line(outcome: Outcome) -> str:
    name = f"  {outcome.case.name[:31]:32}"
    if outcome.skipped or outcome.broken:
        return f"{name} {'skipped: ' + outcome.skipped if outcome.skipped else 'BROKEN: ' + outcome.broken}"
    ran = [("compiled" if yes else "eager") for yes in (outcome.inference, outcome.training)]
    marks = [_mark(outcome, ["values"]), _mark(outcome, ["values, gradients"])]
    rest = [_mark(outcome, [kind, f"{kind}, gradients"]) for kind in _KINDS[1:3]]
    chunks = _mark(outcome, ["chunks", "chunks, gradients", "chunk bits"])
    stream = _mark(outcome, ["stream"])
    text = f"{name} {ran[0]:9} {ran[1]:8} {marks[0]:4} {marks[1]:4} {outcome.ratio:5.1f} {rest[0]:3} {rest[1]:3} "
    return text + f"{chunks:3} {stream:3} {outcome.seconds:5.1f}"


def _mark(outcome: Outcome, names: Iterable[str]) -> str:
    made = [outcome.checks[name] for name in names if name in outcome.checks]
    return "-" if not made else "ok" if all(made) else "NO"


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the count by family, what is refused and why, and what is wrong."""
    families = list(dict.fromkeys(outcome.case.family for outcome in outcomes))
    lines = [f"\n{'':24} {'cases':>6} {'inference':>9} {'training':>9} {'both':>6} {'right':>6}"]
    measured = [outcome for outcome in outcomes if not outcome.skipped]
    for family in families:
        lines.append(_count(family, [outcome for outcome in measured if outcome.case.family == family]))
    lines.append(_count("all", measured))
    for title, failures in (
        ("skipped", [(outcome, [outcome.skipped]) for outcome in outcomes if outcome.skipped]),
        ("broken cases", [(outcome, [outcome.broken]) for outcome in outcomes if outcome.broken]),
        ("refused", [(outcome, outcome.refusals) for outcome in outcomes if outcome.refusals]),
        ("failed checks", [(o, _failures(o)) for o in outcomes if not all(o.checks.values())]),
    ):
        if failures:
            lines.append(f"\n{title}:")
            lines += [f"  {outcome.case.name}: {text}" for outcome, texts in failures for text in dict.fromkeys(texts)]
    return "\n".join(lines)


def _failures(outcome: Outcome) -> list[str]:
    failed = ", ".join(name for name, passed in outcome.checks.items() if not passed)
    return [f"{failed} ({'; '.join(outcome.notes)})"]


def _count(family: str, outcomes: Sequence[Outcome]) -> str:
    counts = (
        len(outcomes),
        sum(outcome.inference for outcome in outcomes),
        sum(outcome.training for outcome in outcomes),
        sum(outcome.compiled for outcome in outcomes),
        sum(outcome.right for outcome in outcomes),
    )
    return f"{family:24} {counts[0]:6} {counts[1]:9} {counts[2]:9} {counts[3]:6} {counts[4]:6}"
