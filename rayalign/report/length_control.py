"""The length-controlled win rate: what a policy would win if its replies were as long as its opponent's."""

from __future__ import annotations

import numpy as np

from rayalign.report.statistics import Matrix, Vector

RIDGE = 0.01
"""Pseudo-observations that hold both terms, so that winning everything has a finite answer."""
STEPS = 50


def lc_win_rate(preference: Matrix, length_difference: Matrix) -> Vector:
    """[P, J] soft preferences in [0, 1] (NaN: missing) and differences in tokens, J pairings of a prompt → [P].

    The logistic model logit E[preference] = θ + φ · tanh(difference / its standard deviation), every prompt with equal
    weight, by maximum likelihood with a faint ridge; the rate is σ(θ). Its form is Dubois et al. (2404.04475), with
    the model and the length terms and without theirs for the difficulty of an instruction.

    Returned are pseudo-values, one per prompt (NaN: no pairing): their mean is the rate, and resampling them moves it,
    to first order, as resampling the prompts and fitting again would (the infinitesimal jackknife).
    """
    present = ~np.isnan(preference)
    counts = present.sum(axis=1)
    found: Vector = np.full(len(preference), np.nan)
    asked = counts > 0
    P = int(asked.sum())
    if P == 0:
        return found
    weight = np.where(present, 1 / np.maximum(counts, 1)[:, None], 0.0)
    y = np.where(present, preference, 0.0)
    spread = float(np.std(length_difference[present]))
    length = np.tanh(length_difference / spread) if spread > 0 else np.zeros_like(length_difference)
    design = np.stack([np.ones_like(length), length])  # [2, P, J]
    coefficients = np.zeros(2)
    for _ in range(STEPS):
        residual, curvature = _slopes(coefficients, design, y, weight)
        gradient = np.einsum("kpj,pj->k", design, residual) - RIDGE * coefficients
        hessian = np.einsum("kpj,pj,lpj->kl", design, curvature, design) + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        step *= min(1.0, 2.0 / max(1e-12, float(np.abs(step).max())))
        coefficients = coefficients + step
        if float(np.abs(step).max()) < 1e-10:
            break
    residual, curvature = _slopes(coefficients, design, y, weight)
    hessian = np.einsum("kpj,pj,lpj->kl", design, curvature, design) + RIDGE * np.eye(2)
    pull = np.einsum("kpj,pj->pk", design, residual) - RIDGE * coefficients / P  # sums to 0 over the prompts asked
    rate = _sigmoid(coefficients[0])
    found[asked] = rate + rate * (1 - rate) * P * (pull @ np.linalg.inv(hessian)[0])[asked]
    return found


def pairings(policy: Matrix, opponent: Matrix, policy_length: Matrix, opponent_length: Matrix) -> tuple[Matrix, Matrix]:
    """Scores and lengths [P, S] against [P, S'] → (preference 1, ½ or 0; difference in tokens), [P, S · S']."""
    margin = policy[:, :, None] - opponent[:, None, :]
    preference = np.where(np.isnan(margin), np.nan, (np.sign(margin) + 1) / 2)
    difference = policy_length[:, :, None] - opponent_length[:, None, :]
    return preference.reshape(len(policy), -1), difference.reshape(len(policy), -1)


def _slopes(coefficients: Vector, design: Matrix, y: Matrix, weight: Matrix) -> tuple[Matrix, Matrix]:
    mu = _sigmoid(np.einsum("k,kpj->pj", coefficients, design))
    return weight * (y - mu), weight * mu * (1 - mu)


def _sigmoid(values: Matrix) -> Matrix:
    found: Matrix = 0.5 * (1.0 + np.tanh(0.5 * values))
    return found
