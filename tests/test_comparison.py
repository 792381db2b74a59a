"""Runs side by side: every number by hand, nothing dropped in silence, and text that stays text."""

import importlib.util
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from commands import invoke
from rich.console import Console

from mipfast import cli
from mipfast.errors import ArtefactError, InputError, MipfastError
from mipfast.experiment import comparison, comparison_page, page
from mipfast.experiment.comparison import compare
from mipfast.experiment.comparison_page import metric_grid, overview, parts
from mipfast.judge.records import COPIED, SAID

needs_matplotlib = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
ROLES = {"forget": ["forget_5"], "retain": ["retain_95", "celebrities"]}
HOSTILE = (
    '<script>alert("x")</script> | [bold] `$x_$` </pre><img src=http://e.vil/ onerror=a()> \x1b[31m \ud800 ](u) *b*'
)


def means(forget=(0.8, 0.8), retain=(0.8, 0.8), celebrities=(0.8, 0.8), task="cloze", metric="accuracy"):
    pairs = {"forget_5": forget, "retain_95": retain, "celebrities": celebrities}.items()
    return {f"{g}/{m}/{task}/{metric}": v for g, both in pairs for m, v in zip(("text", "image"), both, strict=True)}


def write_run(folder, unlearned, vanilla=None, sizes=None, rows=None, **facts):
    """sizes: {group: samples}; without them the folder has no EVAL.json."""
    models = ({} if vanilla is None else {"vanilla": vanilla}) | {"unlearned": unlearned}
    summary = {"title": "A title", "config": {"lr": 0.1}, "seed": 0, "versions": {"torch": "2.13.0"}, "roles": ROLES}
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary | {"models": models, "flags": []} | facts))
    for model in models if sizes else ():
        write_eval(folder / "eval" / model, models[model], sizes, (rows or {}).get(model))
    return folder


def write_eval(folder, found, sizes, rows=None):
    folder.mkdir(parents=True)
    every = {}
    for key, mean in found.items():
        ids = [row["id"] for row in rows] if rows else [f"{i}" for i in range(sizes[key.split("/")[0]])]
        scored = {i: row["score"] for i, row in zip(ids, rows or [], strict=False)}
        values = {i: {key.rsplit("/", 1)[1]: scored.get(i, mean)} for i in ids}
        every[key] = {"agg_value": mean, "value_by_index": values}
    (folder / "MIPFAST_EVAL.json").write_text(json.dumps(every))
    (folder / "MIPFAST_SUMMARY.json").write_text(json.dumps(found))
    if rows:
        whole = [{key: row.get(key) for key in (*COPIED, *SAID)} for row in rows]
        (folder / "rows-000000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole))
        (folder / "run.json").write_text(json.dumps({"records": len(rows)}))


def row_of(grid, name):
    return next(row for row in grid.rows if row[0].split("\n")[0] == name)


def flags_of(compared, name):
    return next(row for row in compared.rows if row.name == name).flagged


class Page(HTMLParser):
    """What a browser would make of a page: an error for a tag that is not closed in turn."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.said = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def test_rates_by_hand(tmp_path):
    vanilla = means() | means(task="choice", forget=(0.5, 0.4), retain=(0.5, 0.5), celebrities=(0.5, 0.5))
    unlearned = means((0.2, 0.4), (0.6, 0.8), (0.4, 0.4))
    unlearned |= means(task="choice", forget=(0.25, 0.4), retain=(0.5, 0.5), celebrities=(0.5, 0.5))
    compared = compare(
        [write_run(tmp_path / "a", unlearned, vanilla, {"forget_5": 5, "retain_95": 30, "celebrities": 10})]
    )
    # retain: (30 0.6 + 10 0.4) / 40 = 0.55, of 0.8: 68.75 %; (30 0.8 + 10 0.4) / 40 = 0.7, of 0.8: 87.5 %
    grid = metric_grid(compared, "cloze", "accuracy")
    assert grid.heads == [
        "run",
        "forget ↓\ntext, n = 5",
        "forget ↓\nimage, n = 5",
        "retain ↑\ntext, n = 40",
        "retain ↑\nimage, n = 40",
    ]
    assert row_of(grid, "vanilla") == ["vanilla"] + ["0.800"] * 4
    wanted = ["0.200\n75.0 % gone", "0.400\n50.0 % gone", "0.550\n68.8 % kept", "0.700\n87.5 % kept"]
    assert row_of(grid, "a") == ["a", *wanted] and grid.before == 1
    # forget text: 75 % of the cloze and 50 % of the choice; image: 50 % and 0 %
    assert row_of(overview(compared), "a") == ["a", "62.5", "25.0", "84.4", "93.8", "inconsistent_modality"]
    assert row_of(overview(compared), "vanilla") == ["vanilla", "0.0", "0.0", "100.0", "100.0", ""]


def test_groups_of_unknown_size_are_pooled_alike(tmp_path):
    compared = compare([write_run(tmp_path / "a", means(retain=(0.6, 0.6), celebrities=(0.4, 0.4)), means())])
    grid = metric_grid(compared, "cloze", "accuracy")
    assert row_of(grid, "a")[3] == "0.500\n62.5 % kept" and grid.heads[3] == "retain ↑\ntext"


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path):
    for seed, left in enumerate((0.2, 0.4, 0.6)):
        config = {"lr": 0.1, "out": f"run{seed}", "stage": {"seed": seed}}
        write_run(tmp_path / f"s{seed}", means((left, 0.8)), means(), seed=seed, config=config)
    write_run(tmp_path / "again", means(), means(), seed=0, config={"lr": 0.1, "stage": {"seed": 0}})
    write_run(tmp_path / "other", means(), means(), seed=3, config={"lr": 0.2, "stage": {"seed": 3}})
    compared = compare([tmp_path / name for name in ("s0", "other", "s1", "s2", "again")])
    assert [row.name for row in compared.rows] == ["vanilla", "s0, s1, s2", "other", "again"]
    # 75, 50 and 25 % are forgotten: mean 50, sample sd 25; the values 0.4 ± 0.2
    assert row_of(overview(compared), "s0, s1, s2")[:3] == ["s0, s1, s2\n3 seeds", "50.0 ± 25.0", "0.0 ± 0.0"]
    assert row_of(metric_grid(compared, "cloze", "accuracy"), "s0, s1, s2")[1] == "0.400 ± 0.200\n50.0 ± 25.0 % gone"
    assert flags_of(compared, "s0, s1, s2") == {"inconsistent_modality": 2}  # 75 and 50 points, but not 25
    assert row_of(overview(compared), "s0, s1, s2")[-1] == "inconsistent_modality (2 of 3)"


def test_every_run_is_measured_against_its_own_vanilla(tmp_path):
    write_run(tmp_path / "a", means((0.4, 0.4)), means())
    write_run(tmp_path / "b", means((0.4, 0.4)), means((0.5, 0.5)))
    compared = compare([tmp_path / "a", tmp_path / "b"])
    assert [row.name for row in compared.rows] == ["vanilla of a", "vanilla of b", "a", "b"]
    assert [row_of(overview(compared), name)[1] for name in "ab"] == ["50.0", "20.0"]
    write_run(tmp_path / "c", means((0.4, 0.4)), means((0.5, 0.5)), seed=1)
    joined = compare([tmp_path / "a", tmp_path / "c"])
    assert row_of(metric_grid(joined, "cloze", "accuracy"), "vanilla")[:2] == ["vanilla\n2 seeds", "0.650 ± 0.212"]
    assert row_of(overview(joined), "a, c")[1] == "35.0 ± 21.2"


@pytest.mark.parametrize(
    ("unlearned", "vanilla", "wanted"),
    [
        (means((0.2, 0.2)), means(), []),
        (means((0.2, 0.2)), None, ["no_vanilla"]),
        (means((0.0, 0.2)), means(), []),  # 100 and 75 %: 25 points are allowed
        (means((0.0, 0.21)), means(), ["inconsistent_modality"]),
        (means(celebrities=(0.8, 0.8), retain=(0.8, 0.0)), means(), []),  # half of the pool is left
        (means(celebrities=(0.8, 0.12), retain=(0.8, 0.12)), means(), []),  # 15 % to the digit
        (means(celebrities=(0.8, 0.11), retain=(0.8, 0.12)), means(), ["collapse"]),
        (means((None, 0.8)), means(), ["diverged"]),
        (means((float("inf"), 0.8)), means(), ["diverged"]),
        (means((0.0, 0.0)), means((0.0, 0.0)), []),  # nothing was known
    ],
)
def test_flags(unlearned, vanilla, wanted, tmp_path):
    compared = compare([write_run(tmp_path / "a", unlearned, vanilla)])
    assert [*flags_of(compared, "a")] == wanted
    notes = comparison_page.notes(compared)
    assert [note.split(": ")[1] for note in notes if note.startswith("a: ")] == wanted
    assert [note.split(" means: ")[0] for note in notes if " means: " in note] == wanted


def test_flags_state_their_numbers():
    assert (comparison.GAP, comparison.COLLAPSE) == (25, 15)
    assert "25" in comparison.flags.__doc__ and "15 %" in comparison.flags.__doc__
    assert "25" in comparison.FLAGS["inconsistent_modality"] and "15 %" in comparison.FLAGS["collapse"]


def test_what_the_run_itself_says_is_beside_its_row(tmp_path):
    compared = compare([write_run(tmp_path / "a", means(), means(), flags=["nothing was trained: x", "eval resumed"])])
    assert row_of(overview(compared), "a")[-1] == "run_note"
    assert "a: run_note: nothing was trained: x" in comparison_page.notes(compared)
    assert "a: run_note: eval resumed" in comparison_page.notes(compared)


def test_different_metrics_are_dashes_and_a_flag(tmp_path):
    write_run(tmp_path / "a", means((0.2, 0.2)), means())
    write_run(
        tmp_path / "b",
        means((0.2, 0.2), task="generation", metric="rouge_l"),
        means(metric="rouge_l", task="generation"),
    )
    compared = compare([tmp_path / "a", tmp_path / "b"])
    assert row_of(metric_grid(compared, "cloze", "accuracy"), "b") == ["b"] + ["–"] * 4
    assert row_of(metric_grid(compared, "generation", "rouge_l"), "a") == ["a"] + ["–"] * 4
    for name in ("a", "b", "vanilla of a", "vanilla of b"):
        assert flags_of(compared, name) == {"missing_metrics": 1}


def test_only_metrics_of_knowledge_have_rates(tmp_path):
    vanilla, unlearned = (means(task="choice", metric="legal"), means((0.4, 0.4), task="choice", metric="legal"))
    grid = metric_grid(compare([write_run(tmp_path / "a", unlearned, vanilla)]), "choice", "legal")
    assert row_of(grid, "a")[1] == "0.400" and grid.heads[1].startswith("forget ↑")


def test_an_evaluation_alone_is_a_row_with_the_roles_of_the_others(tmp_path):
    sizes = {"forget_5": 2, "retain_95": 2, "celebrities": 2}
    write_eval(tmp_path / "alone", means((0.3, 0.3)), sizes)
    write_run(tmp_path / "run", means(), means(), sizes)
    both = compare([tmp_path / "run", tmp_path / "alone"])
    assert row_of(metric_grid(both, "cloze", "accuracy"), "alone")[1:3] == ["0.300", "0.300"]
    assert flags_of(both, "alone") == {"no_vanilla": 1}
    alone = compare([tmp_path / "alone"])
    heads = metric_grid(alone, "cloze", "accuracy").heads
    assert heads[1:3] == ["celebrities\ntext, n = 2", "celebrities\nimage, n = 2"]
    page.markdown(parts(alone))


def test_foreign_metrics_are_shown_as_they_are(tmp_path):
    (tmp_path / "TOFU_SUMMARY.json").write_text(json.dumps({"forget_quality": 0.25, "model_utility": None}))
    (tmp_path / "TOFU_EVAL.json").write_text(json.dumps({"forget_quality": {"agg_value": 0.25}}))
    compared = compare([tmp_path])
    assert row_of(metric_grid(compared, "", "forget_quality"), tmp_path.name)[1] == "0.250"
    assert row_of(metric_grid(compared, "", "model_utility"), tmp_path.name)[1] == "nan"
    assert "forget_quality" in page.markdown(parts(compared))


def test_names_are_told_apart_by_their_folders(tmp_path):
    for parent in ("x", "y"):
        write_run(tmp_path / parent / "out", means(), means(), config={"parent": parent})
    compared = compare([tmp_path / "x" / "out", tmp_path / "y" / "out"])
    assert [run.name for run in compared.runs] == [str(tmp_path / parent / "out") for parent in ("x", "y")]
    write_eval(tmp_path / "vanilla", means(), dict.fromkeys(("forget_5", "retain_95", "celebrities"), 1))
    names = [row.name for row in compare([tmp_path / "x" / "out", tmp_path / "vanilla"]).rows]
    assert names == ["vanilla", "out", str(tmp_path / "vanilla")]


def test_folders_that_cannot_be_compared_are_named(tmp_path):
    with pytest.raises(InputError, match="nothing to compare"):
        compare([])
    good = write_run(tmp_path / "good", means(), means())
    with pytest.raises(InputError, match="good is given more than once"):
        compare([good, tmp_path / "x" / ".." / "good"])
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "absent"):
        with pytest.raises(ArtefactError, match=rf"{folder} has neither .* expected the folder of a finished run"):
            compare([good, tmp_path / folder])
    (tmp_path / "empty" / "run.json").write_text("{}")
    with pytest.raises(ArtefactError, match="has not finished"):
        compare([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"models": {', "is damaged"),
        ("[]", "holds list"),
        ("{}", "has no models"),
        ('{"models": {}}', "has no models"),
        ('{"models": {"vanilla": 1}}', "has no models"),
        ('{"models": {"vanilla": {"a/text/cloze/accuracy": "high"}}}', "a/text/cloze/accuracy is 'high'"),
    ],
)
def test_a_damaged_summary_is_named(text, message, tmp_path):
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(ArtefactError, match=message):
        compare([tmp_path])


def answered(i, score, text, task="generation"):
    record = {"id": i, "group": "forget_5", "modality": "text", "task": task, "prompt": "Who?", "target": "Ada"}
    return record | {"answer": "Ada", "text": text, "score": score}


def hostile_run(folder):
    rows = [answered(f"q{i}", i / 10, f"answer {i}") for i in range(8)]
    rows[7]["text"] = HOSTILE
    key = {"forget_5/text/generation/rouge_l": 0.3}
    write_run(
        folder,
        key | means((0.2, 0.2)),
        key | means(),
        {"forget_5": 8, "retain_95": 8, "celebrities": 8},
        {"unlearned": rows, "vanilla": [row | {"text": "Ada!"} for row in rows]},
        title=HOSTILE,
        flags=[HOSTILE],
        config={"note": HOSTILE},
        seconds={"locate": 1.0, "eval": None},
    )
    return folder


def test_answers_with_the_highest_and_lowest_scores(tmp_path):
    (run,) = compare([hostile_run(tmp_path / "a")]).runs
    said = [part if isinstance(part, str) else part.text for part in comparison_page.answers(run, "unlearned")]
    assert [text.split(" ")[0] for text in said if text.startswith("forget_5")] == [
        f"forget_5/q{i}" for i in (7, 6, 5, 0, 1, 2)
    ]
    assert said[0] == "Highest scores:" and said[4] == "Lowest scores:"
    assert said[5].splitlines() == [
        "forget_5/q0 (text), generation rouge_l 0.000",
        "asked:   Who?",
        "target:  Ada",
        "vanilla: Ada!",
        "wrote:   answer 0",
    ]
    (tmp_path / "a" / "eval" / "unlearned" / "rows-000000.jsonl").write_text("{")
    with pytest.raises(ArtefactError, match="damaged"):
        comparison_page.answers(run, "unlearned")


@needs_matplotlib
def test_the_page_is_whole_and_loads_nothing(tmp_path):
    compared = compare(
        [hostile_run(tmp_path / 'a <b>" onload=x $x|*'), write_run(tmp_path / "b", means(), means(), seed=1)]
    )
    written = page.write(tmp_path / "out", compared.title, parts(compared))
    text = written.read_text("utf-8")
    found = Page(text)
    tags = {tag for tag, _ in found.tags}
    assert {"table", "img", "details", "pre", "small"} <= tags and not tags & {"script", "link", "iframe", "object"}
    assert found.links and all(link.startswith("data:image/png;base64,") for link in found.links)
    assert "url(" not in text and "@import" not in text
    assert not any(name.startswith("on") for _, attrs in found.tags for name in attrs)
    assert all(attrs["alt"] for tag, attrs in found.tags if tag == "img")
    said = "".join(found.said)
    assert '<script>alert("x")</script>' in said and 'a <b>" onload=x $x|*' in said and "\x1b" not in text
    assert {path.name for path in (tmp_path / "out" / "pictures").iterdir()} == {
        "forget-retain.png",
        "generation-rouge_l.png",
        "cloze-accuracy.png",
    }


def test_markdown_stays_text_and_tables_one_width(tmp_path):
    compared = compare([hostile_run(tmp_path / "a <b>|*"), write_run(tmp_path / "b", means(), means(), seed=1)])
    text = page.markdown(parts(compared))
    outside = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert set(re.findall(r"<(\w+)", outside)) == {"br", "details", "summary"}
    outside = re.sub("<summary>.*", "", outside)  # in HTML, Markdown is text
    assert "a &lt;b&gt;\\|\\*" in outside and not re.search(r"(?<!\\)(\]\(u|\*b|\[bold)", outside)
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "    wrote:   <script>" in text  # indented by four: a code block


def test_terminal_says_the_same(tmp_path):
    console = Console(width=160, file=io.StringIO())
    console.print(page.terminal(parts(compare([hostile_run(tmp_path / "a [bold]")]))))
    shown = console.file.getvalue()
    assert "a [bold]" in shown and "75.0 % gone" in shown and "cloze: accuracy" in shown and "\x1b[31m" not in shown


@needs_matplotlib
def test_pictures_have_every_dot_and_bar(tmp_path):
    write_run(tmp_path / "a", means((0.2, 0.4), (0.6, 0.8), (0.6, 0.8)), means())
    write_run(tmp_path / "b", means((None, 0.4)), means(), seed=1, config={})
    compared = compare([tmp_path / "a", tmp_path / "b"])
    dots, bars = (part.draw() for part in parts(compared) if isinstance(part, page.Plot))
    drawn = [
        tuple(map(float, xy)) for line in dots.axes[0].lines for xy in line.get_xydata() if line.get_marker() in "oD^"
    ]
    assert drawn == [(0, 100), (75, 75), (50, 100), (50, 100)]
    assert len(bars.axes) == 2  # no general set, no panel
    widths = [round(patch.get_width()) for patch in bars.axes[0].patches]
    assert widths == [80, 80, 20, 40, 40]
    assert [text.get_text() for text in bars.axes[0].texts].count("not finite") == 1


@needs_matplotlib
def test_command(tmp_path):
    write_run(tmp_path / "a", means((0.2, 0.2)), means())
    result = invoke(["report", tmp_path / "a", "--out", tmp_path / "out"])
    assert result.exit_code == 0 and "75.0" in result.output
    assert {"report.html", "report.md", "pictures"} == {path.name for path in (tmp_path / "out").iterdir()}
    with pytest.raises(MipfastError, match="neither"):
        cli.app(["report", str(tmp_path)])


def test_importing_loads_no_matplotlib():
    code = "import sys, mipfast.experiment.comparison_page; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
