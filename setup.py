"""Packages by name: setuptools refuses to guess with several top-level folders. The rest is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# kernels/ is a container without __init__.py: Hugging Face owns the import name `kernels`, ours is `stg_kernels`.
kernels = find_packages("kernels") if Path("kernels").is_dir() else []

setup(
    packages=find_packages(include=["stg_engine", "stg_engine.*"]) + kernels,
    package_dir={name: "kernels/" + name.replace(".", "/") for name in kernels},
    package_data={"stg_engine": ["py.typed", "demo/*.md", "demo/model/**/*"], "stg_kernels": ["py.typed"]},
)
