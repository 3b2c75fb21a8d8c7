"""An evaluation's result as a table for the terminal."""

from __future__ import annotations

from typing import Any


def as_table(result: dict[str, Any]) -> str:
    """Lines with every figure, its interval, the network, and the warnings."""
    lines = [f"evaluated  {result['evaluated']}"]
    if "measures" in result:
        lines += [
            f"reference  {result['reference'] or 'none'}",
            f"network    {result['network']} ({result['network_digest']})"
            + ("" if result["network"] == "inception" else ": not to be compared with published figures"),
            "",
            f"{'measure':<10} {'value':>10}   {'95 % interval':<23} on",
        ]
        lines += [_measure_line(measure) for measure in result["measures"]]
    for branch, figures in result.get("validation", {}).items():
        lines += [
            "",
            f"validation of the {branch} branch on {figures['samples']} samples",
            f"{'scale':<10} {'loss':>8} {'accuracy':>9}",
            *(
                _scale_line(name, figures[name.replace(" ", "_")], figures[f"{name.replace(' ', '_')}_accuracy"])
                for name in ("all scales", "last scale")
            ),
            *(
                _scale_line(str(k), loss, accuracy)
                for k, (loss, accuracy) in enumerate(
                    zip(figures["scale_loss"], figures["scale_accuracy"], strict=True), 1
                )
            ),
        ]
    lines += [f"warning: {text}" for text in result.get("warnings", [])]
    return "\n".join(lines)


def _measure_line(measure: dict[str, Any]) -> str:
    if measure["value"] is None:
        return f"{measure['name']:<10} {'-':>10}   {'':<23} {measure['note']}"
    interval = "" if measure["low"] is None else f"{_number(measure['low'])} to {_number(measure['high'])}"
    return f"{measure['name']:<10} {_number(measure['value']):>10}   {interval:<23} {measure['note']}"


def _scale_line(name: str, loss: float | None, accuracy: float | None) -> str:
    if loss is None or accuracy is None:
        return f"{name:<10} {'-':>8} {'-':>9}"
    return f"{name:<10} {loss:>8.4f} {accuracy:>9.4f}"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.6f}"
