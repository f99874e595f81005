"""Which run a path belongs to."""

from pathlib import Path


def run_folder(path: Path) -> Path | None:
    """The folder of the run that a run folder, a checkpoint or a student folder is of; None where it is of none."""
    for folder in (path, *path.absolute().parents[:3]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None
