"""Packed model sets equal the folders they were made from; the one in the package is small, complete, offline, and
in the wheel"""
import json, re, runpy, socket, subprocess, sys, zipfile
from importlib.metadata import PackageNotFoundError, version

import pandas as pd
import pytest
import torch
from conftest import ROOT, copy_of_repo

from lps.cli import main
from lps.zoo.datasheet import datasheet, datasheet_text, write_datasheet
from lps.study.splits import classification_splits
from lps.study.stats import rank_k
from lps.study.table1 import table1
from lps.study.table2 import table2
from lps.core.files import load_tensors, mark_complete, save_tensors
from lps.methods.classes import describe_classes, packed_networks
from lps.models.modelset import bundled, bundled_sets, digest, load_modelset, pack
from lps.nets.resnet import ResNet
from lps.index.index import ModelIndex
from lps.methods.registry import embed_models, fit_method, load_fitted, observations, score_models
from lps.zoo.tasks import source_of

QUICK = dict(n_filters=8, epochs=2, milestones=(1,))
FILES = [
    "DATASHEET.md", "classes-modelset500.safetensors", "datasheet.json", "index.zip", "modelset500.safetensors",
    "net.safetensors", "observed/modelset500.safetensors",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A folder as a build leaves it: four tasks of four models, one model set aside"
    path = tmp_path_factory.mktemp("packed")/"zoo"
    for i in range(15):
        torch.manual_seed(i)
        net = ResNet(depth=8, width=4)
        for m in net.modules():
            if isinstance(m, torch.nn.BatchNorm2d): m.running_var.uniform_(.5, 2), m.weight.data.uniform_(.5, 2)
        meta = dict(
            task=i // 4,
            run=i % 4,
            classes=[f"n{i//4}0", f"n{i//4}1"],
            seed=i,
            build_seed=3,
            data="digits",
            val_accuracy=0.8 + i / 100,
            train_accuracy=0.9,
            recipe=dict(name="short", epochs=40, depth=8, width=4),
            shortcut="conv",
            precision="float32",
            mean=[0.5],
            std=[0.25],
        )
        save_tensors(path/f"task{i//4:02d}_run{i % 4}.safetensors", net.state_dict(), meta)
        mark_complete(path/f"task{i//4:02d}_run{i % 4}.safetensors", seconds=3600)
    (path/"build.json").write_text(json.dumps(dict(pairs=[[0, 1]]*5)))
    (path/"set_aside").mkdir()
    (path / "set_aside/task03_run3.json").write_text(
        json.dumps(dict(task=3, run=3, seed=15, reason="diverged: the loss is nan in epoch 2"))
    )
    return path


@pytest.fixture(scope="module")
def whole(folder): return load_modelset(folder)


@pytest.fixture(scope="module")
def packed(whole): return pack(whole, whole.path.parent/"packed.safetensors", datasheet=datasheet(whole))


@pytest.fixture(scope="module")
def ours(): return load_modelset("bundled")


@pytest.mark.parametrize(
    "how",
    [dict(layer="conv1"), dict(layer="conv1", folded=True), dict(layer="bn1.running_mean"), dict(layer="bn1.bias")],
)
def test_stack_is_that_of_the_folder(whole, packed, how):
    assert torch.equal(packed.stack(**how), whole.stack(**how)) and packed.stack(**how).dtype == torch.float32
    assert torch.equal(packed[[9, 0, 4]].stack(**how), whole[[9, 0, 4]].stack(**how))


def test_manifest_labels_and_models_are_those_of_the_folder(whole, packed):
    pd.testing.assert_frame_equal(packed.manifest, whole.manifest)
    assert (
        torch.equal(packed.labels, whole.labels)
        and packed.tasks == whole.tasks
        and packed.layers == ["conv1"]
        and packed.hashes == whole.hashes
    )
    for a, b in zip(packed, whole, strict=True):
        assert all(torch.equal(v, b.state[k]) for k, v in a.state.items())
        assert a.meta["digest"] == b.digest == digest(b.state) != a.digest
        assert {k: v for k, v in b.meta.items() if k != "layers"}.items() <= a.meta.items()


def test_fit_embed_and_tables_are_those_of_the_folder(whole, packed):
    nets = [fit_method(ms, **QUICK) for ms in (whole, packed)]
    assert torch.equal(embed_models(nets[0], whole), embed_models(nets[1], packed))
    for table, args in ((table1, (1, 2)), (table2, (1, 2, 1))):
        pd.testing.assert_frame_equal(table(packed, *args, **QUICK), table(whole, *args, **QUICK))


def test_search_takes_packed_and_whole_for_the_same_models(whole, packed, folder):
    net = fit_method(whole, **QUICK)
    queries = whole, packed, whole[2], packed[2], folder/"task00_run2.safetensors"
    for q in queries:
        found = [ModelIndex(net, g).query(q, 3, with_self=True) for g in (whole, packed)]
        pd.testing.assert_frame_equal(*found)
    found = [ModelIndex(net, g).query(g, 3) for g in (whole, packed)]
    pd.testing.assert_frame_equal(*found)


def test_a_query_is_left_out_where_the_same_weights_are(whole, packed, folder):
    "A claim of a packed set decides nothing: it has the stem of the query, and nothing tells of the other layers"
    net = fit_method(whole, **QUICK)
    file = folder/"task00_run2.safetensors"
    assert file.name not in set(ModelIndex(net, whole).query(file, 14).file)
    assert ModelIndex(net, packed).query(file, 1).file.tolist() == [file.name]


def test_only_the_network_cannot_be_had(packed, whole):
    with pytest.raises(
        ValueError, match=r"task00_run0.safetensors: only conv1.weight, bn1.weight.* 9 layers are not .*lps zoo build"
    ):
        packed[0].net
    assert pack(whole, packed.path.with_name("all.safetensors"), whole.layers)[0].net(
        torch.zeros(1, 3, 8, 8)
    ).shape == (1, 2)


def test_models_of_a_packed_set_are_copies(packed):
    packed[0].state["conv1.weight"].zero_()
    assert packed[0].state["conv1.weight"].any()


def test_packing_a_packed_set_changes_nothing(packed, tmp_path):
    again = pack(packed[2:9], tmp_path/"again.safetensors", classes=dict(n00="cat"))
    assert (
        torch.equal(again.stack("conv1", True), packed[2:9].stack("conv1", True)) and again.hashes == packed[2:9].hashes
    )
    assert (
        again[0].meta["classes"] == ["cat", "n01"]
        and again[0].meta["class_ids"] == ["n00", "n01"]
        and again[0].digest == packed[2].digest
    )
    with pytest.raises(ValueError, match="no layer 'fc' in these models: known are conv1"):
        pack(packed, tmp_path / "x.safetensors", ["fc"])


def rewritten(packed, path, tensors=lambda t: t, meta=lambda m: m):
    "A packed file with other contents"
    t, m = load_tensors(packed.path)
    save_tensors(path, tensors(t), meta({k: v for k, v in m.items() if k not in ("layers", "content")}))
    return path


def spoil(name, value):
    "One tensor with other values"
    return dict(tensors=lambda t: t | {name: t[name]*0 + value})


def with_models(change, **other):
    "Other metadata of the models"
    def meta(m): return m | {"packed": m["packed"] | dict(models=list(map(change, m["packed"]["models"]))) | other}
    return dict(meta=meta)


def without_task(o): return {k: v for k, v in o.items() if k != "task"}


BROKEN = {
    "NaN": (spoil("bn1.bias", float("nan")), "bn1.bias holds NaN"),
    "inf": (spoil("conv1.weight", float("inf")), "conv1.weight holds inf"),
    "models and rows": (dict(tensors=lambda t: t | {"bn1.bias": t["bn1.bias"][1:]}), r"shape \(14, 4\) for 15 models"),
    "no models": (dict(meta=lambda m: m | {"packed": dict(common={}, models=[])}), "does not name the models"),
    "nonsense": (dict(meta=lambda m: m | {"packed": "yes"}), "packed holds 'yes', expected fields by name"),
    "no common": (dict(meta=lambda m: m | {"packed": dict(models=[{}])}), "field 'common' is missing"),
    "no task": (with_models(without_task), "field 'task' is missing"),
    "task is text": (with_models(lambda o: o | dict(task="3")), "field 'task' is '3'"),
    "no hash": (with_models(lambda o: o | dict(sha256=None)), "field 'sha256' is None"),
    "two of a name": (with_models(lambda o: o | dict(file="a")), "have one name"),
    "no packed set": (dict(meta=lambda m: dict(purpose="?")), "is no packed model set: its metadata has"),
    "one model": (dict(meta=lambda m: dict(task=0)), "it is one model, give the folder"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_packed_file_gives_one_error(packed, tmp_path, case):
    how, words = BROKEN[case]
    with pytest.raises(ValueError, match=words): load_modelset(rewritten(packed, tmp_path/"bad.safetensors", **how))


@pytest.mark.parametrize("cut", [0, 5, 300, 3000, -1])
def test_truncated_packed_file_gives_one_error(packed, tmp_path, cut):
    (bad := tmp_path/"bad.safetensors").write_bytes(packed.path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"bad.safetensors is (not a safetensors file|truncated)"): load_modelset(bad)


def test_datasheet_of_a_build(folder, packed):
    sheet = write_datasheet(folder)
    assert sheet == json.loads((folder/"datasheet.json").read_text()) and len(load_modelset(folder)) == 15
    assert (
        sheet["planned_tasks"] == 5
        and sheet["training_hours"] == 15
        and [a["reason"] for a in sheet["set_aside"]] == ["diverged: the loss is nan in epoch 2"]
    )
    assert (
        sheet["recipes"][0]["epochs"] == 40
        and sheet["source"] == [source_of("digits")]
        and [t["models"] for t in sheet["tasks"]] == [4, 4, 4, 3]
    )
    text = (folder/"DATASHEET.md").read_text()
    assert all(m["sha256"] in text for m in sheet["members"]) and "task 3 run 3: diverged" in text and "digits" in text
    of_packed = datasheet(packed)
    assert {k for k in sheet if sheet[k] != of_packed[k]} <= {
        "name",
        "not_for",
        "written",
        "planned_tasks",
    } and "Anything that needs whole networks" in of_packed["not_for"][-1]
    with pytest.raises(ValueError, match="say in which folder"): write_datasheet(packed)


def test_datasheet_of_models_about_which_nothing_is_known(tmp_path):
    save_tensors(tmp_path/"a.safetensors", ResNet(depth=8, width=4).state_dict(), dict(task=-1))
    text = datasheet_text(write_datasheet(tmp_path))
    assert "1 model of 1 task\n" in text and "not known" in text
    assert "whoever publishes the models must state them" in text


def test_bundled_set_loads_without_a_network(monkeypatch):
    def no(*args, **kw): raise OSError("no network")
    monkeypatch.setattr(socket, "socket", no)
    models, net = load_modelset("bundled"), load_fitted(bundled("net.safetensors"))
    assert len(models) >= 3*len(models.tasks) and embed_models(net, models).isfinite().all()


def files_in(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_bundled_set_is_small_and_holds_no_image(ours):
    data = bundled().parent
    small = ["expected_accuracy.json", "market_map.css", "market_map.html", "market_map.js"]
    small += ["report.css", "report.html", "imagenet_classes.tsv", "architectures.tsv"]
    small += ["classes-cifar100.safetensors", "classes-imagenet-1k.safetensors"]
    assert files_in(data) == sorted([*FILES, *small])
    assert sum((data/name).stat().st_size for name in files_in(data)) <= 9_000_000
    shapes = {k: tuple(v.shape[1:]) for k, v in load_tensors(bundled())[0].items()}
    assert shapes == {
        "conv1.weight": (16, 3, 3, 3),
        **{f"bn1.{k}": (16,) for k in ("weight", "bias", "running_mean", "running_var")},
    }
    assert all(
        v.dtype == torch.float32 and v.ndim < 5 and (v.ndim < 3 or v.shape[-1] == 3)
        for v in load_tensors(bundled("net.safetensors"))[0].values()
    )


def test_bundled_datasheet_is_complete(ours):
    sheet = json.loads(bundled("datasheet.json").read_text())
    optional = "set_aside", "rejected", "planned_tasks", "training_hours"
    assert [k for k, v in sheet.items() if v in (None, [], {}, "") and k not in optional] == []
    assert (
        sheet["models"] == len(ours)
        and [m["file"] for m in sheet["members"]] == ours.manifest.file.tolist()
        and [m["sha256"] for m in sheet["members"]] == ours.hashes
    )
    assert all(re.fullmatch("[0-9a-f]{64}", h) for h in ours.hashes) and len(set(ours.hashes)) == len(ours)
    assert [t["task"] for t in sheet["tasks"]] == ours.tasks == list(range(len(ours.tasks)))
    names = [name for task in sheet["tasks"] for name in task["classes"]]
    assert len(set(names)) == len(names) == 2*len(ours.tasks) == 100
    assert set(names) == set(ours.manifest.class_0) | set(ours.manifest.class_1)
    words = ["CIFAR-100", "citation of the report", "Reconstruction", "other architectures", "two classes"]
    assert [w for w in words if w not in bundled("DATASHEET.md").read_text()] == []


def test_bundled_net_saw_its_training_split_only_and_knows_the_others(ours):
    about, net = load_tensors(bundled("net.safetensors"))[1]["trained_on"], load_fitted(bundled("net.safetensors"))
    n_train = int(re.search(r"n_train=(\d+)", about["split"])[1])
    train, test = classification_splits(ours.labels, n_train, n_splits=1, seed=0)[0]
    assert about["files"] == sorted(ours.manifest.file[train]) and about["held_out"] == sorted(ours.manifest.file[test])
    assert (
        not set(about["files"]) & set(about["held_out"])
        and len(about["files"]) + len(about["held_out"]) == len(ours)
        and net.tasks == ours.tasks
    )
    curve = rank_k(score_models(net, ours[test]), ours.labels[test], torch.tensor(net.tasks))
    assert curve[0] > 1.5/len(net.tasks)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    "Packed two-class networks of a build: three runs of two tasks, and a fourth of one task"
    path = tmp_path_factory.mktemp("toys")
    for i in range(7):
        torch.manual_seed(i)
        about = dict(task=i % 2, run=i//2, epoch=3, recipe=dict(name="tiny", epochs=6), shortcut="conv", data="toys")
        about |= dict(classes=["cat", "dog"] if i % 2 else ["oak", "elm"], seed=i)
        save_tensors(path/f"build/task0{i % 2}_run{i//2}.safetensors", ResNet(8, 4).state_dict(), about)
    script = runpy.run_path(str(ROOT/"scripts/pack_zoo.py"))
    script["pack_epoch"](load_modelset(path/"build"), path/"out", 3, "toys")
    return path/"out/epoch3.safetensors"


def test_bundling_is_one_command(toys, tmp_path):
    "Only runs that all tasks have are taken, with their observations"
    script = runpy.run_path(str(ROOT/"scripts/bundle.py"))
    out = tmp_path/"out"
    assert "6 models of 2 tasks" in script["bundle"](toys, out)
    assert files_in(out) == sorted(FILES)
    models = load_modelset(out/"modelset500.safetensors")
    assert models.about["datasheet"]["name"] == "toys, after 3 epochs"
    packed = load_modelset(toys)
    chosen = packed[packed.manifest.file.isin(models.manifest.file).to_numpy()]
    assert models.digests == chosen.digests and len(packed) == 7
    for method, observed in chosen.stored.items():
        for name, v in observed.items(): assert torch.equal(models.stored[method][name], v)
    assert script["unfit"](out) is None
    script["unfit"].__globals__["LIMIT"] = 10_000
    assert "bytes, 10000 are allowed" in script["unfit"](out)


def test_two_runs_are_too_few_to_bundle(toys, tmp_path):
    models = load_modelset(toys)
    few = pack(models[(models.manifest.run < 2).to_numpy()], tmp_path/"few.safetensors")
    script = runpy.run_path(str(ROOT/"scripts/bundle.py"))
    with pytest.raises(SystemExit, match="all tasks have 2 runs in common, expected at least 3"):
        script["bundle"](few.path, tmp_path/"out")


def test_commands_take_the_bundled_set(tmp_path, monkeypatch, capsys, ours):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "bundled", "--epochs", "1", "--method", "fc", "--out", "net.safetensors"]) == 0
    save_tensors("mine.safetensors", ResNet().state_dict(), {})
    assert main(["query", "bundled", "mine.safetensors", "-k", "2"]) == 0
    assert main(["zoo", "datasheet", "bundled"]) == 0
    out, err = capsys.readouterr()
    assert err == f"net.safetensors: fc on conv1 of {len(ours)} models, 50 tasks\n"
    assert "Most similar models" in out and " / " in out and "## Not suitable for" in out
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["mine.safetensors", "net.safetensors"]


def has_setuptools():
    try: return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError: return False


def test_wheel_holds_the_bundled_set(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--quiet",
        "-w",
        str(tmp_path / "out"),
        *(["--no-build-isolation"] if has_setuptools() else []),
    ]
    run = subprocess.run(command, cwd=copy_of_repo(tmp_path/"lps"), capture_output=True, text=True)
    if run.returncode and not has_setuptools() and "No matching distribution" in run.stderr:
        pytest.skip("setuptools>=77 is not here and cannot be downloaded")
    assert run.returncode == 0, run.stderr
    file = next((tmp_path/"out").glob("*.whl"))
    assert file.stat().st_size <= 10_000_000
    with zipfile.ZipFile(file) as wheel:
        sizes = {o.filename: o.file_size for o in wheel.infolist()}
    assert {n: sizes.get(f"lps/data/{n}") for n in FILES} == {
        n: bundled(n).stat().st_size for n in FILES
    } and "lps/cli.py" in sizes
    assert not [n for n in sizes if n.endswith((".png", ".jpg", ".pt", ".npz"))]


def test_the_bundled_set_is_that_of_the_repository(ours):
    "Networks of runs that all tasks have, after 80 epochs"
    of_all = load_modelset("modelset500-cifar100-epoch80").manifest.set_index("file").seed
    assert (of_all[ours.manifest.file].to_numpy() == ours.manifest.seed.to_numpy()).all()
    assert ours.manifest.task.value_counts().nunique() == 1 and set(ours.manifest.data) == {"cifar100"}


@pytest.mark.parametrize("name", bundled_sets())
def test_packed_networks_of_the_repository_have_their_observations(name):
    "First layers and what methods observe belong to the same networks, and each says what trained it"
    models = load_modelset(name)
    tensors, meta = load_tensors(models.path.parent/"observed"/models.path.name)
    assert meta["observed"]["digests"] == [model.meta["digest"] for model in models] and models.layers == ["conv1"]
    assert {len(tensor) for tensor in tensors.values()} == {len(models)}
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in tensors.values())
    assert all(model.meta["instruction_set"] and model.meta["epoch"] for model in models)


def test_packing_keeps_what_methods_observe(tmp_path):
    "In float16, embeddings of outputs and signatures stay what they are to three digits"
    script = runpy.run_path(str(ROOT/"scripts/pack_zoo.py"))
    kept = tmp_path/"zoo/epochs/003"
    for i in range(4):
        torch.manual_seed(i)
        about = dict(task=i//2, run=i % 2, epoch=3, recipe=dict(name="tiny", epochs=6), shortcut="conv")
        save_tensors(kept/f"task0{i//2}_run{i % 2}.safetensors", ResNet(8, 4).state_dict(), about)
    assert "4 networks of 2 tasks" in script["pack_epoch"](load_modelset(kept), tmp_path/"out", 3, "toys")
    whole = load_modelset(kept)
    tensors, meta = load_tensors(tmp_path/"out/observed/epoch3.safetensors")
    claimed = [model.meta["digest"] for model in load_modelset(tmp_path/"out/epoch3.safetensors")]
    assert claimed == whole.digests == meta["observed"]["digests"]
    observed = observations(whole, fit_method(whole, "two-spectra-probes"))["outputs"]
    z = torch.cat([tensors["outputs"], -tensors["outputs"].sum(-1, keepdim=True)], -1).float()
    torch.testing.assert_close(z, observed, rtol=2e-3, atol=2e-3)
    described = packed_networks(tmp_path/"out/classes/epoch3.safetensors")
    again = describe_classes(whole[1], precision="float32")
    torch.testing.assert_close(described[1].logits, again.logits)
    assert len(described) == 4 and described[1].images == again.images


def test_packing_again_keeps_networks_of_earlier_builds(tmp_path):
    "Those of another machine, with their observations and digests; a network that was trained again is replaced"
    script = runpy.run_path(str(ROOT/"scripts/pack_zoo.py"))
    def build(name, files):
        for i, file in enumerate(files):
            torch.manual_seed(len(name) + i)
            task, run = int(file[4:6]), int(file[-1])
            about = dict(task=task, run=run, epoch=3, recipe=dict(name="tiny", epochs=6), shortcut="conv")
            save_tensors(tmp_path/name/f"{file}.safetensors", ResNet(8, 4).state_dict(), about)
        return load_modelset(tmp_path/name)

    first = build("first", ["task00_run0", "task01_run0", "task02_run0"])
    again = build("again, elsewhere", ["task01_run0", "task03_run0"])
    script["pack_epoch"](first, tmp_path/"out", 3, "toys")
    before, _ = load_tensors(tmp_path/"out/observed/epoch3.safetensors")
    assert "4 networks of 4 tasks" in script["pack_epoch"](again, tmp_path/"out", 3, "toys")
    packed = load_modelset(tmp_path/"out/epoch3.safetensors")
    tensors, meta = load_tensors(tmp_path/"out/observed/epoch3.safetensors")
    wanted = [first[0], again[0], first[2], again[1]]
    assert [model.meta["digest"] for model in packed] == [model.digest for model in wanted]
    assert meta["observed"]["digests"] == [model.digest for model in wanted]
    assert all(torch.equal(a.state["conv1.weight"], b.state["conv1.weight"]) for a, b in zip(packed, wanted))
    assert all(torch.equal(tensors[name][[0, 2]], before[name][[0, 2]]) for name in tensors)
    once_more = pack(packed, tmp_path/"again.safetensors")
    assert [model.meta["digest"] for model in once_more] == [model.meta["digest"] for model in packed]
    assert not torch.equal(tensors["outputs"][1], before["outputs"][1])
    described = packed_networks(tmp_path/"out/classes/epoch3.safetensors")
    torch.testing.assert_close(described[1].logits, describe_classes(again[0], precision="float32").logits)
    torch.testing.assert_close(described[2].logits, describe_classes(first[2], precision="float32").logits)
