"""Plain English: no banned word in notebooks, docstrings, comments, messages, README and CONTRIBUTING

`python tests/test_prose.py [PATH ...]` lists the offences by file, and how long the sentences of each page are.
"""
import ast
import io
import json
import re
import statistics
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [path for path in sorted(ROOT.glob("nbs/**/*.ipynb")) if ".ipynb_checkpoints" not in path.parts]
MODULES = [path for path in sorted(ROOT.glob("lps/**/*.py")) if path.name != "_modidx.py"]
PAGES = [ROOT/"README.md", ROOT/"CONTRIBUTING.md"]

NETWORK = r"(?:network|net|model|source|candidate|sibling)s?"
BANNED = {  # pattern → cure
    r"said|says|asks": "networks have outputs, files record, methods compare: name what happens",
    rf"what (?:{NETWORK}|they|it|one|each) (?:say|answer|know)s?": "outputs, logits",
    rf"(?:{NETWORK}|they) (?:say|ask|answer|know|stand)s?(?= |$)": "a network has outputs; it does not say or know",
    r"is asked|are asked|asked (?:for|with|about)|asking": "query, look up, request",
    r"foretells?|foretold|foretelling": "predict",
    r"head lines?": "name the layer: classifier, head",
    r"nobody's": "be literal",
    r"is no advice|are no advice": "does not tell you which model to fine-tune",
    r"hardly told": "barely above",
    r"ha[ds] no part in": "held out",
    r"first weights": "initialisation",
    r"no file (?:says|names|tells)": "if no file records it",
    r"where no": "if no",
    r"so many epochs": "this many epochs",
    r"is the one that was written|as it was written": "checksums match",
    r"what is stored of it": "its storage",
    r"what is broken": "name it",
    r"that there are not": "unless it is one of",
    r"all that can be": "be literal",
    r"stand alone": "are given without",
    r"is no news": "useless",
    r"what one has|who has|one's own": "your own; if you have",
    r"kin|kinship|kindred": "lineage: copy, derived, independent",
    r"by chance it would be": "chance is",
    r"(?:one )?that looks? up": "query",
}
QUESTION = re.compile(r"(?:What|Which|How|Where|Who|Whose|Whether|Why|When)\b")
PATTERNS = {re.compile(rf"(?<![\w`-])(?:{banned})(?![\w`-])", flags=re.I): cure for banned, cure in BANNED.items()}


class Text(NamedTuple):
    "A piece of prose and where it stands"
    place: str
    text: str
    is_docstring: bool = False


def without_fences(markdown: str) -> str:
    "Return a page without its blocks of code and its comments"
    return re.sub(r"```.*?```|<!--.*?-->", "", markdown, flags=re.S)


def plain(text: str) -> str:
    "Return prose in one line, without code, link targets and formulas"
    text = re.sub(r"\$\$.*?\$\$", " ", without_fences(text), flags=re.S)
    text = re.sub(r"`[^`\n]*`|\$[^$\n]*\$", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(text.split())


def string_of(node) -> str:
    "Return the text of a string or an f-string; what an f-string inserts is left out"
    if isinstance(node, ast.Constant): return node.value if isinstance(node.value, str) else ""
    return "".join(string_of(part) if isinstance(part, ast.Constant) else "CODE" for part in node.values)


def texts_of_code(source: str, where: str) -> list[Text]:
    "Return the docstrings, the other strings of several words, and the comments of some Python code"
    source = re.sub(r"^[%!].*$", "", source, flags=re.M)
    tree = ast.parse(source)
    found, inner = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr): inner |= {id(part) for part in ast.walk(node) if part is not node}
        documented = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node)
        if documented:
            inner.add(id(node.body[0].value))
            found.append(Text(f"{where}{node.lineno}", documented, True))
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Constant, ast.JoinedStr)) or id(node) in inner: continue
        text = string_of(node)
        if " " in text.strip(): found.append(Text(f"{where}{node.lineno}", text))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"# ?(?:%%|AUTO)|#\|", token.string):
            found.append(Text(f"{where}{token.start[0]}", token.string.lstrip("# ")))
    return found


def texts_of(path: Path) -> list[Text]:
    "Return the prose of a page, a module, or a notebook; what a notebook exports is read in its module"
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py": return texts_of_code(source, "line ")
    if path.suffix == ".md": return [Text("", part) for part in re.split(r"\n\s*\n", without_fences(source))]
    found = []
    for cell in json.loads(source)["cells"]:
        text = "".join(cell["source"])
        exported = re.match(r"#\| ?exporti?\b", text)
        if cell["cell_type"] == "markdown": found.append(Text(f"cell {cell['id']}", text))
        elif cell["cell_type"] == "code" and not exported: found += texts_of_code(text, f"cell {cell['id']} line ")
    return found


def offences(text: Text) -> list[str]:
    "Return what is banned in a piece of prose, with its cure"
    prose, found = plain(text.text), []
    if text.is_docstring and QUESTION.match(prose): found.append(f'"{prose[:40]}…": begin with a verb or a noun')
    for pattern, cure in PATTERNS.items():
        found += [f'"{match[0]}" in "{around(prose, match)}": {cure}' for match in pattern.finditer(prose)]
    return found


def around(prose: str, match) -> str:
    "Return a match with some words on each side"
    return prose[max(0, match.start() - 25):match.end() + 25].strip()


def offences_in(path: Path) -> list[str]:
    "Return every offence in a file, with its place"
    return [f"{text.place}: {offence}".lstrip(": ") for text in texts_of(path) for offence in offences(text)]


def sentences(markdown: str) -> list[str]:
    "Return the sentences of a page's prose, without headings, tables, code and pictures"
    kept = [line for line in without_fences(markdown).splitlines() if not re.match(r"\s*(?:#|\||!\[|\[!\[)", line)]
    blocks = re.split(r"\n\s*\n|\n(?=\s*[-*>] )", "\n".join(kept))
    found = []
    for block in blocks: found += re.split(r"(?<=[.!?:])\s+(?=[A-Z`*\[(])", plain(block))
    return [sentence for sentence in found if len(sentence.split()) > 1]


def sentence_lengths(markdown: str) -> tuple[int, float, float]:
    "Return the number of words of a page, and the median and 95th percentile of words a sentence"
    lengths = [len(sentence.split()) for sentence in sentences(markdown)]
    if len(lengths) < 2: return sum(lengths), sum(lengths), sum(lengths)
    return sum(lengths), statistics.median(lengths), statistics.quantiles(lengths, n=20, method="inclusive")[-1]


def markdown_of(path: Path) -> str:
    "Return the prose of a page or notebook as Markdown"
    if path.suffix == ".md": return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def measures(path: Path) -> str:
    "Return the number of words of a page and the lengths of its sentences, as text"
    words, median, longest = sentence_lengths(markdown_of(path))
    return f"{words:5d} words, {median:4.1f} a sentence, 95 %: {longest:4.1f}"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS, *MODULES], ids=relative)
def test_no_banned_word(path):
    found = offences_in(path)
    assert not found, "\n".join([relative(path), *found])


def test_readme_is_short():
    words, median, longest = sentence_lengths(markdown_of(ROOT/"README.md"))
    assert words <= 450 and median < 17 and longest <= 28


def test_the_reader_finds_prose():
    source = 'def f(x):  # said\n    "Which is it"\n    return f"it {x} asks me" + "key"'
    assert texts_of_code(source, "line ") == [
        Text("line 1", "Which is it", True), Text("line 3", "it CODE asks me"), Text("line 1", "said"),
    ]


def test_an_offence_is_seen():
    for text in ("what networks say to noise", "models stand there", "by no means foretold"):
        assert offences(Text("", text)), text
    for text in ("The index answers in a second", "`said` is a key", "a kind of network", "the network standard"):
        assert not offences(Text("", text)), text
    assert offences(Text("", "Which models are near", True)) and not offences(Text("", "Which models are near"))


def test_sentences_are_counted():
    page = "# Title\n\nOne two three. Four five `six` seven.\n\n| a | b |\n\n```sh\ncode\n```\n- Of five words\n"
    assert [len(sentence.split()) for sentence in sentences(page)] == [3, 4, 4]
    assert sentence_lengths(page)[:2] == (11, 4)


def report(paths: list[Path]):
    "Print the offences of some files, and a line of numbers for each"
    total = {}
    for path in paths:
        found = offences_in(path)
        total[path] = len(found)
        if found: print(f"\n{relative(path)}")
        for offence in found: print(f"  {offence}")
    print()
    for path in paths:
        if path.suffix == ".py" and not total[path]: continue
        numbers = "" if path.suffix == ".py" else measures(path)
        print(f"{total[path]:4d}  {relative(path):40} {numbers}")
    print(f"{sum(total.values())} offences")


if __name__ == "__main__": report([Path(arg).resolve() for arg in sys.argv[1:]] or [*PAGES, *NOTEBOOKS, *MODULES])
