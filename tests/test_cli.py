"""The `lps` command as a user calls it: help, mistakes, one step after another, the demo, Ctrl-C"""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import heed_ctrl_c

from lps import __version__ as version
from lps.cli import console, forget_odd_width, main, print_json, show_table
from lps.demo import digits, photographs
from lps.core.files import load_tensors
from lps.models.modelset import load_modelset
from lps.order_chain import permute, random_perms
from lps.nets.resnet import resnet_spec
from lps.methods.registry import METHODS
from lps.zoo.build import build
from lps.zoo.tasks import DATASETS, DataSet
from lps.zoo.recipe import recipes

LPS = Path(sys.executable).parent/"lps"
TINY = replace(recipes["digits"], name="tiny", epochs=1, milestones=(), depth=8, width=4)
COMMANDS = ["zoo build", "zoo import", "zoo datasheet", "fit", "evaluate", "query", "inspect", "compare", "demo"]
COMMANDS += [f"index {name}" for name in ("build", "add", "remove", "info", "graph", "dedup", "map")]
PANELS = {
    "Reading": ["query", "inspect", "compare", "index dedup", "index build", "index add", "zoo import"],
    "Method": ["fit", "evaluate", "query", "index build", "demo"],
    "Output": ["fit", "evaluate", "query", "inspect", "compare", "index info", "index dedup", "index map", "demo",
               "zoo datasheet"],
}
MODEL = "zoo/task00_run0.safetensors"


def env():
    "Return the environment of a process whose terminal is 80 columns wide"
    kept = {key: value for key, value in os.environ.items() if "COLOR" not in key}
    return kept | dict(COLUMNS="80", OMP_NUM_THREADS="1")


def lps(*args, cwd):
    "Run the installed command in a process of its own"
    return subprocess.run([LPS, *args], cwd=cwd, env=env(), capture_output=True, text=True, timeout=120)


def run(capsys, *args) -> tuple[str, str]:
    "Run the command in this process; return what it prints and what it logs"
    assert main([*map(str, args)]) == 0
    out, err = capsys.readouterr()
    tables = [line for line in out.splitlines() if line[:1] in "│┃┏┡└"]
    assert all(len(line) <= 80 for line in tables), out
    return out, err


@pytest.fixture(autouse=True)
def narrow(monkeypatch): monkeypatch.setattr(console, "width", 80)


class Evil:
    "A pickle that runs a command when it is opened without care"
    def __reduce__(self): return os.system, ("touch OWNED",)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    "Make model sets of two architectures, a fitted method of each, a folder of checkpoints, and files of every fault"
    w = tmp_path_factory.mktemp("world")
    args = dict(workers=1, progress=False)
    build(w/"zoo", "digits", TINY, n_models=6, **args)
    build(w/"wide", "digits", replace(TINY, width=8), n_tasks=2, n_models=1, **args)
    cwd = os.getcwd()
    try:
        os.chdir(w)
        for name in ("zoo", "wide"):
            assert main(["fit", name, "--out", f"{name}-net.safetensors", "--epochs", "3"]) == 0
    finally: os.chdir(cwd)
    (w/"foreign").mkdir()
    for i in range(3): torch.save(load_tensors(w/f"zoo/task0{i}_run0.safetensors")[0], w/f"foreign/m{i}.pt")
    torch.save({"state_dict": Evil()}, w/"foreign/evil.pt")
    spoil(w)
    return w


BAD_JSON = dict(
    hello="hello",
    bad="{x",
    five="5",
    single='["a"]',
    regex='[["(", "x"]]',
    group=r'[["a", "\\3"]]',
)


def spoil(w):
    "Write files and folders that no command can use"
    state, _ = load_tensors(w/MODEL)
    torch.save(state | {"conv1.weight": state["conv1.weight"]*float("nan")}, w/"nan.pt")
    (w/"half.safetensors").write_bytes((w/MODEL).read_bytes()[:3000])
    for name, text in BAD_JSON.items(): (w/f"{name}.json").write_text(text)
    empty = "empty", "bare/train", "bare/val", "hollow/train/a", "hollow/train/b", "hollow/val/a", "hollow/val/b"
    for folder in empty: (w/folder).mkdir(parents=True)
    (w/"ends.py").write_text("raise SystemExit(3)")
    for file in ("theirs/results.json", "theirs/DATASHEET.md", "drawn/digits-rank_k.png"):
        (w/file).parent.mkdir(exist_ok=True)
        (w/file).write_text("[1]")


def everything(folder) -> dict:
    "Return the files below a folder, with their times"
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*")}


def shown(text: str) -> str:
    "Return the words of a help text without its boxes"
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


def test_help_lists_the_commands(tmp_path):
    done = lps("--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and all(len(line) <= 80 for line in done.stdout.splitlines())
    assert all(command.split()[0] in done.stdout for command in COMMANDS)
    assert "Learnable Parameter Similarity" in done.stdout


def test_help_does_not_load_torch(tmp_path):
    code = "import sys; from lps.cli import main, show_table; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env(), capture_output=True).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_groups(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert re.sub(r"\s+", " ", out).count(f"Example: lps {command} ") == 1 and not err
    for panel, commands in PANELS.items(): assert (f"─ {panel} ─" in out) == (command in commands), panel


def test_help_shows_the_format_of_a_name_map(capsys):
    main(["zoo", "import", "--help"])
    assert '["pattern", "replacement"]' in shown(capsys.readouterr().out)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"lps {version}\n", "")


MISTAKES = {
    "frobnicate": "No such command 'frobnicate'",
    "zoo frobnicate": "No such command 'frobnicate'",
    "--versions": "No such option: --versions (Possible options: --verbose, --version)",
    "--quiet --verbose fit zoo": "--quiet and --verbose exclude each other",
    "fit": "Missing argument 'MODELSET'",
    "index report " + MODEL: "lps index report is now called lps inspect",
    "index report": "lps index report is now called lps inspect",
    "inspect": "Missing argument 'MODEL'",
    "inspect nowhere.pt": "nowhere.pt",
    f"inspect {MODEL} --arch .:f": ".:f cannot be imported: TypeError: ",
    f"inspect {MODEL} --arch nowhere:f": "nowhere:f cannot be imported: ModuleNotFoundError: ",
    f"inspect {MODEL} --arch [/b]": "arch is '[/b]': give timm/NAME",
    f"inspect {MODEL} --arch ends:f": "ends:f cannot be imported: SystemExit: 3",
    f"inspect {MODEL} --arch sys:exit": "sys:exit: it cannot be built (SystemExit: )",
    f"inspect {MODEL} --arch math:pi": "math:pi is a float",
    f"inspect {MODEL} --arch operator:truediv": "operator:truediv: it cannot be built (TypeError: ",
    f"inspect {MODEL} --arch os:getcwd": "os:getcwd: it gives a str, expected a network",
    "compare " + MODEL: "Missing argument 'B'",
    "compare zoo " + MODEL: "zoo is a folder of models: give one model file in it",
    "compare nowhere.pt " + MODEL: "nowhere.pt",
    "query": "Missing argument 'INDEX'",
    "query zoo": "Missing argument 'MODELS'",
    "query zoo-net.safetensors zoo": "zoo is a folder of models: give one model file in it",
    "query zoo-net.safetensors zoo " + MODEL: f"run lps query zoo {MODEL} --method zoo-net.safetensors",
    "query nowhere " + MODEL: "no index at nowhere: build one with lps index build nowhere FOLDER",
    "query zoo " + MODEL: "no index at zoo: it has no header.json",
    "query zoo-net.safetensors " + MODEL: "zoo-net.safetensors is not a packed index",
    "index build market nowhere": "no model file or folder nowhere",
    "index build market empty": "no model can be read: there are no model files",
    "index build zoo foreign": "zoo holds .build.lock: choose an empty folder",
    "index build hello.json zoo": "hello.json is a file: choose another folder for the index",
    "index build market zoo --method magic": "'magic' is unknown: choose from fc, frobenius, lps",
    "index build market foreign --method chain": "name the tasks in a table, or take probes",
    "index build market foreign --method nowhere.safetensors": "no model file nowhere.safetensors",
    "index build market zoo --workers 0": "Invalid value for '--workers'",
    "index build market foreign --table nowhere.tsv": "lps: no file nowhere.tsv",
    "index info zoo": "no index at zoo: it has no header.json",
    "index add nowhere zoo": "no index at nowhere: build one with lps index build nowhere FOLDER",
    "index remove nowhere zoo": "no index at nowhere: build one with lps index build nowhere FOLDER",
    "fit zoo --epoch 5": "Possible options: --epochs",
    "fit zoo --epochs": "requires an argument",
    "fit zoo too": "unexpected extra argument",
    "fit zoo --epochs ten": "Invalid value for '--epochs'",
    "fit zoo --epochs 0": "Invalid value for '--epochs'",
    "fit zoo --seed -1": "Invalid value for '--seed'",
    "fit zoo --seed 1180591620717411303424": "Invalid value for '--seed'",
    "zoo build new --device mps": "unknown device 'mps'",
    "zoo build new --device meta": "unknown device 'meta'",
    f"fit zoo --out {MODEL}": "exists and is not a method that lps fit wrote",
    "fit zoo --out hello.json": "exists and is not a method that lps fit wrote",
    "evaluate zoo --train 4 --out five.json": "exists and is not a file of results",
    "fit zoo --method magic": "'magic' is unknown: choose from fc, frobenius, lps",
    "fit zoo --layers conv9": "no layer 'conv9' in these models: known are conv1, layer1.0.conv1",
    "fit nowhere": "no model set at nowhere",
    "fit empty": "no *.safetensors file in it",
    "fit hello.json": "hello.json is not a safetensors file",
    "fit " + MODEL: "it is one model, give the folder that it is in",
    "zoo datasheet nowhere": "no model set at nowhere",
    "zoo datasheet zoo --out hello.json": "hello.json is not a folder",
    "fit zoo --out empty": "empty is a folder",
    "fit zoo --out hello.json/net.safetensors": "hello.json is not a folder",
    "evaluate nowhere": "no model set at nowhere",
    "evaluate zoo --train 8": "a task has 6 models and --train is 8: take --train 5 or less",
    "evaluate zoo --train 0": "Invalid value for '--train'",
    "evaluate zoo --train 4 --splits 0": "Invalid value for '--splits'",
    "evaluate zoo --train 4 --test-tasks 4": "5 tasks with 4 held out",
    "evaluate zoo --train 4 --out empty": "empty is a folder",
    "evaluate wide --train 1": "a task has 1 models",
    f"query nowhere {MODEL} --method bundled": "no model set at nowhere",
    f"query bundled {MODEL} --method bundled": "compare models of one architecture",
    f"query zoo {MODEL} --method nowhere": "'nowhere' is unknown: choose from fc, frobenius, lps",
    f"query zoo {MODEL} --method nowhere.safetensors": "no model file nowhere.safetensors",
    f"query zoo {MODEL} --method hello.json": "'hello.json' is unknown",
    f"query zoo {MODEL} --method half.safetensors": "half.safetensors is truncated",
    f"query zoo {MODEL} --method {MODEL}": "holds no fitted method",
    f"query nowhere {MODEL} --method zoo-net.safetensors": "no model set at nowhere",
    f"query empty {MODEL} --method zoo-net.safetensors": "no *.safetensors file in it",
    "query zoo nowhere.pt --method zoo-net.safetensors": "no model file or folder nowhere.pt",
    "query zoo zoo --method zoo-net.safetensors": "zoo is a folder",
    "query zoo half.safetensors --method zoo-net.safetensors": "half.safetensors: truncated",
    "query zoo hello.json --method zoo-net.safetensors": "hello.json: a text file, not a model",
    "query zoo foreign/evil.pt --method zoo-net.safetensors": "refused and not executed",
    "query zoo nan.pt --method zoo-net.safetensors": "nan.pt: conv1.weight holds NaN",
    "query zoo zoo-net.safetensors --method zoo-net.safetensors": "no layer 'conv1' in these models",
    "query zoo wide/task00_run0.safetensors --method zoo-net.safetensors": "compare models of one architecture",
    f"query zoo {MODEL} --method wide-net.safetensors": "compare models of one architecture",
    f"query zoo {MODEL} --method zoo-net.safetensors -k 0": "Invalid value for '-k'",
    f"query zoo {MODEL} --method zoo-net.safetensors --names bad.json": "bad.json is not JSON",
    f"query zoo {MODEL} --method zoo-net.safetensors --stats x y": "separate the numbers with commas",
    "zoo import nowhere new": "no models at nowhere",
    "zoo import empty new": "no .pt, .pth, .ckpt, .bin, .safetensors file in it",
    "zoo import foreign foreign": "choose another folder",
    "zoo import foreign new --names bad.json": "bad.json is not JSON",
    "zoo import foreign new --names five.json": "five.json is not a name map",
    "zoo import foreign new --names single.json": "single.json is not a name map",
    "zoo import foreign new --names regex.json": "regex.json holds a pattern that is not a valid regular expression",
    "zoo import foreign new --names group.json": "group.json holds a pattern that is not a valid regular expression",
    "zoo import foreign new --names nowhere.json": "lps: no file nowhere.json",
    "zoo import foreign new --table nowhere.tsv": "lps: no file nowhere.tsv",
    "zoo import foreign new --table hello.json": "the table has no column file; it has hello",
    "zoo import foreign new --shortcut none": "unknown shortcut 'none': known are pad_end, pad_both",
    "zoo build new --recipe long": "unknown recipe 'long': known are paper, short, digits",
    "zoo build new --images nowhere": "unknown images 'nowhere'",
    "zoo build new --images empty": "empty has no train/ folder",
    "zoo build new --images bare": "no images under bare/train",
    "zoo build new --images hollow": "no images under hollow/train",
    "zoo build new --keep 1,x": "--keep is '1,x': give epochs separated by commas",
    "zoo build new --device gpu0": "unknown device 'gpu0': give 'cpu' or 'cuda'",
    "zoo build new --tasks 6": "6 tasks, but the 10 classes of 'digits' make 5",
    "zoo build new --models 0": "Invalid value for '--models'",
    "zoo build new --models 1.5": "Invalid value for '--models'",
    "zoo build new --workers 0": "Invalid value for '--workers'",
    "zoo build hello.json": "hello.json: File exists",
    "zoo build zoo": "zoo was built with recipe name tiny, now digits",
    "demo --models 5": "Invalid value for '--models'",
    "demo --splits 0": "Invalid value for '--splits'",
    "demo --out hello.json": "hello.json is not a folder",
    "demo --out theirs": "theirs/results.json exists and is not a file that lps demo wrote",
    "demo --out drawn": "drawn/digits-rank_k.png exists and is not a file that lps demo wrote",
    "zoo datasheet zoo --out theirs": "theirs/DATASHEET.md is no datasheet that lps wrote, or was edited",
    "zoo build theirs --models 1": "theirs holds DATASHEET.md, but no build.json, so no build made it",
    "index add bundled zoo": "the bundled index cannot be changed",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_gives_one_line_and_changes_nothing(words, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = everything(world)
    code = main(words.split())
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.startswith("lps: "), (code, out, err)
    assert err.count("\n") == 1 and MISTAKES[words] in err, err
    assert everything(world) == before


@pytest.mark.parametrize("words", ["fit", "query zoo nan.pt --method zoo-net.safetensors"])
def test_exit_code_of_the_process(words, world):
    done = lps(*words.split(), cwd=world)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and MISTAKES[words] in done.stderr


def test_one_step_after_another(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit = "fit", world/"zoo", "--epochs", 3, "--layers", "conv1, layer1.0.conv1", "--out", "runs/net.safetensors"
    out, log = run(capsys, *fit)
    assert not out and log == "runs/net.safetensors: lps on conv1, layer1.0.conv1 of 30 models, 5 tasks\n"
    evaluate = "evaluate", world/"zoo", "--splits", 2, "--epochs", 3, "--train", 4, "--out", "results.json"
    out, _ = run(capsys, *evaluate)
    assert [out.count(text) for text in ("Table 1", "Table 2", "random, without", "nan")] == [1, 1, 2, 0]
    assert "±" in out
    record = json.loads((tmp_path/"results.json").read_text())
    for table in ("table1", "table2"):
        for runs in record[table]["runs"].values(): assert {len(values) for values in runs.values()} == {2}
    assert record["table1"]["settings"]["n_train"] == 4
    assert record["table1"]["versions"]["torch"] and record["table2"]["machine"]["cores"]
    out, _ = run(capsys, "query", world/"zoo", world/MODEL, "-k", 3, "--method", "runs/net.safetensors")
    assert "Most similar models" in out and "copy" in out


def json_of(capsys, *args):
    "Return the JSON that a command prints"
    assert main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def test_a_table_keeps_file_names_whole(capsys):
    "In 80 columns the folder has a line of its own; a column of words gives way"
    table = pd.DataFrame({
        "similarity": [.25], "expected accuracy": ["0.88 [0.75, 1.00]"], "task": ["bridge / castle / poppy"],
        "file": ["runs/my-models/task05_run0.safetensors"],
    })
    show_table(table.rename_axis("rank"))
    out = capsys.readouterr().out
    assert "runs/my-models/" in out and "task05_run0.safetensors" in out and max(map(len, out.splitlines())) <= 80


def test_json_of_every_command_that_prints_a_table(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    method = "--method", world/"zoo-net.safetensors"
    run(capsys, "index", "build", "market", world/"zoo", *method, "--workers", 1)
    assert json_of(capsys, "index", "info", "market")["models"] == 30
    answer = json_of(capsys, "query", "market", world/MODEL, "-k", 2, "--no-expected")
    assert [row["rank"] for row in answer["models"]] == [1, 2] and answer["models"][0]["note"] == "copy"
    assert json_of(capsys, "inspect", world/MODEL)["architecture"].startswith("resnet, depth 8")
    assert json_of(capsys, "compare", world/MODEL, world/MODEL)["verdict"] == "same weights"
    assert json_of(capsys, "zoo", "datasheet", world/"wide", "--out", "sheet")["models"] == 2
    tables = json_of(capsys, "evaluate", world/"zoo", "--splits", 2, "--epochs", 1, "--train", 4, "--method", "fc")
    assert set(tables) == {"table1", "table2"} and "only one FC layer" in tables["table1"]["summary"]


def test_json_is_utf8_whatever_the_terminal_knows(world, tmp_path, monkeypatch):
    written = io.BytesIO()
    shutil.copy(world/MODEL, tmp_path/"größe.safetensors")
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert main(["inspect", str(tmp_path/"größe.safetensors"), "--json"]) == 0
    assert json.loads(written.getvalue().decode("utf-8"))["source"] == "größe.safetensors"


def test_json_has_no_nan(capsys):
    print_json([float("nan"), {"a": float("-inf")}, np.float32(.5), np.int64(3), Path("x")])
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == [None, {"a": None}, .5, 3, "x"]


def test_json_has_no_control_characters(capsys):
    "Nor those above 127, nor halves of characters"
    value = {"\x7f\x9b": "\x00\u2028\udcff\U000e0001 größe", "numbers": np.array([1., np.nan])}
    print_json(value)
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out) and "größe" in out
    assert json.loads(out) == value | dict(numbers=[1., None])


@pytest.mark.parametrize("columns", ["0", "1", "²", "99999999999", "", "-3"])
def test_a_width_that_is_none_is_forgotten(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    forget_odd_width()
    assert "COLUMNS" not in os.environ


def test_help_without_a_width(tmp_path):
    done = subprocess.run([LPS, "--help"], cwd=tmp_path, env=env() | dict(COLUMNS="0"), capture_output=True, text=True)
    assert done.returncode == 0 and all(command.split()[0] in done.stdout for command in COMMANDS)


def test_quiet_and_verbose(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit = "fit", world/"zoo", "--epochs", 1
    assert run(capsys, "--quiet", *fit) == ("", "")
    logged = run(capsys, "--verbose", *fit)[1].splitlines()
    assert len(logged) == 2 and re.fullmatch(r"\d+\.\d s", logged[1])
    assert main(["--verbose", "fit", "nowhere"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_warning_is_one_line(world, monkeypatch, capsys):
    def load(place):
        warnings.warn("first\nsecond", stacklevel=1)
        raise ValueError("stopped")
    monkeypatch.setattr("lps.load_modelset", load)
    assert main(["fit", "bundled", "--out", "nowhere.safetensors"]) == 2
    assert capsys.readouterr().err == "lps: warning: first second\nlps: stopped\n"


def test_a_model_in_another_order_finds_its_original(world, monkeypatch, capsys, tmp_path):
    state = load_tensors(world/MODEL)[0]
    spec = resnet_spec(8, 4)
    torch.save(permute(state, spec, random_perms(spec, 0)), tmp_path/"mixed.pt")
    monkeypatch.chdir(world)
    assert main(["query", "zoo", str(tmp_path/"mixed.pt"), "--method", "zoo-net.safetensors", "-k", "1"]) == 0
    assert re.search(r"│ 1 +│ +1\.000 │.*│ +task00_run0\.safe", capsys.readouterr().out)


def test_brackets_in_a_path_are_shown(world, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", str(world/"zoo"), "--epochs", "1", "--out", "a [bold] net.safetensors"]) == 0
    assert "a [bold] net.safetensors: lps on conv1" in capsys.readouterr().err
    build = "index", "build", "a[/b]", str(world/"zoo"), "--method", "stem-signature", "--workers", "1"
    assert main([*build]) == 0
    assert "a[/b]: 30 models of 5 tasks" in capsys.readouterr().err


def test_import_lists_what_it_refuses_and_takes_the_rest(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [f"{name}.pt\t{i}\n" for i, name in enumerate(["m0", "m1", "m2", "evil"])]
    (tmp_path/"models.tsv").write_text("file\ttask\n" + "".join(rows))
    _, log = run(capsys, "zoo", "import", world/"foreign", "theirs", "--table", "models.tsv", "--data", "digits")
    assert "theirs: 3 models of 3 tasks" in log
    assert "left out 1 file: evil.pt (refused and not executed: it calls posix.system" in log
    assert len(load_modelset(tmp_path/"theirs")) == 3
    assert not list(tmp_path.rglob("OWNED")) and not list(world.rglob("OWNED"))


DEMO_SHOWS = (
    "1. Which task does a network solve?", "2. Which networks are related to mine?", "3. The same on networks",
    "4. The report", "LPS classifies", "✓ right", "✗ wrong", "✓ no relative",
)
MEASURED = "versions", "machine", "time", "runs", "settings"


def test_demo_from_start_to_end_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = {}
    def kept_photographs(*given):
        made["photographs"] = photographs(*given)
        return made["photographs"]
    monkeypatch.setattr("lps.demo.digits", partial(digits, recipe=TINY))
    monkeypatch.setattr("lps.demo.photographs", kept_photographs)
    args = "demo", "--models", 6, "--splits", 2, "--epochs", 2, "--workers", 1
    out, _ = run(capsys, *args)
    said = " ".join(re.sub("[│┃]", " ", out).split())
    assert not [text for text in DEMO_SHOWS if text not in said] and "runs/demo/report.html" in out
    demo = tmp_path/"runs/demo"
    models = sorted((demo/"digits").glob("*.safetensors"))
    html = (demo/"report.html").read_text()
    assert len(models) == 30 and html.count("<table") == 3
    assert html.count("data:image/") == html.count("<figcaption>") - 3  # every table and figure has a caption
    assert html.index("Findings") < html.index("<figure>") and html.count("✗ wrong") >= 1
    assert not re.search(r'(src|href)=(?!["\']?(data:|#))', html) and str(tmp_path) not in html
    pictures = sorted(file.name for file in demo.glob("*.png") if file.read_bytes()[:4] == b"\x89PNG")
    assert pictures == ["digits-rank_k.png", "photographs-rank_k.png"]
    record = json.loads((demo/"results.json").read_text())
    assert set(record) == {"photographs", "digits"}
    for step in record.values(): assert all(step[key] for key in MEASURED)
    before = {file: file.stat().st_mtime_ns for file in models}
    monkeypatch.setattr("lps.demo.photographs", lambda *given: made["photographs"])  # only the live part is repeated
    run(capsys, *args)
    assert {file: file.stat().st_mtime_ns for file in demo.glob("digits/*.safetensors")} == before
    again = json.loads((demo/"results.json").read_text())
    assert again["digits"]["runs"] == record["digits"]["runs"]


def running(group):
    "Return the processes of a group that still run; zombies do not"
    stats = []
    for p in Path("/proc").glob("[0-9]*/stat"):
        try: stats.append(p.read_text().rpartition(")")[2].split())
        except OSError: pass
    return [s for s in stats if int(s[2]) == group and s[0] != "Z"]


SMALL = """
import sys
from dataclasses import replace
from lps.cli import main
from lps.zoo.recipe import recipes
recipes['digits'] = replace(recipes['digits'], depth=8, width=4)
sys.exit(main(sys.argv[1:]))
"""  # the command, which trains small networks


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for left-over processes in /proc")
def test_ctrl_c_keeps_what_is_finished(tmp_path):
    p = subprocess.Popen(
        [sys.executable, "-c", SMALL, "zoo", "build", "zoo", "--models", "40"],
        cwd=tmp_path,
        env=env(),
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.time() + 300
        while not list(tmp_path.glob("zoo/complete/*.json")):
            assert p.poll() is None and time.time() < end
            time.sleep(.05)
        os.killpg(p.pid, signal.SIGINT)
        err, end = p.communicate(timeout=120)[1], time.time() + 60
        while running(p.pid): assert time.time() < end; time.sleep(.05)
    finally:
        if running(p.pid): os.killpg(p.pid, signal.SIGKILL)
    assert p.returncode == 130 and err == "lps: stopped; models that were finished are kept\n"
    ms = load_modelset(tmp_path/"zoo")
    assert 1 <= len(ms) < 200 and not len(ms.rejected)


def test_a_fitted_method_may_be_fitted_again(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in ("0", "1"): assert main(["fit", str(world/"zoo"), "--epochs", "1", "--seed", seed]) == 0
    assert load_tensors(tmp_path/"lps-net.safetensors")[1]["fitted"]["config"]["recipe"]["seed"] == 1


@pytest.mark.parametrize("words", [
    ["fit", ""], ["zoo", "build", ""], ["query", "zoo", "", "--method", "zoo-net.safetensors"],
    ["zoo", "import", "foreign", ""], ["fit", "zoo", "--out", ""],
])
def test_an_empty_path_is_refused(words, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = everything(world)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("lps: ") and everything(world) == before


def test_a_terminal_that_knows_ascii_only(world, monkeypatch):
    written = io.BytesIO()
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert main(["query", "zoo", MODEL, "--method", "zoo-net.safetensors"]) == 0
    assert "Most similar models" in written.getvalue().decode("ascii")


def test_escape_sequences_do_not_reach_the_terminal(world, tmp_path, monkeypatch, capsys):
    torch.save({"\x1b]0;owned\x07.weight": torch.zeros(2, 2)}, tmp_path/"\x1b[31mred.pt")
    monkeypatch.chdir(world)
    assert main(["query", "zoo", str(tmp_path/"\x1b[31mred.pt"), "--method", "zoo-net.safetensors"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.rstrip("\n").isprintable() and r"\x1b[31mred.pt" in err


def test_a_bug_shows_where_it_is(monkeypatch):
    def broken(*args, **kwargs): raise KeyError("a bug")
    monkeypatch.setattr("lps.load_modelset", broken)
    with pytest.raises(KeyError): main(["fit", "bundled"])


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(28, "No space left on device", "x"), ValueError("why"), RuntimeError("why")]
)
def test_what_a_bad_machine_does_is_one_line(error, monkeypatch, capsys):
    def fails(*args, **kwargs): raise error
    monkeypatch.setattr("lps.load_modelset", fails)
    assert main(["fit", "bundled", "--out", "nowhere.safetensors"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_lists_what_is_registered(capsys, monkeypatch):
    monkeypatch.setitem(DATASETS, "holidays", DataSet("holidays", None, "mine"))
    assert main(["zoo", "build", "--help"]) == 0
    assert "holidays" in capsys.readouterr().out


def test_methods_are_listed(capsys, monkeypatch):
    monkeypatch.setitem(METHODS, "mine", replace(METHODS["lps"], name="mine"))
    names = [row["method"] for row in json_of(capsys, "methods")["methods"]]
    assert names == list(METHODS) and "mine" in names


def test_the_shell_completes_commands():
    completing = dict(_LPS_COMPLETE="complete_bash", COMP_WORDS="lps qu", COMP_CWORD="1")
    done = subprocess.run([LPS], env=os.environ | completing, capture_output=True, text=True)
    assert done.stdout.split() == ["query"], done.stderr


def test_several_queries(world, capsys, monkeypatch):
    monkeypatch.chdir(world)
    query = ["query", "zoo", MODEL, "zoo/task01_run0.safetensors", "--method", "zoo-net.safetensors", "-k", "1"]
    both = json_of(capsys, *query)
    assert [answer["models"][0]["file"] for answer in both] == [Path(MODEL).name, "task01_run0.safetensors"]
    assert both[1] == json_of(capsys, *query[:2], *query[3:])
    assert main(query) == 0
    shown = capsys.readouterr().out
    assert shown.index(MODEL) < shown.index("zoo/task01_run0.safetensors")


def test_a_query_that_is_missing_is_noticed_before_a_method_is_fitted(world, capsys, monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError("fitted")
    monkeypatch.chdir(world)
    monkeypatch.setattr("lps.methods.registry.fit_method", refuse)
    monkeypatch.setattr("lps.index.index.fit_method", refuse)
    assert main(["query", "zoo", "nowhere.pt", "--method", "lps"]) == 2
    assert "no model file or folder nowhere.pt" in capsys.readouterr().err


@pytest.mark.parametrize("words, near", [
    ("fit zoo --method stem-signatur", "(did you mean stem-signature?)"),
    ("zoo build new --images digit", "(did you mean digits?)"),
    ("zoo build new --images digits --recipe papr", "(did you mean paper?)"),
])
def test_a_near_name_is_suggested(world, capsys, monkeypatch, words, near):
    monkeypatch.chdir(world)
    assert main(words.split()) == 2 and near in capsys.readouterr().err

