"""Test gate vectors against a naive solution of the same problem, and the output vectors of the factors."""

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
from rs_gguf.methods.gate_vectors import HARMFUL_TARGET_RATIO
from rs_gguf.methods.gates import OFF_TARGET_WEIGHT, GatedAdapterFit, fit_gated_adapter

Float64 = npt.NDArray[np.float64]
LAYERS, WIDTH, OUT = 3, 12, 8
RIDGES = (0.05, 1.0, 20.0)
KINDS = ("sensitive", "benign", "harmful")


def problem(per_class: int = 8, width: int = WIDTH, seed: int = 0) -> tuple[MatrixInputs, Any, Labels]:
    """Return inputs of one matrix, activations and labels; samples of each kind are refused or answered.

    With 8 samples per class there are more rows than columns, with 1 or 2 there are fewer. These are the two
    ways of the solver.
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
    activations = rng.standard_normal((count, LAYERS, OUT)).astype(np.float32)
    return inputs, activations, Labels.of(confidence, kinds)


def members(labels: Labels) -> dict[str, Float64]:
    """Return normalised weights of the three kinds, whatever the confidence."""
    assert labels.kinds is not None
    return {kind: (labels.kinds == kind) / (labels.kinds == kind).sum() for kind in KINDS}


def difference(labels: Labels) -> Float64:
    """Return the weights of the contrast: refused minus answered sensitive samples, by |confidence|."""
    refused = np.where((labels.kinds == "sensitive") & (labels.confidence > 0.15), labels.confidence, 0.0)
    answered = np.where((labels.kinds == "sensitive") & (labels.confidence < -0.15), labels.confidence, 0.0)
    weights: Float64 = refused / refused.sum() - answered / answered.sum()
    return weights


def metric(
    inputs: MatrixInputs, layer: int, labels: Labels, ridge: float, off_target_weight: float
) -> Float64:
    """Return S + ρI of `_gates`, summed row by row."""
    x = np.asarray(inputs.last_token[:, layer], dtype=np.float64)
    width = x.shape[1]
    energy = np.zeros((width, width))
    for weights in members(labels).values():
        for weight, row in zip(weights, x - weights @ x, strict=True):
            energy += weight / 3 * np.outer(row, row)
    for tokens in (inputs.prompt_tokens, inputs.answer_tokens, inputs.template_tokens):
        for row in np.asarray(tokens[:, layer], dtype=np.float64):
            energy += off_target_weight / len(tokens) * np.outer(row, row)
    group_means = []
    for names in labels.groups.T:
        for kind in ("harmful", "benign"):
            weights = members(labels)[kind]
            for group in set(names[weights > 0]) - {""}:
                inside = np.where(names == group, weights, 0.0)
                if (inside > 0).sum() >= MIN_SAMPLES:
                    group_means.append(inside @ x / inside.sum())
    for mean in group_means:
        energy += np.outer(mean, mean) / len(group_means)
    shifted: Float64 = energy + ridge * np.trace(energy) / width * np.eye(width)
    return shifted


def means(inputs: MatrixInputs, layer: int, labels: Labels) -> Float64:
    """Return the means [3, W] of the kinds."""
    x = np.asarray(inputs.last_token[:, layer], dtype=np.float64)
    return np.stack([weights @ x for weights in members(labels).values()])


def constrained(energy: Float64, constraints: Float64, targets: Float64) -> Float64:
    """Return the minimum [W, …] of each column of targets [C, …], from a system with Lagrange multipliers."""
    count, width = constraints.shape
    system = np.block([[energy, constraints.T], [constraints, np.zeros((count, count))]])
    right = np.concatenate([np.zeros((width, *targets.shape[1:])), targets])
    return np.linalg.solve(system, right)[:width]


def naive(
    inputs: MatrixInputs,
    layer: int,
    labels: Labels,
    ridge: float,
    targets: Any,
    off_target_weight: float,
) -> Float64:
    """Return the constrained minimum for the means of the kinds."""
    energy = metric(inputs, layer, labels, ridge, off_target_weight)
    return constrained(energy, means(inputs, layer, labels), np.asarray(targets))


def fitted(
    inputs: MatrixInputs, activations: Any, labels: Labels, *, ridges: Any = RIDGES, **options: Any
) -> GatedAdapterFit:
    return fit_gated_adapter({"ffn_down": inputs}, activations, labels, ridges=ridges, **options)


def in_groups(labels: Labels, names: npt.ArrayLike) -> Labels:
    return Labels.of(labels.confidence, labels.kinds, names)


@pytest.mark.parametrize(("per_class", "width"), [(8, WIDTH), (2, 40)])
@pytest.mark.parametrize("weight", [OFF_TARGET_WEIGHT, 0.7])
def test_gate_vectors_are_the_constrained_minimum(
    per_class: int, width: int, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rs_gguf.methods.gates.TOPIC_SAMPLES", 99)
    inputs, activations, labels = problem(per_class, width)
    rng = np.random.default_rng(1)
    labels = in_groups(labels, rng.choice(["law", "health", ""], (len(labels.confidence), 2)))
    gates = fitted(inputs, activations, labels, off_target_weight=weight)
    assert gates.sensitive_gate["ffn_down"].shape == (len(RIDGES), LAYERS, width)
    for k, ridge in enumerate(RIDGES):
        for layer in range(LAYERS):
            for gate, targets in (
                (gates.sensitive_gate, [1, 0, 0]),
                (gates.benign_gate, [0, 1, HARMFUL_TARGET_RATIO]),
            ):
                expected = naive(inputs, layer, labels, ridge, targets, weight)
                np.testing.assert_allclose(gate["ffn_down"][k, layer], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("per_class", "width"), [(8, WIDTH), (1, 40)])
def test_gate_activations_on_the_kind_means_are_exact(per_class: int, width: int) -> None:
    inputs, activations, labels = problem(per_class, width)
    gates = fitted(inputs, activations, labels)
    for gate, targets in (
        (gates.sensitive_gate, [1.0, 0.0, 0.0]),
        (gates.benign_gate, [0.0, 1.0, HARMFUL_TARGET_RATIO]),
    ):
        for layer in range(LAYERS):
            gate_activations = means(inputs, layer, labels) @ gate["ffn_down"][:, layer].T
            np.testing.assert_allclose(gate_activations.T, [targets] * len(RIDGES), atol=1e-9)


@pytest.mark.parametrize(("per_class", "width"), [(8, WIDTH), (2, 40)])
def test_each_harmful_topic_is_a_constraint(
    per_class: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rs_gguf.methods.gates.TOPIC_SAMPLES", 1)
    inputs, activations, labels = problem(per_class, width)
    labels = in_groups(labels, np.resize(["law", "health", ""], len(labels.confidence)))
    gates = fitted(inputs, activations, labels)
    for k, ridge in enumerate(RIDGES):
        for layer in range(LAYERS):
            x = np.asarray(inputs.last_token[:, layer], dtype=np.float64)
            masks = [labels.groups[:, 0] == name for name in ("law", "health", "")]
            parts = [np.where(mask, members(labels)["harmful"], 0.0) for mask in masks]
            topics = [part @ x / part.sum() for part in parts]
            constraints = np.stack([*means(inputs, layer, labels)[:2], *topics])
            targets = np.array([[1.0, 0.0], [0.0, 1.0], *[[0.0, HARMFUL_TARGET_RATIO]] * 3])
            expected = constrained(
                metric(inputs, layer, labels, ridge, OFF_TARGET_WEIGHT), constraints, targets
            )
            for number, gate in enumerate((gates.sensitive_gate, gates.benign_gate)):
                np.testing.assert_allclose(
                    gate["ffn_down"][k, layer], expected[:, number], rtol=0, atol=1e-10
                )


def test_topics_with_fewer_samples_share_a_constraint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rs_gguf.methods.gates.TOPIC_SAMPLES", 4)
    inputs, activations, labels = problem(per_class=6)
    names = np.full(len(labels.confidence), "", dtype="<U8")
    harmful = np.flatnonzero(members(labels)["harmful"])
    names[harmful[:5]], names[harmful[5:8]], names[harmful[8:]] = "fraud", "rare", "weapons"
    labels = in_groups(labels, names)
    gates = fitted(inputs, activations, labels)
    x = inputs.last_token[:, 1].astype(np.float64)
    for part in (harmful[:5], harmful[5:8], harmful[8:]):
        activation = x[part].mean(axis=0) @ gates.benign_gate["ffn_down"][0, 1]
        np.testing.assert_allclose(activation, HARMFUL_TARGET_RATIO, atol=1e-9)


def test_no_other_gate_with_the_same_activations_has_less_energy() -> None:
    inputs, activations, labels = problem()
    gates = fitted(inputs, activations, labels).sensitive_gate["ffn_down"]
    rng = np.random.default_rng(2)
    for k, ridge in enumerate(RIDGES):
        energy = metric(inputs, 1, labels, ridge, OFF_TARGET_WEIGHT)
        constraints, gate = means(inputs, 1, labels), gates[k, 1]
        steps = rng.standard_normal((200, WIDTH))
        steps -= steps @ np.linalg.pinv(constraints) @ constraints  # activations on the means stay equal
        for size in (1e-3, 1.0):
            others = gate + size * np.linalg.norm(gate) * steps
            np.testing.assert_allclose(others @ constraints.T, [[1.0, 0.0, 0.0]] * 200, atol=1e-9)
            assert (np.einsum("ij,jk,ik->i", others, energy, others) > gate @ energy @ gate).all()


def test_a_weight_of_2_equals_a_copy() -> None:
    inputs, activations, labels = problem()
    confidence = np.sign(labels.confidence) * np.where(np.abs(labels.confidence) > 0.6, 1.0, 0.5)
    weights = np.where(np.arange(len(confidence)) % 3, 1.0, 2.0)
    once = fitted(inputs, activations, Labels.of(confidence, labels.kinds, sample_weight=weights))
    copies = np.repeat(np.arange(len(confidence)), weights.astype(int))
    twice = fitted(
        inputs.of(copies),
        activations[copies],
        Labels.of(confidence[copies], np.asarray(labels.kinds)[copies]),
    )
    np.testing.assert_allclose(once.sensitive_gate["ffn_down"], twice.sensitive_gate["ffn_down"], rtol=1e-8)
    np.testing.assert_allclose(once.contrast, twice.contrast, rtol=1e-10)


def test_gate_vectors_do_not_depend_on_confidence() -> None:
    inputs, activations, labels = problem()
    before = fitted(inputs, activations, labels)
    after = fitted(inputs, activations, Labels.of(-labels.confidence, labels.kinds))
    np.testing.assert_array_equal(before.sensitive_gate["ffn_down"], after.sensitive_gate["ffn_down"])
    assert np.abs(before.contrast - after.contrast).max() > 0.1


def test_the_contrast_is_of_refused_and_answered_sensitive_prompts() -> None:
    inputs, activations, labels = problem()
    weights = difference(labels)
    outside = weights == 0
    assert outside.sum() > 10  # neutral, all harmful, all benign
    contrast = fitted(inputs, np.where(outside[:, None, None], 1e3, activations), labels).contrast
    np.testing.assert_allclose(contrast, np.tensordot(weights, activations.astype(np.float64), 1), rtol=1e-9)


@pytest.mark.parametrize("induce", [False, True])
def test_the_contrast_leaves_out_what_activations_owe_to_groups(induce: bool) -> None:
    """The reference is least squares on the class and all groups, with a row for the ridge of each group."""
    inputs, activations, labels = problem(per_class=16)
    rng = np.random.default_rng(6)
    groups = rng.choice(["letter", "poem", "plan", ""], (len(labels.confidence), 2), p=[0.5, 0.3, 0.15, 0.05])
    sensitive, harmful = labels.kinds == "sensitive", labels.kinds == "harmful"
    refused, answered = labels.confidence > 0.15, labels.confidence < -0.15
    first, second = (answered & ~harmful, refused) if induce else (sensitive & refused, sensitive & answered)
    groups[np.flatnonzero(first)[:3], 0] = "song"  # in one class only: nothing to compare
    weights = np.where(first | second, np.abs(labels.confidence), 0.0)
    columns = [first.astype(float) - second, np.ones(len(weights))]
    ridges = []
    for grouping in range(2):
        for name in ("letter", "poem", "plan"):
            columns.append((groups[:, grouping] == name).astype(float))
            ridges.append(np.eye(8)[len(columns) - 1])
    rows = np.concatenate([np.sqrt(weights)[:, None] * np.stack(columns, axis=1), ridges])
    for layer in range(LAYERS):
        outputs = np.sqrt(weights)[:, None] * activations[:, layer].astype(np.float64)
        right = np.concatenate([outputs, np.zeros((len(ridges), OUT))])
        expected = 2 * np.linalg.lstsq(rows, right)[0][0]
        contrast = fitted(inputs, activations, in_groups(labels, groups), induce=induce).contrast[layer]
        np.testing.assert_allclose(contrast, expected, rtol=1e-8, atol=1e-10)


def test_a_form_that_is_refused_more_often_is_not_in_the_contrast() -> None:
    inputs, activations, labels = problem(per_class=40)
    rng = np.random.default_rng(7)
    refused = labels.confidence > 0.15
    poem = rng.random(len(refused)) < np.where(refused, 0.8, 0.2)
    form, refusal = np.eye(OUT)[:2]
    outputs = (activations + 5 * poem[:, None, None] * form + 3 * refused[:, None, None] * refusal).astype(
        np.float32
    )
    names = np.where(poem, "poem", "letter")
    mixed = fitted(inputs, outputs, labels).contrast.mean(axis=0)
    apart = fitted(inputs, outputs, in_groups(labels, names)).contrast.mean(axis=0)
    assert mixed @ form > 2
    assert abs(apart @ form) < 0.7
    assert abs(apart @ refusal - 3) < 0.7


def test_samples_without_a_confidence_count_for_gate_vectors() -> None:
    """Their activations are not needed: the contrast comes from the judged samples."""
    inputs, activations, labels = problem(per_class=12)
    assert labels.kinds is not None
    judged = np.arange(len(labels.confidence)) % 3 > 0
    order = np.concatenate([np.flatnonzero(judged), np.flatnonzero(~judged)])
    confidence = np.where(judged, labels.confidence, 0.0)[order]
    both = fitted(inputs.of(order), activations[judged], Labels.of(confidence, labels.kinds[order]))
    judged_labels = Labels.of(labels.confidence[judged], labels.kinds[judged])
    alone = fitted(inputs.of(order[: judged.sum()]), activations[judged], judged_labels)
    np.testing.assert_allclose(both.contrast, alone.contrast)
    gates = fitted(inputs, activations, labels).sensitive_gate["ffn_down"]
    np.testing.assert_allclose(both.sensitive_gate["ffn_down"], gates, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("left", [MIN_SAMPLES - 1, MIN_SAMPLES])
def test_benign_prompts_replace_answered_sensitive_ones_if_there_are_fewer_than_4(left: int) -> None:
    inputs, activations, labels = problem(per_class=12)
    answered = np.flatnonzero((labels.kinds == "sensitive") & (labels.confidence < -0.15))
    confidence = labels.confidence.copy()
    confidence[answered[left:]] = 0.1
    labels = Labels.of(confidence, labels.kinds)
    other = "sensitive" if left == MIN_SAMPLES else "benign"
    refused = np.where((labels.kinds == "sensitive") & (confidence > 0.15), confidence, 0.0)
    kept = np.where((labels.kinds == other) & (confidence < -0.15), confidence, 0.0)
    expected = np.tensordot(refused / refused.sum() - kept / kept.sum(), activations.astype(np.float64), 1)
    np.testing.assert_allclose(fitted(inputs, activations, labels).contrast, expected, rtol=1e-9)


def test_gate_activation_is_lower_on_groups_that_cancel_out_in_the_class_mean() -> None:
    inputs, activations, labels = problem(per_class=12)
    harmful = np.flatnonzero(members(labels)["harmful"])
    # Two topics on opposite sides of the mean: the constraint on the mean limits neither of them.
    names = np.full(len(labels.confidence), "", dtype="<U8")
    names[harmful] = np.where(np.arange(len(harmful)) % 2, "weapons", "fraud")
    side = np.where(names == "weapons", 2.0, np.where(names == "fraud", -2.0, 0.0))
    axis = np.random.default_rng(4).standard_normal(WIDTH)
    last = inputs.last_token + side[:, None, None] * axis

    def largest(of_labels: Labels) -> float:
        gates = fitted(replace(inputs, last_token=last), activations, of_labels, ridges=1.0).sensitive_gate
        groups = [np.where(names == name, members(labels)["harmful"], 0.0) for name in ("weapons", "fraud")]
        gate = gates["ffn_down"][0, 0]
        return max(abs(float(group / group.sum() @ last[:, 0] @ gate)) for group in groups)

    assert largest(in_groups(labels, names)) < 0.7 * largest(labels)


def test_a_group_of_few_samples_is_left_out() -> None:
    inputs, activations, labels = problem()
    names = np.full(len(labels.confidence), "", dtype="<U8")
    names[np.flatnonzero(members(labels)["harmful"])[: MIN_SAMPLES - 1]] = "rare"
    plain = fitted(inputs, activations, labels).sensitive_gate["ffn_down"]
    np.testing.assert_array_equal(
        fitted(inputs, activations, in_groups(labels, names)).sensitive_gate["ffn_down"], plain
    )
    names[np.flatnonzero(members(labels)["harmful"])[:MIN_SAMPLES]] = "rare"
    assert (
        np.abs(fitted(inputs, activations, in_groups(labels, names)).sensitive_gate["ffn_down"] - plain).max()
        > 1e-4
    )


def test_one_sample_per_class_is_enough() -> None:
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
def test_a_class_of_the_contrast_without_samples_is_named(empty: dict[str, int], named: str) -> None:
    inputs, activations, labels = problem()
    confidence = labels.confidence
    for kind, sign in empty.items():
        confidence = np.where((labels.kinds == kind) & (sign * confidence > 0), sign * 0.1, confidence)
    with pytest.raises(InputError, match=f"no {named} prompt"):
        fitted(inputs, activations, Labels.of(confidence, labels.kinds))


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_without_samples_is_named(kind: str) -> None:
    inputs, activations, labels = problem()
    rest = np.flatnonzero(labels.kinds != kind)
    assert labels.kinds is not None
    with pytest.raises(InputError, match=f"no {kind} prompt"):
        fitted(inputs.of(rest), activations[rest], Labels.of(labels.confidence[rest], labels.kinds[rest]))


@pytest.mark.parametrize("rows", ["last_token", "prompt_tokens", "answer_tokens", "template_tokens"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_reported_with_their_layer(rows: str, value: float) -> None:
    inputs, activations, labels = problem()
    broken = getattr(inputs, rows).copy()
    sample = int(np.flatnonzero(members(labels)["harmful"])[0]) if rows == "last_token" else 0
    broken[sample, 1, 5] = value
    with pytest.raises(InputError, match=r"ffn_down of layer 1 hold NaN or Inf"):
        fitted(replace(inputs, **{rows: broken}), activations, labels)
    outputs = activations.copy()
    outputs[int(np.flatnonzero(difference(labels))[0]), 2, 0] = value
    with pytest.raises(InputError, match=r"activations of layer 2 hold NaN or Inf"):
        fitted(inputs, outputs, labels)


def rounded(shape: tuple[int, ...]) -> Any:
    """Return ones up to float32 rounding, which depends on the other rows of a batch."""
    return 1 + 1e-7 * np.random.default_rng(3).standard_normal(shape)


@pytest.mark.parametrize("same", [np.ones, np.zeros, rounded])
def test_a_layer_that_does_not_separate_the_kinds_has_no_gate(same: Callable[..., Any]) -> None:
    """The next layer adds its part; if one matrix of a layer has no gate, the other matrix adds all of it."""
    inputs, activations, labels = problem()
    last = inputs.last_token.astype(np.float64)
    last[:, 1] = same(last[:, 1].shape)
    before, after = (
        fitted(inputs, activations, labels),
        fitted(replace(inputs, last_token=last), activations, labels),
    )
    for gates, expected in (
        (after.sensitive_gate, before.sensitive_gate),
        (after.benign_gate, before.benign_gate),
    ):
        assert not gates["ffn_down"][:, 1].any()
        np.testing.assert_allclose(gates["ffn_down"][:, [0, 2]], expected["ffn_down"][:, [0, 2]], atol=1e-5)
    contrast = after.contrast
    factors = after.factors(1.0, 0, 2, 1.0)
    assert list(factors) == ["blk.0.ffn_down.weight", "blk.2.ffn_down.weight"]
    np.testing.assert_allclose(
        factors["blk.2.ffn_down.weight"][1][:, 0], contrast[0] - contrast[2], rtol=1e-5
    )
    assert list(after.factors(1.0, 1, 2, 1.0)) == ["blk.2.ffn_down.weight"]

    both = {"ffn_down": replace(inputs, last_token=last), "attn_output": inputs}
    factors = fit_gated_adapter(both, activations, labels, ridges=RIDGES).factors(1.0, 1, 2, 1.0)
    assert [name for name in factors if name.startswith("blk.1.")] == ["blk.1.attn_output.weight"]
    np.testing.assert_allclose(factors["blk.1.attn_output.weight"][1][:, 0], -contrast[1], rtol=1e-5)

    with pytest.raises(InputError, match="no layer separates"):
        fitted(replace(inputs, last_token=same(last.shape)), activations, labels)


def test_a_metric_without_any_energy_is_an_error() -> None:
    last = np.eye(3, 6, dtype=np.float32)[:, np.newaxis]
    nothing = np.empty((0, 1, 6), dtype=np.float32)
    labels = Labels.of([1, -1, 1], ["sensitive", "benign", "harmful"])
    with pytest.raises(InputError, match="no layer separates"):
        fitted(MatrixInputs(last, nothing, nothing, nothing), np.ones((3, 1, 4), np.float32), labels)


@pytest.mark.parametrize(("per_class", "width"), [(8, WIDTH), (1, 40)])
def test_a_ridge_that_rounding_swallows_is_an_error(per_class: int, width: int) -> None:
    """Doubled columns make the metric singular, in both ways of the solver."""
    inputs, activations, labels = problem(per_class, width)
    twice = MatrixInputs(**{name: np.concatenate([rows] * 2, axis=2) for name, rows in vars(inputs).items()})
    if per_class == 1:
        twice = replace(twice, prompt_tokens=np.concatenate([twice.prompt_tokens] * 2))
    with pytest.raises(InputError, match=r"is lost in the rounding.*use a larger ridge"):
        fit_gated_adapter({"ffn_down": twice}, activations, labels, ridges=[1e-25])


def test_bad_ridges_are_refused() -> None:
    with pytest.raises(InputError, match="positive finite"):
        fitted(*problem(), ridges=[1.0, 0.0])


def test_progress_counts_layers() -> None:
    steps: list[int] = []
    fitted(*problem(), advance=steps.append)
    assert steps == [1] * LAYERS


@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 2), (1, 1)])
def test_the_layers_together_add_the_whole_contrast_at_the_mean_sensitive_prompt(
    first: int, last: int
) -> None:
    inputs, activations, labels = problem()
    other = MatrixInputs(**{name: rows[:, :, :7] for name, rows in vars(inputs).items()})
    both = {"ffn_down": inputs, "attn_output": other}
    gates = fit_gated_adapter(both, activations, labels, ridges=RIDGES)
    factors = gates.factors(1.0, first, last, 0.5, benign_target=0.25)
    assert set(factors) == {
        f"blk.{layer}.{matrix}.weight"
        for layer in range(first, last + 1)
        for matrix in ("ffn_down", "attn_output")
    }
    added: dict[str, Float64] = {kind: np.zeros(OUT) for kind in KINDS}
    for name, (a, b) in factors.items():
        assert a.dtype == b.dtype == np.float32
        layer, rows = int(name.split(".")[1]), inputs if "ffn_down" in name else other
        assert (a.shape, b.shape) == ((1, rows.last_token.shape[2]), (OUT, 1))
        for kind, mean in zip(KINDS, means(rows, layer, labels), strict=True):
            added[kind] += (b @ a).astype(np.float64) @ mean
    contrast = np.tensordot(difference(labels), activations[:, last].astype(np.float64), 1)
    np.testing.assert_allclose(added["sensitive"], -0.5 * contrast, atol=1e-4)
    np.testing.assert_allclose(added["benign"], -0.25 * 0.5 * contrast, atol=1e-4)
    np.testing.assert_allclose(added["harmful"], HARMFUL_TARGET_RATIO * -0.25 * 0.5 * contrast, atol=1e-4)


@pytest.mark.parametrize("induce", [False, True])
def test_harmful_prompts_move_towards_refusal_and_benign_ones_towards_an_answer(induce: bool) -> None:
    inputs, activations, labels = problem()
    gates = fitted(inputs, activations, labels, induce=induce)
    benign_target = adapter.space_of(RIDGES, LAYERS, induce=induce).benign_target
    a, b = gates.factors(1.0, 1, 1, 1.0, benign_target)["blk.1.ffn_down.weight"]
    refusal = gates.contrast[1] * (-1 if induce else 1)
    change = (b @ a).astype(np.float64)
    sensitive, benign, harmful = (refusal @ change @ mean for mean in means(inputs, 1, labels))
    assert (sensitive > 0) == induce
    assert benign < 0 < harmful


def test_strength_scales_output_vectors_alone() -> None:
    gates = fitted(*problem())
    once, twice = gates.factors(20.0, 0, 2, 1.0), gates.factors(20.0, 0, 2, 2.0)
    for name, (a, b) in once.items():
        np.testing.assert_array_equal(twice[name][0], a)
        np.testing.assert_allclose(twice[name][1], 2 * b, rtol=1e-6)


def test_to_induce_the_contrast_is_answered_minus_refused_prompts() -> None:
    inputs, activations, labels = problem()
    assert labels.kinds is not None
    # The model refuses no sensitive prompt.
    confidence = np.where(labels.kinds == "sensitive", -np.abs(labels.confidence), labels.confidence)
    labels = Labels.of(confidence, labels.kinds)
    gates = fitted(inputs, activations, labels, induce=True)
    refused = np.where(confidence > 0.15, confidence, 0.0)
    answered = np.where((labels.kinds != "harmful") & (confidence < -0.15), -confidence, 0.0)
    weights = answered / answered.sum() - refused / refused.sum()
    expected = np.tensordot(weights, activations.astype(np.float64), 1)
    np.testing.assert_allclose(gates.contrast, expected, rtol=1e-9, atol=1e-12)
