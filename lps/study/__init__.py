"""Experiments: registry, result files, statistics and pages"""
