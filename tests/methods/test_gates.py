"""The gate in closed form, against a naive solution of the same problem, and what it writes to a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rs_gguf.activations.activations import MatrixInputs
from rs_gguf.errors import InputError
from rs_gguf.estimators.labels import MIN_SAMPLES, Labels
from rs_gguf.methods import adapter
from rs_gguf.methods.gates import HARMFUL_TARGET_RATIO, OFF_TARGET_WEIGHT, GatedAdapterFit, fit_gated_adapter

Float64 = npt.NDArray[np.float64]
LAYERS, WIDTH, OUT = 3, 12, 8
RIDGES = (0.05, 1.0, 20.0)
KINDS = ("sensitive", "benign", "harmful")


def problem(per_class: int = 8, width: int = WIDTH, seed: int = 0) -> tuple[MatrixInputs, Any, Labels]:
    """Inputs of one matrix, block outputs and labels: every kind refused and answered, and neutral ones.

    With 8 a class there are more rows than columns, with few a class fewer: both ways of the solver.
    """
    rng = np.random.default_rng(seed)
    kinds = np.repeat(["sensitive", "benign", "harmful"], 2 * per_class)
    count = len(kinds)
    confidence = rng.uniform(0.2, 1.0, count) * np.tile([1, -1], count // 2)
    confidence[5::7] = rng.uniform(-0.15, 0.15, len(confidence[5::7]))
    offset = {kind: rng.standard_normal((LAYERS, width)) for kind in ("sensitive", "benign", "harmful")}
    last = np.stack([offset[kind] for kind in kinds]) + rng.standard_normal((count, LAYERS, width))
    inputs = MatrixInputs(
        last_token=last.astype(np.float32),
        prompt_tokens=rng.standard_normal((5, LAYERS, width)).astype(np.float16),
        answer_tokens=rng.standard_normal((3, LAYERS, width)).astype(np.float16),
        template_tokens=(3 * rng.standard_normal((2, LAYERS, width))).astype(np.float32),
    )
    residuals = rng.standard_normal((count, LAYERS, OUT)).astype(np.float32)
    return inputs, residuals, Labels.of(confidence, kinds)


def members(labels: Labels) -> dict[str, Float64]:
    """Normalised weights of the three kinds, answered, refused or neither."""
    assert labels.kinds is not None
    return {kind: (labels.kinds == kind) / (labels.kinds == kind).sum() for kind in KINDS}


def difference(labels: Labels) -> Float64:
    """Weights of the contrast: refused minus answered sensitive, each by |confidence|."""
    refused = np.where((labels.kinds == "sensitive") & (labels.confidence > 0.15), labels.confidence, 0.0)
    answered = np.where((labels.kinds == "sensitive") & (labels.confidence < -0.15), labels.confidence, 0.0)
    found: Float64 = refused / refused.sum() - answered / answered.sum()
    return found


def metric(
    inputs: MatrixInputs, layer: int, labels: Labels, ridge: float, quiet: float = OFF_TARGET_WEIGHT
) -> Float64:
    """S + ρI of the docstring, row by row."""
    x = np.asarray(inputs.last_token[:, layer], dtype=np.float64)
    width = x.shape[1]
    energy = np.zeros((width, width))
    for weights in members(labels).values():
        for weight, row in zip(weights, x - weights @ x, strict=True):
            energy += weight / 3 * np.outer(row, row)
    for tokens in (inputs.prompt_tokens, inputs.answer_tokens, inputs.template_tokens):
        for row in np.asarray(tokens[:, layer], dtype=np.float64):
            energy += quiet / len(tokens) * np.outer(row, row)
    cells = []
    for names in labels.groups.T:
        for kind in ("harmful", "benign"):
            weights = members(labels)[kind]
            for cell in set(names[weights > 0]) - {""}:
                inside = np.where(names == cell, weights, 0.0)
                if (inside > 0).sum() >= MIN_SAMPLES:
                    cells.append(inside @ x / inside.sum())
    for mean in cells:
        energy += np.outer(mean, mean) / len(cells)
    found: Float64 = energy + ridge * np.trace(energy) / width * np.eye(width)
    return found


def means(inputs: MatrixInputs, layer: int, labels: Labels) -> Float64:
    """Means [3, W] of the kinds."""
    x = np.asarray(inputs.last_token[:, layer], dtype=np.float64)
    return np.stack([weights @ x for weights in members(labels).values()])


def naive(
    inputs: MatrixInputs,
    layer: int,
    labels: Labels,
    ridge: float,
    wanted: Any,
    quiet: float = OFF_TARGET_WEIGHT,
) -> Float64:
    """The constrained minimum as one linear system, Lagrange multipliers included."""
    constraints = means(inputs, layer, labels)
    system = np.block(
        [[metric(inputs, layer, labels, ridge, quiet), constraints.T], [constraints, np.zeros((3, 3))]]
    )
    right = np.concatenate([np.zeros(constraints.shape[1]), wanted])
    return np.linalg.solve(system, right)[: constraints.shape[1]]


def fitted(
    inputs: MatrixInputs, residuals: Any, labels: Labels, *, ridges: Any = RIDGES, **options: Any
) -> GatedAdapterFit:
    return fit_gated_adapter({"ffn_down": inputs}, residuals, labels, ridges=ridges, **options)


def in_cells(labels: Labels, names: npt.ArrayLike) -> Labels:
    return Labels.of(labels.confidence, labels.kinds, names)


@pytest.mark.parametrize(("per_class", "width"), [(8, WIDTH), (2, 40)])
@pytest.mark.parametrize("quiet", [OFF_TARGET_WEIGHT, 0.7])
def test_reads_are_the_constrained_minimum(per_class: int, width: int, quiet: float) -> None:
    inputs, residuals, labels = problem(per_class, width)
    rng = np.random.default_rng(1)
    cells = rng.choice(["law", "health", ""], (len(labels.confidence), 2))
    labels = in_cells(labels, cells)
    gates = fitted(inputs, residuals, labels, quiet=quiet)
    assert gates.sensitive_gate["ffn_down"].shape == (len(RIDGES), LAYERS, width)
    for k, ridge in enumerate(RIDGES):
        for layer in range(LAYERS):
            for found, wanted in (
                (gates.sensitive_gate, [1, 0, 0]),
                (gates.benign_gate, [0, 1, HARMFUL_TARGET_RATIO]),
            ):
                expected = naive(inputs, layer, labels, ridge, wanted, quiet)
                np.testing.assert_allclose(found["ffn_down"][k, layer], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("per_class", "width"), [(8, WIDTH), (1, 40)])
def test_means_of_the_kinds_are_met_exactly(per_class: int, width: int) -> None:
    inputs, residuals, labels = problem(per_class, width)
    gates = fitted(inputs, residuals, labels)
    for found, wanted in (
        (gates.sensitive_gate, [1.0, 0.0, 0.0]),
        (gates.benign_gate, [0.0, 1.0, HARMFUL_TARGET_RATIO]),
    ):
        for layer in range(LAYERS):
            answers = means(inputs, layer, labels) @ found["ffn_down"][:, layer].T
            np.testing.assert_allclose(answers.T, [wanted] * len(RIDGES), atol=1e-9)


def test_no_other_gate_with_the_same_answers_has_less_energy() -> None:
    inputs, residuals, labels = problem()
    reads = fitted(inputs, residuals, labels).sensitive_gate["ffn_down"]
    rng = np.random.default_rng(2)
    for k, ridge in enumerate(RIDGES):
        energy, constraints = metric(inputs, 1, labels, ridge), means(inputs, 1, labels)
        gate = reads[k, 1]
        steps = rng.standard_normal((200, WIDTH))
        steps -= steps @ np.linalg.pinv(constraints) @ constraints  # answers of the means stay
        for size in (1e-3, 1.0):
            others = gate + size * np.linalg.norm(gate) * steps
            np.testing.assert_allclose(others @ constraints.T, [[1.0, 0.0, 0.0]] * 200, atol=1e-9)
            assert (np.einsum("ij,jk,ik->i", others, energy, others) > gate @ energy @ gate).all()


def test_weights_are_as_copies() -> None:
    inputs, residuals, labels = problem()
    confidence = np.sign(labels.confidence) * np.where(np.abs(labels.confidence) > 0.6, 1.0, 0.5)
    weights = np.where(np.arange(len(confidence)) % 3, 1.0, 2.0)
    once = fitted(inputs, residuals, Labels.of(confidence, labels.kinds, sample_weight=weights))
    copies = np.repeat(np.arange(len(confidence)), weights.astype(int))
    twice = fitted(
        inputs.of(copies),
        residuals[copies],
        Labels.of(confidence[copies], np.asarray(labels.kinds)[copies]),
    )
    np.testing.assert_allclose(once.sensitive_gate["ffn_down"], twice.sensitive_gate["ffn_down"], rtol=1e-8)
    np.testing.assert_allclose(once.contrast, twice.contrast, rtol=1e-10)


def test_reads_do_not_ask_what_was_refused() -> None:
    inputs, residuals, labels = problem()
    before = fitted(inputs, residuals, labels)
    after = fitted(inputs, residuals, Labels.of(-labels.confidence, labels.kinds))
    np.testing.assert_array_equal(before.sensitive_gate["ffn_down"], after.sensitive_gate["ffn_down"])
    assert np.abs(before.contrast - after.contrast).max() > 0.1


def test_the_contrast_is_of_refused_and_answered_sensitive_prompts() -> None:
    inputs, residuals, labels = problem()
    weights = difference(labels)
    outside = weights == 0
    assert outside.sum() > 10  # neutral, all harmful, all benign
    found = fitted(inputs, np.where(outside[:, None, None], 1e3, residuals), labels).contrast
    np.testing.assert_allclose(found, np.tensordot(weights, residuals.astype(np.float64), 1), rtol=1e-9)


@pytest.mark.parametrize("induce", [False, True])
def test_what_cells_have_of_their_own_is_not_in_the_contrast(induce: bool) -> None:
    """Against least squares on the side and all cells at once, with a row for each cell's ridge."""
    inputs, residuals, labels = problem(per_class=16)
    rng = np.random.default_rng(6)
    cells = rng.choice(["letter", "poem", "plan", ""], (len(labels.confidence), 2), p=[0.5, 0.3, 0.15, 0.05])
    sensitive, harmful = labels.kinds == "sensitive", labels.kinds == "harmful"
    refused, answered = labels.confidence > 0.15, labels.confidence < -0.15
    one, other = (answered & ~harmful, refused) if induce else (sensitive & refused, sensitive & answered)
    cells[np.flatnonzero(one)[:3], 0] = "song"  # of one side alone: nothing to compare
    weights = np.where(one | other, np.abs(labels.confidence), 0.0)
    columns = [one.astype(float) - other, np.ones(len(weights))]
    ridges = []
    for grouping in range(2):
        for name in ("letter", "poem", "plan"):
            columns.append((cells[:, grouping] == name).astype(float))
            ridges.append(np.eye(8)[len(columns) - 1])
    rows = np.concatenate([np.sqrt(weights)[:, None] * np.stack(columns, axis=1), ridges])
    for layer in range(LAYERS):
        outputs = np.sqrt(weights)[:, None] * residuals[:, layer].astype(np.float64)
        right = np.concatenate([outputs, np.zeros((len(ridges), OUT))])
        expected = 2 * np.linalg.lstsq(rows, right)[0][0]
        found = fitted(inputs, residuals, in_cells(labels, cells), induce=induce).contrast[layer]
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


def test_a_form_that_is_refused_more_is_not_taken_for_the_refusal() -> None:
    inputs, residuals, labels = problem(per_class=40)
    rng = np.random.default_rng(7)
    refused = labels.confidence > 0.15
    poem = rng.random(len(refused)) < np.where(refused, 0.8, 0.2)
    form, refusal = np.eye(OUT)[:2]
    outputs = (residuals + 5 * poem[:, None, None] * form + 3 * refused[:, None, None] * refusal).astype(
        np.float32
    )
    names = np.where(poem, "poem", "letter")
    mixed = fitted(inputs, outputs, labels).contrast.mean(axis=0)
    apart = fitted(inputs, outputs, in_cells(labels, names)).contrast.mean(axis=0)
    assert mixed @ form > 2
    assert abs(apart @ form) < 0.7
    assert abs(apart @ refusal - 3) < 0.7


def test_samples_without_a_confidence_help_to_tell_the_kinds_apart() -> None:
    """Their block outputs are not asked for: the contrast is of the judged ones."""
    inputs, residuals, labels = problem(per_class=12)
    assert labels.kinds is not None
    judged = np.arange(len(labels.confidence)) % 3 > 0
    order = np.concatenate([np.flatnonzero(judged), np.flatnonzero(~judged)])
    confidence = np.where(judged, labels.confidence, 0.0)[order]
    found = fitted(inputs.of(order), residuals[judged], Labels.of(confidence, labels.kinds[order]))
    alone = Labels.of(labels.confidence[judged], labels.kinds[judged])
    np.testing.assert_allclose(
        found.contrast, fitted(inputs.of(order[: judged.sum()]), residuals[judged], alone).contrast
    )
    reads = fitted(inputs, residuals, labels).sensitive_gate["ffn_down"]
    np.testing.assert_allclose(found.sensitive_gate["ffn_down"], reads, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("left", [MIN_SAMPLES - 1, MIN_SAMPLES])
def test_where_hardly_a_sensitive_prompt_is_answered_benign_ones_take_their_place(left: int) -> None:
    inputs, residuals, labels = problem(per_class=12)
    answered = np.flatnonzero((labels.kinds == "sensitive") & (labels.confidence < -0.15))
    confidence = labels.confidence.copy()
    confidence[answered[left:]] = 0.1
    labels = Labels.of(confidence, labels.kinds)
    other = "sensitive" if left == MIN_SAMPLES else "benign"
    refused = np.where((labels.kinds == "sensitive") & (confidence > 0.15), confidence, 0.0)
    kept = np.where((labels.kinds == other) & (confidence < -0.15), confidence, 0.0)
    expected = np.tensordot(refused / refused.sum() - kept / kept.sum(), residuals.astype(np.float64), 1)
    np.testing.assert_allclose(fitted(inputs, residuals, labels).contrast, expected, rtol=1e-9)


def test_a_cell_that_the_class_mean_hides_is_quietened() -> None:
    inputs, residuals, labels = problem(per_class=12)
    harmful = np.flatnonzero(members(labels)["harmful"])
    # Two topics on either side of the mean: the constraint on the mean alone leaves both open.
    names = np.full(len(labels.confidence), "", dtype="<U8")
    names[harmful] = np.where(np.arange(len(harmful)) % 2, "weapons", "fraud")
    side = np.where(names == "weapons", 2.0, np.where(names == "fraud", -2.0, 0.0))
    axis = np.random.default_rng(4).standard_normal(WIDTH)
    last = inputs.last_token + side[:, None, None] * axis

    def loudest(found: Labels) -> float:
        read = fitted(replace(inputs, last_token=last), residuals, found, ridges=1.0).sensitive_gate[
            "ffn_down"
        ][0, 0]
        cells = [np.where(names == cell, members(labels)["harmful"], 0.0) for cell in ("weapons", "fraud")]
        return max(abs(float(cell / cell.sum() @ last[:, 0] @ read)) for cell in cells)

    assert loudest(in_cells(labels, names)) < 0.7 * loudest(labels)


def test_a_cell_of_few_samples_is_left_out() -> None:
    inputs, residuals, labels = problem()
    names = np.full(len(labels.confidence), "", dtype="<U8")
    names[np.flatnonzero(members(labels)["harmful"])[: MIN_SAMPLES - 1]] = "rare"
    plain = fitted(inputs, residuals, labels).sensitive_gate["ffn_down"]
    np.testing.assert_array_equal(
        fitted(inputs, residuals, in_cells(labels, names)).sensitive_gate["ffn_down"], plain
    )
    names[np.flatnonzero(members(labels)["harmful"])[:MIN_SAMPLES]] = "rare"
    assert (
        np.abs(fitted(inputs, residuals, in_cells(labels, names)).sensitive_gate["ffn_down"] - plain).max()
        > 1e-4
    )


def test_one_sample_a_class_is_enough() -> None:
    rng = np.random.default_rng(0)
    last = rng.standard_normal((3, 1, 6)).astype(np.float32)
    inputs = MatrixInputs(last, rng.standard_normal((4, 1, 6)), np.empty((0, 1, 6)), np.empty((0, 1, 6)))
    labels = Labels.of([1, -1, 1], ["sensitive", "benign", "harmful"])
    gates = fitted(inputs, rng.standard_normal((3, 1, 4)), labels, ridges=1.0)
    np.testing.assert_allclose(last[:, 0] @ gates.sensitive_gate["ffn_down"][0, 0], [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("empty", "named"),
    [({"sensitive": 1}, "refused sensitive"), ({"sensitive": -1, "benign": -1}, "answered benign")],
)
def test_a_side_of_the_contrast_without_samples_is_named(empty: dict[str, int], named: str) -> None:
    inputs, residuals, labels = problem()
    confidence = labels.confidence
    for kind, side in empty.items():
        confidence = np.where((labels.kinds == kind) & (side * confidence > 0), side * 0.1, confidence)
    with pytest.raises(InputError, match=f"no {named} prompt"):
        fitted(inputs, residuals, Labels.of(confidence, labels.kinds))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_samples_is_named(kind: str) -> None:
    inputs, residuals, labels = problem()
    rest = np.flatnonzero(labels.kinds != kind)
    assert labels.kinds is not None
    with pytest.raises(InputError, match=f"no {kind} prompt"):
        fitted(inputs.of(rest), residuals[rest], Labels.of(labels.confidence[rest], labels.kinds[rest]))


@pytest.mark.parametrize("rows", ["last", "prompts", "answers", "constant"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_found_at_their_block(rows: str, value: float) -> None:
    inputs, residuals, labels = problem()
    broken = getattr(inputs, rows).copy()
    place = int(np.flatnonzero(members(labels)["harmful"])[0]) if rows == "last" else 0
    broken[place, 1, 5] = value
    with pytest.raises(InputError, match=r"ffn_down of layer 1 hold NaN or Inf"):
        fitted(replace(inputs, **{rows: broken}), residuals, labels)
    outputs = residuals.copy()
    outputs[int(np.flatnonzero(difference(labels))[0]), 2, 0] = value
    with pytest.raises(InputError, match=r"block outputs of layer 2 hold NaN or Inf"):
        fitted(inputs, outputs, labels)


def rounded(shape: tuple[int, ...]) -> Any:
    """What is one and the same but for F32's rounding, which depends on what shares a batch."""
    return 1 + 1e-7 * np.random.default_rng(3).standard_normal(shape)


@pytest.mark.parametrize("same", [np.ones, np.zeros, rounded])
def test_a_block_that_does_not_tell_the_classes_apart_has_no_gate(same: Callable[..., Any]) -> None:
    """The other blocks of a band write its part; a matrix that has none leaves all to the other one."""
    inputs, residuals, labels = problem()
    last = inputs.last_token.astype(np.float64)
    last[:, 1] = same(last[:, 1].shape)
    before, found = (
        fitted(inputs, residuals, labels),
        fitted(replace(inputs, last_token=last), residuals, labels),
    )
    for reads, unbroken in (
        (found.sensitive_gate, before.sensitive_gate),
        (found.benign_gate, before.benign_gate),
    ):
        assert not reads["ffn_down"][:, 1].any()
        np.testing.assert_allclose(reads["ffn_down"][:, [0, 2]], unbroken["ffn_down"][:, [0, 2]], atol=1e-5)
    contrast = found.contrast
    factors = found.factors(1.0, 0, 2, 1.0)
    assert list(factors) == ["blk.0.ffn_down.weight", "blk.2.ffn_down.weight"]
    np.testing.assert_allclose(
        factors["blk.2.ffn_down.weight"][1][:, 0], contrast[0] - contrast[2], rtol=1e-5
    )
    assert list(found.factors(1.0, 1, 2, 1.0)) == ["blk.2.ffn_down.weight"]

    both = {"ffn_down": replace(inputs, last_token=last), "attn_output": inputs}
    gates = fit_gated_adapter(both, residuals, labels, ridges=RIDGES)
    factors = gates.factors(1.0, 1, 2, 1.0)
    assert [name for name in factors if name.startswith("blk.1.")] == ["blk.1.attn_output.weight"]
    np.testing.assert_allclose(factors["blk.1.attn_output.weight"][1][:, 0], -contrast[1], rtol=1e-5)

    with pytest.raises(InputError, match="no block"):
        fitted(replace(inputs, last_token=same(last.shape)), residuals, labels)


def test_a_metric_without_any_energy_is_an_error() -> None:
    last = np.eye(3, 6, dtype=np.float32)[:, np.newaxis]
    nothing = np.empty((0, 1, 6), dtype=np.float32)
    labels = Labels.of([1, -1, 1], ["sensitive", "benign", "harmful"])
    with pytest.raises(InputError, match="no block"):
        fitted(MatrixInputs(last, nothing, nothing, nothing), np.ones((3, 1, 4), np.float32), labels)


@pytest.mark.parametrize(("per_class", "width"), [(8, WIDTH), (1, 40)])
def test_a_ridge_that_rounding_swallows_is_an_error(per_class: int, width: int) -> None:
    """Samples twice over leave the metric singular, by either of its two products."""
    inputs, residuals, labels = problem(per_class, width)
    twice = MatrixInputs(**{name: np.concatenate([rows] * 2, axis=2) for name, rows in vars(inputs).items()})
    if per_class == 1:
        twice = replace(twice, prompt_tokens=np.concatenate([twice.prompt_tokens] * 2))
    with pytest.raises(InputError, match=r"is lost in the rounding.*choose a larger ridge"):
        fit_gated_adapter({"ffn_down": twice}, residuals, labels, ridges=[1e-25])


def test_bad_ridges_are_refused() -> None:
    with pytest.raises(InputError, match="positive finite"):
        fitted(*problem(), ridges=[1.0, 0.0])


def test_progress_counts_blocks() -> None:
    told: list[int] = []
    fitted(*problem(), advance=told.append)
    assert told == [1] * LAYERS


@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 2), (1, 1)])
def test_the_band_writes_the_whole_contrast_for_the_mean_sensitive_prompt(first: int, last: int) -> None:
    inputs, residuals, labels = problem()
    other = MatrixInputs(**{name: rows[:, :, :7] for name, rows in vars(inputs).items()})
    gates = fit_gated_adapter({"ffn_down": inputs, "attn_output": other}, residuals, labels, ridges=RIDGES)
    factors = gates.factors(1.0, first, last, 0.5, benign_target=0.25)
    assert set(factors) == {
        f"blk.{layer}.{matrix}.weight"
        for layer in range(first, last + 1)
        for matrix in ("ffn_down", "attn_output")
    }
    written: dict[str, Float64] = {kind: np.zeros(OUT) for kind in KINDS}
    for name, (a, b) in factors.items():
        assert a.dtype == b.dtype == np.float32
        layer, rows = int(name.split(".")[1]), inputs if "ffn_down" in name else other
        assert (a.shape, b.shape) == ((1, rows.last_token.shape[2]), (OUT, 1))
        for kind, mean in zip(KINDS, means(rows, layer, labels), strict=True):
            written[kind] += (b @ a).astype(np.float64) @ mean
    contrast = np.tensordot(difference(labels), residuals[:, last].astype(np.float64), 1)
    np.testing.assert_allclose(written["sensitive"], -0.5 * contrast, atol=1e-4)
    np.testing.assert_allclose(written["benign"], -0.25 * 0.5 * contrast, atol=1e-4)
    np.testing.assert_allclose(written["harmful"], HARMFUL_TARGET_RATIO * -0.25 * 0.5 * contrast, atol=1e-4)


@pytest.mark.parametrize("induce", [False, True])
def test_harm_is_moved_to_a_refusal_and_what_is_benign_to_an_answer(induce: bool) -> None:
    inputs, residuals, labels = problem()
    gates = fitted(inputs, residuals, labels, induce=induce)
    benign_target = adapter.space_of(RIDGES, LAYERS, induce=induce).benign_target
    a, b = gates.factors(1.0, 1, 1, 1.0, benign_target)["blk.1.ffn_down.weight"]
    refusal = gates.contrast[1] * (-1 if induce else 1)
    written = (b @ a).astype(np.float64)
    sensitive, benign, harmful = (refusal @ written @ mean for mean in means(inputs, 1, labels))
    assert (sensitive > 0) == induce
    assert benign < 0 < harmful


def test_strength_scales_what_is_written_alone() -> None:
    gates = fitted(*problem())
    once, twice = gates.factors(20.0, 0, 2, 1.0), gates.factors(20.0, 0, 2, 2.0)
    for name, (a, b) in once.items():
        np.testing.assert_array_equal(twice[name][0], a)
        np.testing.assert_allclose(twice[name][1], 2 * b, rtol=1e-6)


def test_to_induce_the_writes_lead_from_what_is_answered_to_what_is_refused() -> None:
    inputs, residuals, labels = problem()
    assert labels.kinds is not None
    # The topic is not refused at all.
    confidence = np.where(labels.kinds == "sensitive", -np.abs(labels.confidence), labels.confidence)
    labels = Labels.of(confidence, labels.kinds)
    gates = fitted(inputs, residuals, labels, induce=True)
    refused = np.where(confidence > 0.15, confidence, 0.0)
    answered = np.where((labels.kinds != "harmful") & (confidence < -0.15), -confidence, 0.0)
    weights = answered / answered.sum() - refused / refused.sum()
    expected = np.tensordot(weights, residuals.astype(np.float64), 1)
    np.testing.assert_allclose(gates.contrast, expected, rtol=1e-9, atol=1e-12)
