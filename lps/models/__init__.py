"""Trained models: read one from anywhere, or many as a model set"""
