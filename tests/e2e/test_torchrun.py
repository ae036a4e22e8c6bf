"""`torchrun -m limbeck train`: two gloo ranks make what one process makes."""

import json
import os
import subprocess
import sys

from safetensors.torch import load_file

from conftest import digest, limbeck


def test_two_ranks_cache_and_train_as_one(recipe_tree, tmp_path):
    # Without warm-up AdamW's first steps are signs; a gradient that differs in its last bit may flip one.
    training = {**recipe_tree["training"], "warmup_steps": 4, "mode": "distill"}
    for name, batch in (("one", 8), ("two", 4)):
        tree = {
            **recipe_tree,
            "output_dir": str(tmp_path / name),
            "training": {**training, "per_device_train_batch_size": batch},
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(tree))
    limbeck("train", tmp_path / "one.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "limbeck"]
    done = subprocess.run(
        [*command, "train", str(tmp_path / "two.yaml")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for patterns in (("data/*.parquet",), ("cache/*.h5",)):
        assert digest(tmp_path / "one", *patterns) == digest(tmp_path / "two", *patterns)
    one, two = (load_file(tmp_path / name / "student" / "final" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4
    # Killed before the manifest: both ranks go on from rank 0's checkpoint, and nothing changes.
    final = tmp_path / "two" / "student" / "final" / "model.safetensors"
    before = final.read_bytes()
    (tmp_path / "two" / "student" / "manifest.json").unlink()
    final.unlink()
    again = subprocess.run(
        [*command, "train", str(tmp_path / "two.yaml")],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    assert "continuing from" in again.stderr
    assert final.read_bytes() == before
