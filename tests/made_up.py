"Fields of a result file that never was, for tests of what is made from it"


def base_record(tasks: int = 5, **settings) -> dict:
    "Return the fields that every result file has"
    return dict(
        model_set=dict(models=100, tasks=tasks, data=[], recipe=[], val_accuracy=None),
        settings=dict(name="made up") | settings,
        versions={},
        machine=dict(cores=2, cpu="x"),
        time="2026-01-01T",
        commit="abc",
    )
