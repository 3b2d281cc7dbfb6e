"""The build hook of the wheel ``fusecell-runtime``: Hatch calls it before and after building."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Hatch runs this file by its path

from package_files import PACKAGE, write


class RuntimeBuildHook(BuildHookInterface):
    """Write the package beside the wheel, include it in the wheel, and remove it again."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self._folder = Path(self.directory) / PACKAGE
        shutil.rmtree(self._folder, ignore_errors=True)
        write(self._folder)
        build_data["force_include"][str(self._folder)] = PACKAGE

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
