import logging
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tests' tensors are so small that a second thread costs more than it gives

settings.register_profile("many", max_examples=2000)  # of each of the five fuzz tests

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _quiet_loggers() -> None:
    """Levels as a new process has them: a command that an earlier test of this process ran may have set its own."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "afd_scale" and isinstance(logger, logging.Logger):
            logger.setLevel(logging.NOTSET)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", type=Path, default=GOLDEN, help="folder of golden .safetensors files to check")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folder = metafunc.config.getoption("golden_dir")
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise pytest.UsageError(f"--golden-dir ({folder}) must hold .safetensors files")
        metafunc.parametrize("golden_file", files, ids=lambda path: path.stem, indirect=True)
