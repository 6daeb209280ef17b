"""Indexes, fitted methods and model sets in folders and on the Hub, and the cards that go with them"""
import json
import shutil
import sys
from unittest.mock import create_autospec

import pytest
import torch
from conftest import ROOT

from lps.files import save_model
from lps.methods import embed_models, fit_method
from lps.modelset import load_modelset
from lps.resnet import ResNet
from lps.search import ModelIndex
from lps.sharing import card, from_pretrained, push_to_hub, save_pretrained

RESULT = ROOT/'results/table1-bundled.json'


@pytest.fixture(scope='module')
def models():
    models = load_modelset('bundled')
    return models[(models.labels < 3).numpy()]


@pytest.fixture(scope='module')
def fitted(models): return fit_method(models, 'lps', n_filters=4, epochs=1, milestones=())


@pytest.fixture(scope='module')
def things(models, fitted): return dict(index=ModelIndex(fitted, models), method=fitted, modelset=models)


def check_same(thing, again, models):
    "Does what came back do the same?"
    if isinstance(thing, ModelIndex):
        assert again.query(models[0], k=3).equals(thing.query(models[0], k=3))
    elif thing is models: assert again.digests == models.digests and again.tasks == models.tasks
    else: assert torch.equal(embed_models(again, models), embed_models(thing, models))


@pytest.mark.parametrize('kind', ['index', 'method', 'modelset'])
def test_a_folder_gives_back_what_went_in(things, models, kind, tmp_path):
    save_pretrained(things[kind], tmp_path/'shared', licence='mit', records=[RESULT])
    check_same(things[kind], from_pretrained(tmp_path/'shared'), models)
    assert json.loads((tmp_path/'shared/lps.json').read_text())['kind'] == kind
    said = (tmp_path/'shared/README.md').read_text()
    assert said.startswith('---\nlicense: "mit"\n') and 'LPS: Frobenius + FC, with alignment' in said


def test_whole_networks_go_into_files_of_their_own(tmp_path):
    for i in range(2): save_model(tmp_path/f'zoo/m{i}.safetensors', ResNet(depth=8, width=4).state_dict(), dict(task=i))
    models = load_modelset(tmp_path/'zoo')
    again = from_pretrained(save_pretrained(models, tmp_path/'shared'))
    assert again.digests == models.digests and again[1].net.depth == 8
    assert '2 models of 2 tasks' in (tmp_path/'shared/DATASHEET.md').read_text()


def test_the_card_has_the_figures_of_the_result_file_and_what_speaks_against_them(things):
    said, record = card(things['index'], 'org/market', records=[RESULT]), json.loads(RESULT.read_text())
    for name, row in record['summary'].items(): assert f"| {name} | {' | '.join(row.values())} |" in said
    assert record['commit'] in said and 'measured from an uncommitted tree' in said
    assert "from_pretrained('org/market')" in said and 'license: "unknown"' in said
    assert 'Tiny' in said or 'tiny' in said, 'the terms of the images'


def test_the_hub_reads_the_card(things):
    hub = pytest.importorskip('huggingface_hub')
    said = hub.ModelCard(card(things['index'], 'org/market', 'apache-2.0', [RESULT]))
    assert said.data.license == 'apache-2.0' and said.data.library_name == 'lps' and 'index' in said.data.tags


def test_a_folder_with_files_in_it_is_left_alone(things, tmp_path):
    (tmp_path/'mine.txt').write_text('keep')
    with pytest.raises(FileExistsError, match='choose another folder'): save_pretrained(things['method'], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


@pytest.mark.parametrize('said, words', [
    ('{"kind": "other", "lps": "9"}', "holds 'other', this version of lps reads index, method, modelset"),
    ('{"lps": "9"}', "field 'kind' is missing"),
    ('[', 'is not JSON'),
    ('{"kind": "method", "lps": "0"}', 'no model file'),
])
def test_a_folder_that_lies_is_refused(tmp_path, said, words):
    (tmp_path/'lps.json').write_text(said)
    with pytest.raises((ValueError, FileNotFoundError), match=words): from_pretrained(tmp_path)


def test_a_missing_package_is_named(things, monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    for call in (lambda: push_to_hub(things['method'], 'org/net'), lambda: from_pretrained('org/net')):
        with pytest.raises(ImportError, match=r"not installed: pip install 'lps\[hub\]'"): call()


def test_what_is_pushed_can_be_opened(things, models, tmp_path, monkeypatch):
    "The calls that the real package takes; the upload lands in the cache that a download would fill"
    hub = pytest.importorskip('huggingface_hub')
    api = create_autospec(hub.HfApi, instance=True)
    cached = tmp_path/'models--org--market'

    def upload(repo_id, folder_path, **_):
        (cached/'refs').mkdir(parents=True)
        (cached/'refs/main').write_text('0'*40)
        shutil.copytree(folder_path, cached/'snapshots'/('0'*40))
        return 'https://hub/commit/0'

    api.upload_folder.side_effect = upload
    monkeypatch.setattr(hub, 'HfApi', create_autospec(hub.HfApi, return_value=api))
    assert push_to_hub(things['index'], 'org/market', 'mit', private=True) == 'https://hub/commit/0'
    api.create_repo.assert_called_once_with('org/market', private=True, exist_ok=True)
    monkeypatch.setattr(hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(hub.constants, 'HF_HUB_OFFLINE', True)
    check_same(things['index'], from_pretrained('org/market'), models)
