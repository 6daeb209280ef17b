"A mixed folder as practitioners have it: what is read of it, and what an index answers"
import json

import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import save_file

from lps.core.jobs import seeded
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
])
def test_checkpoints_name_their_classes(tmp_path, key, value):
    state = network(num_classes=3).state_dict()
    torch.save({"arch": "test_resnet", "state_dict": state, key: value}, tmp_path/"m.pth.tar")
    assert read_model(tmp_path/"m.pth.tar").meta["classes"] == ["cat", "dog", "cow"]


def test_rows_of_a_table_are_matched_by_name_path_and_pattern():
    table = read_table(pd.DataFrame([
        dict(file="a.pt", task="exact"), dict(file="cars/*.pt", task="pattern"), dict(file="cars/b.pt", task="path"),
        dict(file="birds/**/*.pt", task="deep"), dict(file="gone.pt", task="gone"),
    ]))
    paths = ["/x/a.pt", "/x/cars/c.pt", "/x/cars/b.pt", "/x/birds/1/2/d.pt"]
    assert [table_row(table, path)["task"] for path in paths] == ["exact", "pattern", "path", "deep"]
    assert unmatched_rows(table, paths) == ["gone.pt"]
