"""Which files of this folder a C++ source includes, directly or not: what its object file depends on.

The text is searched, the preprocessor is not run, so an include under an #if counts always. Files outside
the given folders (the system's, the compiler's) are not looked at; the compiler's version stands for them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', re.MULTILINE)


def files_behind(source: Path, folders: Sequence[Path] = ()) -> list[Path]:
    """`source` and everything it includes, sorted; names are looked for beside the including file, then in
    `folders`, as the compiler does with -I.
    """
    found: set[Path] = set()
    queue = [source.resolve()]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        for name in _INCLUDE.findall(path.read_text()):
            candidates = ((folder / name).resolve() for folder in (path.parent, *folders))
            queue += [next((candidate for candidate in candidates if candidate.is_file()), path)]
    return sorted(found)
