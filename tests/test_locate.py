"""`mipfast.locate` against `slow_reference.slow_locate`, and the rest of its public contract.

In float64 every score must agree to 1e-9 of its layer's largest, besides the rounding of `.scores` to
float32; a float32 model must agree with the float64 truth to 1e-4. Paths must be equal wherever the truth
has no tie.
"""

import pytest
import torch
from slow_reference import quadrature, slow_locate
from tiny import (
    FIRST_WORD,
    image_batch,
    marked,
    split,
    text_batch,
    tiny_llama,
    tiny_llava,
    tiny_moe,
    tiny_polynomial,
    tiny_qwen_vl,
    unchecked_route,
)

import mipfast
from mipfast.scoring import prefix_attention, search

GAUSS = ["gausslegendre", "gaussradau"]
METHODS = [*GAUSS, "riemann_left", "riemann_right", "riemann_middle", "riemann_trapezoid"]
POSITIONS = ["last_prompt", "answer", "first", "prompt", "all", [1, 3]]
OBJECTIVES = ["logprob", "prob", "log_odds", "loss"]
F64 = torch.float64


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(F64)


@pytest.fixture(scope="module")
def qwen():
    return tiny_qwen_vl(F64)


@pytest.fixture(scope="module")
def polynomial():
    return tiny_polynomial()


@pytest.fixture(scope="module")
def llama_batch(llama):
    return text_batch(llama, [9, 12], [2, 3], "right", seed=1)


def compare(found, truth, rtol=1e-9):
    """Scores, paths and residuals of an Attribution against slow_locate's."""
    scores, path, residual = truth
    assert found.scores.shape == scores.shape and found.scores.dtype == torch.float32
    assert found.path.shape == path.shape and found.path.dtype == torch.int64
    exact = rtol < 1e-6
    for i in range(scores.shape[0]):
        for layer, want in enumerate(scores[i]):
            where = f"sample {i}, layer {layer}"
            if (path[i, layer] < 0).all():
                assert (found.path[i, layer] == -1).all() and (found.scores[i, layer] == 0).all(), where
                continue
            off = (found.scores[i, layer].double() - want).abs()
            largest = want.abs().max()
            assert (off <= rtol * largest + 2**-24 * want.abs()).all(), f"{where}: {off.max() / largest:.1e}"
            off = abs(found.report["residuals"][i][layer] - residual[i, layer].item())
            assert off <= (1e-7 if exact else 1e-3), f"{where}: residual off by {off:.1e}"
            if largest == 0:
                continue  # every choice is a tie: test_ties_go_to_the_lowest_index
            ranked = want.sort(descending=True).values[: path.shape[-1] + 1]
            if (ranked[:-1] - ranked[1:]).min() <= 2 * rtol * largest:
                assert not exact, f"{where}: the batch has a tie, choose another seed"
                break  # a tie decides the further path
            assert found.path[i, layer].tolist() == path[i, layer].tolist(), where


def same(model, batch, rtol=1e-9, **settings):
    settings = {"n_steps": 4 if settings.get("modality", "text") == "text" else 2} | settings
    found = mipfast.locate(model, batch, **settings)
    compare(found, slow_locate(model, batch, **settings), rtol)
    return found


# ------------------------------------------------------------------------- the reference itself, first


@pytest.mark.parametrize("search", ["pointwise", "greedy"])
def test_reference_is_complete(llama, llama_batch, search):
    """IGI + carry = F(1) - F(0) once the quadrature is fine: so scores and carry are both right."""
    _, _, residual = slow_locate(llama, split(llama_batch, 0), positions="all", n_steps=24, search=search)
    assert residual.max() < 1e-8


@pytest.mark.parametrize("method", METHODS)
def test_reference_quadrature_integrates_what_it_should(method):
    """Gauss rules are exact to degree 2n - 1 and 2n - 2; all weights sum to 1; Radau ends on alpha = 1."""
    n = 4
    nodes, weights = map(torch.tensor, quadrature(method, n))
    degree = {"gausslegendre": 2 * n - 1, "gaussradau": 2 * n - 2}.get(method, 0)
    for power in range(degree + 1):
        assert (weights * nodes**power).sum().item() == pytest.approx(1 / (power + 1), abs=1e-6)
    if method == "gaussradau":
        assert nodes[-1] == 1


# ----------------------------------------------------------------------------------------- text, Llama


def test_text_defaults(llama):
    """logprob, last prompt position, greedy, top 5, IGI, 4 Gauss-Legendre nodes."""
    batch = text_batch(llama, [9, 12, 7], [2, 3, 1], "right", seed=2)
    found = same(llama, batch)
    assert found.path.shape == (3, 4, 5)
    assert not found.report["layers_without_gradient"]


@pytest.mark.parametrize("positions", ["last_prompt", "answer"])
@pytest.mark.parametrize("method", METHODS)
def test_text_methods(llama, llama_batch, method, positions):
    same(llama, llama_batch, method=method, n_steps=3, positions=positions)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.filterwarnings("ignore")
def test_text_positions_and_objectives(llama, llama_batch, positions, objective):
    same(llama, llama_batch, positions=positions, objective=objective, n_steps=2)


@pytest.mark.parametrize("positions", ["last_prompt", "answer", "prompt", "all"])
def test_text_left_padding(llama, positions):
    batch = text_batch(llama, [9, 12, 6], [2, 1, 3], "left", seed=3)
    same(llama, batch, positions=positions, n_steps=2)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize(
    "settings",
    [{}, dict(search="pointwise"), dict(score="ifi"), dict(combine="product")],
    ids=str,
)
def test_a_subject_is_scored_as_its_indices_are(llama, padding, settings):
    """Bit for bit."""
    batch = text_batch(llama, [9, 12, 7], [2, 3, 1], padding, seed=3)
    length = 1 if settings.get("combine") == "product" else 2
    given = marked(batch, *((start, start + length) for start in (2, 5, 0)))
    indices = given["subject"].nonzero()[:, 1].view(3, length)
    found = mipfast.locate(llama, given, positions="subject", **settings)
    expected = mipfast.locate(llama, batch, positions=indices, **settings)
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.path, expected.path)
    assert found.report["residuals"] == expected.report["residuals"]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_subjects_of_unequal_length(llama, padding):
    """Against the reference, which knows indices alone, and one by one."""
    batch = text_batch(llama, [9, 12, 7], [2, 3, 1], padding, seed=3)
    given = marked(batch, (2, 5), (8, 9), (0, 2))
    settings = dict(positions="subject", n_steps=2, residuals="all")
    found = mipfast.locate(llama, given, **settings)
    in_halves = mipfast.locate(llama, given, memory_budget=1, **settings)
    torch.testing.assert_close(in_halves.scores, found.scores, rtol=1e-5, atol=1e-7)
    truth = []
    for i, own in enumerate(given["subject"]):
        at = own.nonzero()[:, 0].tolist()
        truth.append(slow_locate(llama, split(batch, i, keep_padding=True), positions=at, n_steps=2))
        alone = mipfast.locate(llama, split(given, i), positions="subject", n_steps=2)
        torch.testing.assert_close(alone.scores[0], found.scores[i], rtol=1e-5, atol=1e-7)
    compare(found, [torch.cat(parts) for parts in zip(*truth, strict=True)])


def test_a_subject_beside_pictures_and_counterfactuals(qwen, llama):
    batch = image_batch(qwen, 2, 7)
    given = marked(batch, (-5, -3), (-6, -4))
    indices = given["subject"].nonzero()[:, 1].view(2, 2)
    found = mipfast.locate(qwen, given, positions="subject", n_steps=1)
    assert torch.equal(found.scores, mipfast.locate(qwen, batch, positions=indices, n_steps=1).scores)
    one, others = (text_batch(llama, [9, 9], [2, 2], None, seed=seed) for seed in (0, 1))
    spans, indices = ((1, 3), (4, 6)), torch.tensor([[1, 2], [4, 5]])
    known, plain = dict(counterfactuals=marked(others, *spans)), dict(counterfactuals=others)
    found = mipfast.locate(llama, marked(one, *spans), positions="subject", n_steps=2, **known)
    assert torch.equal(found.scores, mipfast.locate(llama, one, positions=indices, n_steps=2, **plain).scores)


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        (lambda m: None, "asks for the batch's subject, found none; expected a bool or int tensor \\[2, 12\\]"),
        (lambda m: m[:, 1:], "found a torch.bool one \\[2, 11\\]; expected"),
        (lambda m: m.float(), "found a torch.float32 one \\[2, 12\\]; expected"),
        (lambda m: m & torch.tensor([[True], [False]]), "the subject of samples \\[1\\] is empty; expected"),
        (lambda m: m.roll(7, 1), "the subject of samples \\[0\\] lies where their attention_mask is 0; expected"),
        (
            lambda m: m | (torch.arange(12) == 8),
            "samples \\[0\\] lies behind the position that predicts their last label",
        ),
    ],
    ids=["none", "shape", "dtype", "empty", "padding", "behind"],
)
def test_a_subject_that_cannot_be_used_is_named_before_anything_runs(llama, llama_batch, mark, says):
    given = marked(llama_batch, (2, 4), (3, 4))
    given["subject"] = mark(given["subject"])
    with llama.register_forward_pre_hook(lambda *_: pytest.fail("the model ran")):
        with pytest.raises(mipfast.InputError, match=f"batch 0: positions='subject'.*{says}"):
            mipfast.locate(llama, given, positions="subject")


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_long_suffixes_take_torchs_attention(qwen, monkeypatch, modality, padding):
    monkeypatch.setattr(prefix_attention, "TORCH_FROM", 1)
    same(qwen, image_batch(qwen, 2, 7, padding=padding), modality=modality, positions="all")


@pytest.mark.parametrize("positions", ["last_prompt", "all"])
@pytest.mark.parametrize("method", ["gausslegendre", "gaussradau", "riemann_trapezoid"])
def test_text_pointwise(llama, llama_batch, method, positions):
    same(llama, llama_batch, search="pointwise", method=method, n_steps=2, positions=positions)


@pytest.mark.parametrize("search", ["greedy", "pointwise"])
def test_text_ifi(llama, llama_batch, search):
    same(llama, llama_batch, score="ifi", positions="answer", n_steps=2, search=search)


@pytest.mark.parametrize("top_k", [1, 9])
def test_text_top_k(llama, llama_batch, top_k):
    same(llama, llama_batch, top_k=top_k, positions="prompt", n_steps=2)


def test_radau_with_one_step_is_the_clean_gradient(llama, llama_batch):
    same(llama, llama_batch, method="gaussradau", n_steps=1, positions="answer")


def test_text_two_label_spans(llama):
    """All labels count in F; `answer` and `last_prompt` look at the first span, `prompt` ends before it."""
    batch = text_batch(llama, [12, 14], [2, 3], "right", seed=4)
    batch["labels"][:, 4:6] = batch["input_ids"][:, 4:6]
    for positions in ("answer", "last_prompt", "prompt"):
        same(llama, batch, positions=positions, n_steps=2)


def test_text_label_at_index_0_is_never_predicted(llama):
    batch = text_batch(llama, [9, 9], [2, 3], None, seed=5)
    batch["labels"][:, 0] = batch["input_ids"][:, 0]
    same(llama, batch, positions="answer", n_steps=2)


def test_text_ids_and_labels_are_enough(llama):
    batch = text_batch(llama, [9, 9], [2, 3], None, seed=6)
    bare = {name: batch[name] for name in ("input_ids", "labels")}
    same(llama, bare, n_steps=2, positions="all")
    compare(mipfast.locate(llama, bare, n_steps=4), slow_locate(llama, batch))


def test_ties_go_to_the_lowest_index():
    """Activations of zero make every score of their layer exactly 0, with a gradient that does arrive."""
    model = tiny_llama(F64)
    model.model.layers[2].mlp.up_proj.weight.data.zero_()
    found = mipfast.locate(model, text_batch(model, [9], [2]))
    assert found.path[0, 2].tolist() == [0, 1, 2, 3, 4]
    assert (found.scores[0, 2] == 0).all() and not found.report["layers_without_gradient"]


@pytest.mark.parametrize(
    "settings", [{}, dict(search="pointwise"), dict(score="ifi"), dict(combine="product")], ids=str
)
def test_a_gradient_of_exactly_zero_is_no_gradient(settings):
    """A zero output projection: nothing behind it depends on its layer's neurons."""
    model = tiny_llama(F64)
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    found = mipfast.locate(model, text_batch(model, [9, 12], [2, 1]), **settings)
    assert (found.path[:, 0] == -1).all() and (found.scores[:, 0] == 0).all() and (found.path[:, 1:] >= 0).all()
    assert found.report["layers_without_gradient"] == [0] and found.report["without_gradient"] == [[0], [0]]


@pytest.mark.parametrize("search", ["greedy", "pointwise"])
def test_the_first_token_of_the_last_layer_reaches_no_label(llama, llama_batch, search):
    found = same(llama, llama_batch, positions="first", search=search)
    assert (found.path[:, 3] == -1).all() and (found.path[:, :3] >= 0).all()
    assert found.report["layers_without_gradient"] == [3] and found.report["without_gradient"] == [[3], [3]]


@pytest.mark.parametrize("search", ["greedy", "pointwise"])
def test_a_sample_s_own_gradient_may_be_zero(llama, search):
    """Of the second sample the chosen position is the label's own, which no logits see; the first is unharmed."""
    batch, positions = text_batch(llama, [9, 9], [3, 1], None, seed=2), torch.tensor([[5], [8]])
    found = mipfast.locate(llama, batch, positions=positions, search=search)
    alone = mipfast.locate(llama, split(batch, 0), positions=[5], search=search)
    torch.testing.assert_close(found.scores[0], alone.scores[0], rtol=1e-6, atol=1e-9)
    assert found.path[0].equal(alone.path[0]) and (found.path[0] >= 0).all()
    assert (found.path[1] == -1).all() and (found.scores[1] == 0).all()
    assert found.report["layers_without_gradient"] == []
    assert found.report["without_gradient"] == [[], [0, 1, 2, 3]]
    for aggregate in ("union", "mean"):
        both, first = (mipfast.NeuronPath.select(a, per_layer=5, aggregate=aggregate) for a in (found, alone))
        assert {k: sorted(v.tolist()) for k, v in both.items()} == {k: sorted(v.tolist()) for k, v in first.items()}
    other = mipfast.locate(llama, split(batch, 1), positions=[8], search=search)  # dead in this one's only sample
    assert mipfast.NeuronPath.select([alone, other], per_layer=5).keys() == first.keys()


# ------------------------------------------------------------------------------------ text, Qwen2.5-VL


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("positions", ["last_prompt", "answer", "all"])
def test_qwen_text(qwen, positions, padding):
    same(qwen, text_batch(qwen, [9, 12], [2, 3], padding, seed=1), positions=positions, n_steps=2)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("positions", ["last_prompt", "answer", "prompt", "all"])
def test_qwen_text_with_pictures(qwen, positions, padding):
    """Rows with a small picture, a larger one, two, and none."""
    batch = image_batch(qwen, 4, 2, [56, 84, [56, (84, 56)], []], padding)
    same(qwen, batch, positions=positions, n_steps=2)


@pytest.mark.parametrize("method", ["gaussradau", "riemann_left"])
@pytest.mark.parametrize("objective", ["prob", "log_odds"])
def test_qwen_text_with_pictures_settings(qwen, method, objective):
    same(qwen, image_batch(qwen, 2, 3), method=method, n_steps=3, objective=objective, search="pointwise")


# ---------------------------------------------------------------------------------------------- vision


def test_vision_defaults(qwen):
    """IFI over all patches, greedy, 2 Radau nodes."""
    found = same(qwen, image_batch(qwen, 2, 1), modality="vision")
    assert found.scores.shape == (2, 3, 40)
    assert (found.scores >= 0).all()
    assert not found.report["layers_without_gradient"]


@pytest.mark.parametrize("method", METHODS)
def test_vision_methods(qwen, method):
    same(qwen, image_batch(qwen, 2, 2, [56, 84]), modality="vision", method=method, n_steps=2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("positions", ["all", "first", [0, 5]], ids=str)
def test_vision_positions_and_objectives(qwen, positions, objective):
    batch = image_batch(qwen, 2, 3, [56, (56, 84)])
    same(qwen, batch, modality="vision", positions=positions, objective=objective)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("search", ["greedy", "pointwise"])
def test_vision_unequal_pictures(qwen, search, padding):
    batch = image_batch(qwen, 3, 4, [84, 56, [56, (84, 56)]], padding)
    same(qwen, batch, modality="vision", search=search, n_steps=3)


def test_vision_igi(qwen):
    batch = image_batch(qwen, 2, 5, [56, 84])
    same(qwen, batch, modality="vision", score="igi", method="gausslegendre", n_steps=3)


def test_layer_without_gradient():
    """LLaVA leaves the last vision block unused."""
    llava = tiny_llava(F64)
    found = same(llava, image_batch(llava, 2, 1), modality="vision")
    assert list(found.report["layers_without_gradient"]) == [2]
    assert (found.path[:, 2] == -1).all() and (found.path[:, :2] >= 0).all()


# --------------------------------------------------------------------------------------------- float32


@pytest.mark.parametrize("positions", ["last_prompt", "answer", "all"])
@pytest.mark.parametrize("method", GAUSS)
def test_float32_llama(llama, llama_batch, method, positions):
    settings = dict(method=method, positions=positions, n_steps=3)
    found = mipfast.locate(tiny_llama(), llama_batch, **settings)
    compare(found, slow_locate(llama, llama_batch, **settings), 1e-4)


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_float32_qwen(qwen, modality):
    model = tiny_qwen_vl()
    batch = image_batch(model, 3, 6, [56, 84, 56])
    truth = slow_locate(qwen, {**batch, "pixel_values": batch["pixel_values"].double()}, modality)
    compare(mipfast.locate(model, batch, modality=modality, n_steps=4 if modality == "text" else 2), truth, 1e-4)


# -------------------------------------------------------------- batches, budgets, the model afterwards


def one_by_one(model, batch, found, **settings):
    for i in range(len(batch["input_ids"])):
        alone = mipfast.locate(model, split(batch, i), **settings)
        torch.testing.assert_close(alone.scores[0], found.scores[i], rtol=1e-6, atol=1e-9)
        assert torch.equal(alone.path[0], found.path[i])


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("positions", ["last_prompt", "answer", "all"])
def test_batched_is_one_by_one_text(llama, positions, padding):
    batch = text_batch(llama, [9, 12, 7], [2, 1, 3], padding, seed=7)
    one_by_one(llama, batch, mipfast.locate(llama, batch, positions=positions), positions=positions)


def test_a_batch_of_mixed_lengths_runs_what_each_needs(llama, monkeypatch):
    """A window per sample: the widest of them, not from the shortest prompt's end to the longest answer's."""
    rows = []

    def count(module, args):
        rows.append(args[0].shape[1])

    monkeypatch.setattr(search, "_check_route", unchecked_route)
    batch = text_batch(llama, [9, 30, 16], [2, 1, 3], seed=7)
    with llama.model.layers[0].mlp.register_forward_pre_hook(count):
        mipfast.locate(llama, batch, n_steps=2)
    assert set(rows[rows.index(batch["labels"].shape[1]) + 1 :]) == {3}  # behind the clean run


def test_a_label_before_the_chosen_positions(llama, caplog):
    """Its logits are not the first chosen position's."""
    batch = text_batch(llama, [12, 12], [4, 5])
    same(llama, batch, positions=[9], n_steps=2)
    assert "natively" not in caplog.text


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_batched_is_one_by_one_pictures(qwen, modality, padding):
    batch = image_batch(qwen, 3, 8, [56, 84, (56, 84)], padding)
    one_by_one(qwen, batch, mipfast.locate(qwen, batch, modality=modality), modality=modality)


def test_an_iterable_of_batches(llama):
    batches = [text_batch(llama, [9, 12], [2, 1], seed=8), text_batch(llama, [7], [3], seed=9)]
    found = mipfast.locate(llama, batches)
    want = [mipfast.locate(llama, batch) for batch in batches]
    torch.testing.assert_close(found.scores, torch.cat([w.scores for w in want]))
    assert torch.equal(found.path, torch.cat([w.path for w in want]))
    assert len(found.report["residuals"]) == 3


@pytest.mark.parametrize("modality", ["text", "vision"])
def test_the_memory_budget_changes_nothing(qwen, modality):
    batch = image_batch(qwen, 3, 9, [56, 84, 56])
    small = mipfast.locate(qwen, batch, modality=modality, memory_budget=1, n_steps=3)
    compare(small, slow_locate(qwen, batch, modality, n_steps=3))


def test_config_and_overrides(llama, llama_batch):
    config = mipfast.LocateConfig(n_steps=2, positions="answer", top_k=3)
    settings = dict(n_steps=2, positions="answer", top_k=4)
    compare(mipfast.locate(llama, llama_batch, config, top_k=4), slow_locate(llama, llama_batch, **settings))
    assert config.top_k == 3


@pytest.mark.parametrize("modality", ["text", "vision"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_left_as_it_was(modality, grad):
    model = tiny_qwen_vl()
    batch = image_batch(model, 2, 10, [56, 84])
    next(model.parameters()).requires_grad_(False)
    inputs = {name: value.clone() for name, value in batch.items()}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = [weight.requires_grad for weight in model.parameters()]
    with torch.no_grad():
        before = model(**batch).logits
    with torch.set_grad_enabled(grad):
        mipfast.locate(model, batch, modality=modality)
    with torch.no_grad():
        assert torch.equal(before, model(**batch).logits)
    assert wanted == [weight.requires_grad for weight in model.parameters()]
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert inputs.keys() == batch.keys()
    assert all(torch.equal(inputs[name], value) for name, value in batch.items())
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks and "forward" not in vars(module)
    assert not model.training


# ---------------------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("positions", ["last_prompt", "answer", "all"])
@pytest.mark.parametrize("search", ["greedy", "pointwise"])
def test_completeness_is_exact_on_a_polynomial(polynomial, search, positions):
    """`tiny_polynomial`'s F is of degree 8 at most in alpha (after layer 0 come 3 native layers, each doubles
    the degree; what is overwritten is linear in alpha), so dF/dalpha is of degree 7 at most: 4 Gauss-Legendre
    (exact to degree 2n - 1) or 5 Radau nodes (2n - 2) integrate it without error."""
    batch = text_batch(polynomial, [9, 12], [2, 3], seed=1)
    settings = dict(objective="log_odds", positions=positions, search=search)
    coarse = mipfast.locate(polynomial, batch, n_steps=2, **settings)
    assert torch.tensor(coarse.report["residuals"]).max() > 1e-4
    for method, n in (("gausslegendre", 4), ("gaussradau", 5)):
        found = same(polynomial, batch, method=method, n_steps=n, **settings)
        assert torch.tensor(found.report["residuals"]).max() < 1e-10


def test_completeness_in_float32_is_off_by_rounding_alone():
    """F is of the size of 100 here and F(1) - F(0) smaller: 1e-4 is what float32 can say about it."""
    model = tiny_polynomial(torch.float32)
    batch = text_batch(model, [9, 12], [2, 3], seed=1)
    found = mipfast.locate(model, batch, objective="log_odds")
    assert torch.tensor(found.report["residuals"]).max() < 1e-4


@pytest.mark.parametrize("search", ["greedy", "pointwise"])
def test_completeness_improves_with_nodes(llama, llama_batch, search):
    """Gauss-Legendre on a real non-polynomial F: every doubling of the nodes pays."""
    worst = []
    for n in (1, 2, 4, 8, 16):
        found = mipfast.locate(llama, llama_batch, n_steps=n, search=search)
        worst.append(torch.tensor(found.report["residuals"]).max().item())
    assert all(finer < coarser / 5 for coarser, finer in zip(worst, worst[1:], strict=False)), worst
    assert worst[-1] < 1e-8


# ---------------------------------------------------------------------------------------------- errors


def test_fused_experts_are_refused_clearly():
    model = tiny_moe()
    with pytest.raises(mipfast.MipfastError, match="(?i)expert"):
        mipfast.locate(model, text_batch(model, [9], [2]))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(method="simpson"),
        dict(objective="accuracy"),
        dict(positions="middle"),
        dict(positions=[40]),
        dict(search="beam"),
        dict(score="taylor"),
        dict(modality="audio"),
        dict(n_steps=0),
        dict(top_k=49),
        dict(method="riemann_trapezoid", n_steps=1),
        dict(combine="product", score="ifi"),
        dict(modality="vision"),  # a text model has no such stack
    ],
    ids=str,
)
def test_wrong_settings_are_refused(llama, llama_batch, wrong):
    with pytest.raises(mipfast.MipfastError):
        mipfast.locate(llama, llama_batch, **wrong)


def test_a_misspelt_setting_is_refused(llama, llama_batch):
    with pytest.raises((mipfast.MipfastError, TypeError)):
        mipfast.locate(llama, llama_batch, steps=4)


def test_labels_are_required(llama, llama_batch):
    with pytest.raises(mipfast.MipfastError, match="label"):
        mipfast.locate(llama, {name: x for name, x in llama_batch.items() if name != "labels"})
    blank = torch.full_like(llama_batch["labels"], -100)
    with pytest.raises(mipfast.MipfastError, match="label"):
        mipfast.locate(llama, {**llama_batch, "labels": blank})


def test_first_position_warns(llama, llama_batch, caplog, recwarn):
    mipfast.locate(llama, llama_batch, positions="first")
    said = [record.getMessage() for record in caplog.records] + [str(w.message) for w in recwarn]
    assert any("first" in message for message in said)


def test_the_batches_are_what_they_say(llama, qwen):
    """Guards the tests above: padding and batching do not change what a row computes."""
    for model, batch in (
        (llama, text_batch(llama, [9, 12, 7], [2, 1, 3], "left")),
        (qwen, text_batch(qwen, [9, 12, 7], [2, 1, 3], "left")),
        (qwen, image_batch(qwen, 3, 0, [56, 84, []], "left")),
    ):
        with torch.no_grad():
            together = model(**batch).logits
            for i in range(3):
                row = batch["attention_mask"][i].bool()
                torch.testing.assert_close(together[i, row], model(**split(batch, i)).logits[0])
    assert (batch["labels"] != -100).sum(-1).tolist() == [1, 2, 3]
    assert batch["labels"].max() >= FIRST_WORD
