"""Datasets on S3, over HTTP to a real server: read as local ones, refused in one line."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from afd_scale.benchmarks.object_storage import object_storage, upload
from afd_scale.config import ConfigError, LostInputError, RunConfig
from afd_scale.config.run import ProceduralSource
from afd_scale.data.check import check_dataset
from afd_scale.data.reader import TeacherStream, distinct_prompts
from afd_scale.data.storage import teacher_data
from tests.toy_datasets import make_procedural_shards

# streaming 0.13 leaves a file open where a download fails; botocore's sockets are closed by the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def storage() -> Iterator[dict[str, str]]:
    with object_storage() as environment:
        yield environment


@pytest.fixture
def s3(storage: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in storage.items():
        monkeypatch.setenv(name, value)
    return storage


def run_config(shards: str, cache: Path) -> RunConfig:
    data = {"shards": shards, "global_batch": 16, "cache": cache}
    return RunConfig.model_validate({"method": "sft", "data": data})


def test_remote_shards_read_as_local_ones(s3: dict[str, str], tmp_path: Path) -> None:
    make_procedural_shards(ProceduralSource(clips=100, seed=1), tmp_path / "teacher")
    url = upload(s3, tmp_path / "teacher", "one")
    local = run_config(str(tmp_path / "teacher"), tmp_path / "local")
    remote = run_config(url, tmp_path / "remote")
    assert check_dataset(remote) == check_dataset(local)
    for one, other in zip(islice(TeacherStream(local), 7), islice(TeacherStream(remote), 7), strict=True):
        assert one.prompts.keys == other.prompts.keys
        assert one.teacher.latents.equal(other.teacher.latents)
        assert one.prompts.embeddings.equal(other.prompts.embeddings)
    length = local.student.text_length
    prompts = [distinct_prompts(teacher_data(config), length) for config in (local, remote)]
    assert prompts[0].texts == prompts[1].texts
    assert prompts[0].embeddings.equal(prompts[1].embeddings)


def test_damaged_remote_shard_does_not_read(s3: dict[str, str], tmp_path: Path) -> None:
    make_procedural_shards(ProceduralSource(clips=32), tmp_path / "teacher")
    path = tmp_path / "teacher" / "shard.00000.mds.zstd"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    config = run_config(upload(s3, tmp_path / "teacher", "damaged"), tmp_path / "cache")
    check_dataset(config)
    with pytest.raises(LostInputError, match="Checksum failure"):
        distinct_prompts(teacher_data(config), 16)


@pytest.mark.parametrize("url", ["s3://absent-bucket/teacher", "s3://shards/absent"])
def test_what_is_not_there(s3: dict[str, str], tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.shards \({url}\) must be a readable MDS dataset") as caught:
        check_dataset(run_config(url, tmp_path / "cache"))
    assert "\n" not in str(caught.value)


def test_no_server(tmp_path: Path, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(
        ConfigError, match=r"^data\.shards \(s3://shards/one\) must be a readable MDS dataset"
    ) as caught:
        check_dataset(run_config("s3://shards/one", tmp_path / "cache"))
    assert "\n" not in str(caught.value)
