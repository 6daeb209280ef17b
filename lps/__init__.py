"""Learnable Parameter Similarity: tell from the weights of trained networks which tasks they solve"""
__version__ = "0.1.0"
