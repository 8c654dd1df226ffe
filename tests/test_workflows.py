"""The workflow files and issue forms: what actionlint does not look at, and where it is not at hand."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")  # mlx-lm brings it
ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
if not GITHUB.exists():
    pytest.skip("no .github: not a clone of the repository", allow_module_level=True)

WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda x: x.name)
def test_actions_are_pinned_to_a_commit_and_name_its_version(path):
    uses = [line for line in path.read_text().splitlines() if re.search(r"\buses:", line)]
    assert uses
    for line in uses:
        assert re.search(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line), line


def test_an_action_has_one_version():
    pins = re.findall(r"uses: (\S+)@(\S+)", "".join(path.read_text() for path in WORKFLOWS))
    assert len(set(pins)) == len(dict(pins))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda x: x.name)
def test_jobs_are_bounded_and_read_only(path):
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 60, name
        assert job.keys() >= {"runs-on", "steps"}, name
        assert all(("uses" in step) != ("run" in step) for step in job["steps"]), name
        wanted = job.get("needs", [])
        assert set([wanted] if isinstance(wanted, str) else wanted) <= workflow["jobs"].keys(), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda x: x.name)
def test_matrix_names_exist(path):
    for name, job in jobs(path).items():
        matrix = job.get("strategy", {}).get("matrix", {})
        assert set(re.findall(r"matrix\.(\w+)", str(job))) == matrix.keys(), name


def test_the_gpu_of_a_hosted_mac_informs_and_does_not_block():
    ci = jobs(GITHUB / "workflows" / "ci.yml")
    gpu, cpu = ci["metal"], ci["macos"]
    assert gpu["continue-on-error"] is True
    assert "continue-on-error" not in cpu
    assert gpu["strategy"]["matrix"]["os"] == cpu["strategy"]["matrix"]["os"] == ["macos-14", "macos-15", "macos-26"]
    commands = "\n".join(step.get("run", "") for step in gpu["steps"])
    for wanted in (
        "pytest -m gpu",
        "tqext doctor --prove --json proof/",
        "-name tqext.metallib -exec cp",
        "tee proof/build.log",
    ):
        assert wanted in commands
    assert gpu["defaults"]["run"]["shell"] == "bash"  # with pipefail: tee hides no failure
    last = gpu["steps"][-1]
    assert last["if"] == "${{ !cancelled() }}"
    assert last["with"]["path"] == "proof/"
    assert any("tests/on_cpu" in step.get("run", "") for step in cpu["steps"])


def test_wheels_are_tested_on_the_cpu():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert settings["macos"]["test-command"] == "env PYTHONPATH={project}/tests/on_cpu tqext doctor"
    code = "import sys; seen = 'mlx.core' in sys.modules; import mlx.core as mx; print(seen, mx.default_device() == mx.cpu)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "on_cpu")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


@pytest.mark.parametrize("path", FORMS, ids=lambda x: x.name)
def test_issue_form(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    ids = [x["id"] for x in form["body"] if x["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
    for part in form["body"]:
        assert part["type"] in {"markdown", "input", "textarea", "dropdown", "checkboxes"}
        assert part["attributes"]["value" if part["type"] == "markdown" else "label"]
