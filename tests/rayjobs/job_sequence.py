"""Several steps one after the other in one process, so that they share one local Ray: ``python -m tests.rayjobs.job_sequence '[["prepare", ["--task", ...]], ...]'``.

A step is a job with its arguments, or a function as ``tests.rayjobs.test_rooms:write_queries`` with its own. Ends with the first status that is not 0.
"""

import importlib
import json
import sys

from rayjobs.cli import run_job


def main() -> None:
    for name, arguments in json.loads(sys.argv[1]):
        module_name, _, function = name.partition(":")
        if function:
            getattr(importlib.import_module(module_name), function)(*arguments)
            continue
        module = importlib.import_module(f"rayjobs.{name}")
        print(f"--- {name} {' '.join(arguments)}", flush=True)
        try:
            run_job(getattr(module, f"{name.title()}Job"), module.main, arguments)
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main()
