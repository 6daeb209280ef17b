"A mixed folder as practitioners have it: what is read of it, and what an index answers"
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file

from lps.cli import main
from lps.core.files import save_tensors
from lps.core.jobs import seeded
from lps.index.family import relatives
from lps.index.gather import BY_CLASSES
from lps.index.index import BuildSettings, ModelIndex
from lps.index.related import at_reduced_size
from lps.methods.classes import describe_classes, information, initial_norms, variation
from lps.methods.synthetic import synthetic_images
from lps.models.table import read_table, table_row, unmatched_rows
from lps.models.read import Reading, read_model

VIT = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4)


def network(name="test_resnet", seed=0, **config):
    with seeded(seed): return timm.create_model(name, **config).eval()


def hub_folder(folder, net, name, **config):
    "Write a folder as timm pushes it to the Hub"
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, folder/"model.safetensors")
    (folder/"config.json").write_text(json.dumps(dict(architecture=name) | config))
    return folder


@pytest.mark.parametrize("form", ["folder", "lightning", "script"])
def test_the_network_that_a_file_names_is_built_with_its_arguments(tmp_path, form):
    net = network("vit_tiny_patch16_224", num_classes=3, **VIT)
    place = tmp_path/"model.ckpt"
    if form == "folder": place = hub_folder(tmp_path/"m", net, "vit_tiny_patch16_224", model_args=VIT)
    elif form == "lightning":
        state = {f"model.{k}": v for k, v in net.state_dict().items()}
        torch.save(dict(state_dict=state, hyper_parameters=dict(arch="vit_tiny_patch16_224") | VIT), place)
    else: torch.save(dict(model=net.state_dict(), model_name="vit_tiny_patch16_224", epoch=1) | VIT, place)
    model = read_model(place)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.outputs(images), net(images).detach())


def test_arguments_that_a_network_does_not_take_are_left_out(tmp_path):
    net = network("densenet121", growth_rate=8, block_config=(1, 1), num_classes=3)
    arguments = dict(model="densenet121", img_size=32, growth_rate=8, block_config=(1, 1))
    torch.save(dict(arch="densenet121", state_dict=net.state_dict(), args=arguments), tmp_path/"m.pt")
    assert read_model(tmp_path/"m.pt").meta["size"] == [3, 32, 32]


def test_arguments_of_a_file_build_no_large_network(tmp_path):
    net = network("vit_tiny_patch16_224", num_classes=3, **VIT)
    place = hub_folder(tmp_path/"m", net, "vit_tiny_patch16_224", model_args=VIT | dict(depth=10**9))
    assert read_model(place).architecture is None or read_model(place).architecture.config["depth"] < 100


def test_a_network_is_named_with_arguments(tmp_path):
    net = network("resnet18", channels=(8, 8, 8, 8), num_classes=3)
    torch.save(net.state_dict(), tmp_path/"m.pt")
    model = read_model(tmp_path/"m.pt", Reading(arch="timm/resnet18(channels=(8, 8, 8, 8))", size=32))
    assert model.meta["architecture"] == "timm/resnet18(channels=(8, 8, 8, 8), num_classes=3)"
    with pytest.raises(ValueError, match="NAME\\(key=value"):
        read_model(tmp_path/"m.pt", Reading(arch="timm/resnet18(8)"))


@pytest.mark.parametrize("key, value", [
    ("classes", ["cat", "dog", "cow"]),
    ("class_names", ("cat", "dog", "cow")),
    ("id2label", {"2": "cow", "0": "cat", "1": "dog"}),
    ("id2label", {2: "cow", 0: "cat", 1: "dog"}),
])
def test_checkpoints_name_their_classes(tmp_path, key, value):
    state = network(num_classes=3).state_dict()
    torch.save({"arch": "test_resnet", "state_dict": state, key: value}, tmp_path/"m.pth.tar")
    assert read_model(tmp_path/"m.pth.tar").meta["classes"] == ["cat", "dog", "cow"]


def test_checkpoints_name_many_classes(tmp_path):
    names = [f"class {i}" for i in range(300)]
    state = network(num_classes=300).state_dict()
    for key, value in dict(classes=names, id2label=dict(enumerate(names))).items():
        torch.save({"arch": "test_resnet", "state_dict": state, key: value}, tmp_path/"m.pth.tar")
        assert read_model(tmp_path/"m.pth.tar").meta["classes"] == names
    torch.save({"arch": "test_resnet", "state_dict": state, "classes": ["x"*10_000]*300}, tmp_path/"m.pth.tar")
    assert len(read_model(tmp_path/"m.pth.tar").meta.get("classes", ())) < 300  # too long to be names


def test_rows_of_a_table_are_matched_by_name_path_and_pattern():
    table = read_table(pd.DataFrame([
        dict(file="a.pt", task="exact"), dict(file="cars/*.pt", task="pattern"), dict(file="cars/b.pt", task="path"),
        dict(file="birds/**/*.pt", task="deep"), dict(file="gone.pt", task="gone"),
    ]))
    paths = ["/x/a.pt", "/x/cars/c.pt", "/x/cars/b.pt", "/x/birds/1/2/d.pt"]
    assert [table_row(table, path)["task"] for path in paths] == ["exact", "pattern", "path", "deep"]
    assert unmatched_rows(table, paths) == ["gone.pt"]


NAMES = {"a.pt": ["cat", "dog", "cow", "hen"], "b.pt": ["hen", "cow", "dog", "cat"], "c.pt": ["bus", "car", "van"]}


def trained(seed, n_classes, name="test_resnet"):
    "Make a network whose norms are not those before training, and whose outputs depend on the image"
    net = network(name, seed, num_classes=n_classes)
    g = torch.Generator().manual_seed(seed)
    for key, v in net.state_dict().items():
        if v.ndim == 1 and v.is_floating_point(): v.copy_(v + .3*torch.rand(v.shape, generator=g))
        if v.ndim == 2: v.copy_(torch.randn(v.shape, generator=g))
    side = 160 if name == "test_vit" else 32
    with torch.no_grad(): net.get_classifier().bias -= net(synthetic_images(16, size=side)).mean(0)
    return net


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two networks with the same classes in another order, one of other classes, an untrained one, a ViT, a text"
    place = tmp_path_factory.mktemp("folder")
    net = trained(0, 4)
    torch.save(dict(state_dict=net.state_dict(), img_size=32), place/"a.pt")
    state = net.state_dict()
    for key in ("fc.weight", "fc.bias"): state[key] = state[key].flip(0)
    noisy = {k: v + .02*v.std()*torch.randn(v.shape) if v.ndim > 1 else v for k, v in state.items()}
    torch.save(dict(state_dict=noisy, img_size=32), place/"b.pt")
    torch.save(dict(state_dict=trained(1, 3).state_dict(), img_size=32), place/"c.pt")
    torch.save(dict(state_dict=network(seed=5, num_classes=4).state_dict(), img_size=32), place/"fresh.pt")
    hub_folder(place/"vit", trained(2, 5, "test_vit"), "test_vit")
    (place/"notes.pt").write_text("no weights here")
    return place


@pytest.fixture(scope="module")
def index(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("index")/"market"
    rows = [dict(file=name, task="animals" if len(names) == 4 else "vehicles", classes="|".join(names))
            for name, names in NAMES.items()]
    table = pd.DataFrame([*rows, dict(file="gone/*.pt", task="gone")])
    ModelIndex.build(folder, path, table=table)
    return path


def test_a_mixed_folder_is_indexed_by_one_command(index, folder):
    opened = ModelIndex.load(index)
    assert opened.fitted.method == BY_CLASSES and len(opened) == 5
    rejected = opened.rejected.set_index("file").reason.to_dict()
    assert rejected.pop("gone/*.pt") == "in the table, but it matches no file"
    assert set(rejected) == {str(folder/"notes.pt")}
    labels = opened.manifest.set_index("file").label
    assert labels[str(folder/"a.pt")] == labels[str(folder/"b.pt")] != labels[str(folder/"c.pt")]


def test_models_with_the_same_classes_come_first(index, folder):
    answer = ModelIndex.load(index).answer(folder/"a.pt", k=9)
    assert answer.related and answer.recommended == str(folder/"b.pt")
    assert answer.table.file.tolist()[:2] == [str(folder/"a.pt"), str(folder/"b.pt")]
    assert answer.table.note.tolist()[:2] == ["copy", ""]
    assert answer.table.shared.iloc[1] > 3 > answer.table.shared.iloc[2]


def test_untrained_networks_are_never_recommended(index, folder):
    opened = ModelIndex.load(index)
    assert str(folder/"fresh.pt") not in opened.answer(folder/"c.pt", k=9).table.file.tolist()
    answer = opened.answer(network(seed=6, num_classes=4))
    assert answer.recommended == "" and "seems untrained" in str(answer)
    assert answer.table.probability.isna().all() and (answer.table.shared == 0).all()


def test_copies_alone_are_no_related_models(folder):
    assert ModelIndex.build(folder/"b.pt", method=BY_CLASSES).answer(folder/"a.pt").related
    answer = ModelIndex.build(folder/"a.pt", method=BY_CLASSES).answer(folder/"a.pt")
    assert answer.related is False and answer.recommended == ""


def test_classes_are_named_and_found(index, folder, capsys):
    assert main(["classes", str(folder/"b.pt"), "--in", str(index), "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["classes"]] == NAMES["b.pt"]
    assert main(["query", str(index), "--class", "hen", "--json"]) == 0
    found = [row["file"] for row in json.loads(capsys.readouterr().out)["models"]]
    assert set(found[:2]) == {str(folder/"a.pt"), str(folder/"b.pt")}
    assert main(["query", str(index), "--class", "tram"]) == 2
    assert "known are bus, car" in capsys.readouterr().err


def test_models_that_do_not_name_a_class_are_found(folder):
    table = pd.DataFrame([dict(file=name, classes=NAMES[name]) for name in ("a.pt", "c.pt")])
    found = ModelIndex.build(folder, method=BY_CLASSES, table=table).with_class("hen")
    assert found.named.tolist()[:2] == [True, False] and found.file.iloc[1] == str(folder/"b.pt")
    assert found["class"].iloc[1] == 0


def test_any_executor_gives_the_same_index(folder):
    told = []
    with ThreadPoolExecutor(2) as executor:
        settings = BuildSettings(executor=executor, progress=lambda done, total: told.append((done, total)))
        by_threads = ModelIndex.build(folder, settings=settings)
    here = ModelIndex.build(folder)
    assert sorted(by_threads.digests) == sorted(here.digests) and told[-1] == (6, 6)


def test_the_size_of_images_is_chosen_if_no_file_names_it(folder, tmp_path, caplog):
    state = trained(0, 4).state_dict()
    torch.save(dict(arch="test_resnet", state_dict=state), tmp_path/"m.pt")
    model = read_model(tmp_path/"m.pt")
    assert model.meta["size_is_usual"] and model.meta["size"] == [3, 160, 160]
    chosen = at_reduced_size(model)
    assert chosen.architecture.size[1] in (32, 64) and at_reduced_size(chosen) is chosen
    with caplog.at_level("INFO", logger="lps"): found = describe_classes(tmp_path/"m.pt", n_images=64)
    side = chosen.architecture.size[1]
    assert f"not recorded: run at {side} pixels" in caplog.text
    told = describe_classes(read_model(tmp_path/"m.pt", Reading(size=side)), n_images=64)
    assert torch.equal(found.logits, told.logits)
    named = read_model(folder/"a.pt")
    assert "size_is_usual" not in named.meta and at_reduced_size(named) is named


def test_information_of_outputs_about_images():
    assert abs(information(torch.zeros(8, 4))) < 1e-9
    assert abs(information(20*torch.eye(4)) - torch.log(torch.tensor(4.))) < 1e-3


def test_what_is_given_later_about_a_file_is_used(folder, tmp_path):
    "Names of classes and an architecture, by a table or for all files; what was given before is kept"
    shutil.copytree(folder, tmp_path/"models")
    net = trained(3, 3, "test_vit")
    place = tmp_path/"models/renamed.pt"
    torch.save({key.replace("blocks", "steps"): v for key, v in net.state_dict().items()}, place)
    index = ModelIndex.build(tmp_path/"models", tmp_path/"market")
    assert len(index) == 5 and str(place) in index.rejected.file.tolist()

    reading = Reading(arch="timm/test_vit", names=[("^steps", "blocks")], size=160)
    assert index.add(place, reading=reading) == 1
    table = pd.DataFrame([dict(file="renamed.pt", classes="bus|car|van"), dict(file="c.pt", classes="bus|car|van")])
    assert index.add(tmp_path/"models", table=table) == 0
    again = ModelIndex.load(tmp_path/"market")
    facts = {Path(fact["file"]).name: fact for fact in again.rows.facts(again.rows.places)}
    assert facts["renamed.pt"]["classes"] == facts["c.pt"]["classes"] == ["bus", "car", "van"]
    assert facts["renamed.pt"]["given"]["arch"] == "timm/test_vit" and len(again) == 6
    assert relatives(again, read_model(place, reading)).verdict.tolist()[:1] == ["same weights"]
    assert again.answer(place, k=1).table.note.tolist() == ["copy"]  # read as it was for the index
    assert main(["query", str(tmp_path/"market"), str(place)]) == 0


def test_an_architecture_that_does_not_fit_leaves_the_row(folder, tmp_path):
    index = ModelIndex.build(folder, tmp_path/"market")
    assert index.add(folder/"a.pt", reading=Reading(arch="timm/test_vit")) == 0
    assert "not the weights of timm/test_vit" in index.rejected.reason[0]
    assert index.rejected.reason[0].endswith("its row is kept") and len(ModelIndex.load(tmp_path/"market")) == 5


def test_states_of_optimisers_are_listed(folder, tmp_path):
    shutil.copytree(folder, tmp_path/"models")
    torch.save(dict(state={}, param_groups=[]), tmp_path/"models/optimizer.pt")
    rejected = ModelIndex.build(tmp_path/"models").rejected
    assert any(file.endswith("optimizer.pt") for file in rejected.file)


def test_subfolders_do_not_change_the_number_of_tasks(tmp_path):
    for i in range(6):
        save_tensors(tmp_path/f"flat/m{i}.safetensors", trained(i, 3).state_dict(), dict(task=i % 2))
        save_tensors(tmp_path/f"deep/{i//3}/m{i}.safetensors", trained(i, 3).state_dict(), dict(task=i % 2))
    for name in ("flat", "deep"):
        index = ModelIndex.build(tmp_path/name, method=BY_CLASSES)
        assert "6 models of 2 tasks" in str(index)


def test_untrained_networks_are_recognised():
    assert "batch normalisation" in initial_norms(network().state_dict())
    assert "norms" in initial_norms(network("test_vit").state_dict())
    assert initial_norms(trained(0, 3).state_dict()) == ""
    assert variation(torch.tensor([[1., 2], [1, 2.001]])) < .001 < variation(torch.tensor([[1., 2], [3, 0]]))
