"""The `lps` command as a user calls it: help, mistakes, the steps one after another, the demo, Ctrl-C"""
import io, json, os, re, signal, subprocess, sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import heed_ctrl_c

from lps.cli import console, main
from lps.demo import digits
from lps.core.files import load_tensors
from lps.models.modelset import load_modelset
from lps.order_chain import permute, random_perms, resnet_spec
from lps.zoo.train import recipes
from lps.zoo.build import build

LPS = Path(sys.executable).parent/"lps"
TINY = replace(recipes["digits"], name="tiny", epochs=1, milestones=(), depth=8, width=4)
COMMANDS = ["zoo build", "zoo import", "zoo datasheet", "fit", "evaluate", "query", "demo"]
COMMANDS += ["index build", "index add", "index remove", "index info", "index map"]
MODEL = "zoo/task00_run0.safetensors"


def env(): return {k: v for k, v in os.environ.items() if "COLOR" not in k} | dict(COLUMNS="80", OMP_NUM_THREADS="1")


def lps(*args, cwd):
    "The installed command, in a process of its own"
    return subprocess.run([LPS, *args], cwd=cwd, env=env(), capture_output=True, text=True, timeout=120)


def said(capsys, *args):
    "What the command prints when all is well, called in this process"
    assert main([*map(str, args)]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines()), out
    return out


@pytest.fixture(autouse=True)
def narrow(monkeypatch): monkeypatch.setattr(console, "width", 80)


class Evil:
    "A pickle that runs a command when it is opened without care"
    def __reduce__(self): return os.system, ("touch OWNED",)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Model sets of two architectures, a fitted net of each, a folder of foreign models, and everything that can be
    wrong
    """
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


def spoil(w):
    "Files and folders that no step can use"
    state, _ = load_tensors(w/MODEL)
    torch.save(state | {"conv1.weight": state["conv1.weight"]*float("nan")}, w/"nan.pt")
    (w/"half.safetensors").write_bytes((w/MODEL).read_bytes()[:3000])
    for n, text in dict(
        hello="hello", bad="{x", five="5", single='["a"]', regex='[["(", "x"]]', group=r'[["a", "\\3"]]'
    ).items():
        (w / f"{n}.json").write_text(text)
    for d in ("empty", "bare/train", "bare/val", "hollow/train/a", "hollow/train/b", "hollow/val/a", "hollow/val/b"):
        (w / d).mkdir(parents=True)


def everything(folder): return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_help_of_the_command_lists_the_steps(tmp_path):
    done = lps("--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr and all(len(line) <= 80 for line in done.stdout.splitlines())
    assert all(c.split()[0] in done.stdout for c in COMMANDS) and "Learnable Parameter Similarity" in done.stdout


def test_help_does_not_wait_for_torch(tmp_path):
    code = "import sys; from lps.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env(), capture_output=True).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert re.sub(r"\s+", " ", out).count(f"Example: lps {command} ") == 1 and not err


def test_help_shows_what_a_name_map_looks_like(capsys):
    main(["zoo", "import", "--help"])
    assert '["pattern",' in capsys.readouterr().out


MISTAKES = {
    "frobnicate": "No such command 'frobnicate'",
    "zoo frobnicate": "No such command 'frobnicate'",
    "--version": "No such option: --version",
    "fit": "Missing argument 'modelset'",
    "query": "Missing argument 'INDEX MODEL'",
    "query zoo": "1 arguments: give an index and a model file",
    "query zoo-net.safetensors zoo": "zoo is a folder: ask about one model file in it",
    "query nowhere " + MODEL: "no index at nowhere: build one with lps index build nowhere FOLDER",
    "query zoo " + MODEL: "no index at zoo: no header.json",
    "query zoo-net.safetensors " + MODEL: "zoo-net.safetensors holds no index",
    "index build market nowhere": "no models at nowhere: no such folder or file",
    "index build market empty": "no model could be taken in: no model files there",
    "index build zoo foreign": "zoo holds .build.lock: choose an empty folder",
    "index build hello.json zoo": "hello.json is a file: choose another folder for the index",
    "index build market zoo --method magic": "'magic' is unknown: take one of fc, frobenius, lps",
    "index build market foreign --method chain": "name the tasks in a table, or take probes",
    "index build market foreign --method nowhere.safetensors": "no model file nowhere.safetensors",
    "index build market zoo --workers 0": "Invalid value for '--workers'",
    "index build market foreign --table nowhere.tsv": "nowhere.tsv: No such file",
    "index info zoo": "no index at zoo: no header.json",
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
    f"fit zoo --out {MODEL}": "is there already and is not a method that lps fit wrote",
    "fit zoo --out hello.json": "is there already and is not a method that lps fit wrote",
    "evaluate zoo --train 4 --out five.json": "is there already and is not a file of results",
    "fit zoo --method magic": "'magic' is unknown: take one of fc, frobenius, lps",
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
    "evaluate zoo": "a task has 6 models and --train is 8: take --train 5 or less",
    "evaluate zoo --train 0": "Invalid value for '--train'",
    "evaluate zoo --train 4 --splits 0": "Invalid value for '--splits'",
    "evaluate zoo --train 4 --test-tasks 4": "5 tasks, 4 of them held out",
    "evaluate zoo --train 4 --out empty": "empty is a folder",
    "evaluate wide --train 1": "a task has 1 models",
    "query bundled nowhere " + MODEL: "no model set at nowhere",
    "query bundled bundled " + MODEL: "compare models of one architecture",
    "query nowhere zoo " + MODEL: "no model file nowhere",
    "query hello.json zoo " + MODEL: "hello.json is not a safetensors file",
    "query half.safetensors zoo " + MODEL: "half.safetensors is truncated",
    f"query {MODEL} zoo {MODEL}": "holds no fitted method",
    "query zoo-net.safetensors nowhere " + MODEL: "no model set at nowhere",
    "query zoo-net.safetensors empty " + MODEL: "no *.safetensors file in it",
    "query zoo-net.safetensors zoo nowhere.pt": "no model file or folder nowhere.pt",
    "query zoo-net.safetensors zoo zoo": "zoo is a folder",
    "query zoo-net.safetensors zoo half.safetensors": "half.safetensors: truncated",
    "query zoo-net.safetensors zoo hello.json": "hello.json: not a PyTorch file",
    "query zoo-net.safetensors zoo foreign/evil.pt": "refused and not executed",
    "query zoo-net.safetensors zoo nan.pt": "nan.pt is broken: conv1.weight holds NaN",
    "query zoo-net.safetensors zoo zoo-net.safetensors": "no layer 'conv1' in these models",
    "query zoo-net.safetensors zoo wide/task00_run0.safetensors": "compare models of one architecture",
    "query wide-net.safetensors zoo " + MODEL: "compare models of one architecture",
    f"query zoo-net.safetensors zoo {MODEL} -k 0": "Invalid value for '-k'",
    f"query zoo-net.safetensors zoo {MODEL} --names bad.json": "bad.json is not JSON",
    "zoo import nowhere new": "no models at nowhere",
    "zoo import empty new": "no .pt, .pth, .ckpt, .bin, .safetensors file in it",
    "zoo import foreign foreign": "choose another folder",
    "zoo import foreign new --names bad.json": "bad.json is not JSON",
    "zoo import foreign new --names five.json": "five.json is no name map",
    "zoo import foreign new --names single.json": "single.json is no name map",
    "zoo import foreign new --names regex.json": "regex.json has a pattern that is no regular expression",
    "zoo import foreign new --names group.json": "group.json has a pattern that is no regular expression",
    "zoo import foreign new --names nowhere.json": "nowhere.json: No such file",
    "zoo import foreign new --table nowhere.tsv": "nowhere.tsv: No such file",
    "zoo import foreign new --table hello.json": "the table has no column file, task",
    "zoo import foreign new --shortcut none": "unknown shortcut 'none': known are pad_end, pad_both",
    "zoo build new --recipe long": "unknown recipe 'long': known are paper, short, digits",
    "zoo build new --images nowhere": "unknown images 'nowhere'",
    "zoo build new --images empty": "empty has no train/ folder",
    "zoo build new --images bare": "no images under bare/train",
    "zoo build new --images hollow": "no images under hollow/train",
    "zoo build new --keep 1,x": "--keep is '1,x': give epochs with commas",
    "zoo build new --device gpu0": "unknown device 'gpu0': give 'cpu' or 'cuda'",
    "zoo build new --tasks 6": "10 classes of 'digits' make 5 pairs",
    "zoo build new --models 0": "Invalid value for '--models'",
    "zoo build new --models 1.5": "Invalid value for '--models'",
    "zoo build new --workers 0": "Invalid value for '--workers'",
    "zoo build hello.json": "hello.json: File exists",
    "zoo build zoo": "zoo was built with recipe name tiny, now digits",
    "demo --models 5": "Invalid value for '--models'",
    "demo --splits 0": "Invalid value for '--splits'",
    "demo --out hello.json": "hello.json is not a folder",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_gives_one_line_and_changes_nothing(words, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = everything(world)
    code, (out, err) = main(words.split()), capsys.readouterr()
    assert code == 2 and not out and err.count("\n") == 1 and err.startswith("lps: ") and MISTAKES[words] in err, (
        code,
        out,
        err,
    )
    assert everything(world) == before


@pytest.mark.parametrize("words", ["fit", "query zoo-net.safetensors zoo nan.pt"])
def test_exit_code_of_the_process(words, world):
    p = lps(*words.split(), cwd=world)
    assert p.returncode == 2 and not p.stdout and p.stderr.count("\n") == 1 and MISTAKES[words] in p.stderr


def test_one_step_after_another(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fit = "fit", world/"zoo", "--epochs", 3, "--layers", "conv1, layer1.0.conv1", "--out", "runs/net.safetensors"
    words = " ".join(said(capsys, *fit).split())
    assert "runs/net.safetensors: lps on conv1, layer1.0.conv1 of 30 models, 5 tasks" in words
    evaluate = "evaluate", world/"zoo", "--splits", 2, "--epochs", 3, "--train", 4, "--out", "results.json"
    out = said(capsys, *evaluate)
    assert [out.count(t) for t in ("Table 1", "Table 2", "random, without", "nan")] == [1, 1, 2, 0] and "±" in out
    record = json.loads((tmp_path/"results.json").read_text())
    for t in ("table1", "table2"): assert {len(r) for m in record[t]["runs"].values() for r in m.values()} == {2}
    assert (
        record["table1"]["settings"]["n_train"] == 4
        and record["table1"]["versions"]["torch"]
        and record["table2"]["machine"]["cores"]
    )
    out = said(capsys, "query", "runs/net.safetensors", world/"zoo", world/MODEL, "-k", 3)
    assert "Closest models" in out and "Closest tasks" in out and Path(MODEL).name not in out


def test_a_model_in_another_order_finds_its_original(world, monkeypatch, capsys, tmp_path):
    state, spec = load_tensors(world/MODEL)[0], resnet_spec(8, 4)
    torch.save(permute(state, spec, random_perms(spec, 0)), tmp_path/"mixed.pt")
    monkeypatch.chdir(world)
    assert main(["query", "zoo-net.safetensors", "zoo", str(tmp_path/"mixed.pt"), "-k", "1"]) == 0
    assert re.search(r"│ 1 +│ +1\.000 │.*│ +task00_run0\.safetensors │", capsys.readouterr().out)


def test_brackets_in_a_path_are_shown(world, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", str(world/"zoo"), "--epochs", "1", "--out", "a [bold] net.safetensors"]) == 0
    assert "a [bold] net.safetensors: lps on conv1" in capsys.readouterr().out


def test_import_names_what_it_refuses_and_takes_the_rest(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.tsv").write_text(
        "file\ttask\n" + "".join(f"{n}.pt\t{i}\n" for i, n in enumerate(["m0", "m1", "m2", "evil"]))
    )
    take = "zoo", "import", world/"foreign", "theirs", "--table", "models.tsv", "--data", "digits"
    assert main([*map(str, take)]) == 0
    out = "".join(capsys.readouterr())
    assert (
        "theirs: 3 models of 3 tasks" in out
        and "left out 1 file: evil.pt (refused and not executed: it asks for posix.system" in out
    )
    assert (
        len(load_modelset(tmp_path / "theirs")) == 3
        and not list(tmp_path.rglob("OWNED"))
        and not list(world.rglob("OWNED"))
    )


def test_demo_from_start_to_end_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lps.demo.digits", partial(digits, recipe=TINY))
    args = "demo", "--models", 6, "--splits", 2, "--epochs", 2, "--workers", 1
    out = said(capsys, *args)
    assert out.index("Photographs, Table 1") < out.index("Digits, Table 1")
    assert [
        w
        for w in (
            "Photographs, Table 2",
            "Digits, Table 2",
            "over 2 splits",
            "Query: task",
            "Closest models",
            "runs/demo/report.html",
        )
        if w not in out
    ] == []
    demo, models = tmp_path/"runs/demo", sorted((tmp_path/"runs/demo/digits").glob("*.safetensors"))
    html = (demo/"report.html").read_text()
    assert len(models) == 30 and html.count("<table") >= 8 and html.count("data:image/") >= 6
    assert not re.search(r'(src|href)=(?!["\']?(data:|#))', html) and str(tmp_path) not in html
    assert sorted(f.name for f in demo.glob("*.png") if f.read_bytes()[:4] == b"\x89PNG") == [
        f"{s}-{f}.png" for s in ("digits", "photographs") for f in ("embedding", "rank_k", "similarity")
    ]
    record = json.loads((demo/"results.json").read_text())
    assert all(
        record[s][t][k]
        for s in ("bundled", "digits")
        for t in ("table1", "table2")
        for k in ("versions", "machine", "time", "runs", "settings")
    )
    before = {f: f.stat().st_mtime_ns for f in models}
    said(capsys, *args)
    assert {f: f.stat().st_mtime_ns for f in demo.glob("digits/*.safetensors")} == before
    again = json.loads((demo/"results.json").read_text())
    assert all(again[s]["table1"]["runs"] == record[s]["table1"]["runs"] for s in record)


def running(group):
    "Processes of a group that still run (zombies do not)"
    stats = []
    for p in Path("/proc").glob("[0-9]*/stat"):
        try: stats.append(p.read_text().rpartition(")")[2].split())
        except OSError: pass
    return [s for s in stats if int(s[2]) == group and s[0] != "Z"]


SMALL = """
import sys
from dataclasses import replace
from lps.cli import main
from lps.zoo.train import recipes
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


@pytest.mark.parametrize("words", [["fit", ""], ["zoo", "build", ""], ["query", "zoo-net.safetensors", "zoo", ""],
                                   ["zoo", "import", "foreign", ""], ["fit", "zoo", "--out", ""]])
def test_an_empty_path_is_refused(words, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = everything(world)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("lps: ") and everything(world) == before


def test_a_terminal_that_knows_ascii_only(world, monkeypatch):
    written = io.BytesIO()
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", write_through=True))
    assert main(["query", "zoo-net.safetensors", "zoo", MODEL]) == 0
    shown = written.getvalue().decode("ascii")
    assert "Closest models" in shown


def test_escape_sequences_do_not_reach_the_terminal(world, tmp_path, monkeypatch, capsys):
    torch.save({"\x1b]0;owned\x07.weight": torch.zeros(2, 2)}, tmp_path/"\x1b[31mred.pt")
    monkeypatch.chdir(world)
    assert main(["query", "zoo-net.safetensors", "zoo", str(tmp_path/"\x1b[31mred.pt")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.rstrip("\n").isprintable() and r"\x1b[31mred.pt" in err


def test_a_bug_shows_where_it_is(monkeypatch):
    def broken(*args, **kwargs): raise KeyError("a bug")
    monkeypatch.setattr("lps.models.modelset.load_modelset", broken)
    with pytest.raises(KeyError): main(["fit", "bundled"])


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(28, "No space left on device", "x"), ValueError("why"), RuntimeError("why")]
)
def test_what_a_bad_machine_does_is_one_line(error, monkeypatch, capsys):
    def fails(*args, **kwargs): raise error
    monkeypatch.setattr("lps.models.modelset.load_modelset", fails)
    assert main(["fit", "bundled", "--out", "nowhere.safetensors"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_knows_what_is_registered(capsys, monkeypatch):
    from lps import methods, tasks
    monkeypatch.setitem(methods.METHODS, "mine", replace(methods.METHODS["lps"], name="mine"))
    monkeypatch.setitem(tasks.DATASETS, "holidays", tasks.DataSet("holidays", None, "mine"))
    assert main(["fit", "--help"]) == 0
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    assert "lps, stem-signature" in shown.replace("- ", "-") and "mine; baselines: fc, frobenius" in shown
    assert main(["zoo", "build", "--help"]) == 0
    assert "holidays" in capsys.readouterr().out
