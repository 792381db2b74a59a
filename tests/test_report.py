"""The report says what the results say: every row, the right spread, only the pictures that exist."""

import copy
import importlib.util
import io
import json
import random
import subprocess
import sys

import pytest
from rich.console import Console

from mipfast.demo.report import accuracy_figure, accuracy_table, parts, path_figure, residual_figure, write_report
from mipfast.errors import InputError, MipfastError
from mipfast.experiment import page

needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
VISION = "model.visual.blocks"
#          stage, name, neurons, forget text/image, retain text/image, general text/image
ROWS = [
    ("before", "before", None, (98, 95, 98, 96, 99, 97)),
    ("prune only", "snr", 569, (31, 28, 93, 91, 99, 96)),
    ("prune only", "mean", 569, (12, 14, 38, 33, 71, 62)),
    ("prune only", "random", 569, (94, 92, 93, 91, 95, 94)),
    ("RMisU", "MIP", 569, (4, 6, 94, 91, 98, 96)),
    ("RMisU", "random", 569, (38, 44, 90, 87, 97, 95)),
    ("RMisU", "IGI only", 512, (5, 33, 93, 90, 98, 95)),
    ("RMisU", "IFI only", 57, (72, 21, 95, 92, 98, 96)),
    ("RMisU", "plain RMU", None, (2, 3, 81, 76, 94, 90)),
    ("reference", "retrained", None, None),
]


def fake_results(seeds):
    rng = random.Random(0)

    def row(stage, name, neurons, centres):
        def draws(at):
            return [] if centres is None else [min(100.0, centres[at] + rng.gauss(0, 1.5)) for _ in seeds]

        pairs = enumerate(("forget", "retain", "general"))
        accuracy = {group: {"text": draws(2 * i), "image": draws(2 * i + 1)} for i, group in pairs}
        facts = {"name": name, "stage": stage, "note": f"what {name} is", "neurons": neurons, "per_seed": {}}
        return {**facts, "accuracy": accuracy}

    def path():
        def stack(layers, neurons):
            picked = {str(layer): rng.sample(range(neurons), neurons // 10) for layer in range(layers)}
            return {"num_layers": layers, "num_neurons": neurons, "neurons": picked}

        return {"stacks": {"model.language_model.layers": stack(5, 1024), VISION: stack(3, 192)}}

    def residual(far, spread):
        norms = [far * (layer + 1) / 3 for layer in range(3)] + [far * 1.1, far]
        points = [[rng.gauss(far, spread), rng.gauss(0, spread)] for _ in range(60)]
        return {"relative_norm": norms, "points": points}

    return {
        "title": "Forgetting five people",
        "seeds": list(seeds),
        "config": {"fraction": 0.1, "objective": "log_odds"},
        "versions": {"torch": "2.13.0"},
        "machine": {"cpu": "two cores"},
        "seconds": {"locate": 3.25, "prune": 0.02, "misdirect": 41.7},
        "rows": [row(*each) for each in ROWS],
        "paths": {"MIP": path(), "random": path()},
        "residuals": {
            "MIP": {"forget": residual(2.4, 0.35), "retain": residual(0.2, 0.1)},
            "random": {"forget": residual(1.1, 0.3), "retain": residual(0.25, 0.1)},
        },
        "steering_layer": 2,
        "limits": ["A tiny model and made-up people.", "One architecture."],
    }


@pytest.fixture(params=[(0,), (0, 1, 2)], ids=["one seed", "three seeds"])
def results(request):
    return fake_results(request.param)


def terminal(results, width=160):
    console = Console(width=width, file=io.StringIO())
    console.print(page.terminal([accuracy_table(results)]))
    return console.file.getvalue()


def markdown(results):
    return page.markdown(parts(results))


def line_of(text, name):
    return next(line for line in text.splitlines() if line.strip("| ").startswith(name))


def test_every_row_and_stage_is_in_table_and_page(results):
    for text in (terminal(results), markdown(results)):
        assert "nan" not in text.lower() and "None" not in text
        for row in results["rows"]:
            assert row["name"] in text and row["stage"] in text
    shown = markdown(results)
    for row in results["rows"]:
        assert f"- {row['name']} ({row['stage']}): {row['note']}" in shown
    for said in (results["title"], *results["limits"], "| misdirect | 41.70 |", '"objective": "log_odds"', "2.13.0"):
        assert said in shown


def test_mean_and_sample_sd_by_hand():
    results = fake_results((0, 1, 2))
    # mean 20, squared deviations 100 + 0 + 100, over n - 1 = 2: sd 10 (the population sd would be 8.2)
    results["rows"][4]["accuracy"]["forget"]["text"] = [10.0, 20.0, 30.0]
    for text in (terminal(results), markdown(results)):
        assert "20.0 ± 10.0" in line_of(text, "MIP")
        assert "mean ± sample sd of 3 seeds: 0, 1, 2" in text


def test_one_seed_claims_no_spread():
    results = fake_results((7,))
    for text in (terminal(results), markdown(results)):
        assert "±" not in text and " sd" not in text and "one seed: 7" in text


def test_a_value_from_fewer_seeds_says_so():
    results = fake_results((0, 1, 2))
    results["rows"][-1]["accuracy"]["retain"]["text"] = [97.0]
    assert "97.0 (n=1)" in line_of(markdown(results), "retrained")


def test_unmeasured_row_is_a_row_of_dashes(results):
    assert line_of(markdown(results), "retrained") == "| retrained |" + " – |" * 7
    results["rows"][-1]["accuracy"] = {}
    assert line_of(markdown(results), "retrained") == "| retrained |" + " – |" * 7


def test_a_bracket_in_a_name_is_not_markup():
    results = fake_results((0,))
    results["rows"][1]["name"] = "snr [bold]"
    assert "snr [bold]" in terminal(results)


def test_page_table_has_one_width(results):
    table = [line for line in markdown(results).split("## What")[0].splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4 + 10 and {line.count("|") for line in table} == {9}


@needs_matplotlib
def test_files_appear_whole(results, tmp_path):
    written = write_report(results, tmp_path / "new")
    names, drawn = (
        {"report.json", "report.md", "report.html", "pictures"},
        {"accuracy.png", "path.png", "residuals.png"},
    )
    assert written.name == "report.md" and {path.name for path in written.parent.iterdir()} == names
    assert {path.name for path in (written.parent / "pictures").iterdir()} == drawn
    assert json.loads((written.parent / "report.json").read_text()) == results
    for name in drawn:
        assert (written.parent / "pictures" / name).read_bytes().startswith(b"\x89PNG")
        assert f"](pictures/{name})" in written.read_text("utf-8")


@needs_matplotlib
@pytest.mark.parametrize("other", [{}, {"IGI only": {}}, None])
def test_absent_data_draws_and_links_nothing(other, tmp_path):
    results = fake_results((0,))
    for key in ("paths", "residuals"):
        del results[key]
        if other is not None:
            results[key] = other
    written = write_report(results, tmp_path).read_text("utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html", "pictures"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == {"accuracy.png"}
    assert "path.png" not in written and "residuals.png" not in written
    for draw in (path_figure, residual_figure):
        with pytest.raises(InputError, match="expected 'MIP'"):
            draw(results)


@needs_matplotlib
def test_accuracy_figure_draws_the_means():
    results = fake_results((0, 1, 2))
    results["rows"][4]["accuracy"]["forget"]["text"] = [10.0, 20.0, 30.0]
    forget, retain, general = accuracy_figure(results).axes
    for axes in (forget, retain, general):
        assert sum(bool(patch.get_width()) for patch in axes.patches) == 9 * 2  # retrained has no bar
        assert sum(text.get_text() == "not measured" for text in axes.texts) == 2
    assert any(patch.get_width() == pytest.approx(20) for patch in forget.patches)
    assert "lower is better" in forget.get_title("left") and "higher is better" in retain.get_title("left")


@needs_matplotlib
def test_path_figure_has_a_tick_for_every_neuron_and_counts():
    results = fake_results((0,))
    del results["paths"]["random"]
    results["paths"]["MIP"]["stacks"][VISION]["neurons"].pop("1")  # a layer the path leaves alone
    text, vision = path_figure(results).axes
    assert [len(events.get_positions()) for events in text.collections] == [102] * 5
    assert [label.get_text() for label in vision.texts] == ["19", "0", "19"]
    assert "38 of 576" in vision.get_title("left")


@needs_matplotlib
def test_residual_scatters_share_one_scale():
    results = fake_results((0,))
    norms, mip, chance = residual_figure(results).axes
    assert mip.get_xlim() == chance.get_xlim() and mip.get_ylim() == chance.get_ylim()
    assert mip.get_xlim()[1] - mip.get_xlim()[0] == pytest.approx(mip.get_ylim()[1] - mip.get_ylim()[0])
    for axes in (mip, chance):
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        points = [point for cloud in axes.collections for point in cloud.get_offsets()]
        assert len(points) == 120 and all(left < x < right and bottom < y < top for x, y in points)
    assert [line.get_linestyle() for line in norms.lines[1:]] == ["-", "-", "--", "--"]
    assert len(norms.lines[1].get_ydata()) == 5
    results["residuals"] = {"MIP": copy.deepcopy(results["residuals"]["MIP"])}
    for points in ([], [[1.0, 2.0]]):  # nothing to scale by
        for group in ("forget", "retain"):
            results["residuals"]["MIP"][group]["points"] = points
        assert len(residual_figure(results).axes) == 2


def test_without_matplotlib_the_error_names_the_extra_and_the_facts_are_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(MipfastError, match=r"pip install 'mipfast\[eval\]'"):
        write_report(fake_results((0,)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_importing_loads_no_matplotlib():
    code = "import sys, mipfast.demo.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
