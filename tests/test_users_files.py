"""Commands replace and delete only files that lps wrote: datasheets, temporary files, folders of builds"""
import os
from dataclasses import replace

import pytest

from lps.core.files import save_tensors
from lps.nets.resnet import ResNet
from lps.zoo.build import build, remove_temporary
from lps.zoo.datasheet import write_datasheet
from lps.zoo.recipe import recipes

TINY = replace(recipes["digits"], name="tiny", epochs=1, milestones=(), depth=8, width=2)
ONE = dict(n_tasks=1, n_models=1, workers=1, progress=False)

OURS = [".task04_run1.safetensors.0123abcd.tmp", "complete/.task04_run1.json.0123abcd.tmp",
        "epochs/003/.task04_run1.safetensors.0123abcd.tmp", "epochs/003/complete/.task04_run1.json.0123abcd.tmp",
        "checkpoints/.unit_0123abcd.safetensors.0123abcd.tmp", "set_aside/.task04_run1.json.0123abcd.tmp",
        ".DATASHEET.md.0123abcd.tmp", ".build.json.0123abcd.tmp"]
THEIRS = [".notes.tmp", ".task04_run1.safetensors.1.tmp", "notes/.task04_run1.safetensors.0123abcd.tmp",
          "epochs/mine/.task04_run1.json.0123abcd.tmp", ".git/.build.json.0123abcd.tmp"]


def test_only_temporary_files_of_a_build_are_removed(tmp_path):
    for name in OURS + THEIRS:
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text("")
        os.utime(tmp_path/name, (0, 0))
    (tmp_path/".task05_run1.safetensors.0123abcd.tmp").write_text("written right now")
    remove_temporary(tmp_path)
    left = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert left == {*THEIRS, ".task05_run1.safetensors.0123abcd.tmp"}


@pytest.fixture
def models(tmp_path):
    state = ResNet(depth=8, width=2).state_dict()
    for task in range(2): save_tensors(tmp_path/"models"/f"m{task}.safetensors", state, dict(task=task))
    return tmp_path/"models"


def test_a_datasheet_replaces_only_one_that_lps_wrote(models):
    write_datasheet(models)
    write_datasheet(models, name="again")
    text = (models/"DATASHEET.md").read_text()
    assert text.startswith("# again")
    for other in (text.replace("again", "edited"), text + "and more\n", "my own", "", text[:-4]):
        (models/"DATASHEET.md").write_text(other)
        with pytest.raises(FileExistsError, match="DATASHEET.md is no datasheet that lps wrote, or was edited"):
            write_datasheet(models)
        assert (models/"DATASHEET.md").read_text() == other
    (models/"DATASHEET.md").unlink()
    for other in ("[]", "{}", "x"):
        (models/"datasheet.json").write_text(other)
        with pytest.raises(FileExistsError, match="datasheet.json is no datasheet"): write_datasheet(models)
        assert (models/"datasheet.json").read_text() == other and not (models/"DATASHEET.md").exists()


@pytest.mark.parametrize("name", ["DATASHEET.md", "datasheet.json", "checkpoints", "epochs", "complete", "set_aside"])
def test_a_build_does_not_begin_in_a_folder_with_files_of_such_names(tmp_path, name):
    (tmp_path/name).mkdir() if "." not in name else (tmp_path/name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}, but no build.json"): build(tmp_path, "digits", TINY, **ONE)


def test_a_build_keeps_a_datasheet_that_was_edited(tmp_path):
    build(tmp_path, "digits", TINY, **ONE)
    (tmp_path/"DATASHEET.md").write_text("edited")
    with pytest.warns(UserWarning, match="no new datasheet: .*DATASHEET.md is no datasheet that lps wrote"):
        assert len(build(tmp_path, "digits", TINY, **ONE | dict(n_models=2))) == 2
    assert (tmp_path/"DATASHEET.md").read_text() == "edited"
