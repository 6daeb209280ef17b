"""Generated files agree with their sources: lps/, README, the sidebar, and the constraints"""
import configparser
import json
import re
import runpy
import subprocess
import sys
from importlib.metadata import metadata
from itertools import chain
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, copy_of_repo
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

BIN = Path(sys.executable).parent
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT/"settings.ini", encoding="utf-8")
NOTEBOOKS = [p for p in sorted(ROOT.glob("nbs/**/*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
NEEDED = SETTINGS["DEFAULT"]["requirements"] + SETTINGS["DEFAULT"]["dev_requirements"]
REQUIREMENTS = [Requirement(r) for r in NEEDED.split()]


def files(root: Path) -> dict[str, bytes]:
    "Return the bytes of all notebooks and modules"
    found = [*root.glob("nbs/**/*.ipynb"), *root.glob("lps/**/*.py")]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in found}


@pytest.mark.parametrize("command", ["nbdev-export", "nbdev-clean"])
def test_command_changes_nothing(command, tmp_path):
    copy = copy_of_repo(tmp_path/"lps")
    before = files(copy)
    subprocess.run([BIN/command], cwd=copy, check=True)
    after = files(copy)
    assert sorted(before) == sorted(after)
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"{command} changes {changed}: run `make sync`"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_presentable(path):
    "Outputs hold no warning, no error, no training log and no path of a machine"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = list(chain.from_iterable(c.get("outputs", []) for c in cells))
    assert not [out for out in outputs if out["output_type"] == "error" or out.get("name") == "stderr"]
    for out in outputs:
        data = out.get("data", {"text": out.get("text")})
        text = json.dumps({kind: value for kind, value in data.items() if "image" not in kind})
        assert not re.search(r"\[0, [\d.]+, .*'00:", text), text[:80]
        assert not re.findall(r"[^\w.~]/(?:root|home|tmp|Users|var)/\S*", text)


MODULES = [p for p in sorted(ROOT.glob("lps/**/*.py")) if not p.name.startswith("_")]


def dotted(path: Path) -> str:
    "Return the name of a module of the library, such as zoo.train"
    return path.relative_to(ROOT/"lps").with_suffix("").as_posix().replace("/", ".")


def test_every_module_comes_from_a_notebook():
    notebooks = "".join(p.read_text(encoding="utf-8") for p in NOTEBOOKS)
    assert {dotted(p) for p in MODULES} == set(re.findall(r"#\| ?default_exp ([\w.]+)", notebooks))


def test_readme_is_the_front_page():
    docs = runpy.run_path(str(ROOT/"scripts/docs.py"))
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    assert readme == docs["readme_text"](), "README.md is older than nbs/index.ipynb: run `make readme`"


def test_page_of_commands_comes_from_the_app():
    docs = runpy.run_path(str(ROOT/"scripts/docs.py"))
    page = (ROOT/"nbs/commands.md").read_text(encoding="utf-8")
    assert page == docs["commands_text"](), "nbs/commands.md is older than lps/cli.py: run `make sync`"


def test_readme_links_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT/"README.md").read_text(encoding="utf-8"))
    assert links and not [link for link in links if not (ROOT/link).exists()]


def constraints() -> dict[str, Version]:
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT/"constraints.txt").read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[-_.]+", "-", name).lower(): Version(version) for name, version in pins}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_constraint_meets_its_lower_bound(requirement):
    assert constraints()[requirement.name] in requirement.specifier


def test_constraints_hold_no_package_of_one_platform():
    assert not [name for name in constraints() if re.match("nvidia|cuda|triton", name)]


def test_metadata_comes_from_settings():
    cfg = SETTINGS["DEFAULT"]
    meta = metadata(cfg["dist_name"])
    assert meta["Requires-Python"] == f">={cfg['python_floor']}"
    assert meta["Summary"] == cfg["description"]
    assert meta["Version"] == runpy.run_path(str(ROOT/"lps/__init__.py"))["__version__"]


def sidebar(items) -> list[str]:
    "Return every page of the sidebar"
    pages = []
    for item in items:
        if isinstance(item, str): pages.append(item)
        elif "section" in item: pages += sidebar(item["contents"])
        else: pages.append(item["href"])
    return pages


def test_sidebar_names_every_page():
    config = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
    named = {p for p in sidebar(config["website"]["sidebar"]["contents"]) if not p.endswith(".md")}
    notebooks = {p.relative_to(ROOT/"nbs").as_posix() for p in NOTEBOOKS}
    docs = runpy.run_path(str(ROOT/"scripts/docs.py"))
    modules = {f"api/{name}.qmd" for name in docs["api_names"]()}
    assert named == notebooks | modules


def test_front_picture_shows_the_result_file():
    script = runpy.run_path(str(ROOT/"scripts/picture.py"))
    with Image.open(script["PICTURE"]) as picture: shown = picture.info["Fingerprint"]
    assert shown == script["fingerprint"](), "the front page's picture is older than its result: run scripts/picture.py"
    assert "images/front.png" in (ROOT/"README.md").read_text(encoding="utf-8")


def test_ruff_reads_everything():
    done = subprocess.run([BIN/"ruff", "check", "--output-format", "concise"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_readme_names_every_extra():
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    extras = [name.removesuffix("_requirements") for name in SETTINGS["DEFAULT"] if name.endswith("_requirements")]
    assert sorted(re.findall(r"'\.\[(\w+)\]'", readme)) == sorted(extras)


def test_readme_code_prints_what_it_shows(tmp_path):
    readme = (ROOT/"README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", readme, flags=re.M | re.S))
    shown = "".join(re.findall(r"^```text\n(.*?)^```$", readme, flags=re.M | re.S))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == shown, done.stderr
