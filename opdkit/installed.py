"""What installed packages add to opdkit: entry points of the groups opdkit.methods, opdkit.contexts, opdkit.tasks,
opdkit.token_weights, opdkit.problem_weights and opdkit.turn_weights. Only names are read here; nothing is imported."""

from __future__ import annotations

from importlib.metadata import entry_points


def installed(group: str) -> dict[str, str]:
    """{name: "module:object"} of the group `opdkit.<group>`. Raises ValueError where two packages claim one name."""
    found: dict[str, str] = {}
    for point in entry_points(group=f"opdkit.{group}"):
        target = f"{point.module}:{point.attr}" if point.attr else point.module
        if found.setdefault(point.name, target) != target:
            raise ValueError(
                f"is claimed by two installed packages ({point.name}: {found[point.name]} and {target}); write "
                "module:name for the one that is meant"
            )
    return found
