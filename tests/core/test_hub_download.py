"""A hub id: which files of a repository are fetched."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import pytest

from mmd_export.checkpoint import PICKLE, SAFETENSORS
from mmd_export.checkpoints.diffusers_folder import download

CONFIG = "config.json"
WHOLE, SHARD = SAFETENSORS, "diffusion_pytorch_model-00001-of-00002.safetensors"
INDEX, OTHER_SHARD = f"{WHOLE}.index.json", SHARD.replace("00001", "00002", 1)
HALF, HALF_SHARD = (name.replace("_model", "_model.fp16") for name in (WHOLE, SHARD))


@pytest.mark.parametrize(
    ("held", "fetched"),
    [
        ({"unet": [WHOLE, HALF], "vae": [WHOLE]}, {"unet": [WHOLE], "vae": [WHOLE]}),
        ({"transformer": [SHARD, HALF_SHARD], "vae": [WHOLE]}, {"transformer": [SHARD], "vae": [WHOLE]}),
        ({"unet": [HALF], "vqvae": [WHOLE, HALF]}, {"unet": [HALF], "vqvae": [WHOLE]}),
        ({"transformer": [HALF_SHARD], "vae": [HALF]}, {"transformer": [HALF_SHARD], "vae": [HALF]}),
        ({".": [SHARD]}, {".": [SHARD]}),
        ({".": [INDEX, SHARD, OTHER_SHARD]}, {".": [INDEX, SHARD, OTHER_SHARD]}),
        ({"unet": [WHOLE], "controlnet": [SHARD]}, {"unet": [WHOLE], "controlnet": []}),
        ({"unet": [PICKLE]}, {"unet": []}),
    ],
)
def test_every_part_of_a_hub_id_is_fetched(
    held: dict[str, list[str]], fetched: dict[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole weights, else shards, else fp16, for each part by itself; a pickle or a part of no use never."""

    def snapshot(_hub_id: str, allow_patterns: list[str]) -> str:
        for part, names in held.items():
            for name in (CONFIG, *names):
                path = PurePosixPath(part) / name
                if any(fnmatch(str(path), pattern) for pattern in allow_patterns):
                    (tmp_path / path).parent.mkdir(exist_ok=True)
                    text = json.dumps({"weight_map": {"a": SHARD, "b": OTHER_SHARD}}) if name == INDEX else ""
                    (tmp_path / path).write_text(text)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    if "." in held:  # what an interrupted download left
        (tmp_path / SHARD).touch()
    assert download("owner/name") == tmp_path
    for part, names in fetched.items():
        assert sorted(path.name for path in (tmp_path / part).iterdir()) == sorted([CONFIG, *names])
