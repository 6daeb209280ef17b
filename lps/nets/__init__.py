"""First-order networks and the registry of architectures"""
