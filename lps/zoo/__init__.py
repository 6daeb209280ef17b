"""Train model sets: tasks, training, builds and datasheets"""
