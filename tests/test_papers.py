"""docs/methods/papers.md names files, recipes and tests: each is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"[\w*-][\w./*-]*(\.py|\.toml|/)")


def test_every_named_file_is_there() -> None:
    """Rows name paths from the root or from opdkit/; a bare file is beside the one named before it. Not that a row's
    words are true."""
    page = (ROOT / "docs" / "methods" / "papers.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    found, missing = 0, []
    for cell in (cell for row in rows for cell in row.split("|")):
        folder = ROOT
        for name in (word for word in re.findall(r"`([^`]+)`", cell) if NAMED.fullmatch(word)):
            places = [folder] if "/" not in name else [ROOT, ROOT / "opdkit"]
            matches = [match for place in places for match in place.glob(name)]
            found += len(matches)
            missing += [] if matches else [name]
            folder = matches[0].parent if matches else folder
    assert not missing and found > 50
