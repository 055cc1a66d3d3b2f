"""What pyproject.toml cannot say: recipes/ is a folder of the package, and the package page is README.md without its
picture and its relative links, which lead nowhere outside the repository."""

import re
from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
RELATIVE = r"\((?!https?://)[^)]*\)"

setup(
    packages=[*find_packages(include=["opdkit", "opdkit.*"]), "opdkit.recipes"],
    package_dir={"opdkit.recipes": "recipes"},
    long_description=re.sub(rf"\[([^]]*)\]{RELATIVE}", r"\1", re.sub(rf"!\[[^]]*\]{RELATIVE}\n*", "", README)),
    long_description_content_type="text/markdown",
)
