"""Everything a package index needs, read from settings.ini; the version lives in lps/__init__.py"""
import configparser
import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = configparser.ConfigParser()
cfg.read(here / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
EXTRAS = "cluster", "triplet", "hub", "approximate", "imagenet", "dev"

setup(
    name=cfg["dist_name"],
    version=re.search(r'__version__ = "(.+?)"', (here / "lps/__init__.py").read_text(encoding="utf-8"))[1],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    keywords=cfg["keywords"],
    project_urls=dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in cfg["urls"].strip().splitlines()),
    packages=find_packages(include=["lps", "lps.*"]),
    include_package_data=True,
    package_data={"lps": ["data/*", "data/observed/*", "py.typed", "__init__.pyi"]},
    python_requires=f">={cfg['python_floor']}",
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in EXTRAS},
    entry_points={"console_scripts": ["lps=lps.cli:main"]},
)
