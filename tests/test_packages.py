"""The two distributions, dtrak and dtrak-kernels, built and installed as users do."""

import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
# what a user of the kernels does first, in an environment that has torch and nothing of ours
SKETCH = """
import dtrak_kernels, torch, importlib.util
from dtrak_kernels import GradientSketcher, Projection, RidgeSolver
model = torch.nn.Linear(20, 3)
x = torch.randn(50, 20)
sketcher = GradientSketcher(model, Projection("sjlt", 256))
features = sketcher.sketch(lambda: model(x).square().sum(1), 50)
scores = RidgeSolver(features).scores(features[:2], damping=1.0)
assert scores.shape == (2, 50) and scores.isfinite().all()
print(dtrak_kernels.__file__)
print(importlib.util.find_spec("dtrak") is not None)
"""


def distribution(folder: Path) -> dict:
    return tomllib.loads((folder / "pyproject.toml").read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {requirement.split(">=")[0] for requirement in requirements}


def test_what_the_distributions_depend_on():
    whole, kernels = distribution(ROOT), distribution(ROOT / "kernels")
    assert (whole["name"], kernels["name"]) == ("dtrak", "dtrak-kernels")
    assert names(kernels["dependencies"]) == {"torch", "triton", "numpy", "safetensors"}
    # the same floors in both, and nothing of ours, which no index has
    assert set(kernels["dependencies"]) <= set(whole["dependencies"])
    assert kernels["requires-python"] == whole["requires-python"]
    for extra, requirements in kernels["optional-dependencies"].items():
        assert whole["optional-dependencies"][extra] == requirements
    assert not names(whole["dependencies"]) & {"dtrak-kernels", "dtrak"}
    assert (ROOT / "LICENSE").read_text() == (ROOT / "kernels/LICENSE").read_text()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder]
    subprocess.run([*pip, ROOT, ROOT / "kernels"], check=True)
    return {wheel.name.split("-")[0]: wheel for wheel in folder.glob("*.whl")}


def modules(wheel: Path) -> set[str]:
    return {name for name in ZipFile(wheel).namelist() if ".dist-info" not in name}


@pytest.mark.full
def test_both_hold_the_same_kernels(wheels):
    whole, kernels = modules(wheels["dtrak"]), modules(wheels["dtrak_kernels"])
    assert kernels == {name for name in whole if name.startswith("dtrak_kernels/")}
    sources = {
        path.relative_to(ROOT / "kernels").as_posix()
        for path in (ROOT / "kernels/dtrak_kernels").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert kernels == sources
    assert {"dtrak_kernels/py.typed", "dtrak_kernels/sjlt/triton.py"} <= kernels
    # what pages are made of
    assert {"dtrak/pages/page.css", "dtrak/pages/explorer.js"} <= whole
    assert {name.split("/")[0] for name in whole} == {"dtrak", "dtrak_kernels"}


@pytest.mark.full
@pytest.mark.parametrize("name, has_dtrak", [("dtrak", True), ("dtrak_kernels", False)])
def test_an_empty_environment(name, has_dtrak, wheels, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    python = tmp_path / "env" / scripts / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheels[name]], check=True)

    def run(code: str) -> list[str]:
        done = subprocess.run(
            [python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
        )
        return done.stdout.splitlines()

    # without torch there are options, and a version
    options = (
        "import dtrak_kernels as d; print(d.__version__, d.Projection('sjlt', 512).kind, *d.KINDS)"
    )
    version, kind, *kinds = run(options)[0].split()
    assert (version, kind) == (wheels[name].name.split("-")[1], "sjlt")
    assert "rademacher" in kinds
    # torch is lent: two gigabytes need not be installed again
    (packages,) = run("import sysconfig; print(sysconfig.get_path('purelib'))")
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(packages) / "lent.pth").write_text("\n".join(lent))
    place, found = run(SKETCH)
    assert Path(packages) in Path(place).parents
    assert found == str(has_dtrak)
