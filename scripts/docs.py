"""Build the documentation without Quarto: `docs.py site` writes _docs/, `docs.py readme` writes README.md,
`docs.py sidebar` writes the lists of notebooks and modules in _quarto.yml, and the reference of commands

nbdev prepares the notebooks in _proc/: it runs imports and exported cells and adds signatures. smalldocs renders
_proc/ by _quarto.yml. Formulas become MathML, so that a page loads nothing from elsewhere.
"""
import ast
import html
import json
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG = 30  # lines of source that are folded even without a signature above them


def plain_names(signature: str) -> str:
    "Return a signature without the notebook's own module, with escaped underscores in its heading"
    return re.sub(
        r"^#+ .*$", lambda m: m[0].replace("_", r"\_"), signature.replace("__main__.", ""), count=1, flags=re.M
    )


CHECKS = "test_eq test_close test_ne assert_close expect_fail expect_warning".split()


def is_check(statement) -> bool:
    "Return whether a statement, or every statement in a block, only checks"
    if isinstance(statement, ast.Assert): return True
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return ast.unparse(statement.value.func).rpartition(".")[2] in CHECKS
    if isinstance(statement, ast.With):
        names = [ast.unparse(item.context_expr).partition("(")[0].rpartition(".")[2] for item in statement.items]
        if set(names) & set(CHECKS): return True
    block = getattr(statement, "body", []) if isinstance(statement, (ast.With, ast.For)) else []
    return bool(block) and all(map(is_check, block))


def parted(source: str) -> tuple[str, str]:
    "Part the code of an example from its checks; code that only checks is the example"
    try: statements = ast.parse(source).body
    except SyntaxError: return source, ""
    checks = [s for s in statements if is_check(s)]
    taken = set()
    for s in checks: taken |= set(range(s.lineno, s.end_lineno + 1))
    shared = any(s.lineno in taken for s in statements if s not in checks)
    if not checks or len(checks) == len(statements) or shared: return source, ""
    lines = list(enumerate(source.splitlines(), 1))
    rest = "\n".join(line for i, line in lines if i not in taken)
    return re.sub(r"\n{3,}", "\n\n", rest).strip(), "\n".join(line for i, line in lines if i in taken)


def with_source():
    """Return nbdev's processors, which keep the source of exported cells in a fold under the signature

    The fold is open for short public cells without a signature. Helpers are one fold without a signature. The checks
    of all examples are one fold at the end.
    """
    from nbdev.process import Processor
    from nbdev.processors import FilterDefaults, _def_names, mk_cell

    class KeepSource(Processor):
        def begin(self): self.nb.helpers_ = set()

        def cell(self, cell):
            if (
                cell.cell_type != "code"
                or "hide" in cell.directives_
                or not {"export", "exporti"} & cell.directives_.keys()
            ):
                return
            if all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in cell.parsed_() or []): return
            cell.private = "exporti" in cell.directives_
            if cell.private: self.nb.helpers_ |= set(_def_names(cell, ()))
            for name in ("export", "exporti"): cell.directives_.pop(name, None)
            cell.directives_["exports"] = ""

    class FoldHelpers(Processor):
        "Put an anchor, to which pages link, in the place of a helper's signature"
        def cell(self, cell):
            name = re.match(r"show_doc\((\w+)\)", cell.source) if getattr(cell, "has_sd", False) else None
            if not name or name[1] not in self.nb.helpers_: return
            cell.cell_type = "markdown"
            cell.source = f'<span id="{name[1]}"></span>'
            for key in ("outputs", "execution_count"): cell.pop(key, None)

    class ChecksLast(Processor):
        "Move the checks of examples into a fold at the end"
        def begin(self): self.checks = []

        def cell(self, cell):
            if cell.cell_type != "code" or {"exports", "export", "exporti", "hide"} & cell.directives_.keys(): return
            cell.source, checks = parted(cell.source)
            if checks: self.checks.append(checks)

        def end(self):
            if not self.checks: return
            fold = '#| code-fold: true\n#| code-summary: "Checks of the examples"\n'
            last = mk_cell(fold + "\n".join(self.checks))
            last.directives_ = {}
            self.nb.cells.append(last)

    def finish(cell):
        "Close folds that are long or have a signature, and simplify the signature's names"
        private = getattr(cell, "private", False)
        closed = cell.cell_type == "code" and (private or _def_names(cell, ()) or cell.source.count("\n") > LONG)
        names = ", ".join(_def_names(cell, ())) if cell.cell_type == "code" and private else ""
        fold = "true" if closed else "show"
        summary = f"Helpers: {names}" if names else "Helpers" if private else "Source"
        cell.source = re.sub(
            r"^#\| code-fold: show\n#\| code-summary: .*",
            f'#| code-fold: {fold}\n#| code-summary: "{summary}"',
            cell.source,
        )
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = plain_names(as_text(data["text/markdown"]))

    class WithSource(FilterDefaults):
        def base_procs(self):
            procs = super().base_procs()
            after = [proc.__name__ for proc in procs].index("add_show_docs") + 1
            return [KeepSource, *procs[:after], FoldHelpers, *procs[after:], ChecksLast, finish]

    return WithSource


def prepare() -> Path:
    "Prepare the notebooks with nbdev in this process; return the folder"
    os.chdir(ROOT)
    import nbdev.serve
    nbdev.serve.FilterDefaults = with_source()
    return nbdev.serve.proc_nbs("nbs", n_workers=0, force=True)


def render(staged: Path):
    "Render the prepared folder with smalldocs; return the site's folder and its warnings"
    from smalldocs.config import load
    from smalldocs.site import Site
    project = load(staged)
    project.project.pop("pre-render", None)  # for Quarto; smalldocs makes the API pages itself
    site = Site(project, quiet=True)
    site.build()
    return site.out, [w for w in site.warnings if "output-file is not read" not in w]


def mathml(page: str) -> str:
    "Replace the formulas of an HTML page by MathML, and drop the script that would typeset them"
    from latex2mathml.converter import convert
    def formula(m):
        return convert(html.unescape(m[2]), display="block" if m[1] == "display" else "inline")
    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', formula, page, flags=re.S)
    return re.sub(r"<(?:link|script)[^>]*cdn\.jsdelivr\.net/npm/katex[^>]*>(?:</script>)?", "", page)


MOST = 3  # columns of a table that a narrow screen shows side by side


LONG_WORD = r"[^\s<>]{13,}"  # a name of a file, or a hash


def breakable(table):
    "Mark where the long words of a table may break"
    for text in table.find_all(string=re.compile(LONG_WORD)):
        marked = re.sub(LONG_WORD, lambda word: re.sub(r"([_/.,-]+|\w{16}(?=\w))", "\\1\u200b", word[0]), text)
        text.replace_with(marked)


def columns_of(table) -> tuple[list, list]:
    "Return the heads and the rows of a table as cells; none for a table in which cells span others"
    heads = table.select("thead tr")
    if not heads or table.select("[rowspan], [colspan]"): return [], []
    names = heads[0].find_all(["th", "td"], recursive=False)
    rows = [row.find_all(["th", "td"], recursive=False) for row in table.select("tbody tr")]
    return (names, rows) if all(len(row) == len(names) for row in rows) else ([], [])


def left_aligned(table):
    "Mark the columns that hold words, which start at the left; numbers end at the right"
    names, rows = columns_of(table)
    for column in list(zip(names, *rows))[1:]:
        texts = [cell.get_text(strip=True) for cell in column[1:]]
        if any(texts) and all(re.match(r"[^\W\d]|[✓✗?]|$", text) for text in texts):
            for cell in column: cell["class"] = [*cell.get("class", []), "words"]


def labelled(table):
    "Write each column's name into the cells of a wide table, so that a narrow screen shows a card a row"
    names, rows = columns_of(table)
    if not names and len(table.select("tr:last-child > *")) > MOST: table["class"] = [*table.get("class", []), "tight"]
    if len(names) <= MOST: return
    for row in rows:
        for name, cell in zip(names[1:], row[1:]):
            if cell.get_text(strip=True) or cell.find(): cell["data-label"] = name.get_text(" ", strip=True) or " "
            else: cell["class"] = [*cell.get("class", []), "empty"]
    table["class"] = [*table.get("class", []), "cards"]


def cards(page: str) -> str:
    "Label the tables of an HTML page, and let their long words break"
    from bs4 import BeautifulSoup
    def replaced(found):
        table = BeautifulSoup(found[0], "html.parser").table
        left_aligned(table)
        labelled(table)
        breakable(table)
        return str(table).replace("\u200b", "<wbr>")
    return re.sub(r"<table\b(?:(?!<table\b).)*?</table>", replaced, page, flags=re.S)


def alt_texts(page: str, see: str = "") -> str:
    "Describe each picture of an HTML page that has no alternative text by the heading before it, and what to see"
    text = ""
    def described(found):
        nonlocal text
        if found["words"] is not None:
            text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", found["words"])).strip(" :") or text
            return found[0]
        if re.search(r'\balt="[^"]', found[0]): return found[0]
        image = re.sub(r'\salt="[^"]*"', "", found[0])
        alt = html.escape(html.unescape(f"{text}: {see}" if see else text), quote=True)
        return image.replace("<img ", f'<img alt="{alt}" ', 1)
    blocks = r"<(?P<tag>h[1-6])\b[^>]*>(?P<words>.*?)</(?P=tag)>|<img [^>]*>"
    return re.sub(blocks, described, page, flags=re.S)


def notebooks_of_api() -> dict[str, Path]:
    "Return the notebook of each API page"
    paths = [path for path in sorted(ROOT.glob("lps/**/*.py")) if not path.name.startswith("_")]
    found = {}
    for name, path in zip(api_names(), paths):
        source = re.search(r"File to edit: (?:\.\./)+nbs/(.+\.ipynb)", path.read_text(encoding="utf-8"))
        if source: found[name] = ROOT/"nbs"/source[1]
    return found


def example_of(name: str, cells: list) -> str:
    "Return the first cell of a notebook that uses a name after its definition, without checks; empty if there is none"
    defined = False
    for cell in cells:
        source = as_text(cell["source"])
        if cell["cell_type"] != "code": continue
        if re.search(r"^#\|\s*exporti?\b", source, flags=re.M):
            defined |= bool(re.search(rf"^(?:class|def) {name}\b|^{name} = ", source, flags=re.M))
        elif defined and re.search(rf"\b{name}\b", source) and "#| hide" not in source:
            lines = [line for line in source.splitlines() if not re.match(r"#\||\s*(assert|test_eq|with expect)", line)]
            text = "\n".join(lines).strip()
            if re.search(rf"\b{name}\b", text): return text
    return ""


def with_examples(page: str, notebook: Path) -> str:
    "Add an example and a link to its notebook to each entry of an API page"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    link = notebook.relative_to(ROOT/"nbs").with_suffix(".html").as_posix()
    def added(found):
        example = example_of(found["name"], cells)
        code = f"<pre><code>{html.escape(example)}</code></pre>" if example else ""
        return f'{found[0]}{code}<p><a href="../{link}">Notebook with examples and source</a></p>'
    return re.sub(r'<h2 class="anchored" data-anchor-id="(?P<name>\w+)">.*?</h2>', added, page, flags=re.S)


def draw_map(staged: Path):
    "Draw the map of the bundled models into the prepared folder, where pages link to it"
    from lps.index.map import bundled_map
    bundled_map(staged/"images/market-map.html", inline=False)


def dark_theme(staged: Path):
    "Write the dark theme, which _quarto.yml names: Bootstrap in its dark mode"
    import smalldocs
    vendor = Path(smalldocs.__file__).parent/"assets/vendor"
    css = (vendor/"bootstrap/bootstrap.min.css").read_text(encoding="utf-8")
    dark = css.replace("[data-bs-theme=dark]{", ":root,[data-bs-theme=dark]{")
    (staged/"dark.css").write_text(dark, encoding="utf-8")


def site():
    "Write the site into _docs/; a warning of smalldocs is an error"
    staged = prepare()
    draw_map(staged)
    dark_theme(staged)
    built, warnings = render(staged)
    from lps.study.registry import EXPERIMENTS
    for page in built.rglob("*.html"):
        text = cards(mathml(page.read_text(encoding="utf-8")))
        see = EXPERIMENTS[page.stem].see if page.parent.name == "experiments" else ""
        page.write_text(alt_texts(text, see), encoding="utf-8")
    for name, notebook in notebooks_of_api().items():
        page = built/f"api/{name}.html"
        page.write_text(with_examples(page.read_text(encoding="utf-8"), notebook), encoding="utf-8")
    shutil.rmtree(ROOT/"_docs", ignore_errors=True)
    shutil.move(built, ROOT/"_docs")
    print(f"{len(list((ROOT/'_docs').rglob('*.html')))} pages in _docs: open _docs/index.html")
    if warnings: sys.exit("\n".join(warnings))


TITLES = dict(
    core="Core", nets="Networks", models="Models", zoo="Zoo", methods="Methods", lineage="Lineage",
    advice="Advice", study="Study", index="Index",
)


def library_sections() -> str:
    "Return the sidebar's sections of library notebooks: top level first, then one section a folder"
    lines = ["      - section: Method and commands", "        contents:"]
    lines += [f"          - {path.name}" for path in sorted(ROOT.glob("nbs/[0-9]*.ipynb"))]
    for folder, title in TITLES.items():
        lines += [f"      - section: {title}", "        contents:"]
        lines += [f"          - {folder}/{path.name}" for path in sorted(ROOT.glob(f"nbs/{folder}/[0-9]*.ipynb"))]
    return "".join(f"{line}\n" for line in lines)


def api_names() -> list[str]:
    "Return the API page of every module: its last name, or its full name if two modules share that"
    paths = [path.relative_to(ROOT/"lps").with_suffix("") for path in sorted(ROOT.glob("lps/**/*.py"))]
    modules = [path for path in paths if not path.name.startswith("_")]
    lasts = [path.name for path in modules]
    return [
        path.name if lasts.count(path.name) == 1 else "lps." + path.as_posix().replace("/", ".") for path in modules
    ]


def api_pages() -> str:
    "Return the sidebar's list of modules"
    return "".join(f"          - api/{name}.qmd\n" for name in api_names())


def sidebar():
    "Write the lists of notebooks and modules into _quarto.yml, between their two comments, and the commands' page"
    config = ROOT/"_quarto.yml"
    text = config.read_text(encoding="utf-8")
    for name, lists in dict(library=library_sections(), api=api_pages()).items():
        text = re.sub(
            rf"( *# {name}: .*\n)(?:.*\n)*?( *# end of {name}\n)",
            lambda found: f"{found[1]}{lists}{found[2]}",
            text,
        )
    config.write_text(text, encoding="utf-8")
    commands()


COMMANDS = ROOT/"nbs/commands.md"


def walk(command, words: tuple = ("lps",)):
    "Yield the words and the click command of every command that does something"
    if not hasattr(command, "commands"): yield words, command
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden: yield from walk(child, (*words, name))


def one_cell(text) -> str:
    "Return text as a cell of a Markdown table"
    plain = " ".join(str(text or "").split()).replace(r"\[", "[").replace("|", r"\|").replace("<", "&lt;")
    return re.sub(r"(?<![\w`-])--[a-z][\w-]*", r"`\g<0>`", plain)


def placeholder(option) -> str:
    "Return an argument as the usage shows it"
    name = (option.metavar or option.name.upper()).strip("[]")
    return name if option.required else f"[{name}]"


def option_row(option) -> str:
    "Describe an argument or option of a command in one row of a table"
    argument = option.param_type_name == "argument"
    name = placeholder(option) if argument else ", ".join([*option.opts, *option.secondary_opts])
    default = "" if option.required or callable(option.default) else option.default
    shown = "on" if default is True else "" if default in (None, False, "", ()) else default
    needed = "required" if option.required else one_cell(shown)
    return f"| `{name}` | {needed} | {one_cell(option.help)} |"


def commands_text() -> str:
    "Return the reference of the command line: a table of commands, then a section for each"
    import typer.main
    from lps.cli import app
    found = list(walk(typer.main.get_command(app)))
    lines = [
        "# Commands", "",
        "All commands of `lps`, with their options. `lps COMMAND --help` prints the same.",
        "Messages go to stderr, and results to stdout.", "",
        "| command | purpose |", "|---|---|",
    ]
    for words, command in found:
        anchor = "-".join(words)
        lines.append(f"| [`{' '.join(words)}`](#{anchor}) | {one_cell(command.help).split('. ')[0].rstrip('.')} |")
    for words, command in found:
        usage = [placeholder(option) for option in command.params if option.param_type_name == "argument"]
        shown = [option for option in command.params if not getattr(option, "hidden", False)]
        rows = [option_row(option) for option in shown if "--help" not in option.opts]
        lines += ["", f"## {' '.join(words)}", "", one_cell(command.help), "", "```sh"]
        lines += [" ".join([*words, *usage, "[OPTIONS]"]), "```", ""]
        if rows: lines += ["| argument or option | default | meaning |", "|---|---|---|", *rows]
        example = " ".join(str(command.epilog or "").split()).removeprefix("Example: ")
        if example: lines += ["", "Example:", "", "```sh", example, "```"]
    return "\n".join(lines) + "\n"


def commands():
    "Write the reference of the command line from the Typer app"
    COMMANDS.write_text(commands_text(), encoding="utf-8")


def as_text(source) -> str: return source if isinstance(source, str) else "".join(source)


def outputs_md(cell: dict) -> list[str]:
    "Return the outputs of a code cell for a README: Markdown as it is, text in a fence, no pictures"
    parts = []
    for out in cell.get("outputs", []):
        data = out.get("data", {"text/plain": out.get("text", "")})
        if "image/png" in data: continue
        if "text/markdown" in data: parts.append(as_text(data["text/markdown"]).strip())
        text = as_text(data.get("text/plain", "")).rstrip()
        if text.strip() and "text/markdown" not in data: parts.append(f"```text\n{text}\n```")
    return parts


def cell_md(cell: dict) -> list[str]:
    "Return a notebook cell as Markdown for the README"
    source = as_text(cell["source"])
    if cell["cell_type"] == "markdown": return [source.strip()]
    if cell["cell_type"] != "code" or re.search(r"^#\|\s*hide\b", source, flags=re.M): return []
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    show = code and not re.search(r"^#\|\s*echo:\s*false", source, flags=re.M)
    return ([f"```python\n{code}\n```"] if show else []) + outputs_md(cell)


def readme_text(notebook: Path = ROOT/"nbs/index.ipynb") -> str:
    "Return the README: the front page's notebook, with links relative to the top folder"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n\n".join(part for cell in cells for part in cell_md(cell) if part)
    text = re.sub(
        r"\]\((?![a-z]+:|#|/)([^)#]+)",
        lambda m: f"]({os.path.relpath((notebook.parent/m[1]).resolve(), notebook.resolve().parent.parent)}",
        text,
    )
    return f"<!-- Made from nbs/index.ipynb by `make readme`: change it there -->\n\n{text}\n"


def readme():
    "Write README.md from the front page"
    (ROOT/"README.md").write_text(readme_text(), encoding="utf-8")


if __name__ == "__main__":
    targets = dict(site=site, readme=readme, sidebar=sidebar, commands=commands)
    if sys.argv[1:2] and sys.argv[1] in targets: targets[sys.argv[1]]()
    else: sys.exit(f"usage: docs.py {'|'.join(targets)}")
