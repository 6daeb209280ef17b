"""A build on a real Dask cluster: a scheduler and two worker processes on this machine, one of which is killed"""
import os
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pandas as pd
import pytest

from lps.core.files import not_as_marked, write_json
from lps.models.modelset import load_modelset
from lps.index.index import BuildSettings, ModelIndex
from lps.zoo.tasks import load_images
from lps.zoo.recipe import recipes
from lps.zoo.build import build, plan_build

distributed = pytest.importorskip("distributed", reason="needs the extra `cluster`")
TINY = replace(recipes["digits"], name="tiny", epochs=10, milestones=(6,), depth=8, width=2, batch_size=512)
IMAGES = tuple(load_images("digits", s) for s in ("train", "test"))


@pytest.fixture(scope="module")
def client():
    how = dict(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None)
    with distributed.LocalCluster(**how, silence_logs=50) as cluster, distributed.Client(cluster) as c: yield c


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A model set that one process built"
    folder = tmp_path_factory.mktemp("straight")
    build(folder, IMAGES, TINY, n_models=2, workers=1, progress=False)
    return folder


def models(path): return {f.name: f.read_bytes() for f in path.glob("*.safetensors")}


def test_killed_worker(tmp_path, client, straight):
    "The set ends complete and without duplicates, and is the one that a single process builds"
    folder, pids = tmp_path/"cluster", list(client.run(os.getpid).values())
    assert len(set(pids)) == 2 and os.getpid() not in pids
    with ThreadPoolExecutor(1) as ex:
        building = ex.submit(
            build, folder, IMAGES, TINY, n_models=2, executor=client.get_executor(), progress=False, every=5
        )
        end = time.time() + 300
        while len(list(folder.glob("complete/*.json"))) < 2 and time.time() < end and not building.done():
            time.sleep(0.01)
        early = models(folder)
        os.kill(pids[0], signal.SIGKILL)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            ms = building.result(300)
    assert 2 <= len(early) < 10, "the worker was killed in the middle"
    assert pids[0] not in client.run(os.getpid).values()
    assert len(ms) == 10 and not ms.manifest.duplicated(["task", "run"]).any() and ms.manifest.seed.is_unique
    assert len(list(folder.glob("complete/*.json"))) == 10 and not any(
        not_as_marked(f) for f in folder.glob("*.safetensors")
    )
    assert models(folder) == models(straight) and early.items() <= models(folder).items()
    assert len(load_modelset(folder)) == 10


def test_error_on_the_cluster_is_the_builds_error(tmp_path, client):
    write_json(tmp_path/"build.json", asdict(plan_build(IMAGES[0], TINY, seed=0)))
    (tmp_path/"checkpoints").write_text("in the way")
    with pytest.raises(OSError, match="checkpoints.* could not be written"):
        build(tmp_path, IMAGES, TINY, n_models=1, executor=client.get_executor(), progress=False, every=5)
    (tmp_path/"checkpoints").unlink()
    assert len(build(tmp_path, IMAGES, TINY, n_models=1, executor=client.get_executor(), progress=False)) == 5


def test_an_index_built_on_the_cluster_is_that_of_one_process(tmp_path, client, straight):
    settings = BuildSettings(executor=client.get_executor())
    index = ModelIndex.build(straight, tmp_path/"market", "stem-signature", settings=settings)
    one = ModelIndex.build(straight, method="stem-signature")
    assert len(index) == 10 and sorted(index.digests) == sorted(one.digests)
    found, alone = (built.query(load_modelset(straight)[3], 5) for built in (index, one))
    pd.testing.assert_frame_equal(found, alone, rtol=0, atol=1e-6)  # rows arrive in any order
