"""What a search tells people: the table of its trials (terminal, CSV) and one self-contained page with Optuna's plots."""

import csv
import html
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from cad_models.config import Recipe, paths, replace_all
from cad_models.dataset import Folder
from cad_models.task import Score, Task
from rayjobs.search import Trial, as_study

_PLOT_HEIGHT = 480


def table_columns(trials: Sequence[Trial], base: Recipe) -> list[str]:
    """The recipe paths in which any trial differs from the base recipe, in the recipe's order."""
    varied = {path for trial in trials for path in trial.values}
    return [path for path in paths(base) if path in varied]


def table_rows(trials: Sequence[Trial], base: Recipe) -> list[dict[str, Any]]:
    """One dict a trial: number, state, score, epochs, seconds, recipe values, why it failed."""
    columns = table_columns(trials, base)
    rows = []
    for trial in trials:
        values = paths(replace_all(base, trial.values))
        rows.append(
            {
                "trial": trial.number,
                "state": trial.state,
                "score": trial.score,
                "epochs": trial.num_epochs,
                "seconds": round(trial.seconds, 1),
                **{path: values[path] for path in columns},
                "recipe": trial.digest,
                "reason": trial.reason,
            }
        )
    return rows


def table_csv(trials: Sequence[Trial], base: Recipe) -> bytes:
    """``trials.csv``: trials by number; scores with all their digits."""
    sink = io.StringIO()
    names = ["trial", "state", "score", "epochs", "seconds", *table_columns(trials, base), "recipe", "reason"]
    writer = csv.DictWriter(sink, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in table_rows(trials, base))
    return sink.getvalue().encode()


def table_text(trials: Sequence[Trial], base: Recipe, score: Score) -> str:
    """The table for a terminal, best trial first."""
    sign = -1.0 if score.mode == "max" else 1.0
    rank = {"complete": 0, "pruned": 1, "running": 2, "failed": 3}
    ordered = sorted(trials, key=lambda t: (rank[t.state], sign * (t.score if t.score is not None else 0.0), t.number))
    rows = table_rows(ordered, base)
    columns = [name for name in (rows[0] if rows else {}) if name not in ("recipe", "reason")]
    cells = [[{"score": score.name}.get(name, name.rsplit(".", 1)[-1]) for name in columns]]
    cells += [[_short(row[name]) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    lines[1:] = [f"{line}  {row['reason']}".rstrip() for line, row in zip(lines[1:], rows, strict=True)]
    return "\n".join(lines)


def _short(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def member_table(selection: dict[str, Any], score: Score) -> str:
    """What the task scores by (and its parts) of every member and of the ensemble, on val and test."""
    metric = score.name.split("/", 1)[1]
    known = selection["metrics"]
    names = [name for split in ("val", "test") for name in sorted(known) if name.startswith(f"{split}/") and _is_part(name, split, metric)]
    names.sort(key=lambda name: (name.startswith("test/"), name.count("/"), name))
    header = ["", *names]
    rows = [
        [f"{entry['name']}{' *' if i in selection['chosen'] else ''}", *[with_bounds(entry["metrics"], name) for name in names]]
        for i, entry in enumerate(selection["members"])
    ]
    rows.append([f"ensemble of {len(selection['chosen'])}", *[with_bounds(known, name) for name in names]])
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join([line[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)]]) for line in [header, *rows]]
    return "\n".join([*lines, "* = in the ensemble"])


def with_bounds(metrics: Mapping[str, float], name: str) -> str:
    """A figure, and its confidence interval where there is one: ``0.7143 [0.6122, 0.8163]``."""
    bounds = [metrics.get(f"{name}_{side}") for side in ("low", "high")]
    return f"{metrics[name]:.4f}" + (f" [{bounds[0]:.4f}, {bounds[1]:.4f}]" if None not in bounds else "")


def _is_part(name: str, split: str, metric: str) -> bool:
    """The metric itself, and for one as ``recall@3`` also ``<direction>/recall@3``, but no further protocols."""
    inner = name.removeprefix(f"{split}/")
    return inner == metric or ("/" not in metric and inner.rsplit("/", 1)[-1] == metric and inner.count("/") <= 1)


def beside_the_base_recipe(folder: Folder, base: Trial, best: Trial, score: Score) -> str:
    """What the search is worth: the best trial's figures and the base recipe's."""
    if base.state != "complete":
        return f"the base recipe (trial {base.number}) is {base.state}: nothing to compare the best trial with"
    if best.number == base.number:
        return f"no trial was better than the base recipe (trial {base.number})"
    figures = {score.name: (best.score, base.score)}
    results = [f"trials/{trial.digest}/result.json" for trial in (best, base)]
    if all(folder.exists(result) for result in results):  # people delete the folders of trials that are nobody's members
        ours, theirs = (folder.read_json(result)["metrics"] for result in results)
        test = score.name.replace("val/", "test/", 1)
        figures |= {test: (ours[test], theirs[test])} if test in ours and test in theirs else {}
    told = ", ".join(f"{name} {value:.4f} against {other:.4f}" for name, (value, other) in figures.items())
    return f"best trial ({best.number}) against the base recipe (trial {base.number}): {told}"


def report_page(trials: Sequence[Trial], base: Recipe, task: Task, *, title: str, notes: Sequence[str]) -> str:
    """One HTML page without any reference to the network: notes, table, optimisation history, parallel coordinates, importances."""
    rows = table_rows(trials, base)
    names = list(rows[0]) if rows else []
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_short(row[name]))}</td>" for name in names) + "</tr>" for row in rows)
    plots = "".join(f"<section>{plot}</section>" for plot in _plots(trials, task.score))
    shown = "".join(f"<pre>{html.escape(note)}</pre>" for note in notes)
    return _PAGE.format(title=html.escape(title), notes=shown, head=head, body=body, plots=plots)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>
<style>
:root {{ color-scheme: light }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1.5rem; max-width: 1200px; color: #1d2630; background: #fff }}
h1 {{ font-size: 1.4rem }}
pre {{ background: #f3f5f8; padding: .8rem; overflow-x: auto }}
.table {{ overflow-x: auto; max-height: 32rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap }}
th {{ position: sticky; top: 0; background: #e8ecf2; text-align: right }}
th, td {{ padding: .25rem .6rem; text-align: right }}
tr:nth-child(even) {{ background: #f7f9fb }}
section {{ margin: 1.5rem 0 }}
</style></head><body>
<h1>{title}</h1>
{notes}
<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{plots}
</body></html>
"""


def _plots(trials: Sequence[Trial], score: Score) -> list[str]:
    """Plots as pieces of HTML; the first carries the plotting library."""
    import optuna.visualization as plots

    counted = [trial for trial in trials if trial.state == "complete"]
    # Trials outside of the space (a base recipe with other values) have no parameters to draw.
    drawn = [trial for trial in counted if trial.params]
    figures = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna calls some of its plots experimental
        if counted:
            figures.append(plots.plot_optimization_history(as_study(counted, score), target_name=score.name))
        if len(drawn) >= 2:
            study = as_study(drawn, score)
            figures.append(plots.plot_parallel_coordinate(study, params=_common_params(drawn), target_name=score.name))
            if len({trial.score for trial in drawn}) > 1:
                figures.append(plots.plot_param_importances(study, target_name=score.name))
    pieces = []
    for figure in figures:
        figure.update_layout(height=_PLOT_HEIGHT, template="plotly_white")
        # Fixed ids: the same trials give the same page.
        name = f"plot-{len(pieces)}"
        pieces.append(figure.to_html(full_html=False, include_plotlyjs=not pieces, div_id=name, config={"displaylogo": False}))
    return pieces


def _common_params(trials: Sequence[Trial]) -> list[str]:
    """Parameters that every trial has: a line of parallel coordinates needs them all."""
    return sorted(set.intersection(*[set(trial.params) for trial in trials]))


def count_by_state(trials: Sequence[Trial]) -> str:
    """As ``12 complete, 3 pruned, 1 failed``."""
    counts = {state: sum(trial.state == state for trial in trials) for state in ("complete", "pruned", "failed", "running")}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "complete")
