"""Runs in VBench's own environment, which is not ours, so nothing of this package is imported.

    PYTHON vbench_process.py REQUEST

REQUEST is a JSON file: `videos`, a list of [file, prompt]; `folder`, where the layout and VBench's files go. Where all
prompts are VBench's own, its benchmark is run, all dimensions; else the dimensions that it has for other prompts.
"""

import json
import sys
from collections import Counter
from pathlib import Path

OF_OTHER_PROMPTS = [
    "subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality",
    "imaging_quality",
]  # fmt: skip


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    import torch
    import vbench

    all_prompts = Path(vbench.__file__).parent / "VBench_full_info.json"
    own = {entry["prompt_en"] for entry in json.loads(all_prompts.read_text())}
    standard = all(prompt in own for _, prompt in request["videos"])
    folder = Path(request["folder"])
    (folder / "videos").mkdir()
    prompts, files = {}, {}
    numbers: Counter[str] = Counter()
    for number, (file, prompt) in enumerate(request["videos"]):
        name = f"{prompt}-{numbers[prompt]}" if standard else f"{number:05d}"
        numbers[prompt] += 1
        link = folder / "videos" / f"{name}{Path(file).suffix}"
        link.symlink_to(file)
        prompts[link.name], files[link.name] = prompt, file
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vbench.VBench(device, str(all_prompts), str(folder)).evaluate(
        videos_path=str(folder / "videos"),
        name="afd",
        prompt_list=[] if standard else prompts,
        dimension_list=None if standard else OF_OTHER_PROMPTS,
        mode="vbench_standard" if standard else "custom_input",
    )
    results = json.loads((folder / "afd_eval_results.json").read_text())
    answer = {"standard": standard, "files": files, "results": results, "version": getattr(vbench, "__version__", None)}
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
