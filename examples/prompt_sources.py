"""Prompts for sampling: from a text file, one of the files in examples/prompts/, or a data set on the Hub.

    file.txt            a prompt on each line
    everyday            examples/prompts/everyday.txt; likewise composition, people and small_world
    parti               PartiPrompts (Yu et al. 2022), nateraw/parti-prompts on the Hub
    hpdv2               the test prompts of HPDv2 (Wu et al. 2023), test.json of ymhao/HPDv2 on the Hub
    user/name:column    any other data set on the Hub, or a folder that `datasets` loads; its split "train"

The two on the Hub were not tried: this was written without access to it.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "prompts"
ON_THE_HUB = {  # arguments of load_dataset, column
    "parti": ({"path": "nateraw/parti-prompts"}, "Prompt"),
    "hpdv2": ({"path": "json", "data_files": "hf://datasets/ymhao/HPDv2/test.json"}, "prompt"),
}


def read_prompts(spec, max_prompts=None):
    """Returns the prompts that a specification names, the first `max_prompts`; raises ValueError if there are none."""
    file = FOLDER / f"{spec}.txt" if (FOLDER / f"{spec}.txt").is_file() else Path(spec).expanduser()
    try:
        if file.is_file():
            texts = file.read_text(encoding="utf-8-sig").splitlines()
        elif spec in ON_THE_HUB or ":" in spec:
            from datasets import disable_progress_bars, load_dataset

            disable_progress_bars()
            name, _, column = spec.rpartition(":")
            arguments, column = ON_THE_HUB.get(spec) or ({"path": str(Path(name).expanduser())}, column)
            texts = dict.fromkeys(load_dataset(**arguments, split="train")[column])  # pictures repeat their prompts
        else:
            names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.txt")))
            raise ValueError(f"neither a file nor one of {names}, {', '.join(ON_THE_HUB)}, user/name:column")
    except Exception as problem:  # `datasets` raises a dozen kinds
        raise ValueError(f"--prompts {spec}: cannot be read: {' '.join(str(problem).split())[:300]}") from problem
    prompts = [" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()]
    if not prompts:
        raise ValueError(f"--prompts {spec}: no prompt is in it")
    return prompts[:max_prompts]
