"""Where affmae runs: systems with POSIX file locks. Elsewhere it says so instead of failing at an import."""

from __future__ import annotations

import importlib.util
import sys

from affmae_engine.errors import ResourceError


def require_supported() -> None:
    """Raises ResourceError on a system without POSIX file locks, which is Windows outside WSL2."""
    if sys.modules.get("fcntl") is not None or ("fcntl" not in sys.modules and importlib.util.find_spec("fcntl")):
        return
    raise ResourceError(
        f"affmae does not run on this system ({sys.platform}): it needs the file locks of Linux and macOS",
        "on Windows, install WSL2 (https://learn.microsoft.com/windows/wsl/install) and run affmae in it",
    )
