"""Prints what pip has to install for extras of this project, without building the project.

    python tools/requirements.py test lint

One requirement a line: those of the build, those of the package itself, and those of the extras
named, with ``aiouffd[...]`` among them followed.
"""

import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    """The flat list, in order and without repetitions."""
    data = tomllib.loads(PYPROJECT.read_text())
    project = data["project"]
    own = project["name"] + "["
    found = [*data["build-system"]["requires"], *project["dependencies"]]
    waiting, seen = list(extras), set()
    while waiting:
        extra = waiting.pop(0)
        if extra in seen:
            continue
        seen.add(extra)
        for item in project["optional-dependencies"][extra]:
            if item.startswith(own):
                waiting += [name.strip() for name in item[len(own) :].rstrip("]").split(",")]
            else:
                found.append(item)
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
