"""The jobs' actor pool without Ray: units one after the other, in this process."""

from rayjobs import actor_pool


def use(monkeypatch) -> None:
    """Let prepare, embed and infer work in this process for the time of a test."""

    def run_units(units, worker, arguments, pool, *, longest_unit_s):
        work = worker(*arguments)
        for unit in units:
            yield work(unit)

    monkeypatch.setattr(actor_pool, "connect_stoppable", lambda: None)
    monkeypatch.setattr(actor_pool, "plan_pool", lambda num_units, **asked: actor_pool.PoolSize(min_workers=1, max_workers=1, cpus=1.0, gpus=0.0))
    monkeypatch.setattr(actor_pool, "run_units", run_units)
