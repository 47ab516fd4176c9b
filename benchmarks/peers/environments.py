"""Virtual environments for other libraries, made when they are missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def interpreter(place: Path, *installs: Sequence[str]) -> Path:
    """The Python of the environment in `place`; made if it is missing, with one `pip install` per list of packages."""
    python = place / "bin" / "python"
    if not python.exists():
        print(f"installing {', '.join(name for names in installs for name in names)} into {place}", flush=True)
        try:
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            for packages in installs:
                subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)  # half an environment would be taken for a whole one
            raise
        (place / ".gitignore").write_text("*\n")
    return python
