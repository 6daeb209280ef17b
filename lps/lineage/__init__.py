"""Copies and derived models: what was made from what"""
