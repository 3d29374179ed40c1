"""Tests of points.py: what its picture claims, on a run of a quarter of the length."""

import contextlib
import io
import itertools

import points
import pytest
import torch
from scipy.stats import ks_2samp


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The paths by name, what was printed, and the folder of the picture."""
    folder = tmp_path_factory.mktemp("points")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        paths = points.main(flow_steps=1000, epochs=30)
    return paths, printed.getvalue(), folder


def mean_reward(paths):
    return paths[:, -1, 0].mean().item()  # how far to the right the points lie


def spread(paths):
    return paths[:, -1].std(dim=0).norm().item()


def share_on_the_ring(paths):
    distance = torch.cdist(paths[:, -1], points.CENTRES)
    nearest = distance.min(dim=1).values
    return (nearest < 1).float().mean().item()


def test_times_are_those_of_sd3():
    published = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    assert points.schedule(10) == pytest.approx(published, abs=2e-4)


def test_flow_draws_all_clouds_alike(run):
    paths, _, _ = run
    ends = paths["ODE"][:, -1]
    nearest = torch.cdist(ends, points.CENTRES).argmin(dim=1)
    shares = torch.bincount(nearest, minlength=8) / len(ends)
    # Sampling alone gives a standard deviation of .005; the rest is for the short training.
    assert shares.tolist() == pytest.approx([1 / 8] * 8, abs=0.05)


def test_ode_and_sde_start_from_the_same_noise(run):
    paths, _, _ = run
    assert torch.equal(paths["ODE"][:, 0], paths["SDE"][:, 0])


def test_ode_and_sde_take_different_paths(run):
    paths, _, _ = run
    difference = paths["ODE"][:, -1] - paths["SDE"][:, -1]
    assert difference.norm(dim=1).median() > 1


@pytest.mark.parametrize("coordinate", [0, 1])
@pytest.mark.parametrize("k", [10, 20, 30, 40])
def test_ode_and_sde_have_the_same_marginals(run, k, coordinate):
    paths, _, _ = run
    ode = paths["ODE"][:, k, coordinate]
    sde = paths["SDE"][:, k, coordinate]
    # With 4,000 points each, two samples of one distribution fail this once in 10,000 times.
    assert ks_2samp(ode, sde).pvalue > 1e-4


def test_reward_rises_as_beta_falls(run):
    paths, _, _ = run
    names = ["ODE", "beta 1", "beta 0.3", "beta 0"]
    rewards = [mean_reward(paths[name]) for name in names]
    # The mean of 4,000 points of spread 3 has a standard error of .05 at the most.
    for lower, higher in itertools.pairwise(rewards):
        assert higher > lower + 0.25


def test_spread_falls_as_beta_falls(run):
    paths, _, _ = run
    names = ["ODE", "beta 1", "beta 0.3"]
    spreads = [spread(paths[name]) for name in names]
    # Its standard error is .03 at the most.
    for wider, narrower in itertools.pairwise(spreads):
        assert narrower < wider - 0.05


@pytest.mark.parametrize("beta", ["beta 1", "beta 0.3"])
def test_kl_keeps_points_on_the_ring(run, beta):
    paths, _, _ = run
    assert share_on_the_ring(paths[beta]) > share_on_the_ring(paths["ODE"]) - 0.05


def test_without_kl_points_leave_the_ring(run):
    paths, _, _ = run
    assert share_on_the_ring(paths["beta 0"]) < 0.1


def test_table_has_the_numbers(run):
    paths, printed, _ = run
    rows = printed.splitlines()[1:-1]
    for row, (name, run_paths) in zip(rows, paths.items(), strict=True):
        numbers = row.removeprefix(name).split()
        assert float(numbers[0]) == pytest.approx(mean_reward(run_paths), abs=0.01)
        assert float(numbers[1]) == pytest.approx(spread(run_paths), abs=0.01)


def test_table_counts_the_clouds(run):
    _, printed, _ = run
    clouds = [row[-6:] for row in printed.splitlines()[1:-1]]
    assert clouds[:3] == ["8 of 8", "8 of 8", "8 of 8"]
    assert clouds[4] == "0 of 8"


def test_picture_is_written(run):
    _, _, folder = run
    header = (folder / "points.png").read_bytes()[:4]
    assert header == b"\x89PNG"


def test_runs_are_equal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = points.main(flow_steps=5, epochs=1)
    second = points.main(flow_steps=5, epochs=1)
    for name in first:
        assert torch.equal(first[name], second[name])
