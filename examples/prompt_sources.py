"""Prompts for sampling: from a text file, one of the files in examples/prompts/, or a data set on the Hub.

    file.txt            a prompt on each line
    everyday            examples/prompts/everyday.txt; likewise composition, people and small_world
    parti               PartiPrompts (Yu et al. 2022), nateraw/parti-prompts on the Hub
    hpdv2               the test prompts of HPDv2 (Wu et al. 2023), test.json of ymhao/HPDv2 on the Hub
    user/name:column    any other data set on the Hub, or a folder that `datasets` loads; its split "train"

The two on the Hub were not tried: this was written without access to it.
"""

import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training_options import nearest, one_line

FOLDER = Path(__file__).parent / "prompts"
ON_THE_HUB = {  # data set, arguments of load_dataset, column
    "parti": ("nateraw/parti-prompts", {"path": "nateraw/parti-prompts"}, "Prompt"),
    "hpdv2": ("ymhao/HPDv2", {"path": "json", "data_files": "hf://datasets/ymhao/HPDv2/test.json"}, "prompt"),
}


def read_prompts(spec, max_prompts=None):
    """Returns the prompts that a specification names, the first `max_prompts`; raises ValueError if there are none."""
    file = FOLDER / f"{spec}.txt" if (FOLDER / f"{spec}.txt").is_file() else Path(spec).expanduser()
    try:
        if file.is_file():
            texts = file.read_text(encoding="utf-8-sig").splitlines()
        elif spec in ON_THE_HUB or ":" in spec:
            from datasets import disable_progress_bars, load_dataset

            from training_utils import find_model

            disable_progress_bars()
            name, _, column = spec.rpartition(":")
            name, arguments, column = ON_THE_HUB.get(spec) or (name, {"path": os.path.expanduser(name)}, column)
            find_model("the data set", os.path.expanduser(name), None, logging.getLogger(__name__).warning, "dataset")
            texts = dict.fromkeys(load_dataset(**arguments, split="train")[column])  # pictures repeat their prompts
        else:
            names = [*sorted(path.stem for path in FOLDER.glob("*.txt")), *ON_THE_HUB]
            near = nearest(file.name, [*names, *(path.name for path in file.absolute().parent.glob("*"))])
            hint = f"; did you mean {near if near in names else file.parent / near}?" if near else ""
            raise ValueError(f"neither a file nor one of {', '.join(names)}, user/name:column{hint}")
    except UnicodeDecodeError as problem:
        raise ValueError(f"--prompts {spec}: cannot be read: not UTF-8 text; is it Latin-1 or UTF-16?") from problem
    except Exception as problem:  # `datasets` raises a dozen kinds
        raise ValueError(f"--prompts {spec}: cannot be read: {one_line(problem)}") from problem
    prompts = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
    if not prompts:
        raise ValueError(f"--prompts {spec}: no prompt is in it")
    return prompts[:max_prompts]
