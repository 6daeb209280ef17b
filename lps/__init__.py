"""Learnable Parameter Similarity: tell from the weights of trained networks which tasks they solve"""
import warnings

__version__ = "0.1.0"

warnings.filterwarnings('ignore', message='`torch.jit.script` is deprecated', category=FutureWarning)

import warnings

# fastai 2.8 scripts two functions on import, of which torch warns from 2.10 on
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
