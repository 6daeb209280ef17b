"""The second-order network: order does not matter to any of the 19 branches, training equals `torch.optim.SGD`, n = 1
equals the plain case"""
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lps.core.files import save_tensors
from lps.core.jobs import seeded
from lps.models.modelset import load_modelset
from lps.methods.registry import embed_models, fit_many, fit_method, load_fitted, save_fitted
from lps.order_chain import permute, random_perms
from lps.nets.resnet import ResNet, branch_layers, resnet_spec
from lps.second_order import VARIANTS, NetConfig, SecondOrderNet, _order, fit, similarity
from lps.zoo.recipe import rate_factor
from lps.zoo.train import Diverged


def same(a, b): return all(torch.equal(v, b.state_dict()[name]) for name, v in a.state_dict().items())
def embed(net, models): return net.embed(models.weights(list(net.config.shapes), net.config.folded))
def save(folder, name, state, task, run): save_tensors(folder/f"{name}.safetensors", state, dict(task=task, run=run))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Two tasks of three untrained ResNet20s of width 4, BN vectors made to matter"
    folder, spec = tmp_path_factory.mktemp("models"), resnet_spec(width=4)
    for task in range(2):
        for run in range(3):
            torch.manual_seed(10*task + run)
            state = {
                k: v + torch.rand_like(v) * 0.5 if "bn" in k and v.is_floating_point() else v
                for k, v in ResNet(width=4).state_dict().items()
            }
            save(folder, f"task{task}_run{run}", state, task, run)
            save(
                folder,
                f"task{task}_run{run + 3}_permuted",
                permute(state, spec, random_perms(spec, run)),
                task,
                run + 3,
            )
    return load_modelset(folder)


@pytest.mark.parametrize("folded", [False, True])
def test_a_permuted_model_has_the_same_embedding_on_every_branch(models, folded):
    original, permuted = models[models.manifest.run < 3], models[models.manifest.run >= 3]
    net = fit(original, branch_layers(), epochs=1, n_filters=5, folded=folded)
    assert len(net.branches) == 19
    torch.testing.assert_close(embed(net, original), embed(net, permuted), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        similarity(embed(net, original), embed(net, permuted)).diagonal(), torch.ones(6), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "switches", [dict(method="fc"), dict(method="frobenius"), dict(align_filters=False), dict(align_channels=False)]
)
def test_without_alignment_order_matters(models, switches):
    original, permuted = models[models.manifest.run < 3], models[models.manifest.run >= 3]
    net = fit(original, ("layer1.0.conv2",), epochs=1, n_filters=5, **switches)
    assert (embed(net, original) - embed(net, permuted)).abs().max() > 1e-2


def fit_by_torch(
    models, layers, method="lps", folded=False, epochs=3, milestones=(), momentum=.9, bs=1, per_task=1, **config
):
    "Train with torch's optimiser and schedule, a step for each minibatch"
    weights = models.weights(layers, folded)
    tasks, targets = models.labels.unique(return_inverse=True)
    shapes = {layer: weight.shape[1:] for layer, weight in weights.items()}
    config = NetConfig(shapes=shapes, tasks=tasks.tolist(), method=method, stem=models.stem, folded=folded, **config)
    with seeded(0): net = SecondOrderNet(config)
    opt = torch.optim.SGD(net.parameters(), 1e-3, momentum=momentum)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: rate_factor(milestones, epoch))
    g = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for i in _order(targets, per_task, g).split(bs):
            loss = net.loss(net(*[weight[i] for weight in weights.values()]), targets[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
        schedule.step()
    return net


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize(
    "layers, bs",
    [
        (("conv1",), 1),
        (("conv1", "layer2.0.conv1"), 1),
        (("conv1",), 4),
        (("layer3.0.conv1",), 1),
        (("layer3.2.conv2",), 1),
        (branch_layers(), 1),
    ],
)
def test_training_is_torchs_sgd_to_the_bit(models, method, layers, bs):
    few = dict(epochs=3, milestones=(1, 2), n_filters=6, bs=bs)
    assert same(fit(models, layers, method, **few), fit_by_torch(models, layers, method, **few))


@pytest.mark.parametrize(
    "switches",
    [
        dict(align_filters=False),
        dict(align_channels=False),
        dict(alpha=[0.9, 0.1]),
        dict(momentum=0),
        dict(loss="triplet", bs=6, per_task=3),
        dict(folded=True),
    ],
)
def test_training_is_torchs_sgd_with_every_switch(models, switches):
    layers = "layer1.0.conv1", "layer3.1.conv1"
    few = dict(epochs=3, milestones=(1, 2), n_filters=6) | switches
    assert same(fit(models, layers, **few), fit_by_torch(models, layers, **few))


def test_branches_of_one_network_learn_as_if_alone(models):
    "They share no weight: α of eq. (9) is a factor of a branch's learning rate, to the bit for powers of two"
    few = dict(epochs=3, milestones=(1,), n_filters=6)
    both, alone = fit(models, ("layer2.1.conv1", "layer3.1.conv1"), lr=2e-3, alpha=[0.5, 0.5], **few), fit(
        models, ("layer2.1.conv1",), lr=1e-3, **few
    )
    assert same(both.branches[0], alone.branches[0])


@pytest.mark.parametrize("where", ["here", "threads", "processes"])
def test_fits_at_once_have_the_weights_of_fits_one_by_one(models, where, request):
    train, few, threads = [0, 1, 2, 6, 7, 8], dict(epochs=2, milestones=(1,), n_filters=6), torch.get_num_threads()
    jobs = [
        dict(layers=("layer3.1.conv1",), **few),
        dict(method="fc", seed=3, **few),
        dict(layers=("conv1", "layer1.0.conv1"), folded=True, **few),
    ]
    one_by_one = [fit_method(models[train], **job) for job in jobs]
    jobs = [dict(job, train=train) for job in jobs]
    if where == "threads":
        with ThreadPoolExecutor(2) as ex: at_once = fit_many(models, jobs, executor=ex)
    else: at_once = fit_many(models, jobs, executor=request.getfixturevalue(where) if where == "processes" else None)
    assert all(same(a, b) and a.config == b.config for a, b in zip(at_once, one_by_one))
    assert torch.get_num_threads() == threads


def test_a_job_carries_only_the_layers_it_reads(models):
    for layer in branch_layers(): models.stack(layer)
    seen = []
    class Recorder(ThreadPoolExecutor):
        def submit(self, f, *args):
            seen.append(pickle.dumps(args))
            return super().submit(f, *args)
    with Recorder(1) as executor: fit_many(models, [dict(train=[0, 6], epochs=1, n_filters=4)], executor=executor)
    weight = models.stack("conv1")
    assert len(seen) == 1 and len(seen[0]) < 4*weight[:2].numel() + 4_000


def test_a_fit_that_fails_at_once_with_others_says_why(models, processes):
    jobs = [dict(train=range(12), epochs=2, n_filters=4), dict(train=range(12), lr=1e8, epochs=9, n_filters=4)]
    with pytest.raises(Diverged, match="the loss is"): fit_many(models, jobs, executor=processes)
    with pytest.raises(ValueError, match="no layer 'conv9'"):
        fit_many(models, [dict(train=range(12), layers=("conv9",))])


def test_a_branch_of_weight_zero_changes_nothing(models):
    one, two = fit(models, ("conv1",), epochs=2, n_filters=6), fit(
        models, ("conv1", "layer1.0.conv1"), epochs=2, n_filters=6, alpha=[1, 0]
    )
    torch.testing.assert_close(one.branches[0].fc.weight, two.branches[0].fc.weight)
    sims = [similarity(embed(net, models)) for net in (one, two)]
    torch.testing.assert_close(*sims, atol=1e-5, rtol=1e-4)


def test_fit_leaves_the_random_state_and_the_threads_alone(models):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    fit(models, epochs=1, n_filters=4)
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == threads


def test_saved_and_read_again_it_is_the_same(models, tmp_path):
    net = fit_method(models, layers=("conv1", "layer1.0.conv1"), epochs=1, n_filters=4, alpha=[.75, .25])
    save_fitted(tmp_path/"net.safetensors", net)
    again = load_fitted(tmp_path/"net.safetensors")
    assert again.config == net.config and torch.equal(embed_models(net, models), embed_models(again, models))


def test_what_is_wrong_is_named(models, tmp_path):
    with pytest.raises(ValueError, match="no layer 'conv9'"): fit(models, ("conv9",))
    with pytest.raises(ValueError, match="'cosine' is unknown.*lps, frobenius, fc"): fit(models, method="cosine")
    with pytest.raises(Diverged, match="the loss is"): fit(models, lr=1e8, epochs=5)
    with pytest.raises(ValueError, match="hold no triplet"): fit(models, loss="triplet", bs=16)
    with pytest.raises(ValueError, match="'hinge' is unknown"): fit(models, loss="hinge")
    with pytest.raises(FileNotFoundError): load_fitted(tmp_path/"none.safetensors")
    wider = SecondOrderNet(NetConfig(shapes={"conv1": (16, 3, 3, 3)}, tasks=[0, 1], n_filters=4))
    with pytest.raises(ValueError, match=r"conv1 is \(4, 3, 3, 3\).*\(16, 3, 3, 3\)"): embed(wider, models)
    with pytest.raises(ValueError, match="layer conv1 is missing"): wider.embed({})


HEAVY = "fastai", "torchvision", "sklearn", "numba", "pandas", "rich"
LIGHT = "zoo.tasks", "second_order", "methods.registry", "methods.paper", "methods.signatures", "methods.probes"
IMPORTS = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module("lps." + name)
    print(name, [heavy for heavy in {HEAVY} if heavy in sys.modules])
"""


def test_imports_are_light():
    "Training, image data, compilers and estimators are imported where they are used"
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} []" for name in LIGHT]
