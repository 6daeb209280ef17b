"Lineage from weights alone: every derivation is recognised, in both orders, and independent models are not related"
import json
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lps.cli import main
from lps.core.files import save_tensors
from lps.index.family import duplicates, families, relatives
from lps.index.index import ModelIndex
from lps.lineage.benchmark import DERIVATIONS, half, merged, noisy, pruned, renamed, reordered, rescaled, sliced
from lps.lineage.compare import (
    Aligner, balanced, channel_groups, compare, held_out_scores, layers_of, parts_of, split_scores,
)
from lps.lineage.sketch import DERIVED, sketch_similarity, weight_sketch
from lps.models.model import Model
from lps.nets.plain import PlainNet
from lps.nets.resnet import ResNet

ARROWS = {"": "", "a → b": "b → a", "b → a": "a → b"}


def network(seed, make=lambda: ResNet(8, width=16)):
    torch.manual_seed(seed)
    model = Model(make().state_dict())
    for v in model.state.values():
        if v.ndim == 1 and v.is_floating_point(): v.uniform_(.5, 1.5)
    return model


@pytest.mark.parametrize("name", DERIVATIONS)
def test_derivations_are_recognised_in_both_orders(name):
    a, other = network(0), network(1)
    b = Model(DERIVATIONS[name].make(a, other, 3))
    found = compare(a, b)
    assert found.verdict == DERIVATIONS[name].verdict
    assert DERIVATIONS[name].how in (*found.how, "")
    back = compare(b, a)
    assert (back.verdict, back.how, back.direction) == (found.verdict, found.how, ARROWS[found.direction])


def test_derivations_are_recognised_under_other_names_order_and_scales():
    a = network(0)
    disguised = rescaled(reordered(pruned(a.state, .5), a.architecture.spec), a.architecture)
    names = sorted(disguised, key=lambda name: name[::-1])
    found = compare(a, Model(renamed({name: disguised[name] for name in names})))
    assert found.verdict == "derived" and found.how == ["pruned"] and found.direction == "a → b"


@pytest.mark.parametrize("make", [
    lambda: ResNet(8, width=16), lambda: PlainNet(8, 16), lambda: PlainNet(8, 16, norm=False),
])
def test_independent_networks_are_independent(make):
    models = [network(seed, make) for seed in range(5)]
    for i, a in enumerate(models):
        for b in models[:i]:
            found = compare(a, b)
            assert found.verdict == "independent" and found.log10_p > -3 and not len(found.layers)


def test_a_plain_network_is_recognised():
    a = network(0, lambda: PlainNet(8, 16))
    b = Model(reordered(a.state, a.architecture.spec))
    assert compare(a, b).verdict == "same network, reordered or rescaled"


def test_dropped_layers_are_named():
    a = network(0, lambda: ResNet(14, width=16))
    b = {name: v for name, v in a.state.items() if not name.startswith("layer2.1.")}
    found = compare(a, Model(b))
    assert (found.verdict, found.how, found.direction) == ("derived", ["layers removed"], "a → b")


def test_broken_weights_do_not_relate_models():
    a = network(0)
    zeros = Model({name: torch.zeros_like(v) for name, v in a.state.items()})
    assert compare(a, zeros).verdict == "independent"
    assert balanced(torch.zeros(3, 4, 9)).equal(torch.zeros(3, 4, 9))
    assert compare(Model({"a": torch.ones(3)}), Model({"b": torch.zeros(3)})).verdict == "independent"


def test_evidence_cannot_exceed_the_number_of_maps():
    "A layer of n rows has n! maps, so one layer of two rows is never significant"
    state = {"fc.weight": torch.randn(2, 64, generator=torch.Generator().manual_seed(0))}
    assert Aligner(layers_of(state), layers_of(state)).run().log_p >= -math.log(2)


def test_counters_of_batch_normalisation_give_a_direction_only_if_both_models_have_them():
    a = network(0)
    b = Model(DERIVATIONS["noise-10"].make(a, None, 0))
    counts = [model.state["bn1.num_batches_tracked"] for model in (a, b)]
    for n_a, n_b, direction in ((5, 9, "a → b"), (9, 5, "b → a"), (0, 9, ""), (5, 5, "")):
        for count, n in zip(counts, (n_a, n_b)): count.fill_(n)
        assert compare(a, b).direction == direction


def moved(model, seed):
    "The same function in another order, with other scales and in float16"
    return half(rescaled(reordered(model.state, model.architecture.spec, seed), model.architecture, seed))


def disguised(model, seed):
    "The same under other names"
    return renamed(moved(model, seed))


@settings(max_examples=8, deadline=None, database=None)
@given(st.integers(0, 2**31 - 1))
def test_a_disguise_changes_neither_verdict_nor_sketch(seed):
    a = network(0)
    b = Model(disguised(a, seed))
    assert compare(a, b).verdict == "same network, reordered or rescaled"
    assert sketch_similarity(weight_sketch(a.state), weight_sketch(b.state)) > .99


def test_a_quarter_of_a_parent_is_found_in_another_order():
    models = [network(seed, lambda: ResNet(20)) for seed in range(2)]
    b = reordered(merged(models[0].state, models[1].state, .25), models[0].architecture.spec, 3)
    found = compare(models[0], Model(b))
    assert found.verdict == "derived" and found.how == ["merged"]
    other = reordered(models[1].state, models[1].architecture.spec, 3)
    assert compare(models[0], Model(other)).verdict == "independent"


MADE = ["resnet18", "resnet26", "mobilenetv2_035", "mobilenetv3_small_050", "efficientnet_b0"]


@pytest.mark.parametrize("name", MADE)
def test_groups_that_are_guessed_from_shapes_have_channels_in_common(name):
    "Permuting them leaves the outputs as they are"
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    with torch.no_grad():
        for v in net.parameters():
            if v.ndim == 1: v.uniform_(.5, 1.5)
        images = torch.randn(2, 3, 64, 64)
        before = net(images)
        parts = parts_of(net.state_dict())
        rows, columns, _ = channel_groups(parts)
        layers = {part.name: pair for part, *pair in zip(parts, rows, columns) if part.role != "vector"}
        sizes = {row: len(part.weight) for part, row in zip(parts, rows) if part.role != "vector" and row >= 0}
        orders = {row: torch.randperm(n) for row, n in sizes.items()}
        n_moved = 0
        row = None
        for key, v in net.state_dict().items():
            row, column = layers.get(key, (row, None))
            old = v.clone()
            if column in orders: v.copy_(v[:, orders[column]])
            if row in orders and v.ndim: v.copy_(v[orders[row]])
            n_moved += not v.equal(old)
        assert n_moved > len(layers)
        torch.testing.assert_close(net(images), before, rtol=1e-3, atol=1e-3*float(before.abs().max()))


def test_a_merge_of_a_network_without_shortcuts_is_found_in_another_order():
    models = [network(seed, lambda: PlainNet(8, 16)) for seed in range(2)]
    b = reordered(merged(models[0].state, models[1].state, .25), models[0].architecture.spec, 3)
    found = compare(models[0], Model(b))
    assert found.verdict == "derived" and found.how == ["merged"] and found.direction == ""
    other = reordered(models[1].state, models[1].architecture.spec, 3)
    assert compare(models[0], Model(other)).verdict == "independent"


def test_networks_of_one_task_and_one_data_set_are_independent(trained_twice):
    a, b, tuned = trained_twice
    assert compare(a, b).verdict == "independent"
    found = compare(a, tuned)
    assert (found.verdict, found.how, found.direction) == ("derived", ["fine-tuned"], "a → b")
    assert found.because.startswith("batches: ")
    for model in (a, tuned):
        for name in [name for name in model.state if name.endswith("num_batches_tracked")]: del model.state[name]
    found = compare(tuned, a)
    assert found.direction == "b → a" and found.because.startswith("distance from initial values")


@pytest.fixture
def trained_twice():
    "Two networks of one task from two seeds, and the first trained further"
    from dataclasses import replace

    from lps.zoo.recipe import recipes
    from lps.zoo.tasks import load_images, task_images
    from lps.zoo.train import train_model
    recipe = replace(recipes["digits"], name="two", epochs=2, milestones=(), depth=8, width=16)
    tasks = [task_images(load_images("digits", split), (3, 8)) for split in ("train", "test")]
    nets = [train_model(*tasks, recipe, seed)[0] for seed in (0, 1)]
    further = train_model(*tasks, recipe, 2, start_from=nets[0].state_dict())[0]
    return [Model({name: v.clone() for name, v in net.state_dict().items()}) for net in (*nets, further)]


@pytest.fixture
def shelf(tmp_path):
    "A folder with three networks, a copy of the first in another order, and a pruned one"
    a = network(0)
    states = {f"net{seed}": network(seed).state for seed in range(3)}
    states |= dict(copy=moved(a, 5), pruned=pruned(a.state, .8))
    for i, (name, state) in enumerate(states.items()):
        meta = dict(task=i % 2, classes=[f"{i % 2}a", f"{i % 2}b"])
        save_tensors(tmp_path/"models"/f"{name}.safetensors", state, meta)
    return tmp_path


def test_an_index_finds_copies_and_families(shelf):
    index = ModelIndex.build(shelf/"models", None, "probes")
    found = relatives(index, Model(disguised(network(0), 7)))
    verdicts = {Path(file).stem: verdict for file, verdict in zip(found.file, found.verdict)}
    same = "same network, reordered or rescaled"
    assert verdicts == dict(net0=same, copy=same, pruned="derived")
    assert [[Path(file).stem for file in group] for group in duplicates(index)] == [["copy", "net0"]]
    family = families(index)
    assert sorted(Path(file).stem for file in family.file) == ["copy", "net0", "pruned"]
    assert sum(parent == "" for parent in family.parent) == 1
    (shelf/"models"/"net0.safetensors").unlink()
    found = relatives(index, network(0))
    assert found.verdict.tolist()[0] == "same weights" and set(found.verdict) == {"same weights", same, "derived"}
    assert "gone" not in str(duplicates(index)) and duplicates(index) == []


def test_families_include_slices_and_disguised_merges(tmp_path):
    a, other = network(0), network(1)
    spec = a.architecture.spec
    states = dict(net=a.state, slice=sliced(a.state, spec, .5))
    states["merge"] = moved(Model(merged(a.state, other.state, .5)), 4)
    for i, (name, state) in enumerate(states.items()):
        meta = dict(task=i % 2, classes=[f"{i % 2}a", f"{i % 2}b"])
        save_tensors(tmp_path/"models"/f"{name}.safetensors", state, meta)
    index = ModelIndex.build(tmp_path/"models", None, "probes")
    family = families(index)
    assert sorted(Path(file).stem for file in family.file) == ["merge", "net", "slice"]


def test_lineage_on_the_command_line(shelf, monkeypatch, capsys):
    monkeypatch.chdir(shelf)
    def says(*words):
        assert main([*map(str, words)]) == 0
        return capsys.readouterr().out
    said = says("compare", "models/net0.safetensors", "models/pruned.safetensors")
    assert "Verdict: derived (pruned)" in said and "Direction: net0.safetensors → pruned.safetensors" in said
    assert "layer3.0.conv2.weight" in said and re.search("p (= 1e-|< 1e-300)", said)
    found = json.loads(says("compare", "models/net0.safetensors", "models/net1.safetensors", "--json"))
    assert found["verdict"] == "independent" and found["layers"] == []
    says("index", "build", "market", "models", "--method", "probes", "--workers", 1)
    groups = json.loads(says("index", "dedup", "market", "--json"))["groups"]
    assert [[Path(file).stem for file in group] for group in groups] == [["copy", "net0"]]
    assert "1 group in 5 models" in says("index", "dedup", "market")
    save_tensors(shelf/"renamed.safetensors", disguised(network(0), 8), {})
    for query in ("models/copy.safetensors", "renamed.safetensors"):
        said = says("query", "market", query, "--no-expected")
        assert "Copies and relatives of the query" in said and "same network" in said
    says("index", "map", "market", "--out", "map.html")
    page = Path("map.html").read_text(encoding="utf-8")
    assert "<section id='families'>" in page and page.count("<li>") == 3


def test_sketches_of_independent_networks_are_not_similar():
    sketches = [weight_sketch(network(seed).state) for seed in range(6)]
    assert max(sketch_similarity(a, b) for i, a in enumerate(sketches) for b in sketches[:i]) < DERIVED
    assert sketch_similarity(sketches[0], weight_sketch(noisy(network(0).state, .3))) > DERIVED


def test_layers_with_one_dominant_direction_are_not_related():
    scores = []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        gains = torch.randn(2, 64, 1, generator=g)*torch.randn(2, 1, 64, generator=g)
        a, b = (3*gains + torch.randn(2, 64, 64, generator=g))[..., None]
        scores.append((split_scores(a, b).max(), held_out_scores(a, b).max()))
    raw, corrected = map(max, zip(*scores))
    assert raw > 5 and corrected < 4
    copy = (a + torch.randn(64, 64, 1, generator=g))[torch.randperm(64, generator=g)]
    assert held_out_scores(a, copy).max() > 10
