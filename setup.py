"""Everything declarative stands in pyproject.toml; here is what an index page shows."""

import re
from pathlib import Path

from setuptools import setup


def page(readme: str) -> str:
    """The README for a page beside no file of the project: without the pictures and links that would break there."""
    text = re.sub(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", "", readme, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


if __name__ == "__main__":
    setup(
        long_description=page(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
