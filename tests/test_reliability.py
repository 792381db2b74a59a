"""Files, folders, disks and stops: one line that names the file and says what to do, nothing half-written, and the same
command goes on to the same bits. docs/reliability.md is the table of what is promised."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from commands import invoke
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from mipfast import ArtefactError, InputError, LocateConfig, MIPConfig, ModelError
from mipfast.data import Record
from mipfast.data.checkpoint import load_model
from mipfast.data.encoder import Encoder
from mipfast.experiment import locate_file, pipeline
from mipfast.files import claim, read_json, write_atomic
from mipfast.judge.records import evaluate_records, read_records

CONFIG = LocateConfig(search="pointwise", n_steps=1)
WORDS = ["<pad>", "<bos>", "<eos>", "a", "b", "c", "d"]
RECORDS = [Record(str(i), "g", "text", "cloze", "a b __", "c") for i in range(3)]


@pytest.fixture(scope="module")
def home():
    """m, a model; ok.jsonl, three samples; file; dangling, a link to nothing. Readable by everybody."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    tiny_llama().save_pretrained(folder / "m")
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="a")
    inner = tokenizers.Tokenizer(words)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names).save_pretrained(folder / "m")
    (folder / "ok.jsonl").write_text("".join(f'{{"prompt": "a b", "answer": "{x}"}}\n' for x in "bcd"))
    for file in (folder / "m").iterdir():
        file.chmod(0o644)
    (folder / "file").write_text("x")
    (folder / "dangling").symlink_to(folder / "nowhere" / "x")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(locate_file, "CHUNK", 1)


def line(home, out, model="m", data="ok.jsonl", more=()):
    given = ["--model", home / model, "--data", home / data, "--out", out, "--batch-size", 1, "--device", "cpu"]
    return ["locate", *given, "--search", "pointwise", "--n-steps", 1, *more]


def one_line(told, *words):
    assert told.exit_code == 2, told.output
    last = told.output.strip().splitlines()[-1]
    assert last.startswith("error: ") and all(word in last for word in words), told.output


def left_over(folder):
    return [path for path in Path(folder).rglob(".[0-9]*.*")] if Path(folder).is_dir() else []


DATA = {  # name: (bytes of a data file, what the line says)
    "half of a surrogate pair in a prompt": (
        b'{"prompt": "a \\ud83d", "answer": "c"}',
        "line 1: the text is no Unicode",
    ),
    "half of one in an answer": (b'{"prompt": "a", "answer": "c \\udc00"}', "line 1: the text is no Unicode"),
    "half of one in a picture's path": (b'{"prompt": "a", "answer": "c", "image": "\\ud83d"}', "there is no image"),
    "nested without end": (b"[" * 100_000, "line 1: nested too deep"),
    "a value nested without end": (b'{"prompt": ' + b"[" * 100_000, "line 1: nested too deep"),
    "a number without end": (b"9" * 5000, "line 1: Exceeds the limit"),
    "a path longer than a path may be": (b'{"prompt": "a", "answer": "c", "image": "%s"}' % (b"a" * 5000), "line 1: "),
    "a zero byte in a path": (b'{"prompt": "a", "answer": "c", "image": "\\u0000"}', "line 1: there is no image"),
    "another encoding": (b'{"prompt": "\xe9", "answer": "c"}', "line 1: 'utf-8' codec can't decode"),
    "a byte order mark": (b'\xef\xbb\xbf{"prompt": "a", "answer": "c"}', "line 1: Unexpected UTF-8 BOM"),
    "UTF-16": ('{"prompt": "a", "answer": "c"}'.encode("utf-16"), "line 1: 'utf-8' codec can't decode"),
    "a zero byte": (b"\0", "line 1: Expecting value"),
    "nothing": (b"", "is empty; expected one object a line"),
}


@pytest.mark.parametrize("kind", DATA)
def test_a_data_file_that_cannot_be_used_is_one_line(home, tmp_path, kind):
    text, found = DATA[kind]
    (tmp_path / "data.jsonl").write_bytes(text + b"\n" if text else text)
    one_line(invoke(line(home, tmp_path / "out", data=tmp_path / "data.jsonl")), "data.jsonl", found)
    assert not (tmp_path / "out").exists()


OUT = {  # name: (--out, what the line says)
    "a file": ("file", "file is a file; expected a folder"),
    "a folder below a file": ("file/sub", "cannot write", "file/sub/run.json (Not a directory); make room or give"),
    "a link to nothing": ("dangling", "dangling is a link to nothing; expected a folder"),
    "a name that is too long": ("a" * 300, "(File name too long); make room or give another folder"),
    "a folder that takes no files": ("/proc/none", "cannot write /proc/none/run.json (No such file or directory)"),
}


@pytest.mark.parametrize("kind", OUT)
def test_an_out_that_cannot_be_written_is_one_line(home, kind):
    out, *found = OUT[kind]
    one_line(invoke(line(home, home / out)), *found)


def replaced(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configured(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def template(text):
    return replaced("chat_template.jinja", text)


FOLDERS = {  # name: (what is done to a model's folder, what the line says)
    "truncated weights": (cut, "gives no AutoModelForCausalLM (SafetensorError: "),
    "weights that are garbage": (replaced("model.safetensors", b"x" * 99), "gives no AutoModelForCausalLM ("),
    "empty weights": (replaced("model.safetensors", b""), "gives no AutoModelForCausalLM ("),
    "a tensor that is missing": (without_a_tensor, "no weights for 1 tensors, such as model.layers.1.mlp.down_proj"),
    "weights of another size": (configured(intermediate_size=7), "gives no AutoModelForCausalLM ("),
    "a config that is no JSON": (replaced("config.json", b"{"), "gives no AutoConfig (OSError: "),
    "a config that is a list": (replaced("config.json", b"[]"), "gives no AutoConfig ("),
    "a config nested without end": (replaced("config.json", b"[" * 100_000), "gives no AutoConfig (RecursionError"),
    "a config of bytes": (replaced("config.json", b"\xff\xfe\0"), "gives no AutoConfig ("),
    "an unknown dtype": (configured(dtype="float99"), "has no attribute 'float99'"),
    "an unknown family": (configured(model_type="zzz"), "gives no AutoConfig (ValueError: "),
    "a size in words": (configured(hidden_size="wide"), "gives no AutoConfig ("),
    "a tokenizer that is no JSON": (replaced("tokenizer.json", b"{"), "gives no AutoTokenizer ("),
    "a tokenizer of another kind": (replaced("tokenizer.json", b'{"model": 3}'), "gives no AutoTokenizer ("),
    "a tokenizer's config that is a list": (replaced("tokenizer_config.json", b"[]"), "gives no AutoTokenizer ("),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "gives no AutoTokenizer ("),
    "a template that raises": (template(b"{{ raise_exception('no') }}"), "line 1: the chat template raises TemplateE"),
    "a template that is none": (template(b"{% if %}"), "line 1: the chat template raises TemplateSyntaxError"),
    "a template of other messages": (template(b"{{ messages[0].x.y }}"), "line 1: the chat template raises Undefined"),
    "a template that adds a text": (template(b"{{ 1 + 'a' }}"), "line 1: the chat template raises TypeError"),
    "a template that divides by zero": (template(b"{{ 1 / 0 }}"), "the chat template raises ZeroDivisionError"),
    "a template without the prompt": (
        template(b"{{ bos_token }}"),
        "the chat template does not show the prompt",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_model_s_folder_that_cannot_be_used_is_one_line(home, tmp_path, kind):
    damage, found = FOLDERS[kind]
    shutil.copytree(home / "m", tmp_path / "m")
    damage(tmp_path / "m")
    one_line(invoke(line(home, tmp_path / "out", model=tmp_path / "m")), found)
    assert not (tmp_path / "out").exists()


OPTIONS = {  # options: what the line says
    "--top-k 0": "error: top_k=0; expected at least 1",
    "--top-k 99": "before the first line: top_k=99 of 48 neurons per layer of model.layers; lower top_k",
    "--stack zzz": "before the first line: no stack 'zzz' in this model; it has model.layers",
    "--positions 999": "a batch of lines 1: batch 0: positions 999..999 fall outside this batch's",
    "--modality vision": 'line 1: modality vision scores pictures; expected an "image" with every sample',
    "--batch-size 0": "batch_size=0, limit=None; expected at least 1",
    "--limit 0": "limit=0; expected at least 1",
    "--device zzz": "device='zzz' is not to be had here",
    "--memory-budget 0": "memory_budget=0; expected 'auto' or a number of bytes",
    "--group x": "there is no folder",
}


@pytest.mark.parametrize("options", OPTIONS)
def test_an_option_that_cannot_be_used_is_told_and_claims_nothing(home, tmp_path, options):
    told = invoke(line(home, tmp_path / "out", more=options.split()))
    assert told.exit_code == 2 and OPTIONS[options] in " ".join(told.output.split())
    if "--top-k" in options or "--stack" in options:  # found out with the model, when the folder is claimed
        assert invoke(line(home, tmp_path / "out")).exit_code == 0


YAML = {
    "nested without end": (b"[" * 5000, "cannot be read as YAML (maximum recursion depth"),
    "a day that is none": (b"title: 2020-13-41", "cannot be read as YAML (month must be in 1..12"),
    "an alias to itself": (b"a: &a [*a]", "a: no such key; expected one of title, model"),
    "a key that is a list": (b"? [1]\n: 2", "cannot be read as YAML"),
    "an object to be made": (b"!!python/object:os.system x", "cannot be read as YAML"),
    "bytes": (b"\xff\xfe", "cannot be read as YAML ('utf-8'"),
    "groups that are a number": (b"unlearn: {data: {groups: 3}}", "unlearn.data.groups=3; expected dict"),
}


@pytest.mark.parametrize("kind", YAML)
def test_a_yaml_that_cannot_be_used_is_told(tmp_path, kind):
    text, found = YAML[kind]
    (tmp_path / "run.yaml").write_bytes(text)
    told = invoke(["run", tmp_path / "run.yaml"])
    assert told.exit_code == 2 and "run.yaml" in told.output and found in told.output


SUMMARIES = {
    "no JSON": (b"{", "is damaged ("),
    "nested without end": (b"[" * 100_000, "is damaged (nested too deep)"),
    "a list": (b"[]", "holds list, expected a JSON object"),
    "no models": (b'{"models": 3}', "has no models"),
    "a mean in words": (b'{"models": {"a": {"x": "y"}}}', "x is 'y'; expected a number or null"),
    "roles that are a number": (b'{"models": {"a": {"x": 1}}, "roles": 3}', "roles is 3; expected a dict"),
    "seconds that are a list": (b'{"models": {"a": {"x": 1}}, "seconds": []}', "seconds is []; expected a dict"),
}


@pytest.mark.parametrize("kind", SUMMARIES)
def test_a_run_that_cannot_be_reported_is_one_line(tmp_path, kind):
    text, found = SUMMARIES[kind]
    (tmp_path / "summary.json").write_bytes(text)
    one_line(invoke(["report", tmp_path, "--out", tmp_path / "report"]), str(tmp_path), found)


def test_a_report_and_a_demo_that_cannot_be_written_are_one_line(home, tmp_path):
    (tmp_path / "summary.json").write_text('{"models": {"a": {"forget/text/cloze/accuracy": 1}}}')
    for command in (["report", tmp_path], ["demo"]):
        one_line(invoke([*command, "--out", home / "file" / "sub"]), "cannot write", "(Not a directory)")


def in_child(arguments, before=lambda: None):
    """What `invoke` gives, from a process of its own that does something first."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            before()
            told = invoke(arguments)
            os.write(writer, json.dumps([told.exit_code, told.output[-2000:]]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        code, output = json.loads(pipe.read())
    os.waitpid(child, 0)
    return transformers.utils.ModelOutput(exit_code=code, output=output)


def ordinary_user():
    if os.getuid() == 0:  # whom modes do not stop
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def test_folders_and_files_without_permission_are_one_line(home, tmp_path):
    invoke(line(home, tmp_path / "warm"))  # what is imported late may be out of an ordinary user's reach
    hidden, closed = home / "hidden.jsonl", home / "closed"
    hidden.write_text((home / "ok.jsonl").read_text())
    hidden.chmod(0)
    closed.mkdir(mode=0o555)
    told = in_child(line(home, closed / "out"), ordinary_user)
    one_line(told, f"cannot write {closed}/out/run.json (Permission denied)")
    told = in_child(line(home, closed), ordinary_user)
    one_line(told, f"cannot write {closed}/run.json (Permission denied)")
    one_line(in_child(line(home, closed, data=hidden), ordinary_user), f"cannot read {hidden} (Permission denied)")
    assert not list(closed.iterdir())
    hidden.unlink()
    closed.rmdir()


@pytest.mark.parametrize("limit", [100, 1500])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(home, tmp_path, limit):
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    out = tmp_path / "out"
    one_line(in_child(line(home, out), full), "cannot write", "File too large", "what is finished is kept")
    assert not left_over(out)
    assert invoke(line(home, out)).exit_code == invoke(line(home, tmp_path / "whole")).exit_code == 0
    assert torch.equal(locate_file.read(out).scores, locate_file.read(tmp_path / "whole").scores)


def test_what_torch_says_of_a_full_disk_is_told_too(tmp_path):
    def write(path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    with pytest.raises(ArtefactError, match="cannot write .*x .*inline_container.*what is finished is kept"):
        write_atomic(tmp_path / "x", write)
    with pytest.raises(RuntimeError, match="another"):  # no disk's: the traceback is needed
        write_atomic(tmp_path / "x", lambda path: (_ for _ in ()).throw(RuntimeError("another")))


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(home, tmp_path, monkeypatch):
    calls, real = [], locate_file.locate

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(locate_file, "locate", interrupted)
        told = invoke(line(home, tmp_path / "out"))
    assert told.exit_code == 130 and not left_over(tmp_path)
    assert told.output.strip().splitlines()[-1].startswith("stopped: what is finished is kept, and the same command")
    monkeypatch.setattr(locate_file, "locate", lambda *args: calls.append(1) or real(*args))
    assert invoke(line(home, tmp_path / "out")).exit_code == 0 and len(calls) == 4  # the first is not done again


DAMAGES = {
    "cut": lambda data: data[:-8],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\xff" * len(data),
    "zeros within": lambda data: data[: len(data) // 2] + bytes(64) + data[len(data) // 2 + 64 :],
    "another's end": lambda data: data + b"x",
}


@pytest.mark.parametrize("aggregate", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_scores_is_seen_and_done_again(home, tmp_path, damage, aggregate, caplog):
    model, encoder = load_model(home / "m"), Encoder.from_pretrained(home / "m")

    def run():
        data = home / "ok.jsonl"
        locate_file.locate_file(model, encoder, data, tmp_path, CONFIG, batch_size=1, aggregate=aggregate)
        return locate_file.read(tmp_path)

    before = run()
    file = tmp_path / (locate_file.AGGREGATE if aggregate else "shard-000001.safetensors")
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(ArtefactError, match=f"{file.name} is damaged .*; remove it and run the same mipfast locate"):
        locate_file.read(tmp_path)
    with caplog.at_level("WARNING", logger="mipfast"):
        after = run()
    assert f"{file.name} is damaged" in caplog.text
    assert torch.equal(before.scores, after.scores) and torch.equal(before.path, after.path)


ROWS = {
    "cut": lambda text: text[:-9],
    "empty": lambda text: "",
    "a row less": lambda text: text.split("\n", 1)[1],
    "a key less": lambda text: text.replace('"nll"', '"nil"'),
    "another's": lambda text: text.replace('"id": "1"', '"id": "7"'),
    "no objects": lambda text: "[]\n" * 3,
    "nested without end": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("damage", ROWS)
def test_a_damaged_file_of_answers_is_seen_and_done_again(home, tmp_path, damage):
    model, encoder = load_model(home / "m"), Encoder.from_pretrained(home / "m")

    def run():
        return evaluate_records(model, encoder, RECORDS, tmp_path, max_new_tokens=2)

    before, file = run(), tmp_path / "rows-000000.jsonl"
    file.write_text(ROWS[damage](file.read_text()))
    if damage not in ("another's",):
        with pytest.raises(ArtefactError, match="is damaged .*remove it|holds 2 of 3 records"):
            read_records(tmp_path)
    assert run().rows == before.rows


def test_an_experiment_s_damaged_files_are_named(tmp_path):
    for name, read in (("stages.json", pipeline.Stages), ("run.json", lambda folder: claim(folder, {}))):
        for text in ("", "{", "[]", "[" * 100_000):
            (tmp_path / name).write_text(text)
            with pytest.raises(
                ArtefactError, match=f"{name} (is damaged|holds list).*; remove (it|the folder) and run"
            ):
                read(tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(ArtefactError, match=r"none.json is damaged \(.*No such file"):
        read_json(tmp_path / "none.json")


def test_a_stage_whose_result_was_removed_is_done_again(tmp_path):
    done, made = [], tmp_path / "made"
    for _ in range(2):
        pipeline.Stages(tmp_path).do("one", lambda: (done.append(1), made.mkdir()), made)
    assert len(done) == 1
    made.rmdir()
    pipeline.Stages(tmp_path).do("one", lambda: done.append(1), made)
    assert len(done) == 2


def test_scores_that_were_damaged_after_their_stage_are_located_again(home, tmp_path, monkeypatch):
    model, encoder = load_model(home / "m"), Encoder.from_pretrained(home / "m")
    roles = {"forget": RECORDS[:2], "retain": RECORDS[2:]}
    stage = pipeline.UnlearnStage(text=CONFIG)
    pipeline._locate(model, encoder, roles, stage, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob(locate_file.AGGREGATE)}
    next(iter(before)).write_bytes(b"x")

    def found(sites, text, vision, kept, config):
        assert isinstance(config, MIPConfig)
        raise ArtefactError(
            f"{text.report['aggregate']['samples']} and {kept[0].report['aggregate']['samples']} samples"
        )

    monkeypatch.setattr(pipeline, "select_path", found)
    with pytest.raises(ArtefactError, match="^2 and 1 samples"):
        pipeline._unlearn(model, encoder, roles, stage, tmp_path, {})
    assert before.keys() == set(tmp_path.rglob(locate_file.AGGREGATE))


def test_records_that_are_no_unicode_are_named_from_python_too(home):
    encoder = Encoder.from_pretrained(home / "m")
    with pytest.raises(InputError, match="record 7 of g: the text is no Unicode"):
        encoder.batch([Record("7", "g", "text", "generation", "a \ud83d", "b")])


def test_a_tensor_that_a_folder_lacks_is_not_drawn_at_random(home, tmp_path):
    shutil.copytree(home / "m", tmp_path / "m")
    without_a_tensor(tmp_path / "m")
    with pytest.raises(ModelError, match="no weights for 1 tensors, such as model.layers.1.mlp.down_proj.weight"):
        load_model(tmp_path / "m")


def test_documented_modules_are_there_after_import_mipfast():
    """`mipfast locate` ends with: In Python: mipfast.streaming.read('OUT')."""
    code = "import mipfast; print(mipfast.streaming.read.__name__, mipfast.samples.load_model.__name__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["read", "load_model"]
