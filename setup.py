"""Puts ``conf/`` and ``models/`` into the wheel, as ``longrope2/_data``; see pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithData(build_py):
    """setuptools' own, and the folders that a checkout has at its top."""

    def run(self) -> None:
        """Build, then copy them."""
        super().run()
        if not self.editable_mode:
            for name in ("conf", "models"):
                target = Path(self.build_lib) / "longrope2" / "_data" / name
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(name, target)


setup(cmdclass={"build_py": BuildWithData})
