"""Files, jobs and optional packages: what everything else is built on"""
