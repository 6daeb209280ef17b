"""Methods that compare models by their weights or their outputs"""
