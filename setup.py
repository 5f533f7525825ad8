"""Copies vocab.pkl, which lies at the root, into the package that is built; all else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithVocabulary(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # a checkout has its own
            self.copy_file("vocab.pkl", str(Path(self.build_lib, "showtell")))

    def get_source_files(self):  # of the source distribution
        return [*super().get_source_files(), "vocab.pkl"]


setup(cmdclass={"build_py": BuildWithVocabulary})
