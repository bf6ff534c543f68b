"""Pure Python for now; everything stands in pyproject.toml. Never imports torch, so that an isolated build works."""

from setuptools import setup

setup()
