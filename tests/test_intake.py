"""Models from everywhere: every format, written by its own library, and what a file cannot make the reader do"""
import json
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from lps.cli import main
from lps.core.files import save_tensors
from lps.models.inspect import inspect_model
from lps.models.read import Reading, read_model
from lps.nets.named import network_builder
from lps.models.model import Model
from lps.methods.probes import centred_outputs, probe_outputs
from lps.methods.synthetic import noise_images
from lps.methods.fitted import Fitted, FittedConfig
from lps.methods.registry import why_not
from lps.nets.resnet import ResNet
from lps.index.index import BuildSettings, ModelIndex


class Small(nn.Module):
    "A network that the registry does not know"
    def __init__(self, num_classes=2, width=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.register_buffer("places", torch.arange(3))
        self.out = nn.Linear(width, num_classes)

    def forward(self, x): return self.out(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return ResNet(depth=8, width=4).eval()


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small(num_classes=3).eval()


def check_same(model, net):
    "A model has the tensors of a network"
    state = {name: v for name, v in net.state_dict().items() if v.is_floating_point()}
    assert {name for name, v in model.state.items() if v.is_floating_point()} == set(state)
    for name, tensor in state.items(): assert torch.equal(model.state[name], tensor), name


def check_runs(model, net, size=(3, 32, 32)):
    "A model has the outputs of a network"
    images = torch.rand((4, *size), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.outputs(images), net(images).detach())


# Every format, written by its library

def loop(net): return dict(epoch=3, model_state_dict=net.state_dict(), optimizer=torch.optim.Adam(net.parameters()))


TORCH = {
    "state.pt": lambda net: net.state_dict(),
    "state.pth": lambda net: net.state_dict(),
    "state.bin": lambda net: net.state_dict(),
    "parallel.pt": lambda net: nn.DataParallel(net).state_dict(),
    "whole.pt": lambda net: net,
    "whole parallel.pt": lambda net: dict(model=nn.DataParallel(net), epoch=3),
    "loop.ckpt": loop,
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("new", [True, False])
def test_files_of_torch(net, tmp_path, name, new):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(TORCH[name](net), tmp_path/name, _use_new_zipfile_serialization=new)
    report = inspect_model(tmp_path/name)
    model = report.model
    check_same(model, net)
    check_runs(model, net)
    assert report.architecture.startswith("resnet, depth 8, width 4") and report.source == name
    assert ("optimizer" in report.ignored) == (name == "loop.ckpt")


def test_safetensors_and_own_files(net, tmp_path):
    safetensors.torch.save_file(net.state_dict(), tmp_path/"theirs.safetensors", dict(format="pt"))
    save_tensors(tmp_path/"own.safetensors", net.state_dict(), dict(task=3, mean=[.5]*3, std=[.25]*3, shortcut="conv"))
    theirs, own = read_model(tmp_path/"theirs.safetensors"), read_model(tmp_path/"own.safetensors")
    for model in (theirs, own): check_same(model, net)
    assert (own.meta["task"], own.meta["std"]) == (3, [.25]*3) and "std" not in theirs.meta


def test_a_checkpoint_of_lightning(net, tmp_path):
    "With the names of an attribute, hyperparameters of a class of its own, a metric and a loss"
    lightning = pytest.importorskip("lightning", reason="reads a checkpoint that Lightning writes")

    class Task(lightning.LightningModule):
        def __init__(self, lr=.1, mean=(.4, .5, .6), std=(.2, .2, .2)):
            super().__init__()
            self.save_hyperparameters()
            self.net, self.loss = net, nn.CrossEntropyLoss(weight=torch.ones(2))

        def training_step(self, batch): return self.loss(self.net(batch[0]), batch[1])
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), self.hparams.lr)

    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Task(), torch.utils.data.DataLoader(data, batch_size=4))
        trainer.save_checkpoint(tmp_path/"last.ckpt")
    report = inspect_model(tmp_path/"last.ckpt")
    model = report.model
    check_same(model, net)
    assert model.meta["mean"] == [.4, .5, .6] and report.normalisation.endswith("from the file, hyper_parameters")
    assert report.ignored["loss"] == "1 tensor outside of the network" and "optimizer_states" in report.ignored


def test_the_keys_of_a_checkpoint_of_lightning(net, tmp_path):
    "Written by hand, with the keys that lightning 2 writes, so that it is read where lightning is not installed"
    state = {f"net.{name}": tensor for name, tensor in net.state_dict().items()} | {"loss.weight": torch.ones(2)}
    optimizer = torch.optim.SGD(net.parameters(), .1, momentum=.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    saved = {"dirpath": str(tmp_path), "best_model_score": None, "monitor": None}
    torch.save({
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": dict(fit_loop=dict(state_dict={}, epoch_progress=dict(total=dict(ready=4)))),
        "callbacks": {"ModelCheckpoint{'monitor': None}": saved},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [schedule.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": dict(lr=.1, mean=(.4, .5, .6), std=(.2, .2, .2)),
    }, tmp_path/"epoch=3-step=120.ckpt")
    report = inspect_model(tmp_path/"epoch=3-step=120.ckpt")
    model = report.model
    check_same(model, net)
    check_runs(model, net)
    assert model.meta["mean"] == [.4, .5, .6] and report.normalisation.endswith("from the file, hyper_parameters")
    assert report.ignored["loss"] == "1 tensor outside of the network"
    beside = {"epoch", "global_step", "pytorch-lightning_version", "loops", "callbacks", "optimizer_states",
              "lr_schedulers", "hparams_name", "hyper_parameters"}
    assert set(report.ignored) == beside | {"loss"}


@pytest.fixture
def learner(net, tmp_path):
    "A learner of fastai on four images"
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, Learner, PILImage
    images = [PILImage.create(torch.full((8, 8, 3), 60*i, dtype=torch.uint8).numpy()) for i in range(4)]
    block = DataBlock((ImageBlock, CategoryBlock), get_x=lambda i: images[i], get_y=lambda i: i % 2)
    dls = block.dataloaders([0, 1, 2, 3], bs=2, num_workers=0)
    return Learner(dls, net, loss_func=nn.CrossEntropyLoss(), path=tmp_path, model_dir=".")


def test_what_fastai_saves_and_exports(net, learner, tmp_path):
    learner.create_opt()
    learner.save("saved")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner.export("export.pkl")
    for name in ("saved.pth", "export.pkl"):
        report = inspect_model(tmp_path/name)
        model = report.model
        check_same(model, net)
        assert report.ignored, name


def test_networks_of_torchvision(tmp_path):
    torch.manual_seed(0)
    net = network_builder("torchvision/shufflenet_v2_x0_5")(num_classes=7).eval()
    torch.save(net.state_dict(), tmp_path/"shuffle.pth")
    report = inspect_model(tmp_path/"shuffle.pth", Reading(arch="torchvision/shufflenet_v2_x0_5", stats=(.5, .25)))
    model = report.model
    check_runs(model, net, model.meta["size"])
    assert report.architecture == "torchvision/shufflenet_v2_x0_5(num_classes=7)"
    assert model.meta["size"] == [3, 224, 224] and model.meta["mean"] == [.5]*3
    assert report.head == "fc, 7 × 1024" and report.stem.startswith("conv1.0, 24 × 3 × 3 × 3; the first")
    why = why_not(model, ["chain", "stem-signature"])
    assert list(why) == ["chain"] and "is not registered" in why["chain"]
    again = read_model(tmp_path/"shuffle.pth", Reading(arch="torchvision/shufflenet_v2_x0_5"))
    assert again.digest == model.digest and "mean" not in again.meta


def timm_net(**settings):
    "A small network of timm"
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("test_resnet", **settings).eval()


def test_networks_of_timm(tmp_path):
    net = timm_net(num_classes=4)
    torch.save(net.state_dict(), tmp_path/"tuned.pth")
    report = inspect_model(tmp_path/"tuned.pth", Reading(arch="timm/test_resnet"))
    model = report.model
    check_runs(model, net, model.meta["size"])
    assert model.meta["architecture"] == "timm/test_resnet(num_classes=4)" and "timm's recipe" in report.input
    assert "mean" not in model.meta, "a recipe of published weights says nothing of these"


def test_a_folder_that_timm_wrote(tmp_path):
    net = timm_net(num_classes=4)
    from timm.models import save_for_hf
    save_for_hf(net, tmp_path/"hub")
    report = inspect_model(tmp_path/"hub", Reading(arch="timm/test_resnet"))
    model = report.model
    check_runs(model, net, model.meta["size"])
    assert model.meta["std"] == pytest.approx([.5, .5, .5], abs=.3) and "config.json" in report.normalisation
    assert inspect_model(tmp_path/"hub").architecture == report.architecture


def test_a_name_of_timm(tmp_path, monkeypatch):
    "The weights come from the cache of the Hub, as after a download"
    net = timm_net()
    from huggingface_hub import constants
    from timm.models import save_for_hf
    cached, commit = tmp_path/"models--timm--test_resnet.r160_in1k", "0"*40
    save_for_hf(net, cached/"snapshots"/commit)
    (cached/"refs").mkdir()
    (cached/"refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    report = inspect_model("timm/test_resnet", Reading(hub=True))
    model = report.model
    check_same(model, net)
    assert report.kind == "weights of timm" and len(model.meta["mean"]) == 3
    with pytest.raises(ValueError, match="could not load its weights"): read_model("timm/resnet18", Reading(hub=True))


def test_folders_of_huggingface_hub(small, tmp_path):
    "In one file, and in shards"
    hub = pytest.importorskip("huggingface_hub")
    for name in ("one", "shards"): (tmp_path/name).mkdir()
    hub.save_torch_state_dict(small.state_dict(), tmp_path/"one")
    hub.save_torch_state_dict(small.state_dict(), tmp_path/"shards", max_shard_size=200)
    assert len(list((tmp_path/"shards").glob("*.safetensors"))) > 1
    for folder in ("one", "shards"):
        report = inspect_model(tmp_path/folder, Reading(arch=Small))
        model = report.model
        check_same(model, small)
        assert report.ignored == {"places": "whole numbers, which the network makes itself"}
    assert "2 shards" in report.kind


def test_a_module_in_memory_is_left_as_it_is(small):
    small.train()
    report = inspect_model(small)
    model = report.model
    assert small.training and report.kind == "network in memory" and report.architecture == "test_intake:Small"
    check_runs(model, small.eval())
    assert model.meta["size"] == [3, 32, 32] and "pass size for its own" in report.input


# What is known is used, and nothing is made up

def folder(path, net, **configs):
    "A folder as the Hub has them"
    path.mkdir()
    safetensors.torch.save_file(net.state_dict(), path/"model.safetensors")
    for name, said in configs.items(): (path/f"{name}.json").write_text(json.dumps(said))
    return path


def test_the_configuration_of_a_folder(small, tmp_path):
    said = dict(image_mean=[.1, .2, .3], image_std=[.4]*3, crop_size=dict(height=24, width=20), do_normalize=True)
    config = dict(id2label={"0": "cat", "1": "dog", "2": "owl"}, architectures=["SmallForImages"], image_size=99)
    path = folder(tmp_path/"hub", small, config=config, preprocessor_config=said)
    assert "['SmallForImages']: name it" in inspect_model(path).architecture
    report = inspect_model(path, Reading(arch=Small))
    model = report.model
    assert (model.meta["mean"], model.meta["std"]) == ([.1, .2, .3], [.4]*3)
    assert model.meta["size"] == [3, 24, 20] and model.meta["classes"] == ["cat", "dog", "owl"]
    assert report.normalisation.endswith("from preprocessor_config.json")


@pytest.mark.parametrize("said", [
    dict(image_mean=[.5], image_std=[.5]), dict(image_mean=[.5]*3, image_std=[0, 1, 1]), dict(image_mean="x"),
    dict(image_mean=[.5]*3, image_std=[.5]*3, do_rescale=False), [], 3, dict(image_mean=[float("nan")]*3, image_std=1),
])
def test_a_normalisation_that_is_none_stays_unknown(small, tmp_path, said):
    report = inspect_model(folder(tmp_path/"hub", small, preprocessor_config=said))
    model = report.model
    assert "mean" not in model.meta and report.normalisation.startswith("not known")
    assert why_not(model, ["read-out"])["read-out"].endswith("its architecture is not known")


def test_shortcuts_without_weights_are_told_apart_by_answers():
    for kind in ("pad_end", "pad_both"):
        net = ResNet(depth=8, width=4, shortcut=kind).eval()
        report = inspect_model(net)
        model = report.model
        assert f"shortcut {kind}" in report.architecture
        check_runs(model, net)


def test_two_networks_with_equal_names_and_shapes_stay_apart(small):
    class Other(Small):
        def forward(self, x): return -super().forward(x)**2
    x = torch.rand(3, 3, 32, 32)
    nets = small, Other(num_classes=3).eval()
    models = [read_model(net) for net in nets]
    for net, model in zip(nets, models): torch.testing.assert_close(model.outputs(x), net(x).detach())


def test_another_network_is_refused(small, tmp_path):
    torch.save(small.state_dict() | {"conv.more": torch.ones(1)}, tmp_path/"more.pt")
    with pytest.raises(ValueError, match="more.pt: not the weights of .*Small: .*conv.more"):
        read_model(tmp_path/"more.pt", Reading(arch=Small))
    torch.save({name: v for name, v in small.state_dict().items() if name != "conv.weight"}, tmp_path/"less.pt")
    with pytest.raises(ValueError, match="the checkpoint lacks conv.weight; a name map"):
        read_model(tmp_path/"less.pt", Reading(arch=Small))
    torch.save(Small(width=5).state_dict(), tmp_path/"wide.pt")
    with pytest.raises(ValueError, match=r"conv.weight has shape \(5, 3, 3, 3\), in the network it has \(4, 3, 3, 3\)"):
        read_model(tmp_path/"wide.pt", Reading(arch=Small))


def test_names_are_mapped_for_a_named_network(small, tmp_path):
    theirs = {f'module.{name.replace("conv.", "retina.")}': v for name, v in small.state_dict().items()}
    torch.save(theirs, tmp_path/"theirs.pt")
    for names in ([("retina", "conv")], [("^retina", "conv")]):
        check_runs(read_model(tmp_path/"theirs.pt", Reading(names=names, arch=Small)), small)


def test_probes_of_a_named_network_are_those_of_the_method(small):
    model = read_model(small)
    found = probe_outputs({name: v[None] for name, v in model.state.items()}, model.architectures, n_images=16)
    expected = centred_outputs(small(noise_images(16)).detach()[None])
    torch.testing.assert_close(found["outputs"], expected)
    why = why_not(model)
    assert {"chain", "read-out"} <= set(why) and not {"probes", "stem-signature", "lps"} & set(why)


def test_broken_weights_are_no_model(net, tmp_path):
    net.conv1.weight.data[0] = torch.nan
    torch.save(net.state_dict(), tmp_path/"nan.pt")
    with pytest.raises(ValueError, match="nan.pt: conv1.weight holds NaN"): read_model(tmp_path/"nan.pt")


# What a file cannot do

class Trap:
    "Pickled, it asks for a folder to be made"
    def __init__(self, path): self.path = path
    def __reduce__(self):
        import os
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(net, tmp_path):
    net.trap = Trap(tmp_path/"executed")
    torch.save(dict(model=net, hook=Trap(tmp_path/"executed")), tmp_path/"trap.pt")
    report = inspect_model(tmp_path/"trap.pt")
    model = report.model
    check_same(model, net)
    assert not (tmp_path/"executed").exists() and "mkdir" in report.ignored["hook"]


def test_a_file_cannot_name_the_code_that_builds_it(small, tmp_path):
    (tmp_path/"lps_intake_canary.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        said = dict(architecture="lps_intake_canary:build", auto_map=dict(AutoModel="lps_intake_canary.Model"))
        report = inspect_model(folder(tmp_path/"hub", small, config=said))
    finally: sys.path.remove(str(tmp_path))
    assert "lps_intake_canary" not in sys.modules and report.architecture.startswith("not known")


@pytest.mark.parametrize("index, words", [
    (dict(weight_map={"a": "../other.pt"}), "no file beside it"),
    (dict(weight_map={"a": "/etc/passwd"}), "no file beside it"),
    (dict(weight_map={"a": 3}), "no file beside it"),
    (dict(weight_map={}), "names no tensors"),
    ([], "names no tensors"),
    (dict(weight_map={"a": "part.pt"}), "in none of its files"),
    (dict(weight_map={f"{i}": "part.pt" for i in range(20_001)}), "20000 are allowed"),
])
def test_an_index_of_shards_that_lies_is_refused(tmp_path, index, words):
    torch.save({"b": torch.ones(1)}, tmp_path/"part.pt")
    (tmp_path/"pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words): read_model(tmp_path)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model file or folder"): read_model(tmp_path/"nowhere.pt")
    with pytest.raises(ValueError, match="a dict is a model only if"): read_model({})
    with pytest.raises(TypeError, match="a list is no model"): read_model([])
    with pytest.raises(ValueError, match="a folder without a file of weights"): read_model(tmp_path)
    with pytest.raises(ValueError, match="give timm/NAME"): network_builder("os")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    network_builder.cache_clear()
    with pytest.raises(ImportError, match="timm is not installed: pip install timm"):
        network_builder("timm/resnet18")


def test_a_network_in_memory_whose_configuration_is_of_another_head_and_size():
    timm = pytest.importorskip("timm")
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=3)
    report = inspect_model(net)
    assert report.model.meta["size"] == [3, 32, 32] and "the first of 32" in report.input
    assert "classes" not in report.model.meta and "probes" not in why_not(report.model)


def test_a_network_for_larger_images_is_asked_in_its_size():
    "A head that counts pixels cannot take 32 × 32; asked about those, it sees them enlarged, as if it had been told"
    torch.manual_seed(0)
    fixed = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4*11*11, 2)).eval()
    report = inspect_model(fixed, Reading(size=48))
    model = report.model
    assert model.meta["size"] == [3, 48, 48] and "probes" not in why_not(model)
    found = probe_outputs({name: v[None] for name, v in model.state.items()}, model.architectures, n_images=40)
    enlarged = F.interpolate(noise_images(40), (48, 48), mode="bicubic")
    torch.testing.assert_close(found["outputs"], centred_outputs(fixed(enlarged).detach()[None]))
    with pytest.raises(RuntimeError): fixed(torch.zeros(1, 3, 32, 32))


def test_a_model_can_say_why_a_fitted_method_cannot_compare_it(net):
    class Stubborn(Fitted):
        def embed(self, observed): raise ValueError("stem has 16 filters")
    fitted = Stubborn(FittedConfig(tasks=[0, 1], layers=["conv1"]), method="lps")
    assert why_not(Model(net.state_dict(), {}), [fitted]) == {"lps": "stem has 16 filters"}


# Into an index

FEW_IMAGES = BuildSettings(fit=dict(n_images=16))

def test_an_index_takes_in_what_is_not_a_file(net, small, tmp_path, monkeypatch):
    "A folder of the Hub, one in shards, a named network, a name of timm; the same model is found again"
    (tmp_path/"models").mkdir()
    folder(tmp_path/"models/hub", net, config=dict(architectures=["ResNet"]))
    (tmp_path/"models/hub/training_args.bin").write_bytes(b"no weights")
    torch.save(small.state_dict(), tmp_path/"models/small.pt")
    torch.save(ResNet(depth=8, width=4, n_classes=3).state_dict(), tmp_path/"models/plain.pt")
    reading = Reading(arch=Small, hub=True)
    index = ModelIndex.build([tmp_path/"models", "timm/none"], reading=reading, settings=FEW_IMAGES)
    assert index.fitted.method == "class-descriptors" and len(index) == 3, index.rejected
    assert dict(zip([Path(file).name for file in index.manifest.file], index.manifest.architecture)) == {
        "hub": "resnet", "plain.pt": "resnet", "small.pt": "test_intake:Small(num_classes=3)"}
    reasons = dict(zip(index.rejected.file, index.rejected.reason))
    assert list(reasons) == ["timm/none"] and "no network of timm is called none" in reasons["timm/none"]
    for asked in (tmp_path/"models/hub", str(tmp_path/"models/hub"), net):
        assert index.answer(asked, 1).table.note[1] == "copy"
    assert index.answer(small, 1).table.note[1] == "copy"
    assert index.add(tmp_path/"models", reading=Reading(arch=Small)) == 0 and index.remove(tmp_path/"models/hub") == 1


def test_an_index_says_why_a_model_cannot_be_compared(net, small, tmp_path):
    torch.save(net.state_dict(), tmp_path/"a.pt")
    torch.save(small.state_dict(), tmp_path/"b.pt")
    index = ModelIndex.build(tmp_path, settings=FEW_IMAGES)
    assert len(index) == 1 and index.rejected.reason[0].endswith("(--arch, --names on the command line)")
    with pytest.raises(ValueError, match="b.pt: no known architecture .*--arch, --names on the command line"):
        index.query(tmp_path/"b.pt")
    assert len(index.query(tmp_path/"b.pt", reading=Reading(arch=Small))) == 1
    with pytest.raises(ValueError, match="b.pt: not the weights of torchvision/resnet18"):
        index.query(tmp_path/"b.pt", reading=Reading(arch="torchvision/resnet18"))


def test_a_report_on_the_command_line(small, tmp_path, capsys):
    torch.save(small.state_dict(), tmp_path/"b.pt")
    assert main(["inspect", str(tmp_path/"b.pt")]) == 0
    said = capsys.readouterr().out
    assert "architecture: not known; name it" in said
    assert "by probes, two-spectra-probes, gallery-probes, class-descriptors: no known architecture" in said
    words = ["--arch", "test_intake:Small", "--size", "20", "--stats", ".5,.5,.5", ".25,.25,.2"]
    assert main(["inspect", str(tmp_path/"b.pt"), *words]) == 0
    said = capsys.readouterr().out
    assert "3 × 20 × 20, from the call" in said and "standard deviation 0.25, 0.25, 0.2, from the call" in said
    able, _, unable = said.partition("cannot be compared")
    assert "by its outputs: probes" in able and "probes" not in unable
    assert "beside the network: places: whole numbers" in said
    assert main(["inspect", str(tmp_path/"b.pt"), "--stats", "x", "1"]) == 2
