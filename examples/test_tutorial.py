"""Tests of tutorial.ipynb: it runs as it is stored, and shows what its paragraphs claim."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

HERE = Path(__file__).parent
PATH = HERE / "tutorial.ipynb"
FUNCTIONS = ["sde_step", "rollout", "group_advantages", "gaussian_kl", "grpo_loss"]


def load():
    return nbformat.read(PATH, as_version=4)


def cells(notebook, kind):
    return [cell for cell in notebook.cells if cell.cell_type == kind]


@pytest.fixture(scope="module")
def stored():
    return load()


@pytest.fixture(scope="module")
def executed():
    """What comes out of a fresh kernel, where the notebook lies."""
    notebook = load()
    for cell in cells(notebook, "code"):
        cell.outputs = []
    place = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place)
    client.coalesce_streams = True
    return client.execute()


@pytest.fixture(params=["stored", "executed"])
def notebook(request):
    """What the paragraphs claim holds for the stored outputs and for new ones."""
    return request.getfixturevalue(request.param)


def kinds(cell):
    """What a cell leaves: text, pictures or both. Libraries may warn, on stderr."""
    found = set()
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            found.add("text")
        if "image/png" in output.get("data", {}):
            found.add("picture")
    return found


def printed(notebook, section):
    """The text that the code of a section prints, where sections are numbered from 1."""
    headings = [cell.source.startswith(f"## {section}. ") for cell in notebook.cells]
    code = notebook.cells[headings.index(True) + 1]
    return "".join(output.text for output in code.outputs if output.get("name") == "stdout")


def rows(notebook, section, pattern=""):
    """The numbers in each printed line that matches."""
    lines = re.findall(f"^{pattern}.+$", printed(notebook, section), re.MULTILINE)
    numbers = [re.findall(r"-?\d+\.?\d*", line) for line in lines]
    return [[float(number) for number in line] for line in numbers]


# ---- What is stored.
def test_paragraphs_and_code_take_turns(stored):
    order = [cell.cell_type for cell in stored.cells]
    assert order == ["markdown", "code"] * 11 + ["markdown"]


def test_each_numbered_section_has_a_formula_and_a_picture(stored):
    sections = list(zip(stored.cells[2::2], stored.cells[3::2]))
    for number, (text, code) in enumerate(sections, 1):
        assert text.source.startswith(f"## {number}. ")
        assert "$$" in text.source
        assert "picture" in kinds(code)


def test_stored_outputs_are_of_one_run_from_top_to_bottom(stored):
    counts = [cell.execution_count for cell in cells(stored, "code")]
    assert counts == list(range(1, 12))


def test_nothing_else_is_stored(stored):
    for cell in cells(stored, "code"):
        for output in cell.outputs:
            assert output.output_type in ("stream", "display_data")
            assert output.get("name", "stdout") == "stdout"


def test_file_does_not_know_its_machine(stored):
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert stored.metadata.kernelspec.name == "python3"
    assert all(not cell.metadata for cell in stored.cells)
    assert not re.search(r"/(home|root|tmp|Users|work)/", PATH.read_text(encoding="utf-8"))


def test_file_is_small():
    assert PATH.stat().st_size < 700_000


def test_links_lead_to_files(stored):
    text = "".join(cell.source for cell in cells(stored, "markdown"))
    targets = re.findall(r"\]\(([^)#]+)", text)
    local = [target for target in targets if not target.startswith("https:")]
    assert len(local) > 5
    for target in local:
        assert (HERE / target).exists()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_are_imported_not_repeated(stored, function):
    code = "\n".join(cell.source for cell in cells(stored, "code"))
    assert f"def {function}(" not in code
    # `points.sample` calls `rollout`.
    assert f"{'sample' if function == 'rollout' else function}(" in code


# ---- What it shows.
def test_each_cell_leaves_what_is_stored(stored, executed):
    for old, new in zip(cells(stored, "code"), cells(executed, "code"), strict=True):
        assert kinds(new) == kinds(old) != set()


def test_sde_is_no_further_from_the_ode_than_chance(notebook):
    table = rows(notebook, 2, "t =")
    assert len(table) == 3
    for _, distance, chance in table:
        # Distances of two sets of 4,000 points vary by about as much as they are.
        assert distance < 3 * chance + 0.03


def test_std_falls_from_the_noise_level_to_almost_nothing(notebook):
    stds = [std for _, std in rows(notebook, 3, "t =")]
    assert stds[0] == pytest.approx(0.7)
    assert stds[1] > stds[0]
    assert stds[1:] == sorted(stds[1:], reverse=True)
    assert stds[9] == 0.006


def test_advantages_are_those_by_hand(notebook):
    function, by_hand = rows(notebook, 4)
    assert function == by_hand == [-0.71, -0.35, 0, 1.06, 0, 0, 0, 0]


def test_ratios_are_1_before_the_first_update_alone(notebook):
    first, second = rows(notebook, 5)
    assert first == [1, 1]
    lowest, highest = second
    assert 0.5 < lowest < 0.99
    assert 1.01 < highest < 1.5


def test_clip_keeps_ratios_nearer_to_1(notebook):
    without, clipped = rows(notebook, 6)
    assert clipped[0] < without[0] - 5  # per cent outside the clip range
    assert clipped[1] < without[1] - 0.05  # the mean distance from 1


def test_ratios_spread_by_one_over_the_root_of_the_elements(notebook):
    table = rows(notebook, 7)
    assert [row[0] for row in table] == [2, 16, 128, 1024, 8192, 65536]
    for elements, delta, spread in table:
        assert delta == pytest.approx(0.03, rel=0.02)
        # The standard deviation of 128 samples is known to 6 %.
        assert spread == pytest.approx(delta / elements**0.5, rel=0.25)


def test_kl_by_the_means_is_the_kl_by_the_velocities(notebook):
    table = rows(notebook, 8)
    assert len(table) == 9
    for _, by_means, by_velocities in table:
        assert by_means == pytest.approx(by_velocities, rel=1e-3, abs=2e-6)


def test_late_steps_have_most_of_the_kl(notebook):
    kls = [row[1] for row in rows(notebook, 8)]
    assert sum(kls[6:]) > sum(kls[:6])


def fine_tuned(notebook):
    """By beta, or for the base model, the mean reward and the per cent of points near a cloud."""
    table = rows(notebook, 9, "beta")
    results = {beta: (reward, near) for beta, reward, near in table}
    results["base"] = tuple(rows(notebook, 9, "base")[0])
    return results


def test_reward_rises_as_beta_falls(notebook):
    rewards = [reward for reward, _ in fine_tuned(notebook).values()]
    strong, weak, none, base = rewards
    assert base + 0.5 < strong < weak - 0.5
    assert weak + 5 < none


def test_with_the_kl_points_stay_near_the_clouds(notebook):
    results = fine_tuned(notebook)
    assert results[1][1] > results["base"][1] - 5
    assert results[0.3][1] > 50


def test_without_the_kl_points_leave_the_data(notebook):
    assert fine_tuned(notebook)[0][1] < 5


def test_what_10_steps_taught_holds_with_any_number(notebook):
    table = rows(notebook, 10, " ")[-4:]
    assert [row[0] for row in table] == [5, 10, 20, 40]
    for _, before, _, after, _ in table:
        assert after > before + 0.5


def test_more_steps_draw_more_points_near_a_cloud(notebook):
    table = rows(notebook, 10, " ")[-4:]
    for column in 2, 4:
        near = [row[column] for row in table]
        assert near[0] + 3 < near[3]
    # As near as those of the base model
    assert near[3] > table[3][2] - 5
