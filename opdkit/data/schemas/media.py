"""Images, sound and films: opdkit reads and trains text. A question that comes with more is none without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opdkit.data.files.unusable import Unusable

# Columns in which data sets keep them beside the question.
MEDIA = ("image", "images", "image_url", "image_urls", "video", "videos", "audio", "audios")


def check_without_media(row: Mapping[str, Any]) -> None:
    """Raises Unusable for a row with anything in such a column."""
    for name in MEDIA:
        if row.get(name) not in (None, "", [], {}, ()):
            raise Unusable(
                f'its column "{name}" holds what is no text, which opdkit does not read; if the question stands '
                "without it, remove the column"
            )


def text_of_parts(content: Any) -> Any:
    """[{"type": "text", "text": ...}, ...], as OpenAI's API has it, as one text; all else as it is. Raises Unusable for
    parts of another type."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    kinds = [part.get("type") for part in content]
    if other := [str(kind) for kind in kinds if kind != "text"]:
        raise Unusable(f"the content has a part of type {other[0][:80]!r}, and opdkit reads text alone")
    return "\n".join(str(part.get("text") or "") for part in content)
