"""The architecture as tests: arrows point one way, and importing the kernels is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "kernels/dtrak_kernels": {"numpy", "safetensors", "torch", "triton"},
    "dtrak": {
        "accelerate",
        "datasets",
        "diffusers",
        "dtrak",
        "dtrak_kernels",
        "huggingface_hub",
        "matplotlib",
        "numpy",
        "peft",
        "PIL",
        "pyarrow",
        "rich",
        "safetensors",
        "scipy",
        "sklearn",
        "torch",
        "trak",
        "transformers",
        "typer",
    },
}
# the adapters are what other libraries' users import, so they may know those libraries
ADAPTERS = {"adapters/dattri.py": {"dattri"}, "adapters/trak.py": {"trak"}}
# a kernel file may import triton when it is loaded; nothing else may
# kernels, and what compiles them
KERNEL_FILES = {"compiling.py", "gram_triton.py", "triton.py", "words_triton.py"}
DIFFUSION_WORDS = ("diffusion", "diffusers", "timestep", "unet", "noise schedule")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        extra = ADAPTERS.get(path.relative_to(ROOT / room).as_posix(), set())
        assert imports(path) <= ALLOWED[room] | extra, path


def test_only_kernel_files_import_triton():
    for path in (ROOT / "kernels/dtrak_kernels").rglob("*.py"):
        assert ("triton" in imports(path)) == (path.name in KERNEL_FILES), path


def modules_read_by(path: Path, root: Path) -> set[str]:
    """Full names of what a file imports of its own package, names in modules as well."""
    package = path.relative_to(root).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = ".".join(package[: len(package) - node.level + 1])
            module = f"{start}.{node.module}" if node.module else start
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


# whatever is in a floor may import what is in it or below
FLOORS = (
    {"models", "data", "features", "methods", "training", "runs"},
    {"evaluation"},
    {"pages"},
    {"cli"},
)


def test_arrows_point_from_the_commands_to_the_core():
    """Core <- evaluation <- pages <- commands."""
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    folders = {path.parent.name for path in (ROOT / "dtrak").glob("*/__init__.py")}
    assert folders == set(floors)
    for room, floor in floors.items():
        for path in (ROOT / "dtrak" / room).rglob("*.py"):
            read = {name.split(".")[1] for name in modules_read_by(path, ROOT) if "." in name}
            above = {other for other in read if floors.get(other, 0) > floor}
            assert not above, f"{path}: {above}"


def test_the_reference_and_the_kernels_do_not_know_each_other():
    """A reference shares the names of streams with what it judges, and nothing else."""
    files = list((ROOT / "kernels/dtrak_kernels").rglob("*.py"))
    references = [path for path in files if path.name == "reference.py"]
    assert len(references) == 4
    for path in files:
        read = modules_read_by(path, ROOT / "kernels")
        if path in references:
            others = {name for name in read if ".reference" not in name and name.count(".") > 1}
            words = "dtrak_kernels.random.words"
            assert others <= {words, f"{words}.Stream"}, path
        else:
            assert not any(name.split(".")[-1] == "reference" for name in read), path


def test_no_diffusion_word_in_the_kernels():
    for path in (ROOT / "kernels").rglob("*.py"):
        text = path.read_text().lower()
        # sketcher.py gives timesteps as an example of rows
        words = [word for word in DIFFUSION_WORDS if word in text and word != "timestep"]
        assert not words, f"{path}: {words}"


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow PyPI's `kernels`"


def test_importing_the_kernels_is_light():
    code = (
        "import sys, dtrak_kernels; dtrak_kernels.Projection('none'); dtrak_kernels.KINDS;"
        "print({'torch', 'numpy'} & set(sys.modules)); dtrak_kernels.GradientSketcher;"
        "print({'triton', 'diffusers', 'trak'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["set()", "set()"]


def test_public_names_are_where_they_are_said_to_be():
    import dtrak_kernels

    assert set(dtrak_kernels._PLACES) == set(dtrak_kernels.__all__) <= set(dir(dtrak_kernels))
    for name in dtrak_kernels.__all__:
        assert getattr(dtrak_kernels, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'attribute'"):
        _ = dtrak_kernels.attribute


def test_no_submodule_hides_a_public_name():
    import dtrak_kernels

    inside = {path.stem for path in (ROOT / "kernels/dtrak_kernels").iterdir()}
    assert not inside & set(dtrak_kernels.__all__)


def test_the_environment_resolves_only_the_two_packages():
    code = (
        "import importlib.util as u; "
        "print([n for n in ('benchmarks', 'tests') if u.find_spec(n) is not None])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd="/"
    )
    assert done.stdout.strip() == "[]"
