"""`locate(tol=...)`: the error is controlled. Against an integrator that is not ours (`slow_oracle`), and the slots it
runs against the fixed rules' engine at the same nodes."""

import logging
from functools import cache

import numpy as np
import pytest
import torch
from families import FAMILIES, Float64, build, pictures, text
from slow_oracle import oracle
from tiny import image_batch, split, text_batch, tiny_llama, tiny_qwen_vl

from mipfast import Attribution, InputError, LocateConfig, locate
from mipfast.scoring import memory, quadrature, slot_wave, slots, wave
from mipfast.scoring.adaptive import LOOSE
from mipfast.scoring.panels import (
    COARSE,
    GRADED,
    WHOLE,
    coarsened,
    error,
    errors,
    integral,
    nodes_of,
    refined,
    refined_to,
)

model = cache(build)
TOWERS = [(name, stack) for name, family in FAMILIES.items() if family.picture for stack in family.stacks]
SEARCHES = ("greedy", "pointwise")

# ------------------------------------------------------------------------------------------- panels


def values(mesh, *functions):
    return torch.tensor([[f(a) for f in functions] for a in nodes_of(mesh)], dtype=torch.float64)


@pytest.mark.parametrize("mesh", [WHOLE, GRADED, ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0))])
def test_a_mesh_is_exact_to_degree_five_and_tells_no_error_to_degree_three(mesh):
    functions = [lambda a, k=k: a**k for k in range(7)]
    found = integral(values(mesh, *functions), mesh)
    exact = torch.tensor([1 / (k + 1) for k in range(7)], dtype=torch.float64)
    torch.testing.assert_close(found[:6], exact[:6], rtol=1e-13, atol=0)
    if mesh == WHOLE:
        assert abs(found[6] - exact[6]) > 1e-4
    of_panels = torch.stack([errors(values(mesh, f), mesh) for f in functions])
    assert of_panels[:4].abs().max() < 1e-15 and of_panels[4].min() > 0


def test_before_any_panel_there_is_a_rule_of_degree_three():
    functions = [lambda a, k=k: a**k for k in range(5)]
    found = integral(values(COARSE, *functions), COARSE)
    exact = torch.tensor([1 / (k + 1) for k in range(5)], dtype=torch.float64)
    torch.testing.assert_close(found[:4], exact[:4], rtol=1e-13, atol=0)
    assert abs(found[4] - exact[4]) > 1e-3
    of_panels = torch.stack([errors(values(COARSE, f), COARSE) for f in functions])[:, 0]
    assert of_panels[:2].abs().max() < 1e-15 and of_panels[2:].min() > 0
    assert error([0.3], COARSE) == 0.3 and set(nodes_of(COARSE)) < set(nodes_of(WHOLE))


def test_refining_to_a_bound_halves_the_worst_as_often_as_it_takes():
    assert refined_to([0.015], COARSE, 129, 0.01) == WHOLE
    assert refined_to([0.03], COARSE, 129, 0.01) == ((0.0, 0.5), (0.5, 1.0))
    mesh = ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0))
    assert refined_to([1.0, 0.01, 0.01], mesh, 129, 0.1) == (
        *((0.0, 0.0625), (0.0625, 0.125), (0.125, 0.1875), (0.1875, 0.25)),
        *mesh[1:],
    )
    assert refined_to([1.0, 0.01, 0.01], mesh, 17, 0.1) == ((0.0, 0.125), (0.125, 0.25), *mesh[1:])


def test_halving_keeps_every_node_and_asks_for_four_more():
    mesh = refined([1.0, 0.1, 0.6], ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0)), 129)
    assert mesh == ((0.0, 0.125), (0.125, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))
    assert len(nodes_of(mesh)) == 13 + 8 and set(nodes_of(mesh)) > set(nodes_of(((0.0, 0.25), (0.25, 0.5), (0.5, 1.0))))


def test_no_more_nodes_than_allowed_worst_panel_first():
    mesh = ((0.0, 0.5), (0.5, 1.0))
    assert refined([0.8, 1.0], mesh, 13) == ((0.0, 0.5), (0.5, 0.75), (0.75, 1.0))
    assert refined([0.8, 1.0], mesh, 12) == mesh


def test_coarsening_puts_halves_together_while_the_error_allows_it():
    peak = lambda a: 1 / (a + 0.02)  # noqa: E731
    mesh = WHOLE
    while error((e := errors(values(mesh, peak), mesh)).tolist(), mesh) > 1e-3:
        mesh = refined(e.tolist(), mesh, 129)
    assert mesh[0][1] < 0.1 and mesh[-1] == (0.5, 1.0)
    for bound in (1e-3, 1e-2, 1e-1, 1e9):
        coarse = coarsened(e.tolist(), mesh, bound)
        assert error(errors(values(coarse, peak), coarse).tolist(), coarse) <= bound
        assert set(nodes_of(coarse)) <= set(nodes_of(mesh))
    assert coarse == WHOLE
    assert coarsened(e.tolist(), mesh, 0.0) == mesh


@pytest.mark.parametrize("peak", [0.5, 0.1, 0.01, 0.001])
def test_the_estimate_is_above_the_error(peak):
    functions = [lambda a: 1 / (a + peak), lambda a: peak / ((a - 0.3) ** 2 + peak**2), lambda a: np.cos(9 * a)]
    exact = [np.log((1 + peak) / peak), np.arctan(0.7 / peak) + np.arctan(0.3 / peak), np.sin(9) / 9]
    mesh, exact = WHOLE, torch.tensor(exact, dtype=torch.float64)
    for _ in range(40):
        v = values(mesh, *functions)
        of_panels = errors(v, mesh).tolist()
        if error(of_panels, mesh) <= 1e-2:
            break
        mesh = refined(of_panels, mesh, 1025)
    assert (integral(v, mesh) - exact).norm() <= error(of_panels, mesh) <= 1e-2


# ------------------------------------------------------------------------------------------- the truth


@pytest.mark.parametrize(("search", "score"), [("greedy", "igi"), ("greedy", "ifi"), ("pointwise", "igi")])
def test_text_against_the_oracle(search, score):
    llama = tiny_llama(torch.float64)
    batch = text_batch(llama, [9, 7], [2, 1])
    for tol in (1e-2, 1e-5):
        found = locate(llama, batch, search=search, score=score, tol=tol, residuals="all")
        assert (found.error <= tol).all() and found.report["unconverged"] == []
        if score == "igi":
            assert torch.tensor(found.report["residuals"]).max() < 3 * tol + 1e-9
        i = int(tol < 1e-3)  # a sample each
        path = found.path[i] if search == "greedy" else None
        expected, off = oracle(llama, split(batch, i, keep_padding=True), path, score=score)
        assert (off <= 2e-6 * expected.norm(dim=1)).all()
        true = (found.scores[i] - expected).norm(dim=1) / expected.norm(dim=1)
        assert (true <= tol).all() and (true <= found.error[i] + 2e-6).all()  # the oracle's own


@pytest.mark.parametrize(("positions", "search"), [("all", "greedy"), ("answer", "pointwise")])
def test_several_positions_against_the_oracle(positions, search):
    llama = tiny_llama(torch.float64)
    batch = text_batch(llama, [5, 8], [3, 2], "left")
    found = locate(llama, batch, search=search, positions=positions, objective="log_odds", tol=1e-5)
    path = found.path[0] if search == "greedy" else None
    expected, _ = oracle(llama, split(batch, 0, keep_padding=True), path, positions=positions, objective="log_odds")
    assert ((found.scores[0] - expected).norm(dim=1) <= 1e-5 * expected.norm(dim=1)).all()


def test_vision_against_the_oracle():
    qwen = tiny_qwen_vl(torch.float64)
    batch = image_batch(qwen, 2, 3)
    found = locate(qwen, batch, modality="vision", tol=1e-4)
    expected, _ = oracle(qwen, split(batch, 1), found.path[1], "vision", "all", score="ifi")
    assert ((found.scores[1] - expected).norm(dim=1) <= 1e-4 * expected.norm(dim=1)).all()


# ------------------------------------------------------------------------------------------- slots


@pytest.fixture
def five_nodes(monkeypatch):
    """Every layer of every sample at five nodes, and the fixed rule that has the same."""
    boole = np.linspace(0, 1, 5), np.array([7, 32, 12, 32, 7]) / 90
    monkeypatch.setitem(quadrature.RULES, "boole", lambda n: boole)
    return lambda given: dict(n_steps=5, method="boole") if given else dict(tol=1e-12, max_nodes=5)


def assert_same(found, expected):
    scale = expected.scores.abs().amax(2, keepdim=True)
    assert ((found.scores - expected.scores).abs() <= 3e-7 * scale).all()
    assert found.report["without_gradient"] == expected.report["without_gradient"]
    for one, other in zip(found.report["residuals"], expected.report["residuals"], strict=True):
        if other is None:  # a family without forward-mode derivatives
            assert one is None
        else:
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", FAMILIES)
def test_text_of_every_family(name, search, five_nodes):
    batch = text(name) if FAMILIES[name].text else pictures(name, model(name))
    settings = dict(positions="prompt", search=search, residuals="all")
    with Float64():
        assert_same(*(locate(model(name), batch, **settings, **five_nodes(given)) for given in (False, True)))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("name", "stack"), TOWERS)
def test_vision_of_every_family(name, stack, search, five_nodes):
    batch, settings = pictures(name, model(name)), dict(modality="vision", stack=stack, search=search, residuals="all")
    with Float64():
        assert_same(*(locate(model(name), batch, **settings, **five_nodes(given)) for given in (False, True)))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_counterfactuals(modality, search, five_nodes):
    qwen = tiny_qwen_vl(torch.float64)
    batch, other = image_batch(qwen, 2, 3), image_batch(qwen, 2, 4)
    settings = dict(modality=modality, positions="all", counterfactuals=other, search=search, residuals="all")
    assert_same(*(locate(qwen, batch, **settings, **five_nodes(given)) for given in (False, True)))


@pytest.mark.parametrize(("search", "tol"), [("greedy", 1e-5), *(("pointwise", 10.0**-k) for k in (3, 4, 5, 6))])
def test_a_sample_gets_what_it_gets_alone(search, tol):
    """Also where another sample asked for its nodes before it did."""
    llama = tiny_llama(torch.float64)
    batch = text_batch(llama, [9, 12, 7], [2, 3, 1])
    settings = dict(search=search, tol=tol, residuals="all", positions="answer", max_nodes=400)
    found = locate(llama, batch, **settings)
    nodes = torch.tensor(found.report["nodes"])
    assert not (nodes == nodes[:1]).all()
    for i in range(3):
        alone = locate(llama, split(batch, i, keep_padding=True), **settings)
        assert alone.report["nodes"] == [found.report["nodes"][i]]
        torch.testing.assert_close(alone.scores[0], found.scores[i], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(alone.error[0], found.error[i], rtol=1e-3, atol=1e-12)


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("modality", ["text", "vision"])
def test_any_budget_gives_the_same_scores(modality, search):
    qwen = tiny_qwen_vl(torch.float64)
    batch = image_batch(qwen, 2, 3)
    settings = dict(modality=modality, search=search, tol=1e-4)
    expected = locate(qwen, batch, **settings)
    for budget in (1, 1_000_000):
        found = locate(qwen, batch, memory_budget=budget, **settings)
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("search", SEARCHES)
def test_out_of_memory_goes_on_in_halves(search, monkeypatch, caplog):
    llama = tiny_llama(torch.float64)
    batch, settings = text_batch(llama, [9, 12], [2, 3]), dict(search=search, tol=1e-5, residuals="all")
    expected, scored = locate(llama, batch, **settings), slots.Slots.scored

    def short(self, act):
        if len(self.slots) > 5 and not isinstance(self, slots.CleanSlots):
            raise torch.OutOfMemoryError
        return scored(self, act)

    def short_of_waves(self, **how):
        if self.copies > 3:
            raise torch.OutOfMemoryError
        return score(self, **how)

    def short_of_slots(self):
        if self.copies > 3:
            halved.append(self)
            raise torch.OutOfMemoryError
        return score_slots(self)

    score, score_slots, halved = wave.Wave.score, slot_wave.SlotWave.score, []
    monkeypatch.setattr(slots.Slots, "scored", short)
    monkeypatch.setattr(wave.Wave, "score", short_of_waves)
    monkeypatch.setattr(slot_wave.SlotWave, "score", short_of_slots)
    with caplog.at_level(logging.WARNING, "mipfast"):
        found = locate(llama, batch, **settings)
    assert "out of memory: going on with" in caplog.text
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-6, atol=1e-12)
    assert found.report["nodes"] == expected.report["nodes"]
    assert (search == "pointwise") == bool(halved)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_wave_has_only_what_its_samples_asked_for(padding, monkeypatch):
    seen, score = [], slot_wave.SlotWave.score
    monkeypatch.setattr(slot_wave.SlotWave, "score", lambda self: (seen.append(self.slots), score(self))[1])
    llama = tiny_llama(torch.float64)
    found = locate(llama, text_batch(llama, [9, 12, 7], [2, 3, 1], padding), search="pointwise", tol=1e-5)
    added = [slot for of_wave in seen for of_layer in of_wave for slot in of_layer]
    first = [len(nodes_of(mesh)) for mesh in (GRADED, *[COARSE] * (found.scores.shape[1] - 1))]
    assert len(added) == sum(n - m for nodes in found.report["nodes"] for n, m in zip(nodes, first, strict=True))


def test_a_replay_holds_no_more_slots_than_fit(monkeypatch):
    llama, seen, scored = tiny_llama(), [], slots.Slots.scored
    monkeypatch.setattr(slots.Slots, "scored", lambda self, act: (seen.append(len(self.slots)), scored(self, act))[1])
    monkeypatch.setattr(memory, "copies_that_fit", lambda captured, budget: 3)
    locate(llama, text_batch(llama, [9, 12], [2, 3]), tol=1e-3)
    assert 1 < max(seen) <= 6


# ------------------------------------------------------------------------------------------- what is said


def test_what_does_not_reach_tol_is_named(caplog, tmp_path):
    llama = tiny_llama(torch.float64)
    batch = text_batch(llama, [9, 12], [2, 3])
    with caplog.at_level(logging.WARNING, "mipfast"):
        found = locate(llama, batch, tol=1e-12, max_nodes=45)
    above = (found.error > 1e-12).nonzero().tolist()
    assert above and found.report["unconverged"] == above
    assert f"{len(above)} of 8 layers of samples are not known to tol=1e-12 after 45 nodes" in caplog.text
    assert max(map(max, found.report["nodes"])) <= 45
    found.save_pretrained(tmp_path)
    again = Attribution.from_pretrained(tmp_path)
    assert torch.equal(again.error, found.error) and again.report == found.report


def test_a_fixed_rule_does_not_know_its_error():
    llama = tiny_llama()
    found = locate(llama, text_batch(llama, [9], [2]), n_steps=4)
    assert found.error.shape == (1, 4) and found.error.isnan().all() and "nodes" not in found.report


@pytest.mark.parametrize("search", SEARCHES)
def test_a_loose_tol_asks_for_more_than_its_own_estimate(search):
    """Four times what is loose is aimed at as that, and said as four times as much."""
    llama = tiny_llama(torch.float64)
    batch = text_batch(llama, [9, 7], [2, 1])
    loose, tight = (locate(llama, batch, search=search, tol=tol) for tol in (4 * LOOSE, LOOSE))
    assert torch.equal(loose.scores, tight.scores) and loose.report["nodes"] == tight.report["nodes"]
    torch.testing.assert_close(loose.error, 4 * tight.error)


def test_the_margin_is_the_gap_below_the_path_over_the_error():
    llama = tiny_llama(torch.float64)
    found = locate(llama, text_batch(llama, [9, 12], [2, 3]), tol=1e-2, top_k=3)
    ordered = found.scores.sort(dim=2, descending=True).values
    margins = (ordered[..., 2] - ordered[..., 3]) / (found.error * found.scores.norm(dim=2))
    torch.testing.assert_close(torch.tensor(found.report["margins"]), margins, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(tol=0.0), "tol=0.0; expected a number between 0 and 1"),
        (dict(tol=0.01, n_steps=4), "n_steps=4, a fixed rule"),
        (dict(tol=0.01, method="gaussradau"), "method='gaussradau', a fixed rule"),
        (dict(tol=0.01, combine="product"), "combine='product'"),
        (dict(tol=0.01, search="one-pass"), "search='one-pass'"),
        (dict(tol=0.01, max_nodes=4), "max_nodes=4; expected at least 5"),
        (dict(n_steps=4, max_nodes=64), "and no fixed rule"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, said):
    with pytest.raises(InputError, match=said):
        LocateConfig(**settings)
