"""The steps of docs/your_backbone.md as they stand there, with a smaller transformer of random weights and brief trainings."""

import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "your_backbone.md"
SHORTER = {
    "vit_small_patch16_224.dino": "test_vit",
    "pretrained=True": "pretrained=False",
    "--iterations 500 --trials 60": "--iterations 4 --trials 1 --branch-channels 8 --batch-size 2 --compare aspp",
    "--warmup-iterations 50 ": "--warmup-iterations 1 ",
    "--iterations 2000": "--iterations 2 --batch-size 2 --loading-processes 0",
    "--warmup-iterations 100 --iterations 1000": "--warmup-iterations 1 --iterations 2 --batch-size 2 --loading-processes 0",
    "--full-size": "--full-size --size 64 96",
}


def blocks(language: str) -> list[str]:
    """The page's blocks of code in a language, shortened."""
    text = PAGE.read_text(encoding="utf-8")
    for long, short in SHORTER.items():
        assert long in text, long
        text = text.replace(long, short)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def write_fields(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            label = rng.integers(0, 3, (2, 3)).repeat(32, 0).repeat(32, 1)[:60, :90].astype(np.uint8)
            image = 80 * label[..., None] + rng.integers(0, 40, (60, 90, 3))
            for kind, content in (("images", image.astype(np.uint8)), ("labels", label)):
                path = folder / kind / split / f"{i}.{'jpg' if kind == 'images' else 'png'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # where other tests have imported a command
@pytest.mark.skipif(find_spec("onnxruntime") is None or find_spec("onnxscript") is None, reason="the extra `export`")
def test_the_steps_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_fields(tmp_path / "fields")
    (tmp_path / "fields.toml").write_text(blocks("toml")[0], encoding="utf-8")
    torch.manual_seed(0)
    exec(blocks("python")[0], {})
    said = {}
    lines = "\n".join(blocks("bash")).replace("\\\n", "").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("python -m ")]
    assert len(commands) == 8
    for command in commands:
        monkeypatch.setattr(sys, "argv", [command[2], *command[3:]])
        monkeypatch.delitem(sys.modules, command[2], raising=False)  # other tests may have imported it
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)  # an error would end it by SystemExit
        said[command[2]] = capsys.readouterr().out
    lines_of_python = said["search.random"].partition("in Python:\n\n")[2].partition("\n\nnext: ")[0]
    names: dict[str, torch.Tensor] = {}
    exec(lines_of_python, names)
    assert names["outputs"].shape == (1, 3, 4, 6)
    assert "mIOU on fields val: " in said["search.join"]
    assert {path.name for path in (tmp_path / "overlays").iterdir()} == {"0.png", "1.png"}
    assert len(list((tmp_path / "predicted" / "overlays").rglob("*.*"))) == 2
    assert re.search(r"wrote fields\.onnx, ONNX opset \d+, .*: any batch and size\n", said["search.export"])
    assert (tmp_path / "fields.onnx").exists()
