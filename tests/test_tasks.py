"""Images as people have them: of any depth, broken, misplaced, of one class; what cannot make tasks is refused first"""
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lps.zoo.tasks import (DATASETS, DataSet, ImageSet, channel_stats, check_splits, load_images, pair_classes,
                       register_dataset, source_of, task_images)
from lps.zoo.build import build


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
    (Image.new("RGBA", (8, 8), (200, 100, 0, 128)), "png", [100, 50, 0], "1 transparency laid on black"),
    (Image.new("LA", (8, 8), (200, 0)), "png", [0]*3, "1 transparency laid on black"),
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
    with pytest.raises(ValueError, match="class 'dog' has no readable image in"), warnings.catch_warnings():
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
        check_splits(load_images(tree), load_images(tree, "test"))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*\(3, 6, 6\)"):
        build(tmp_path/"zoo", str(tree), n_models=1, workers=1, progress=False)
    check_splits(load_images(tree, size=6), load_images(tree, "test", size=6))
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
        with pytest.raises(ValueError, match="names none of the 2 classes"): images_of(labels)
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
