"""Images as people have them: of any depth, broken, misplaced, of one class; what cannot make tasks is refused first"""
import os
import pickle
import shutil
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from lps.zoo.build import build, plan_build
from lps.zoo.recipe import recipes
from lps.zoo.tasks import (
    CIFAR100_SUPERCLASSES, DATASETS, DataSet, ImageSet, channel_stats, load_images, load_splits, pair_classes,
    register_dataset, source_of, task_images,
)


@pytest.fixture
def tree(tmp_path):
    "A folder of two classes, two images a class and split, of one colour each"
    for split in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (tmp_path/"pets"/split/name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (60 * i, 90 * number, 30)).save(tmp_path / "pets" / split / name / f"{i}.png")
    return tmp_path/"pets"


def load(folder, split="train", **kwargs):
    "The images, and all warnings as one text"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        images = load_images(folder, split, **kwargs)
    return images, " ".join(str(w.message) for w in said)


def pixel(images): return images.images[0, :, 0, 0].tolist()  # of cat/0, where the tests put their image


def grey(value, dtype): return Image.fromarray(np.full((8, 8), value, dtype=dtype))


@pytest.mark.parametrize("image, suffix, rgb, words", [
    (grey(32768, np.uint16), "png", [128]*3, "1 scaled to 8 bits by their range"),
    (grey(32768, np.uint16), "tif", [128]*3, "1 scaled to 8 bits by their range"),
    (grey(65535, np.int32), "tif", [255]*3, "1 scaled to 8 bits by their range"),
    (grey(.5, np.float32), "tif", [128]*3, "1 scaled to 8 bits by their range"),
    (grey(200, np.float32), "tif", [200]*3, "1 scaled to 8 bits by their range"),
    (Image.new("RGBA", (8, 8), (200, 100, 0, 128)), "png", [100, 50, 0], "1 transparency composited on black"),
    (Image.new("LA", (8, 8), (200, 0)), "png", [0]*3, "1 transparency composited on black"),
    (Image.new("RGB", (8, 8), (200, 100, 0)).quantize(2), "png", [200, 100, 0], "1 palette to RGB"),
    (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "tif", [255, 0, 0], "1 CMYK to RGB"),
    (Image.new("L", (8, 8), 77), "png", [77]*3, ""), (Image.new("1", (8, 8), 1), "png", [255]*3, "")])
def test_other_kinds_of_image_are_converted_and_counted(tree, image, suffix, rgb, words):
    (tree/"train"/"cat"/"0.png").unlink()
    image.save(tree/"train"/"cat"/f"0.{suffix}")
    images, said = load(tree)
    assert len(images) == 4 and not images.rejected and words in said and bool(words) == bool(said)
    assert np.abs(np.subtract(pixel(images), rgb)).max() <= 1
    assert images.converted == ({words[2:]: 1} if words else {})


def test_of_an_animation_the_first_frame_is_taken(tree):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    (tree/"train"/"cat"/"0.png").unlink()
    frames[0].save(tree/"train"/"cat"/"0.gif", save_all=True, append_images=frames[1:])
    images, said = load(tree)
    assert pixel(images) == [255, 0, 0] and "first frame of an animation" in said


OF_UNKNOWN_RANGE = [grey(value, np.float32) for value in (3000, -1, np.nan, np.inf)]
OF_UNKNOWN_RANGE += [grey(value, np.int32) for value in (200, 70000, -5)]


@pytest.mark.parametrize("image", OF_UNKNOWN_RANGE)
def test_values_of_an_unknown_range_are_left_out(tree, image):
    image.save(tree/"train"/"cat"/"x.tif")
    images, said = load(tree)
    assert len(images) == 4 and [os.path.basename(f) for f in images.rejected] == ["x.tif"]
    assert "1 of 5 images left out" in said and "known are 16 bits" in said


def test_what_is_no_image_is_listed(tree):
    "A FIFO would block, a folder and a link to nothing cannot be read, other suffixes are named"
    here = tree/"train"/"dog"
    os.mkfifo(here/"pipe.png")
    (here/"folder.jpg").mkdir()
    (here/"link.png").symlink_to("nothing.png")
    (here/"half.png").write_bytes((here/"0.png").read_bytes()[:40])
    for name in ("picture.heic", "notes", ".DS_Store"): (here/name).write_bytes(b"x")
    images, said = load(tree)
    found = {os.path.basename(f): reason for f, reason in images.rejected.items()}
    assert (
        set(found) == {"pipe.png", "folder.jpg", "link.png", "half.png", "picture.heic", "notes"} and len(images) == 4
    )
    assert (
        found["pipe.png"] == "not a file" and "'.heic'" in found["picture.heic"] and "6 of 10 images left out" in said
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_a_readable_image_is_refused_before_there_is_a_folder(tree, tmp_path, split):
    for f in (tree/split/"dog").iterdir(): f.write_bytes(b"broken")
    with pytest.raises(ValueError, match="class 'dog' of 'pets' has no readable image in"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(tmp_path/"zoo", str(tree), n_models=1, workers=1, progress=False)
    assert not (tmp_path/"zoo").exists()


def test_one_class_is_no_task(tree):
    for split in ("train", "val"):
        for f in (tree/split/"dog").iterdir(): f.unlink()
        (tree/split/"dog").rmdir()
    with pytest.raises(ValueError, match="1 class cannot be paired"): pair_classes(len(load_images(tree).classes))


def test_splits_of_two_sizes_or_with_other_classes_are_refused(tree, tmp_path):
    for name in ("cat", "dog"):
        for i in range(2): Image.new("RGB", (6, 6), (60*i, 9, 30)).save(tree/"val"/name/f"{i}.png")
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*\(3, 6, 6\)"):
        load_splits(tree)
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*\(3, 6, 6\)"):
        build(tmp_path/"zoo", str(tree), n_models=1, workers=1, progress=False)
    train, test = load_splits(tree, size=6)
    assert train.images.shape[1:] == test.images.shape[1:] == (3, 6, 6)
    (tree/"val"/"dog").rename(tree/"val"/"cow")
    with pytest.raises(ValueError, match="do not hold the same classes: cow, dog"): load_images(tree, "test")


def test_a_constant_channel_is_named(tree, tmp_path):
    with pytest.raises(ValueError, match="channel 2 of 'pets' is 30 in every pixel"): channel_stats(load_images(tree))
    with pytest.raises(ValueError, match="channel 2"):
        build(tmp_path / "zoo", str(tree), n_models=1, workers=1, progress=False)
    assert not (tmp_path/"zoo").exists()


@pytest.mark.parametrize("name, how, words", [
    ("", {}, "is empty"), ("  ", {}, "is empty"), ("mnist", {}, "known are 'digits', 'cifar100', 'tinyimagenet32'"),
    ("a\x1b[31mb", {}, "a\\x1b[31mb"), ("~nobody-has-this-name/x", {}, "unknown images"),
    ("digits", dict(split="val"), "known are 'train'"),
    ("digits", dict(size=16), "'digits' are 8×8"), ("digits", dict(size=0), "size is 0"),
    ("digits", dict(size=-4), "size is -4"),
    ("digits", dict(size="8"), "size is '8'")])
def test_unknown_names_and_sizes_are_one_message(name, how, words):
    with pytest.raises(ValueError) as e: load_images(name, **how)
    assert words in str(e.value) and "\x1b" not in str(e.value)


def test_escape_sequences_in_names_of_classes_and_files_are_shown_escaped(tree):
    evil = "\x1b[2Jdog"
    for split in ("train", "val"): (tree/split/"dog").rename(tree/split/evil)
    (tree/"train"/evil/"\x1b[31m.png").write_bytes(b"no image")
    images, said = load(tree)
    assert evil in images.classes and "\\x1b[31m.png" in said and "\x1b" not in said
    for f in (tree/"train"/evil).iterdir(): f.unlink()
    with pytest.raises(ValueError) as e: load(tree)
    assert "\\x1b[2Jdog" in str(e.value) and "\x1b" not in str(e.value)


def images_of(labels, classes=("a", "b")):
    return ImageSet(torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8), torch.tensor(labels), list(classes), "toy")


def test_labels_belong_to_classes():
    for labels in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="is none of the 2 classes"): images_of(labels)
    with pytest.raises(ValueError, match="no image of the class b in 'toy'"): task_images(images_of([0, 0]), (0, 1))
    assert len(images_of([0, 1])) == 2


def test_a_data_set_from_outside_is_loaded_built_and_described(tmp_path, monkeypatch):
    "One entry, and the loader, the build, the known names and the datasheet have it"
    def noise(split, **kwargs):
        g = torch.Generator().manual_seed(len(split))
        return ImageSet(
            torch.randint(256, (40, 1, 8, 8), generator=g, dtype=torch.uint8),
            torch.arange(40) % 2,
            ["up", "down"],
            "noise",
        )
    monkeypatch.setitem(DATASETS, "noise", None)
    register_dataset(DataSet("noise", noise, source="Random bytes, free for all"))
    assert len(load_images("noise", "test")) == 40 and source_of("noise") == "Random bytes, free for all"
    with pytest.raises(ValueError, match="'noise'"): load_images("nosie")
    models = build(tmp_path/"zoo", "noise", n_models=1, workers=1, progress=False)
    assert len(models) == 1 and "Random bytes, free for all" in (tmp_path/"zoo"/"DATASHEET.md").read_text()


# A stand-in for CIFAR-100: three training images and two test images a class, in a shuffled official order
CLASSES = sorted(CIFAR100_SUPERCLASSES)
PER_CLASS = dict(train=3, test=2)


def official(split):
    "Pixels `(n, 32, 32, 3)` and labels in the order of the official files"
    rng = np.random.default_rng(PER_CLASS[split])
    labels = rng.permutation(np.arange(100).repeat(PER_CLASS[split]))
    return rng.integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8), labels


def by_class(split):
    "Class name → its images, in the official order"
    pixels, labels = official(split)
    return {name: pixels[labels == number] for number, name in enumerate(CLASSES)}


def write_tree(folder):
    for split in PER_CLASS:
        for name, images in by_class(split).items():
            (folder/split/name).mkdir(parents=True)
            for i, image in enumerate(images): Image.fromarray(image).save(folder/split/name/f"{i:04d}.png")


def write_sheets(folder):
    "Rows of as many tiles as there are images"
    for split in PER_CLASS:
        (folder/split).mkdir(parents=True)
        for name, images in by_class(split).items():
            Image.fromarray(np.concatenate(images, 1)).save(folder/split/f"{name}.png")


def write_official(folder):
    "The pickles that torchvision reads"
    (folder/"cifar-100-python").mkdir(parents=True)
    for split in PER_CLASS:
        pixels, labels = official(split)
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        entry = dict(data=rows, fine_labels=labels.tolist(), coarse_labels=[0]*len(labels))
        (folder/"cifar-100-python"/split).write_bytes(pickle.dumps(entry))
    (folder/"cifar-100-python"/"meta").write_bytes(pickle.dumps(dict(fine_label_names=CLASSES)))


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty `$LPS_HOME/data`; torchvision takes any files for the official ones"
    monkeypatch.setenv("LPS_HOME", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.CIFAR100._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return tmp_path/"data"


SOURCES = dict(
    tree=lambda home: write_tree(home/"cifar100"),
    sheets=lambda home: write_sheets(home/"cifar100"),
    torchvision=write_official,
)


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_of_cifar100_gives_the_same_images(home, source):
    SOURCES[source](home)
    for split in PER_CLASS:
        images = load_images("cifar100", split, download=False)
        expected = by_class(split)
        pixels = np.concatenate(list(expected.values())).transpose(0, 3, 1, 2)
        assert np.array_equal(images.images.numpy(), pixels) and images.images.is_contiguous()
        assert images.labels.tolist() == np.arange(100).repeat(PER_CLASS[split]).tolist()
        assert images.labels.dtype == torch.long and images.classes == CLASSES and images.name == "cifar100"
    pixels = np.concatenate(list(by_class("train").values())).transpose(0, 3, 1, 2)
    labels = np.arange(100).repeat(PER_CLASS["train"])
    crc = zlib.crc32(labels.tobytes(), zlib.crc32(pixels.tobytes()))
    assert plan_build(load_images("cifar100", download=False), recipes["paper"], seed=0).images.crc32 == crc


def test_own_files_come_before_torchvision_s(home):
    "Also when a folder is given; without own files and without a download, the error names the places"
    write_sheets(home/"cifar100")
    (home/"cifar-100-python").mkdir()
    assert len(load_images("cifar100", download=False)) == len(load_images("cifar100", root=home/"cifar100")) == 300
    with pytest.raises(FileNotFoundError, match="LPS_HOME"): load_images("cifar100", root=home/"other", download=False)


def broken_sheet(home):
    file = home/"cifar100/train/apple.png"
    file.write_bytes(file.read_bytes()[:50])


def cut_sheet(home): Image.new("RGB", (96, 40)).save(home/"cifar100/train/apple.png")


def short_sheet(home): Image.new("RGB", (64, 32)).save(home/"cifar100/train/apple.png")


def missing_sheet(home): (home/"cifar100/train/apple.png").unlink()


def unknown_sheet(home): (home/"cifar100/train/apple.png").rename(home/"cifar100/train/unicorn.png")


def missing_image(home): (home/"cifar100/train/apple/0001.png").unlink()


def broken_image(home): (home/"cifar100/train/apple/0001.png").write_bytes(b"no image")


def large_image(home): Image.new("RGB", (64, 64)).save(home/"cifar100/train/apple/0001.png")


def missing_class(home):
    for split in PER_CLASS: shutil.rmtree(home/"cifar100"/split/"apple")


def class_of_one_split(home): shutil.rmtree(home/"cifar100/test/apple")


@pytest.mark.parametrize("source, spoil, words", [
    ("sheets", broken_sheet, "apple.png cannot be read"),
    ("sheets", cut_sheet, "apple.png has 96×40 pixels: a class sheet holds whole tiles of 32×32"),
    ("sheets", short_sheet, "its classes have 2 to 3 images"),
    ("sheets", missing_sheet, "class 'apple' is missing"),
    ("sheets", unknown_sheet, "class 'apple' is missing"),
    ("tree", missing_image, "its classes have 2 to 3 images"),
    ("tree", broken_image, "0001.png cannot be read"),
    ("tree", large_image, "0001.png is 64×64 pixels"),
    ("tree", missing_class, "class 'apple' is missing"),
    ("tree", class_of_one_split, "do not hold the same classes: apple"),
])
def test_an_incomplete_cifar100_is_refused(home, source, spoil, words):
    SOURCES[source](home)
    spoil(home)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=words): load_splits("cifar100", download=False)


def real_cifar100():
    "The folder of the real images, or None"
    places = [Path.home()/".cache/lps/data/cifar100", ROOT.parent/"shared/data/cifar100"]
    return next((place for place in places if (place/"train").is_dir()), None)


@pytest.mark.skipif(real_cifar100() is None, reason="CIFAR-100 is not in ~/.cache/lps/data or ../shared/data")
def test_the_real_cifar100_has_the_known_checksum():
    train = load_images("cifar100", root=real_cifar100(), download=False)
    plan = plan_build(train, recipes["paper"], seed=0)
    assert plan.images.crc32 == 2799742548 and plan.images.n == 50_000
    assert plan.mean == pytest.approx([0.50707513, 0.48654887, 0.44091785], abs=1e-7)
    assert plan.std == pytest.approx([0.26733428, 0.25643846, 0.27615047], abs=1e-7)


def test_tasks_of_many_classes():
    "Labels number the classes in the given order; for two classes they are those of the pair"
    images = load_images("digits")
    x, y = task_images(images, (7, 1, 4))
    rows = torch.cat([(images.labels == number).nonzero()[:, 0] for number in (7, 1, 4)]).sort().values
    assert torch.equal(x, images.images[rows])
    assert torch.equal(torch.tensor([7, 1, 4])[y], images.labels[rows])
    x, y = task_images(images, (9, 2))
    rows = ((images.labels == 9) | (images.labels == 2)).nonzero()[:, 0]
    assert torch.equal(x, images.images[rows]) and torch.equal(y, (images.labels[rows] == 2).long())
