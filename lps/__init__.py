"""Learnable Parameter Similarity: compare trained networks by their weights

The names below are imported when they are first used, so `import lps` is fast:

    import lps
    models = lps.load_modelset("bundled")
    fitted = lps.fit_method(models, "lps")
"""
import importlib
import warnings

__version__ = "0.1.0"

# fastai 2.8 scripts two functions on import, for which torch 2.10 and later warn
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)

_MODULES = {  # name → module that defines it; lps/__init__.pyi lists the same for type checkers
    "DataSet": "zoo.tasks",
    "METHODS": "methods.registry",
    "Method": "methods.registry",
    "Model": "models.model",
    "ModelIndex": "index.index",
    "ModelSet": "models.modelset",
    "Reading": "models.read",
    "Recipe": "zoo.train",
    "SecondOrderNet": "second_order",
    "TaskClassifier": "methods.estimator",
    "align_layer": "align",
    "build": "zoo.build",
    "compare": "lineage.compare",
    "embed_models": "methods.registry",
    "fit_method": "methods.registry",
    "from_pretrained": "index.share",
    "import_models": "models.imports",
    "inspect_model": "models.inspect",
    "join_sets": "models.modelset",
    "load_fitted": "methods.registry",
    "load_images": "zoo.tasks",
    "load_modelset": "models.modelset",
    "match_classes": "methods.classes",
    "model_map": "index.map",
    "name_classes": "methods.classes",
    "pack": "models.modelset",
    "push_to_hub": "index.share",
    "read_model": "models.read",
    "register_architecture": "nets.architectures",
    "register_dataset": "zoo.tasks",
    "register_method": "methods.registry",
    "save_fitted": "methods.registry",
    "save_pretrained": "index.share",
    "train_model": "zoo.train",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    "Import a public name when it is first used (PEP 562)"
    if name not in _MODULES: raise AttributeError(f"module 'lps' has no attribute '{name}': dir(lps) lists its names")
    value = getattr(importlib.import_module(f"lps.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    "Return the public names, for completion"
    return sorted([*__all__, "__version__"])
