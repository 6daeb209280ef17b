"The names that `import lps` offers, for type checkers and completion"
from .align import align_layer as align_layer
from .index.index import ModelIndex as ModelIndex
from .index.map import model_map as model_map
from .index.share import from_pretrained as from_pretrained
from .index.share import push_to_hub as push_to_hub
from .index.share import save_pretrained as save_pretrained
from .lineage.compare import compare as compare
from .methods.estimator import TaskClassifier as TaskClassifier
from .methods.classes import match_classes as match_classes
from .methods.classes import name_classes as name_classes
from .methods.registry import METHODS as METHODS
from .methods.registry import Method as Method
from .methods.registry import embed_models as embed_models
from .methods.registry import fit_method as fit_method
from .methods.registry import load_fitted as load_fitted
from .methods.registry import register_method as register_method
from .methods.registry import save_fitted as save_fitted
from .models.imports import import_models as import_models
from .models.inspect import inspect_model as inspect_model
from .models.model import Model as Model
from .models.modelset import ModelSet as ModelSet
from .models.modelset import join_sets as join_sets
from .models.modelset import load_modelset as load_modelset
from .models.modelset import pack as pack
from .models.read import Reading as Reading
from .models.read import read_model as read_model
from .nets.architectures import register_architecture as register_architecture
from .second_order import SecondOrderNet as SecondOrderNet
from .zoo.build import build as build
from .zoo.tasks import DataSet as DataSet
from .zoo.tasks import load_images as load_images
from .zoo.tasks import register_dataset as register_dataset
from .zoo.train import Recipe as Recipe
from .zoo.train import train_model as train_model

__version__: str
