"""How figures and their intervals are told."""

from cad_models.dataset import Folder
from cad_models.task import Score
from rayjobs.search_report import member_table, with_bounds
from rayjobs.train import print_result

METRICS = {"test/recall@3": 0.5, "test/recall@3_low": 0.25, "test/recall@3_high": 0.75, "val/recall@3": 0.625}


def test_figure_stands_beside_its_bounds_where_it_has_both():
    assert with_bounds(METRICS, "test/recall@3") == "0.5000 [0.2500, 0.7500]"
    assert with_bounds(METRICS, "val/recall@3") == "0.6250"
    assert with_bounds({"x": 1.0, "x_low": 0.5}, "x") == "1.0000"


def test_member_table_has_bounds_in_their_figure_and_no_columns_of_their_own():
    selection = {"members": [{"name": "seed 0", "metrics": METRICS}], "chosen": [0], "metrics": METRICS}
    header, member, ensemble, _ = member_table(selection, Score(name="val/recall@3")).splitlines()
    assert header.split() == ["val/recall@3", "test/recall@3"]
    assert member.endswith("0.6250  0.5000 [0.2500, 0.7500]") and ensemble.endswith("0.5000 [0.2500, 0.7500]")


def test_table_of_a_run_aligns_columns_with_and_without_bounds(tmp_path, capsys):
    this = {name.removeprefix("test/"): value for name, value in METRICS.items() if name.startswith("test/")}
    result = {"score": 0.625, "score_name": "val/recall@3", "best": "best/mean"}
    print_result(result, Folder(str(tmp_path)), {"this run": this, "chance": {"recall@3": 0.1}})
    _, header, line, note, *_ = capsys.readouterr().out.splitlines()
    assert len(header) == len(line) and line.split() == ["recall@3", "0.5000", "[0.2500,", "0.7500]", "0.1000"]
    assert "95 % confidence intervals" in note


def test_table_of_a_run_shows_what_compares_and_keeps_all_in_a_file(tmp_path, capsys):
    this = {"recall@3": 0.5, "up/recall@3": 0.25, "up/roll/recall@3": 0.125, "up/category/nut/recall@3": 1.0, "up/category/nut/recall@3_low": 0.5}
    result = {"score": 0.625, "score_name": "val/recall@3", "best": "best/mean"}
    print_result(result, Folder(str(tmp_path)), {"this run": this, "chance": {"recall@3": 0.1, "up/roll/recall@3": 0.01}})
    told = capsys.readouterr().out
    assert "up/roll/recall@3" in told and "up/recall@3" in told and "category" not in told and "1 more figures" in told
    header, *rows = (tmp_path / "figures.csv").read_text().splitlines()
    assert header == "figure,this run,chance" and len(rows) == len(this)
    assert "up/roll/recall@3,0.125,0.01" in rows and "up/category/nut/recall@3_low,0.5," in rows
