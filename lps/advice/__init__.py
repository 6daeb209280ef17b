"""Which model to fine-tune"""
