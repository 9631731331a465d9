"""Oracles: the definition of the front by brute force; the closed form of a staircase's area; the decoded picture."""

import csv
import io
import random
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest

from halora.analysis.figures import front_figure
from halora.analysis.front import TrialPoint, best, front, hypervolume
from halora.records.tracking import front_csv


def _point(number, accuracy, energy, margin=0.0, **params):
    return TrialPoint(
        number=number,
        accuracy=accuracy,
        accuracy_low=accuracy - 0.1,
        accuracy_high=accuracy + 0.1,
        margin=margin,
        clean_accuracy=accuracy,
        energy_uj_per_token=energy,
        params=params,
    )


def _dominates(one, other):
    no_worse = one.accuracy >= other.accuracy and one.energy_uj_per_token <= other.energy_uj_per_token
    better = one.accuracy > other.accuracy or one.energy_uj_per_token < other.energy_uj_per_token
    return no_worse and better


@pytest.mark.parametrize("seed", range(40))
def test_the_front_is_what_no_point_dominates(seed):
    rng = random.Random(seed)
    # Few distinct values, so that points tie in one objective and in both.
    points = [_point(i, rng.randint(0, 6) / 8, rng.randint(1, 6) / 2) for i in range(rng.randint(0, 25))]
    expected = {p.number for p in points if not any(_dominates(q, p) for q in points)}
    found = front(points)
    assert {p.number for p in found} == expected
    assert len(found) == len(expected)
    energies = [p.energy_uj_per_token for p in found]
    assert energies == sorted(energies)


def test_hypervolume_is_the_area_under_the_staircase():
    steps = [(0.3, 1.0), (0.5, 2.0), (0.6, 4.5)]
    points = [_point(i, accuracy, energy) for i, (accuracy, energy) in enumerate(steps)]
    area = (2.0 - 1.0) * (0.3 - 0.1) + (4.5 - 2.0) * (0.5 - 0.1) + (6.0 - 4.5) * (0.6 - 0.1)
    corner = {"accuracy": 0.1, "energy_uj_per_token": 6.0}
    assert hypervolume(points, **corner) == pytest.approx(area)
    nothing_more = [
        _point(3, 0.4, 3.0),  # dominated
        _point(4, 0.5, 2.0),  # a tie
        _point(5, 0.9, 6.5),  # beyond the reference in energy
        _point(6, 0.05, 0.5),  # below it in accuracy
    ]
    assert hypervolume(points + nothing_more, **corner) == pytest.approx(area)
    assert hypervolume(nothing_more[2:], **corner) == hypervolume([], **corner) == 0.0


def test_the_best_point_is_the_most_accurate_and_then_the_surest():
    points = [_point(0, 0.5, 1.0, margin=0.9), _point(1, 0.7, 3.0, margin=-0.2), _point(2, 0.7, 4.0, margin=0.1)]
    assert best(points).number == 2
    assert best([]) is None


def test_csv_holds_every_row_with_its_params_in_columns():
    rows = [
        {"number": 0, "accuracy": 0.1 + 0.2, "on_front": True, "params": {"lora.rank": 4, "training.mu": 1e-3}},
        {"number": 1, "accuracy": 0.5, "on_front": False, "params": {"lora.rank": 8, "model": 'a "folder", odd'}},
    ]
    read = list(csv.DictReader(io.StringIO(front_csv(rows))))
    assert [float(row["accuracy"]) for row in read] == [0.1 + 0.2, 0.5]
    assert [row["lora.rank"] for row in read] == ["4", "8"]
    assert [row["training.mu"] for row in read] == ["0.001", ""]
    assert [row["model"] for row in read] == ["", 'a "folder", odd']
    assert "params" not in read[0]
    assert front_csv([]).strip() == ""


@pytest.mark.parametrize("number_of_points", [0, 1, 12])
def test_the_figure_shows_every_point_and_numbers_the_front(number_of_points):
    rng = random.Random(0)
    points = [_point(i, rng.random(), 1 + 4 * rng.random()) for i in range(number_of_points)]
    points[-1:] = [
        replace(point, accuracy=1.0, accuracy_low=1 + 2e-16, accuracy_high=1 - 2e-16) for point in points[-1:]
    ]
    figure = front_figure(points, "title of it", {i: ("lora", "noise_lora", "halora")[i % 3] for i in range(12)})
    (axes,) = figure.axes
    drawn = {tuple(xy) for bars in axes.containers for xy in zip(*bars.lines[0].get_data(), strict=True)}
    assert drawn == {(p.energy_uj_per_token, p.accuracy) for p in points}
    texts = {text.get_text() for text in axes.texts}
    assert texts == ({str(p.number) for p in front(points)} or {"no finished trial yet"})
    png = io.BytesIO()
    figure.savefig(png, format="png")
    png.seek(0)
    pixels = matplotlib.image.imread(png)
    assert pixels.shape[:2] == (500, 800)
    assert np.ptp(pixels[..., :3]) > 0.9
