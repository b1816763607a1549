"""What `inspect` prints."""

from __future__ import annotations

from typing import Any


def inspect_text(contents: dict[str, Any]) -> str:
    """What a checkpoint or a bundle holds, as indented lines."""
    lines: list[str] = []

    def add(value: Any, depth: int) -> None:
        for key, item in value.items():
            if isinstance(item, dict) and item:
                lines.append(f"{'  ' * depth}{key}:")
                add(item, depth + 1)
            elif isinstance(item, list) and item and all(isinstance(x, str) for x in item) and len(str(item)) > 80:
                lines.append(f"{'  ' * depth}{key}:")
                lines.extend(f"{'  ' * (depth + 1)}{x}" for x in item)
            elif isinstance(item, list):
                lines.append(f"{'  ' * depth}{key}: {', '.join(map(str, item)) or 'none'}")
            else:
                shown = f"{item:,}" if isinstance(item, int) and not isinstance(item, bool) else item
                lines.append(f"{'  ' * depth}{key}: {shown if shown != {} else 'none'}")

    add(contents, 0)
    return "\n".join(lines)
