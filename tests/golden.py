"""The numbers of small jobs, whole: the commands are run, and what they leave is hashed.

``python tests/golden.py --write`` records them in ``fixtures/golden.json``, for the machine it runs
on. Do so after an intended change, and name the change under "Numerics" in CHANGELOG.md.
"""

import hashlib
import json
import os
import platform
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file

FILE = Path(__file__).parent / "fixtures" / "golden.json"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy", "scikit-learn")
# another instruction set or library of products moves float32 by less
TOLERANCE = 1e-4
# low-rank directions are rounded to bfloat16 when fitted: other last bits are rounded otherwise
ROUNDED = 5e-3
# what has passed 8-bit pictures: one grey level of one pixel
GREY_LEVEL = 2e-3
ADVICE = (
    "If that is intended: python tests/golden.py --write, and a line under Numerics in CHANGELOG.md"
)
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "agg",
}
# these choose other code on the same processor
_CHOOSERS = ("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "OPENBLAS_CORETYPE")


@dataclass
class Artefact:
    """What a job left: tensors by name, and how far their float summary may move elsewhere."""

    tensors: dict[str, torch.Tensor]
    tolerance: float = TOLERANCE

    def hash(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def summary(self) -> list[float]:
        """The norm of all entries, and their sums under eight fixed choices of signs."""
        parts = [self.tensors[name].double().flatten() for name in sorted(self.tensors)]
        entries = torch.cat(parts).numpy()
        bits = hashlib.shake_256(b"golden").digest(len(entries))
        signs = 2.0 * np.unpackbits(np.frombuffer(bits, np.uint8)).reshape(-1, 8) - 1
        sums = (signs * entries[:, None]).sum(0)
        return [float(f"{value:.9g}") for value in (np.sqrt((entries**2).sum()), *sums)]


def key() -> str:
    """What decides bits: libraries, instruction set and processor."""
    libraries = " ".join(f"{name}-{version(name)}" for name in LIBRARIES)
    chosen = [f"{name}={os.environ[name]}" for name in _CHOOSERS if name in os.environ]
    machine = f"{platform.system()} {platform.machine()}"
    capability = torch.backends.cpu.get_cpu_capability()
    return " | ".join([libraries, machine, capability, _processor(), *chosen])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    facts = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    # a virtual machine may hide the true model: libraries look at these
    kinds = ("sse", "avx", "amx", "fma", "f16c", "bmi", "sve", "asimd")
    flags = facts.get("flags", facts.get("Features", "")).split()
    deciding = sorted(flag for flag in flags if flag.startswith(kinds))
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    deciding += [file.read_text().strip() for file in caches]
    digest = hashlib.sha256(" ".join(deciding).encode()).hexdigest()[:8]
    model = "/".join(facts.get(name, "?") for name in ("cpu family", "model", "stepping"))
    return f"{facts.get('vendor_id', facts.get('CPU implementer', '?'))} {model} {digest}"


# from here to `measure`: all that knows where commands leave their results


def run(command: str, *arguments: object) -> None:
    """``python -m dtrak.command arguments`` in this process."""
    sys.argv = ["-", *map(str, arguments)]
    try:
        runpy.run_module(f"dtrak.{command}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"dtrak.{command} ended with {end.code}") from None


def build_tiny_pipeline(folder: Path) -> Path:
    from tiny_stable_diffusion import build_pipeline

    return build_pipeline(folder)


def build_wide_unet(folder: Path) -> Path:
    """Untrained, with weights of more entries than sketches keep tables for."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(128,),
        layers_per_block=1, add_attention=False, **blocks,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def register_tiny_preset() -> str:
    import tiny_lds

    tiny_lds.register()
    return tiny_lds.NAME


def read_weights(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "unet" / "diffusion_pytorch_model.safetensors")


def read_lora(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pytorch_lora_weights.safetensors")


def read_features(run: Path, kind: str) -> dict[str, torch.Tensor]:
    """Of the training images (train) or the queries (query), however they are cut into shards."""
    (folder,) = run.glob(f"features*/*/{kind}*")
    shards = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    return {"features": torch.cat([tensor for shard in shards for tensor in shard.values()])}


def read_scores(run: Path, queries: str = "") -> dict[str, torch.Tensor]:
    (file,) = (run / "queries").glob(f"{queries}*/**/scores.safetensors")
    return load_file(file)


def read_drawn(run: Path) -> dict[str, torch.Tensor]:
    files = sorted(run.glob("generated*/*.png"))
    return {file.name: torch.from_numpy(np.array(Image.open(file))) for file in files}


def read_trajectories(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "trajectories").glob("*.safetensors"))
    return {file.name: torch.cat(list(load_file(file).values())) for file in files}


def read_subset_models(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "models").rglob("*.safetensors"))
    return {
        f"{number} {name}": tensor
        for number, file in enumerate(files)
        for name, tensor in load_file(file).items()
    }


def read_losses(run: Path, kind: str) -> dict[str, torch.Tensor]:
    with np.load(run / "results.npz") as arrays:
        return {"losses": torch.from_numpy(arrays[f"losses {kind}"])}


def read_lds_table(run: Path, column: str) -> dict[str, torch.Tensor]:
    """The correlations of every method (lds), or the λ it was tried with (damping)."""
    table = json.loads((run / "report" / "table.json").read_text())
    return {
        f"{row['queries']} {row['method']}": torch.tensor(
            [
                float(cell[column] or 0)
                for cell in (*row.values(), *row.get("sweep", {}).values())
                if isinstance(cell, dict) and column in cell
            ],
            dtype=torch.float64,
        )
        for row in table["rows"]
    }


def read_counterfactual(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    if kind == "removed":
        return load_file(folder / "removed.safetensors")
    results = load_file(folder / "results.safetensors")
    return {name: tensor for name, tensor in results.items() if name.startswith(kind)}


def write_pictures(folder: Path, count: int, side: int, captions: bool = False) -> Path:
    """Smooth pictures, the same on every machine."""
    folder.mkdir()
    y, x = np.mgrid[:side, :side]
    lines = []
    for number in range(count):
        step = number + 1
        parts = (x * step + y * 3, x * 5 + y * step * 2, (x + 1) * (y + step))
        channels = [part % 97 * 255 // 96 for part in parts]
        picture = np.stack(channels if captions else channels[:1] * 3, -1).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number:02d}.png")
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": f"wave {number % 3}"}))
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def measure(folder: Path, parts: Iterable[str]) -> dict[str, Artefact]:
    """Run jobs in ``folder``; artefacts in the order in which they depend on one another."""
    return {name: artefact for part in parts for name, artefact in PARTS[part](folder).items()}


def measure_digits(folder: Path) -> dict[str, Artefact]:
    model, drawn, main = folder / "model", folder / "drawn", folder / "main"
    run(
        "train", "--preset", "digits", "--output", model, "--steps", 20, "--batch-size", 32,
        "--device", "cpu",
    )  # fmt: skip
    run(
        "generate", "--model", model, "--output", drawn, "--num-images", 2, "--device", "cpu",
        "--num-inference-steps", 5, "--batch-size", 2, "--trajectories",
    )  # fmt: skip
    artefacts = {
        "digits: weights": Artefact(read_weights(model)),
        "digits: trajectories": Artefact(read_trajectories(drawn)),
    }
    plain = ["--whiten", "none", "--batch-size", 64, "--device", "cpu"]
    fixed = ["--model", model, *plain]
    sjlt = [*fixed, "--timesteps", 1, "--proj-dim", 512, "--output", main]
    run("attribute", *sjlt, "--queries", "validation", "--num-queries", 3)
    artefacts |= {
        "digits: features of training images, sjlt": Artefact(read_features(main, "train")),
        "digits: features of queries, sjlt": Artefact(read_features(main, "query")),
        "digits: scores, sjlt": Artefact(read_scores(main)),
    }
    images, whitened = write_pictures(folder / "images", 6, 8), folder / "whitened"
    run(
        "attribute", "--model", model, "--data", images, "--queries", images, "--timesteps", 2,
        "--proj-dim", 512, "--batch-size", 4, "--device", "cpu", "--output", whitened,
    )  # fmt: skip
    return artefacts | {
        "digits: features, whitened": Artefact(read_features(whitened, "train"), ROUNDED),
        "digits: scores, whitened": Artefact(read_scores(whitened), ROUNDED),
    }


def measure_more_of_digits(folder: Path) -> dict[str, Artefact]:
    """Of the digits' run: pictures that it draws, other projections and another model."""
    model, main, images = folder / "model", folder / "main", folder / "images"
    plain = ["--whiten", "none", "--batch-size", 64, "--device", "cpu"]
    fixed = ["--model", model, *plain]
    run(
        "attribute", *fixed, "--timesteps", 1, "--proj-dim", 512, "--output", main,
        "--queries", "generated", "--num-queries", 2,
    )  # fmt: skip
    artefacts = {
        "digits: pictures": Artefact(read_drawn(main), GREY_LEVEL),
        "digits: scores of pictures": Artefact(read_scores(main, "generated"), GREY_LEVEL),
    }
    for kind in ("kronecker", "normal"):
        other = folder / kind
        run(
            "attribute", *fixed, "--data", images, "--queries", images, "--timesteps", 2,
            "--projection", kind, "--proj-dim", 16, "--damping", 0.5, "--output", other,
        )  # fmt: skip
        artefacts |= {
            f"digits: features, {kind}": Artefact(read_features(other, "train")),
            f"digits: scores, {kind}": Artefact(read_scores(other)),
        }
    wide = folder / "wide-run"
    run(
        "attribute", "--model", build_wide_unet(folder / "wide"), "--data", images, "--queries",
        images, "--timesteps", 1, "--proj-dim", 4096, "--damping", 0.5, *plain, "--batch-size", 4,
        "--output", wide,
    )  # fmt: skip
    artefacts["wide model: features, sjlt"] = Artefact(read_features(wide, "train"))
    return artefacts


def measure_counterfactual(folder: Path) -> dict[str, Artefact]:
    """Of the digits' run."""
    again = folder / "counterfactual"
    run(
        "counterfactual", folder / "main", "--output", again, "--num-queries", 1, "--top-k", 10,
        "--methods", "d-trak,random", "--device", "cpu",
    )  # fmt: skip
    return {
        "counterfactual: removed": Artefact(read_counterfactual(again, "removed"), GREY_LEVEL),
        "counterfactual: pictures": Artefact(read_counterfactual(again, "pictures"), GREY_LEVEL),
        "counterfactual: distances": Artefact(read_counterfactual(again, "pixel_l2"), GREY_LEVEL),
    }


def measure_lora(folder: Path) -> dict[str, Artefact]:
    pipeline = build_tiny_pipeline(folder / "pipeline")
    images = write_pictures(folder / "captioned", 6, 16, captions=True)
    lora, main = folder / "lora", folder / "lora-run"
    run(
        "train", "--model", pipeline, "--data", images, "--output", lora, "--lora-rank", 2,
        "--steps", 8, "--batch-size", 3, "--learning-rate", 3e-2, "--device", "cpu",
    )  # fmt: skip
    fixed = [
        "--model", pipeline, "--lora", lora, "--data", images, "--output", main, "--timesteps", 2,
        "--proj-dim", 512, "--damping", 0.5, "--batch-size", 4, "--device", "cpu",
        "--whiten", "none",
    ]  # fmt: skip
    run("attribute", *fixed, "--queries", images)
    artefacts = {
        "LoRA: weights": Artefact(read_lora(lora)),
        "LoRA: features of training images": Artefact(read_features(main, "train")),
        "LoRA: features of queries": Artefact(read_features(main, "query")),
        "LoRA: scores": Artefact(read_scores(main)),
    }
    run("attribute", *fixed, "--prompts", "wave 1", "--num-queries", 2)
    return artefacts | {
        "LoRA: pictures": Artefact(read_drawn(main), GREY_LEVEL),
        "LoRA: scores of pictures": Artefact(read_scores(main, "generated"), GREY_LEVEL),
    }


def measure_lds(folder: Path) -> dict[str, Artefact]:
    main = folder / "lds"
    fixed = ["--preset", register_tiny_preset(), "--output", main]
    run("lds", "prepare", *fixed, "--num-subsets", 4, "--num-generated", 2, "--num-validation", 3)
    run("lds", "train", *fixed, "--device", "cpu")
    run(
        "lds", "evaluate", *fixed, "--loss-timesteps", 4, "--noise-seeds", 1, "--timesteps", 2,
        "--batch-size", 64, "--device", "cpu", "--whiten", "none",
    )  # fmt: skip
    run("lds", "report", *fixed, "--resamples", 1000)
    return {
        "LDS: weights of subset models": Artefact(read_subset_models(main)),
        "LDS: losses of validation images": Artefact(read_losses(main, "validation")),
        "LDS: losses of pictures": Artefact(read_losses(main, "generated"), GREY_LEVEL),
        "LDS: damping": Artefact(read_lds_table(main, "damping")),
        "LDS: table": Artefact(read_lds_table(main, "lds")),
    }


# each may need those before it
PARTS = {
    "digits": measure_digits,
    "more of digits": measure_more_of_digits,
    "counterfactual": measure_counterfactual,
    "LoRA": measure_lora,
    "LDS": measure_lds,
}


def measure_in_child(folder: Path, parts: Iterable[str] = PARTS) -> dict:
    """What `measure` finds in a process of its own: the key, and hash and summary by artefact.

    Raises:
        RuntimeError: the process failed; with the end of what it printed.
    """
    found = folder / "found.json"
    root = Path(__file__).resolve().parents[1]
    places = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    child = subprocess.run(
        [sys.executable, __file__, "--measure", str(folder), *parts],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if child.returncode:
        raise RuntimeError(f"the golden jobs failed:\n{child.stdout[-4000:]}")
    return json.loads(found.read_text())


def _measure_here(folder: Path, parts: list[str]) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    artefacts = measure(folder, parts)
    found = {
        name: {"hash": a.hash(), "tolerance": a.tolerance, "summary": a.summary()}
        for name, a in artefacts.items()
    }
    (folder / "found.json").write_text(json.dumps({"key": key(), "artefacts": found}))


def movement(there: list[float], here: list[float]) -> float:
    """How far a summary moved, relative to the norm."""
    return max(abs(a - b) for a, b in zip(there, here, strict=True)) / there[0]


def write(found: dict) -> None:
    """Record what was found; hashes of other machines stay where this one sees no change."""
    recorded = json.loads(FILE.read_text()) if FILE.is_file() else {"summaries": {}, "hashes": {}}
    artefacts, summaries, hashes = found["artefacts"], {}, {}
    mine = recorded["hashes"].get(found["key"], {})
    stale = set()
    for name, artefact in artefacts.items():
        before = recorded["summaries"].get(name)
        moved = before is None or movement(before, artefact["summary"]) > artefact["tolerance"]
        if moved or mine.get(name, artefact["hash"]) != artefact["hash"]:
            stale.add(name)
        summaries[name] = artefact["summary"] if name in stale else before
    for machine, there in recorded["hashes"].items():
        kept = {name: there[name] for name in artefacts if name in there and name not in stale}
        if kept:
            hashes[machine] = kept
    hashes[found["key"]] = {name: artefact["hash"] for name, artefact in artefacts.items()}
    text = json.dumps({"summaries": summaries, "hashes": hashes}, indent=1)
    # a summary a line
    text = re.sub(r"\[[^][]*\]", lambda numbers: json.dumps(json.loads(numbers[0])), text)
    FILE.write_text(text + "\n")
    print(f"changed: {', '.join(sorted(stale)) or 'nothing'}")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--measure"]:
        _measure_here(Path(arguments[1]), arguments[2:])
    elif arguments == ["--write"]:
        with tempfile.TemporaryDirectory() as folder:
            write(measure_in_child(Path(folder)))
    else:
        raise SystemExit("usage: python tests/golden.py --write")


if __name__ == "__main__":
    main(sys.argv[1:])
